"""Why a request ends without an answer: the stable codes, and what each means to the sender of the request.

Lives in every process; pure. `docs/errors.md` is written from here. Also says any exception in one line.
"""

from __future__ import annotations

import enum
from typing import Any


class Fault(enum.StrEnum):
    """What has to change before the request can be answered.

    Attributes:
        CLIENT: the request, or what its client does.
        CAPACITY: nothing is wrong, but there is not enough room or time now.
        SERVER: a part of the pipeline is away or has failed.
    """

    CLIENT = "client"
    CAPACITY = "capacity"
    SERVER = "server"


class ErrorCode(enum.StrEnum):
    """Stable words for clients and metrics: the `type` of an error's JSON, and the `code` of FAILED and UPLOADED.

    Attributes:
        status: the HTTP status.
        fault: what has to change.
        retry: whether the same request is likely to be answered a little later; if so, the answer has `Retry-After`.
        meaning: when it is used, for `docs/errors.md`.
    """

    status: int
    fault: Fault
    retry: bool
    meaning: str

    def __new__(cls, word: str, *facts: Any) -> ErrorCode:
        """Makes one of the codes below; elsewhere `ErrorCode(word)` finds it, or raises ValueError."""
        code = str.__new__(cls, word)
        code._value_ = word
        code.status, code.fault, code.retry, code.meaning = facts
        return code

    # ---- what the client has sent
    INVALID_REQUEST = "invalid_request", 400, Fault.CLIENT, False, "vLLM's handlers cannot read or do not support it"
    INVALID_HTTP = "invalid_http", 400, Fault.CLIENT, False, "what came over the connection is not valid HTTP"
    EXPECTATION_FAILED = "expectation_failed", 417, Fault.CLIENT, False, "an `Expect` header that is not `100-continue`"
    UNSUPPORTED_ENCODING = "unsupported_encoding", 415, Fault.CLIENT, False, "a `Content-Encoding` that is not known"
    INVALID_BODY = (
        "invalid_body",
        400,
        Fault.CLIENT,
        False,
        "the body is not what its headers say",
    )
    INVALID_JSON = "invalid_json", 400, Fault.CLIENT, False, "the body is not JSON, or is nested too deeply"
    INVALID_URL = "invalid_url", 400, Fault.CLIENT, False, "the address of a picture, video or sound is malformed"
    URL_NOT_ALLOWED = "url_not_allowed", 400, Fault.CLIENT, False, "media may not be taken from that address or path"
    MEDIA_NOT_FOUND = (
        "media_not_found",
        404,
        Fault.CLIENT,
        False,
        "no such picture is kept; it may have expired",
    )
    MEDIA_NOT_FETCHED = "media_not_fetched", 400, Fault.CLIENT, False, "media could not be fetched from their address"
    MEDIA_TIMEOUT = (
        "media_timeout", 400, Fault.CLIENT, False,
        "fetching, decoding or processing one of the media took longer than `endpoint.media_timeout_s`"
    )  # fmt: skip
    INVALID_IMAGE = "invalid_image", 400, Fault.CLIENT, False, "a picture is damaged, empty or of an unknown kind"
    INVALID_VIDEO = "invalid_video", 400, Fault.CLIENT, False, "a video is damaged, empty or of an unknown kind"
    INVALID_AUDIO = "invalid_audio", 400, Fault.CLIENT, False, "a sound is damaged, empty or of an unknown kind"
    UNSUPPORTED = "unsupported", 400, Fault.CLIENT, False, "EPD or this model does not support what is asked for"
    UNSUPPORTED_MODALITY = (
        "unsupported_modality", 400, Fault.CLIENT, False, "no encode worker can encode media of this kind"
    )  # fmt: skip
    UNAUTHORIZED = "unauthorized", 401, Fault.CLIENT, False, "the API key is missing or wrong"
    # ---- how much the client has sent
    TOO_LARGE = "too_large", 400, Fault.CLIENT, False, "no worker or cache of this pipeline will ever have room for it"
    HEADERS_TOO_LARGE = "headers_too_large", 431, Fault.CLIENT, False, "the request's headers are too many or too long"
    BODY_TOO_LARGE = (
        "body_too_large",
        413,
        Fault.CLIENT,
        False,
        "a body, file or picture has too many bytes",
    )
    MEDIA_TOO_LARGE = (
        "media_too_large",
        400,
        Fault.CLIENT,
        False,
        "the media of a request, or one that is fetched, are too large",
    )
    IMAGE_TOO_LARGE = "image_too_large", 400, Fault.CLIENT, False, "a picture has too many pixels"
    VIDEO_TOO_LARGE = "video_too_large", 400, Fault.CLIENT, False, "a video has too many pixels"
    AUDIO_TOO_LARGE = "audio_too_large", 400, Fault.CLIENT, False, "a sound would take too much memory when decoded"
    VIDEO_TOO_LONG = "video_too_long", 400, Fault.CLIENT, False, "a video is too long, or has too many packets"
    AUDIO_TOO_LONG = "audio_too_long", 400, Fault.CLIENT, False, "a sound is too long"
    TOO_MANY_IMAGES = "too_many_images", 400, Fault.CLIENT, False, "too many pictures in one request"
    TOO_MANY_VIDEOS = "too_many_videos", 400, Fault.CLIENT, False, "too many videos in one request"
    TOO_MANY_AUDIOS = "too_many_audios", 400, Fault.CLIENT, False, "too many sounds in one request"
    TOO_MANY_FRAMES = "too_many_frames", 400, Fault.CLIENT, False, "too many frames of one video"
    # ---- what the client does
    DUPLICATE = "duplicate_request", 409, Fault.CLIENT, False, "a request or upload with this id is in flight"
    # nginx's status for a request that nobody waits for; OpenAI's clients do not retry it, as they would 408 and 409
    CANCELLED = "cancelled", 499, Fault.CLIENT, False, "`/v1/requests/{id}/cancel` was called"
    SLOW_CLIENT = "slow_client", 408, Fault.CLIENT, False, "the client does not read its stream"
    MEDIA_QUOTA = "media_quota", 429, Fault.CLIENT, True, "no more pictures can be kept until others expire"
    # ---- room and time
    OVERLOADED = "overloaded", 503, Fault.CAPACITY, True, "too much is in flight, or it has waited for too long"
    PREEMPTED = "preempted", 503, Fault.CAPACITY, True, "decode workers have no room for it, after several attempts"
    DEADLINE = "deadline_exceeded", 504, Fault.CAPACITY, False, "it took longer than `endpoint.request_timeout_s`"
    # ---- the pipeline
    NOT_READY = "not_ready", 503, Fault.SERVER, True, "a stage, the cache or the broker is away"
    SHUTTING_DOWN = "shutting_down", 503, Fault.SERVER, True, "this endpoint is being stopped"
    BROKER_LOST = "broker_lost", 503, Fault.SERVER, True, "the broker was lost and did not come back in time"
    WORKER_LOST = "worker_lost", 502, Fault.SERVER, True, "workers that had it were lost, and it cannot go on elsewhere"
    ENCODE_FAILED = "encode_failed", 502, Fault.SERVER, True, "an encode worker could not encode a patch of it"
    PIXELS_NEEDED = (
        "pixels_needed", 503, Fault.SERVER, True,
        "patches have left the cache; the endpoint sends them again, and clients rarely see this"
    )  # fmt: skip
    ENGINE_FAILED = "engine_failed", 500, Fault.SERVER, False, "an engine has failed on it, or vLLM has in the endpoint"


_LINE_CHARS, _INPUT_CHARS = 500, 60


def one_line(error: BaseException) -> str:
    """An exception's text in one line; for pydantic's, each complaint, with its input if that is short."""
    complaints = getattr(error, "errors", None)
    if callable(complaints):
        try:
            said = [_complaint(each) for each in complaints()]
        except (TypeError, KeyError, ValueError):
            said = []
        if said:
            return "; ".join(said)[:_LINE_CHARS]
    return (" ".join(str(error).split()) or type(error).__name__)[:_LINE_CHARS]


def _complaint(each: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in each["loc"])
    what = " ".join(str(each["msg"]).removeprefix("Value error, ").split())
    given = each.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= _INPUT_CHARS:
        what += f" (it is {given!r})"
    return f"{where}: {what}" if where else what
