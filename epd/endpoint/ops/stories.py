"""The stories of requests: where each is or how it ended, by the id that the client knows.

Lives in the endpoint process; pure. One HTTP request may become several of the pipeline's (n > 1, a list of prompts,
the turns of a tool call): each is kept under its own id and found by the client's.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from epd.messages import StoryEvent

IN_FLIGHT = "in_flight"


class RequestStory(msgspec.Struct, kw_only=True):
    """One request of the pipeline: `state` is "in_flight", "finished", "failed" or "cancelled"; `detail` says how.

    `owner` is a digest of its API key, `name` the `X-Request-Id` of its HTTP request.
    """

    request_id: str
    external_id: str
    owner: str = ""
    name: str = ""
    state: str = IN_FLIGHT
    detail: str = ""
    events: list[StoryEvent] = []


class Stories:
    """Keeps the stories of all requests in flight and of the last `keep` that have ended."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._stories: dict[str, RequestStory] = {}
        self._by_external: dict[str, list[str]] = {}
        self._ended: deque[str] = deque()

    def open(self, request_id: str, external_id: str, owner: str = "", name: str = "") -> None:
        """A request has been submitted."""
        story = RequestStory(request_id=request_id, external_id=external_id, owner=owner, name=name)
        self._stories[request_id] = story
        for known_by in _known_by(story):
            self._by_external.setdefault(known_by, []).append(request_id)

    def close(self, request_id: str, state: str, detail: str = "", events: Sequence[StoryEvent] = ()) -> None:
        """A request has ended; a story that comes later completes it."""
        story = self._stories.get(request_id)
        if story is None:
            return
        if story.state == IN_FLIGHT:
            story.state, story.detail = state, detail
            self._ended.append(request_id)
        story.events = list(events) or story.events
        self._evict()

    def complete(self, request_id: str, events: Sequence[StoryEvent]) -> None:
        """Adds the broker's story to a request that has already ended."""
        story = self._stories.get(request_id)
        if story is not None and story.state != IN_FLIGHT:
            story.events = list(events) or story.events

    def get(self, request_id: str) -> RequestStory | None:
        """The request of the pipeline with this id, if it is still kept."""
        return self._stories.get(request_id)

    def find(self, client_id: str, owner: str = "") -> list[RequestStory]:
        """The requests behind a client's id, oldest first; empty if this owner has none."""
        found = self._of(_stem(client_id), owner)
        for wanted in (
            [each for each in found if client_id in (each.external_id, each.request_id)],
            [each for each in found if _stem(each.external_id) == client_id],
            [each for each in self._of(client_id, owner) if each.name == client_id],
        ):
            if wanted:
                return wanted
        return []

    def _of(self, known_by: str, owner: str) -> list[RequestStory]:
        found = (self._stories[each] for each in self._by_external.get(known_by, ()))
        return [each for each in found if each.owner == owner]

    def _evict(self) -> None:
        while len(self._ended) > self._keep:
            oldest = self._stories.pop(self._ended.popleft())
            for known_by in _known_by(oldest):
                siblings = self._by_external[known_by]
                siblings.remove(oldest.request_id)
                if not siblings:
                    del self._by_external[known_by]


def describe(client_id: str, stories: Sequence[RequestStory]) -> dict[str, Any]:
    """The JSON of /v1/requests/{id}: the events of all parts by time, and each part with its own events."""
    parts = [
        {
            "request_id": each.request_id,
            "state": each.state,
            "detail": each.detail,
            "events": msgspec.to_builtins(each.events),
        }
        for each in stories
    ]
    events = sorted(
        ({"request_id": part["request_id"], **event} for part in parts for event in part["events"]),
        key=lambda event: event["at_s"],
    )
    states = {each.state for each in stories}
    order = (IN_FLIGHT, "failed", "cancelled", "finished")
    state = next((each for each in order if each in states), "unknown")
    return {"id": client_id, "state": state, "events": events, "requests": parts}


def _known_by(story: RequestStory) -> set[str]:
    """The ids under which a story is kept."""
    return {_stem(story.external_id), story.name} - {""}


def _stem(client_id: str) -> str:
    """The id without the counter that vLLM appends: cmpl-x-0 for the first prompt, resp_x_0 for the first turn."""
    return re.sub(r"[-_]\d{1,4}$", "", client_id)
