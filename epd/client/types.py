"""What goes into and comes out of a call: timeouts, completions, chunks.

Lives in the user's process; plain values, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec

__all__ = ["Chunk", "Completion", "Media", "Timeouts", "Usage", "read_json"]


def read_json(text: bytes | str) -> Any:
    """Decode what a server sent, whatever it is.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return msgspec.json.decode(text)  # its errors are ValueErrors, as are those of UTF-8
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The four clocks of a call, in seconds. All are always on.

    Attributes:
        connect_s: Name lookup, TCP and TLS together (``ConnectTimeout``).
        first_token_s: From sending the request to the first token of a stream
            (``FirstTokenTimeout``): upload, queueing, encode and prefill.
        token_s: The longest silence after the first token (``TokenTimeout``); the caller's own time
            between two chunks does not count. Also the limit for small calls such as
            ``models()`` or ``health()``.
        total_s: The whole call (``TotalTimeout``). ``generate`` gets its answer in one piece, so this
            and ``connect_s`` are its only clocks.

    Raises:
        ValueError: A value is not a finite number above zero.
    """

    connect_s: float = 5.0
    first_token_s: float = 120.0
    token_s: float = 60.0
    total_s: float = 600.0

    def __post_init__(self) -> None:
        """Refuse values that would turn a clock off."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{each.name} must be a finite number of seconds above 0, not {value!r}")


@dataclass(frozen=True, slots=True)
class Media:
    """A picture that the server keeps; pass it wherever a picture is expected.

    Attributes:
        id: The server's id of it. Whoever has it and the same API key may use it.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        patches: How many patches it is encoded in.
        expires: Until when it is kept, in seconds since 1970, on the server's clock.
    """

    id: str
    width: int
    height: int
    patches: int
    expires: int

    @property
    def url(self) -> str:
        """The URL that stands for the picture in a request."""
        return f"epd-media://{self.id}"

    @classmethod
    def from_json(cls, raw: Any) -> Media:
        """Read the answer to an upload.

        Raises:
            ValueError: It is not one.
        """
        try:
            numbers = [int(raw[name]) for name in ("width", "height", "patches", "expires")]
            return cls(str(raw["id"]), *numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an upload: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request, as the server counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def from_json(cls, raw: Any) -> Usage | None:
        """Read an OpenAI ``usage`` object; None when there is none."""
        if not isinstance(raw, dict):
            return None
        return cls(
            prompt_tokens=raw.get("prompt_tokens") or 0,
            completion_tokens=raw.get("completion_tokens") or 0,
            total_tokens=raw.get("total_tokens") or 0,
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        texts: The text of each choice, in order; one unless ``n`` was above 1.
        finish_reason: Why the first choice ended: ``stop``, ``length``, ...
        logprobs: The first choice's log probabilities as sent, if they were asked for.
        usage: Token counts, if the server sent them.
        request_id: The server's id of the request.
        raw: The decoded JSON body, untouched.
    """

    texts: tuple[str, ...]
    finish_reason: str | None
    logprobs: dict[str, Any] | None
    usage: Usage | None
    request_id: str
    raw: dict[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.texts[0]

    @classmethod
    def from_json(cls, raw: Any) -> Completion:
        """Read an OpenAI ``chat.completion`` object.

        Raises:
            ValueError: It is not one.
        """
        try:
            choices = sorted(raw["choices"], key=lambda choice: int(choice["index"]))
            return cls(
                texts=tuple(choice["message"].get("content") or "" for choice in choices),
                finish_reason=choices[0].get("finish_reason"),
                logprobs=choices[0].get("logprobs"),
                usage=Usage.from_json(raw.get("usage")),
                request_id=str(raw.get("id", "")),
                raw=raw,
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat completion: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of an answer as it is generated.

    Attributes:
        text: New text; may be empty (a finish, a half character, a tool call: see ``raw``).
        index: Which of the ``n`` choices it belongs to.
        finish_reason: Set on a choice's last chunk, else None.
        logprobs: Log probabilities of these tokens as sent, if they were asked for.
        request_id: The server's id of the request.
        usage: Token counts, on the chunk that carries them (``stream_options``), else None.
        raw: The decoded JSON of the event, untouched; shared by the chunks made from one event.
    """

    text: str
    index: int
    finish_reason: str | None
    logprobs: dict[str, Any] | None
    request_id: str
    usage: Usage | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def all_from_json(cls, raw: dict[str, Any]) -> list[Chunk]:
        """Read an OpenAI ``chat.completion.chunk`` object: one chunk per choice that says something.

        An event that only names the assistant's role yields none; one without choices yields one if
        it carries token counts.

        Raises:
            ValueError: It is not one.
        """
        usage = Usage.from_json(raw.get("usage"))
        request_id = str(raw.get("id", ""))
        try:
            chunks = [
                cls(
                    text=choice["delta"].get("content") or "",
                    index=int(choice["index"]),
                    finish_reason=choice.get("finish_reason"),
                    logprobs=choice.get("logprobs"),
                    request_id=request_id,
                    usage=usage,
                    raw=raw,
                )
                for choice in raw["choices"]
                if _says_something(choice)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chunk of a chat completion: {error!r}") from error
        if not raw["choices"] and usage is not None:
            chunks.append(cls("", 0, None, None, request_id, usage, raw))
        return chunks


def _says_something(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") is not None or choice.get("logprobs") is not None:
        return True
    return any(value for key, value in choice["delta"].items() if key != "role")
