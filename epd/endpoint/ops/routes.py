"""Routes for looking at a pipeline, for people and programs: /ready, /debug/held, /v1/requests, /v1/cache.

Lives in the endpoint process; owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from epd.endpoint.engine.engine_client import PipelineCore
from epd.endpoint.http.keys import owner_of
from epd.endpoint.ops import readiness, stories

PATH = "/v1/requests"


class OpsRoutes:
    """The routes.

    Args:
        core: answers the questions.
        view: what the endpoint sees of the pipeline now.
        has_keys: whether clients have API keys; then a story is only for the key of its request.
    """

    def __init__(self, core: PipelineCore, view: Callable[[], readiness.View], *, has_keys: bool) -> None:
        self._core, self._view, self._has_keys = core, view, has_keys

    def add_to(self, app: FastAPI) -> None:
        """Adds the routes. Ids are whatever clients have chosen, slashes included."""
        app.add_api_route("/ready", self._ready, methods=["GET"])
        app.add_api_route("/debug/held", self._held, methods=["GET"])
        app.add_api_route(PATH + "/{request_id:path}", self._story, methods=["GET"])
        app.add_api_route(PATH + "/{request_id:path}/cancel", self._cancel, methods=["POST"])
        app.add_api_route("/v1/cache", self._cache, methods=["GET"])

    async def _ready(self) -> JSONResponse:
        """Answers 200 while requests can be answered, else 503 with what is missing."""
        view = self._view()
        return JSONResponse(readiness.describe(view), 503 if readiness.missing(view) else 200)

    async def _held(self) -> JSONResponse:
        """Says what each daemon holds, by kind; when idle the same as ever, whatever has happened."""
        return JSONResponse({"daemons": readiness.held_by_daemon(self._view())})

    async def _story(self, request: Request, request_id: str) -> JSONResponse:
        """Says where the request with this id (the answer's `id`) is, or how it ended; only for its key."""
        found = self._core.stories.find(request_id, self._owner(request))
        if not found:
            return _unknown(request_id)
        for each in found:
            if each.state != "failed" and not each.events:
                told = await self._core.story(each.request_id)
                each.events = told.events if told is not None else each.events
        return JSONResponse(stories.describe(request_id, found))

    async def _cancel(self, request: Request, request_id: str) -> JSONResponse:
        """Ends what is in flight of the request with this id; only for its key."""
        count = self._core.cancel(request_id, self._owner(request))
        return _unknown(request_id) if count is None else JSONResponse({"id": request_id, "cancelled": count})

    async def _cache(self) -> JSONResponse:
        """Says how the pools are filled, with the broker's counters; `epd cache ls` draws it."""
        state, status = await self._core.cache_state(), self._core.status
        if state is None or status is None:
            error = {"message": "the broker does not answer", "type": "not_ready", "param": None, "code": 503}
            return JSONResponse({"error": error}, 503)
        return JSONResponse(
            {"pools": msgspec.to_builtins(state.pools), "counters": msgspec.to_builtins(status.counters)}
        )

    def _owner(self, request: Request) -> str:
        return owner_of(request.scope, has_keys=self._has_keys)


def _unknown(request_id: str) -> JSONResponse:
    error = {"message": f"no request {request_id!r} is known here", "type": "not_found", "code": 404}
    return JSONResponse({"error": error | {"param": None}}, 404)
