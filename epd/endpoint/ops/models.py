"""GET /v1/models: vLLM's own answer, plus in each card what the pipeline can spread over its encode workers.

Lives in the endpoint process. Written against vLLM 0.32 (`vllm.entrypoints.openai.models`).
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from epd.messages import Status
from epd.multimodal.units import described

PATH = "/v1/models"


class ModelRoutes:
    """The route, in front of vLLM's; `status` gives the broker's last STATUS."""

    def __init__(self, status: Callable[[], Status | None]) -> None:
        self._status = status

    def add_to(self, app: FastAPI) -> None:
        """Adds the route."""
        app.add_api_route(PATH, self._list, methods=["GET"])
        app.router.routes.insert(0, app.router.routes.pop())  # the first that matches is taken

    async def _list(self, request: Request) -> JSONResponse:
        """The served models; `epd` in each card says by modality what an item is cut into."""
        status = self._status()
        told = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
        more = described(status.workers if status is not None else ())
        return JSONResponse(told | {"data": [card | {"epd": more} for card in told["data"]]})
