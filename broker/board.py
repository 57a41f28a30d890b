"""What the broker knows and what it is about to send: the state that the parts of the decision core share. Pure."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

from broker.fairness import FairQueue
from broker.patches import Patches
from broker.registry import Registry
from broker.request import Request
from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Message, Patch, Role


class Send(NamedTuple):
    """Something to do: send this message with these opaque frames to that peer."""

    peer_id: str
    message: Message
    frames: list[bytes]


@dataclasses.dataclass(slots=True, eq=False)
class Upload:
    """A picture that is kept in the cache for its endpoint until `expires_at`; `missing` are not encoded yet.

    Until it is pinned it has its `frames` (pixels by patch), and `nbytes` and `num_pins` are 0.
    """

    upload_id: str
    endpoint: str
    expires_at: float
    patches: dict[str, Patch]
    frames: dict[str, list[bytes]]
    nbytes: int = 0
    num_pins: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)

    @property
    def frames_bytes(self) -> int:
        """The size of the pixels that it has."""
        return sum(len(frame) for frames in self.frames.values() for frame in frames)


class Board:
    """Peers, patches, requests in flight, uploads, stories of the ended ones, counts, and the messages to send next.

    `requests` has them by their ids, `legs` by the ids of their present legs. `queue` holds the ids of requests that
    wait for a place; `releasing` the ended legs whose slots a peer may still be reading, with those peers;
    `frames_bytes` counts the opaque frames held for requests and waiting uploads. `encode_info` is what the last
    encode worker that came said of itself, `process_held` what the daemon's process holds, as it last said.
    """

    def __init__(self, config: BrokerConfig, first_generation: int) -> None:
        self.config = config
        self.registry = Registry()
        self.patches = Patches(
            config.encode_batches_ahead, first_generation, config.pixel_store_bytes, config.lost_after_s
        )
        self.requests: dict[str, Request] = {}
        self.uploads: dict[str, Upload] = {}
        self.legs: dict[str, Request] = {}
        self.encode_info: m.WorkerInfo | None = None
        self.queue: FairQueue[str] = FairQueue()
        self.releasing: dict[str, set[str]] = {}
        self.frames_bytes = 0
        self.process_held: dict[str, int] = {}
        self._last_leg = first_generation - 1
        self._stories: OrderedDict[str, m.Story] = OrderedDict()
        self._out: list[Send] = []
        self._counts: dict[str, Any] = dict.fromkeys(m.Counters.__struct_fields__, 0)

    # ---- out -------------------------------------------------------------------------------------------------------

    def send(self, peer_id: str, message: Message, frames: list[bytes] | None = None) -> None:
        """Puts a message on the list of what to send."""
        self._out.append(Send(peer_id, message, frames or []))

    def take(self) -> list[Send]:
        """Empties the list of what to send."""
        out, self._out = self._out, []
        return out

    def count(self, name: str) -> None:
        """Adds one to a counter."""
        self._counts[name] += 1

    def tell_pools(self) -> None:
        """Tells all workers which pools there are."""
        for peer in self.registry:
            if peer.role in m.STAGES:
                self.send(peer.peer_id, m.Pools(pools=self.pools()))

    def tell_status(self) -> None:
        """Tells all endpoints which workers there are."""
        for peer in self.registry.of(Role.ENDPOINT):
            self.send(peer.peer_id, self.status())

    # ---- what there is ---------------------------------------------------------------------------------------------

    def pools(self) -> list[m.Pool]:
        """The pools of all registered caches."""
        return [pool for peer in self.registry for pool in peer.pools]

    def status(self) -> m.Status:
        """Workers, pools and counters as they are now."""
        peers = [peer for peer in self.registry if peer.role in m.STAGES]
        pools = sum(len(peer.pools) for peer in self.registry)
        counters = self.counters()
        held = {name: getattr(counters, name) for name in counters.__struct_fields__ if name.startswith("held_")}
        return m.Status(
            workers=[peer.status() for peer in peers],
            counters=counters,
            num_pools=pools,
            broker_held={name.removeprefix("held_"): count for name, count in held.items()} | self.process_held,
            peers_held={peer.name: peer.held for peer in self.registry if peer.role not in m.STAGES},
        )

    def counters(self) -> m.Counters:
        """The counts; the `held_*` ones are 0 when nothing is in flight."""
        stats = self.patches.index.stats()
        self._counts.update(
            num_encoded=self.patches.num_encoded,
            num_cache_hits=stats.num_hits,
            num_coalesced=stats.num_coalesced,
            num_evicted=stats.num_evictions,
            held_requests=len(self.requests) + len(self.releasing),
            held_queued=len(self.queue),
            held_pins=stats.num_pins - sum(one.num_pins for one in self.uploads.values()),
            held_uploads=len(self.uploads),
            held_encodes=len(self.patches.queue),
            encode_s_saved=self.patches.encode_s_saved,
            cache_bytes_used=stats.used_bytes,
            cache_bytes_pinned=stats.pinned_bytes,
            cache_bytes_quarantined=stats.quarantined_bytes,
            cache_embeddings=stats.num_embeddings,
            cache_bytes_total=stats.total_bytes,
        )
        return m.Counters(**self._counts)

    def new_leg(self, request_id: str) -> str:
        """An id for another leg of a request: no worker has seen it, not even from an earlier broker."""
        self._last_leg += 1
        return f"{request_id}~{self._last_leg:x}"

    # ---- stories ---------------------------------------------------------------------------------------------------

    def remember(self, request: Request) -> None:
        """Keeps the story of a request that has ended, in place of the oldest."""
        story = m.Story(request_id=request.request_id, found=True, state=request.state, events=request.story)
        self._stories[request.request_id] = story
        while len(self._stories) > self.config.story_keep:
            self._stories.popitem(last=False)

    def told(self) -> list[str]:
        """The ids of the requests whose stories are held, the ended ones first."""
        return [*self._stories, *self.requests]

    def story(self, request_id: str) -> m.Story:
        """A request's story so far, whether it is in flight or has ended."""
        if request := self.requests.get(request_id):
            events = list(request.story)
            return m.Story(request_id=request_id, found=True, state=request.state, events=events)
        return self._stories.get(request_id) or m.Story(request_id=request_id, found=False)
