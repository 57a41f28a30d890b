"""The stories of requests in flight and of those that have ended. Pure; a part of the decision core."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from broker.core.request import Request
from epd.messages import Story


class Stories:
    """Answers what has become of a request.

    Args:
        requests: those in flight, by id.
        keep: how many stories of ended requests are kept.
        epoch_s: the wall clock (seconds since 1970) when the core's clock was 0.
    """

    def __init__(self, requests: Mapping[str, Request], keep: int, epoch_s: float) -> None:
        self._requests, self._keep, self._epoch_s = requests, keep, epoch_s
        self._ended: OrderedDict[str, Story] = OrderedDict()

    def ended(self, request: Request) -> None:
        """Keeps the story of a request that has ended; the oldest gives way."""
        self._ended.pop(request.request_id, None)
        self._ended[request.request_id] = self._tell(request)
        if len(self._ended) > self._keep:
            self._ended.popitem(last=False)

    def ids(self) -> list[str]:
        """The requests whose stories are held, the ended ones first."""
        return [*self._ended, *self._requests]

    def story(self, request_id: str) -> Story:
        """A request's story so far, whether it is in flight or has ended."""
        if (request := self._requests.get(request_id)) is not None:
            return self._tell(request)
        return self._ended.get(request_id) or Story(request_id=request_id, found=False)

    def _tell(self, request: Request) -> Story:
        return Story(
            request_id=request.request_id,
            found=True,
            state=request.state,
            began_at=self._epoch_s + request.accepted_at,
            events=list(request.story),
        )
