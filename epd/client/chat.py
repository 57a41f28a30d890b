"""One chat, from the arguments of ``generate`` and ``stream`` to the JSON body that is posted.

Lives in the user's process; owns the local media of one call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from epd.client.arguments import OF_THE_CLIENT, check_extra_body, check_names
from epd.client.clips import CLIP_FORMS, LocalClip, clip_or_url
from epd.client.errors import PictureError
from epd.client.given import is_file, several
from epd.client.pictures import PICTURE_FORMS, LocalPicture, is_picture, picture_or_url

__all__ = ["Chat"]

_MODALITIES = ("image", "video", "audio")


class Chat:
    """What one call asks. Made when the method is called: then names are checked and iterables are read, once.

    Args:
        prompt: The user's text, unless ``messages`` are given.
        arguments: Those of ``Arguments``, by name.
        model: The model if they name none.
        stream: Whether to ask for a stream.

    Raises:
        PictureError: Something that is given as a picture or clip is not one.
        TypeError: There is nothing to send, arguments are unknown or of the wrong kind, or both a prompt and messages
            are given.
        ValueError: Both media and messages are given, or a number is not finite.
    """

    def __init__(
        self, prompt: str | None, arguments: Mapping[str, Any], *, model: str | None = None, stream: bool = False
    ) -> None:
        check_names(arguments)
        given = {name: value for name, value in arguments.items() if value is not None}
        self._pictures: list[LocalPicture] = []
        self._clips: list[LocalClip] = []
        media = [*self._media_parts("image", given), *self._media_parts("video", given)]
        media += self._media_parts("audio", given)
        if "messages" not in given:
            if not isinstance(prompt, str):
                raise TypeError("give a prompt or messages" if prompt is None else "the prompt must be text")
            chat = [{"role": "user", "content": [*media, {"type": "text", "text": prompt}] if media else prompt}]
        elif prompt is not None:
            raise TypeError("give a prompt or messages, not both: put the prompt into the last message")
        elif media:
            raise ValueError("with messages, pictures and clips go into the messages' content parts")
        else:
            chat = [self._message(message) for message in _messages(given["messages"])]
        if "system" in given:
            chat.insert(0, {"role": "system", "content": given["system"]})
        self._body = {"messages": chat, **_options(given, model), "stream": stream}

    @property
    def pictures(self) -> list[LocalPicture]:
        """The local pictures, in order."""
        return self._pictures

    @property
    def cache_salt(self) -> str:
        """The call's ``cache_salt``, or an empty text."""
        salt = self._body.get("cache_salt")
        return salt if isinstance(salt, str) else ""

    @property
    def num_choices(self) -> int:
        """How many answers are asked for."""
        count = self._body.get("n")
        return count if isinstance(count, int) and count > 0 else 1

    def load(self) -> None:
        """Read all local media; call it before ``body``. Blocks.

        Raises:
            PictureError: One cannot be read.
        """
        for picture in self._pictures:
            picture.load()
        for clip in self._clips:
            clip.load()

    def body(self, kept: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """Return the body of a POST to ``/v1/chat/completions``. Blocks while it encodes pictures.

        Args:
            kept: By digest, the URLs of pictures that the server keeps.

        Raises:
            PictureError: A picture cannot be written as PNG.
            TypeError: Something cannot be written as JSON.
            ValueError: A text cannot be UTF-8, or something contains itself.
        """

        def url_of(one: Any) -> str:
            if isinstance(one, LocalPicture):
                return kept.get(one.digest) or one.url() if kept else one.url()
            if isinstance(one, LocalClip):
                return one.url()
            raise TypeError(f"{type(one).__name__} cannot be sent as JSON")

        try:
            return msgspec.json.encode(self._body, enc_hook=url_of)
        except UnicodeEncodeError as error:
            raise ValueError(f"a text cannot be sent as UTF-8: {error.reason}, at {error.start}") from error
        except RecursionError as error:
            raise ValueError("the messages or options are nested too deeply to be sent") from error

    def _media_parts(self, modality: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The content parts of ``images``, ``videos`` or ``audios``."""
        name = f"{modality}s"
        if modality == "image":
            found = several(name, given.get(name), is_picture, PICTURE_FORMS)
        else:
            found = several(name, given.get(name), is_file, CLIP_FORMS)
        return [self._media_part(modality, one) for one in found]

    def _media_part(self, modality: str, one: Any) -> dict[str, Any]:
        return {"type": f"{modality}_url", f"{modality}_url": {"url": self._place(modality, one)}}

    def _place(self, modality: str, one: Any) -> Any:
        """What stands for a medium in the body: its address, or its reader, whose URL is written later."""
        place = picture_or_url(one) if modality == "image" else clip_or_url(modality, one)
        if isinstance(place, LocalPicture):
            self._pictures.append(place)
        elif isinstance(place, LocalClip):
            self._clips.append(place)
        return place

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, Iterable) or isinstance(content, str | Mapping):
            return dict(message)
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        """A content part; ``{"type": "image", "image": picture}`` and the like become parts with a URL."""
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _MODALITIES:
            if kind not in part:
                raise PictureError(f'a content part of type "{kind}" needs its {kind} under the key "{kind}"')
            rest = {key: value for key, value in part.items() if key not in ("type", kind)}
            return rest | self._media_part(kind, part[kind])
        for modality in _MODALITIES:
            if kind == f"{modality}_url" and kind in part:
                return {**part, kind: self._url_value(modality, part[kind])}
        return part

    def _url_value(self, modality: str, value: Any) -> Any:
        """The value of ``image_url`` and the like: text is an address, as in the API, anything else a medium."""
        if isinstance(value, Mapping):
            url = value.get("url")
            return value if url is None or isinstance(url, str) else {**value, "url": self._place(modality, url)}
        return value if isinstance(value, str) else {"url": self._place(modality, value)}


def _messages(given: Any) -> list[Mapping[str, Any]]:
    found = [] if isinstance(given, str | Mapping) or not isinstance(given, Iterable) else list(given)
    if not found or not all(isinstance(message, Mapping) for message in found):
        raise TypeError('messages must be an iterable of messages, such as {"role": "user", "content": "Hello"}')
    return found


def _options(given: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """The fields of the body besides the messages."""
    options = {name: value for name, value in given.items() if name not in OF_THE_CLIENT}
    if model is not None:
        options.setdefault("model", model)
    logprobs = given.get("logprobs")
    if logprobs is not None:
        options["logprobs"] = logprobs is not False
        if not isinstance(logprobs, bool):
            if "top_logprobs" in options:
                raise TypeError("give a number of alternatives as logprobs or as top_logprobs, not both")
            options["top_logprobs"] = logprobs
    extra = given.get("extra_body", {})
    check_extra_body(extra, options)
    options.update(extra)
    _check_numbers(options)
    return options


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse NaN and infinity: JSON has neither, and would say null, which is the server's default."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, which is not a number that can be sent")
        if isinstance(value, Mapping):
            _check_numbers(value)
