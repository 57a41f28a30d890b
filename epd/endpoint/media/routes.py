"""`/v1/media`: pictures that are uploaded, processed and encoded before anybody asks about them.

Lives in the endpoint process; owns nothing: what is kept is in `uploads.py`. The routes are inside vLLM's app, behind
its keys and our limits, which have read and checked the body. Written against vLLM 0.32
(`vllm.renderers.online_renderer`).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.types import Scope
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMError
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.renderers.online_renderer import OnlineRenderer

from epd.endpoint.engine.engine_client import PipelineCore
from epd.endpoint.engine.submission import PipelineError
from epd.endpoint.http.failures import failure_of
from epd.endpoint.http.keys import owner_of
from epd.endpoint.http.limits import MEDIA_PATH as PATH
from epd.endpoint.http.limits import media_not_found
from epd.endpoint.media.stored_picture import SCHEME, StoredPicture, current_media
from epd.endpoint.media.uploads import Media
from epd.errors import ErrorCode


class MediaRoutes:
    """The routes over one pipeline.

    Args:
        core: sends and keeps uploads.
        has_keys: whether clients have API keys; if not, all clients count as one.
    """

    def __init__(self, core: PipelineCore, *, has_keys: bool) -> None:
        self._core, self._has_keys = core, has_keys

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes; `app.state.online_renderer` must exist when they are used."""
        app.add_api_route(PATH, self._post, methods=["POST"])
        app.add_api_route(PATH + "/{media_id}", self._get, methods=["GET"])
        app.add_api_route(PATH + "/{media_id}", self._delete, methods=["DELETE"])

    def owner_of(self, scope: Scope) -> str:
        """Who asks."""
        return owner_of(scope, has_keys=self._has_keys)

    def find(self, scope: Scope, media_id: str) -> StoredPicture | None:
        """The kept picture with this id, if the asker may use it."""
        media = self._core.uploads.find(media_id, self.owner_of(scope))
        return None if media is None else media.kept

    async def _post(self, request: Request) -> JSONResponse:
        """Accepts a picture's file, has it encoded, and answers with the id that refers to it."""
        return await _answered(lambda: self._upload(request))

    async def _get(self, request: Request, media_id: str) -> JSONResponse:
        """Says whether a picture's patches can be read already."""

        async def state() -> dict[str, Any]:
            return self._media(request, media_id).describe()

        return await _answered(state)

    async def _delete(self, request: Request, media_id: str) -> JSONResponse:
        """Removes a picture; requests that have begun with it go on."""

        async def drop() -> dict[str, Any]:
            self._core.uploads.drop(self._media(request, media_id))
            return {"id": media_id, "deleted": True}

        return await _answered(drop)

    def _media(self, request: Request, media_id: str) -> Media:
        media = self._core.uploads.find(media_id, self.owner_of(request.scope))
        if media is None:
            raise PipelineError(media_not_found(media_id).failure)
        return media

    async def _upload(self, request: Request) -> dict[str, Any]:
        if self._core.draining:
            raise PipelineError(failure_of(ErrorCode.SHUTTING_DOWN, "this endpoint is shutting down"))
        owner, salt = self.owner_of(request.scope), request.query_params.get("cache_salt", "")
        with self._core.uploads.room(owner):
            kept = StoredPicture(await request.body())
            feature = await render(request.app.state.online_renderer, kept)
            split = await self._core.splitter.slow([feature], salt)
            return self._core.uploads.add(owner, kept, split).describe()


async def render(renderer: OnlineRenderer, kept: StoredPicture) -> MultiModalFeatureSpec:
    """Processes a picture just like one in a chat; `kept` then holds its item.

    Raises:
        PipelineError: vLLM refuses it, or the model takes no pictures.
        ValueError: it cannot be decoded.
    """
    name = secrets.token_hex(16)
    content = [{"type": "image_url", "image_url": {"url": SCHEME + name}}, {"type": "text", "text": "."}]
    chat = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
    token = current_media.set({name: kept})
    try:
        rendered = await renderer.render_chat(chat)
    finally:
        current_media.reset(token)
    if isinstance(rendered, ErrorResponse):
        error = rendered.error
        is_ours = int(error.code) >= HTTPStatus.INTERNAL_SERVER_ERROR
        code = ErrorCode.ENGINE_FAILED if is_ours else ErrorCode.INVALID_IMAGE
        raise PipelineError(failure_of(code, error.message))
    prompt: Any = rendered[1][0]
    if prompt["type"] != "multimodal" or kept.value is None:
        raise PipelineError(failure_of(ErrorCode.UNSUPPORTED, "this model takes no pictures ahead of a request"))
    ((modality, items),) = prompt["mm_kwargs"].items()
    key = prompt["mm_hashes"][modality][0]
    place = prompt["mm_placeholders"][modality][0]
    return MultiModalFeatureSpec(data=items[0], modality=modality, identifier=key, mm_position=place, mm_hash=key)


async def _answered(work: Callable[[], Awaitable[dict[str, Any]]]) -> JSONResponse:
    try:
        return JSONResponse(await work())
    except PipelineError as error:
        failure = error.failure
    except (ValueError, VLLMError) as error:
        failure = failure_of(ErrorCode.INVALID_IMAGE, str(error))
    headers = {"Retry-After": str(math.ceil(failure.retry_after_s))} if failure.retry_after_s > 0 else None
    return JSONResponse(failure.body(PATH), failure.status, headers)
