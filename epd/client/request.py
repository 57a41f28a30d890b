"""The JSON body of a chat completion, from the arguments of ``generate`` and ``stream``.

Lives in the user's process; blocks while it reads and encodes pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from epd.client.clips import clip_parts, with_clip_urls
from epd.client.pictures import Picture, picture_url, with_picture_urls

__all__ = ["chat_body"]


def chat_body(
    prompt: str | None,
    *,
    images: Sequence[Picture],
    system: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    logprobs: bool | int | None,
    options: Mapping[str, Any],
    stream: bool,
    kept: Mapping[int, str] = MappingProxyType({}),
) -> bytes:
    """Build the body of a POST to ``/v1/chat/completions``.

    Args:
        prompt: The user's text; not used when ``messages`` is given.
        images: Pictures that come before the text.
        system: Text of a system message that goes first.
        messages: A whole chat instead of prompt and images.
        logprobs: True, or how many alternatives to report for each token.
        options: Further fields; those that are None are left out. ``videos`` and ``audios`` are clips that come
            before the text.
        stream: Whether to ask for a stream.
        kept: By ``id(picture)``, the URLs of pictures that the server keeps.

    Raises:
        PictureError: A picture or clip cannot be read.
        TypeError: Something cannot be written as JSON, or there is nothing to send.
        ValueError: ``images``, ``videos`` or ``audios`` beside ``messages``.
    """

    def url_of(picture: Picture) -> str:
        return kept.get(id(picture)) or picture_url(picture)

    if isinstance(images, str | bytes):
        raise TypeError("images is a sequence of pictures: write images=[picture]")
    options = dict(options)
    clips = clip_parts(options.pop("videos", None), options.pop("audios", None))
    if messages is not None:
        if images or clips:
            raise ValueError("with messages, pictures and clips go into the messages' content parts")
        chat = with_picture_urls(with_clip_urls(messages), url_of)
    elif prompt is not None:
        chat = [{"role": "user", "content": _content(prompt, images, clips, url_of)}]
    else:
        raise TypeError("give a prompt or messages")
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    body: dict[str, Any] = {"messages": chat}
    body.update((key, value) for key, value in options.items() if value is not None)
    if logprobs is not None:
        body["logprobs"] = logprobs is not False
        if not isinstance(logprobs, bool):
            body["top_logprobs"] = logprobs
    body["stream"] = stream
    return msgspec.json.encode(body)


def _content(
    prompt: str, images: Sequence[Picture], clips: list[dict[str, Any]], url_of: Callable[[Picture], str]
) -> str | list[dict[str, Any]]:
    if not images and not clips:
        return prompt
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url_of(picture)}} for picture in images]
    return [*parts, *clips, {"type": "text", "text": prompt}]
