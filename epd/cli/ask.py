"""``epd ask``: put one question to a running endpoint and print the answer as it comes.

Lives in the user's process; owns one ``epd.client.Client``. The answer goes to stdout, everything else
to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from typing import Any, TextIO

from epd.client import (
    APIError,
    AuthenticationError,
    Client,
    ConnectFailed,
    EPDError,
    NotFound,
    Overloaded,
    PictureError,
    Timeout,
)
from epd.client.chat import Chat

__all__ = ["add_parser", "run"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``ask`` to the command line."""
    parser = subparsers.add_parser(
        "ask",
        help="ask a running endpoint a question, with or without pictures, videos and sounds",
        description="Ask a running endpoint a question and print the answer as it comes. "
        "An API key is read from EPD_API_KEY.",
    )
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--url", default="http://127.0.0.1:8400", help="the endpoint (default: %(default)s)")
    parser.add_argument("--model", help="default: the first one that the endpoint offers")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a picture the question is about: a file or a URL; may be repeated",
    )
    for modality, what in (("video", "a video"), ("audio", "a sound")):
        parser.add_argument(
            f"--{modality}", action="append", default=[], metavar="FILE", help=f"{what}, in the same way"
        )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask, print, and return the exit code.

    Returns:
        0 when the answer is complete, 1 when the endpoint or the connection failed, 2 when the command
        line is wrong (a missing file, a bad URL), 130 after Ctrl-C.
    """
    try:
        media = {"images": args.image, "videos": args.video, "audios": args.audio}
        Chat(args.question, media).load()  # before anything is sent
        client = Client(args.url, api_key=os.environ.get("EPD_API_KEY"))
    except ValueError as error:  # a PictureError is one
        return _complain(str(error), USAGE)
    output = _Output(sys.stdout)
    try:
        with client:
            _answer(client, args, output)
    except PictureError as error:
        return _complain(str(error), USAGE)
    except EPDError as error:
        output.end_line()
        return _complain(_explain(error, args.url), FAILED)
    except KeyboardInterrupt:
        output.end_line()
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout has left, as in `epd ask ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return OK


def _answer(client: Client, args: argparse.Namespace, output: _Output) -> None:
    model = args.model or next(iter(client.models()), None)
    options: dict[str, Any] = {
        "images": args.image,
        "videos": args.video,
        "audios": args.audio,
        "model": model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
    }
    if args.no_stream:
        output.write(client.generate(args.question, **options).text)
    else:
        with closing(client.stream(args.question, **options)) as chunks:
            for chunk in chunks:
                output.write(chunk.text)
    output.write("\n")


class _Output:
    """Writes text at once, and knows whether a line has begun."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._in_line = False

    def write(self, text: str) -> None:
        if text:
            self._in_line = not text.endswith("\n")  # first: Ctrl-C may come before the next line
            self._stream.write(text)
            self._stream.flush()

    def end_line(self) -> None:
        if self._in_line:
            self.write("\n")


def _complain(sentence: str, code: int) -> int:
    print(f"epd ask: {sentence}", file=sys.stderr)
    return code


def _explain(error: EPDError, url: str) -> str:
    return f"{error}{_hint(error, url)}"


def _hint(error: EPDError, url: str) -> str:
    match error:
        case ConnectFailed():
            return "; is `epd up` running?"
        case Timeout():
            return f"; is the endpoint overloaded? See {url.rstrip('/')}/health"
        case AuthenticationError():
            return "; set EPD_API_KEY to a key that the endpoint knows"
        case NotFound():
            return f"; is {url} an EPD endpoint, and --model one of its models?"
        case Overloaded(retry_after_s=float(seconds)):
            return f"; try again in {seconds:g} s"
        case Overloaded():
            return "; try again in a moment"
        case APIError(status=200):
            return f"; is {url} an EPD endpoint?"
    return ""
