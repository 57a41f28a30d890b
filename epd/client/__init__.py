"""The Python client of an EPD endpoint: text, pictures, videos and sounds in, text out, all at once or as a stream.

    from epd.client import Client

    with Client() as client:                       # the endpoint that `epd up` starts
        answer = client.generate("Which digits?", images="scan.png", max_tokens=16)
        print(answer.text, answer.usage)

        answer = client.generate("What is said?", audios=["talk.mp3"], videos=["film.mp4"])

        for chunk in client.stream("Describe them.", images=Path("scans").glob("*.png"), temperature=0):
            print(chunk.text, end="", flush=True)

        page = client.upload("page.png")           # encoded while you think of the question
        print(client.generate("What does it say?", images=page).text)

``AsyncClient`` has the same methods as coroutines. A picture is a path, a URL, bytes, an open file, a PIL image, a
numpy array or an upload (``epd.client.pictures``), a clip a path, a URL, bytes or an open file (``epd.client.clips``);
one of them and an iterable of them are equally welcome. All other arguments are in ``epd.client.arguments``. Every wait
has a clock (``Timeouts``), and everything raised is in one tree (``epd.client.errors``). Lives in the user's
process; needs neither torch nor vLLM nor numpy.
"""

from epd.client.async_client import AsyncClient
from epd.client.clips import Clip
from epd.client.errors import (
    APIError,
    AuthenticationError,
    BadRequest,
    ConnectFailed,
    ConnectTimeout,
    EPDError,
    FirstTokenTimeout,
    NotFound,
    Overloaded,
    PictureError,
    ServerError,
    StreamInterrupted,
    Timeout,
    TokenTimeout,
    TotalTimeout,
    TransportError,
)
from epd.client.pictures import Picture
from epd.client.sync_client import Client
from epd.client.types import Chunk, Completion, Media, Timeouts, Usage

__all__ = [
    "APIError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequest",
    "Chunk",
    "Client",
    "Clip",
    "Completion",
    "ConnectFailed",
    "ConnectTimeout",
    "EPDError",
    "FirstTokenTimeout",
    "Media",
    "NotFound",
    "Overloaded",
    "Picture",
    "PictureError",
    "ServerError",
    "StreamInterrupted",
    "Timeout",
    "Timeouts",
    "TokenTimeout",
    "TotalTimeout",
    "TransportError",
    "Usage",
]
