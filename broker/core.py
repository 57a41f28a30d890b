"""The decision core: messages in, messages out. Pure: no sockets, no clocks, no asyncio.

`Core.handle` takes one message from one peer, and `Core.tick` the time; both return what to send. The daemon performs
it, tests and the simulator call it directly. Every accepted request ends in exactly one FINISHED or FAILED, or in
silence when its endpoint cancelled it or is gone. Peers come and go here; `broker.flow` moves requests,
`broker.answers` passes their tokens on, `broker.retry` tries them again, `broker.endings` ends them, `broker.liveness`
knows who is away, `broker.board` holds what they share.
"""

from __future__ import annotations

from broker.answers import Answers
from broker.board import Board, Send
from broker.endings import Endings
from broker.fill import fills
from broker.flow import Flow
from broker.liveness import Liveness, named, needed
from broker.patches import Lost
from broker.registry import Peer
from broker.request import Event, Request, State
from broker.retry import Retries
from broker.uploads import Uploads
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import ErrorCode
from epd.messages import Message, Role
from epd.protocol import BY_STRUCT


class Core:
    """See the module.

    Args:
        config: bounds and times.
        first_generation: where slot generations start; a later broker of the same caches must start higher.
    """

    def __init__(self, config: BrokerConfig, first_generation: int = 1) -> None:
        self.board = Board(config, first_generation)
        self._endings = Endings(self.board)
        self._liveness = Liveness(self.board)
        self._uploads = Uploads(self.board, self._endings, self._liveness)
        self._retries = Retries(self.board, self._endings)
        self._answers = Answers(self.board, self._endings, self._retries)
        self._flow = Flow(
            self.board, self._endings, self._uploads, self._retries, self._liveness, self._answers
        )  # fmt: skip
        self._started = False

    def handle(self, peer_id: str, message: Message, frames: list[bytes], now: float) -> list[Send]:
        """What to send after `message` from `peer_id` arrived at `now` (seconds of any monotonic clock)."""
        self._start_clock(now)
        peer = self.board.registry.get(peer_id)
        if peer is not None:
            peer.heard_at = now
        if isinstance(message, m.Hello):
            self._hello(peer_id, message, now)
        elif peer is None:
            self.board.count("num_fenced")
            self.board.send(peer_id, m.Unknown())
        elif peer.role not in BY_STRUCT[type(message)].to_broker:
            self.board.count("num_fenced")
        else:
            self._from_peer(peer, message, frames, now)
        self._uploads.start()
        self._flow.start_queued(now)
        self._flow.dispatch(now)
        return self.board.take()

    def tick(self, now: float) -> list[Send]:
        """What to send because time has passed: silent and hung peers are lost, late requests fail."""
        self._start_clock(now)
        for peer in self.board.registry.silent_since(now - self.board.config.lost_after_s):
            self._lose(peer, f"silent for {now - peer.heard_at:.1f} s", now)
        for peer in self._liveness.hung(now):
            self._lose(peer, f"its engine hangs: no step for {now - peer.stepped_at:.0f} s", now)
        self._give_up_waiting(now)
        for request in list(self.board.requests.values()):
            if now >= request.deadline_at:
                self._endings.fail(request, ErrorCode.DEADLINE, "the request's deadline has passed", now)
            elif request.state is State.QUEUED and now - request.queued_at > self.board.config.max_queue_s:
                self._endings.fail(request, ErrorCode.OVERLOADED, "no worker became free in time", now)
        self.board.patches.lift_quarantine("", now)
        self._endings.remind(now)
        self._uploads.expire(now)
        self._uploads.start()
        self._flow.start_queued(now)
        self._flow.dispatch(now)
        return self.board.take()

    def _start_clock(self, now: float) -> None:
        """The first time that is told is when this broker was born: every stage is absent since then."""
        if not self._started:
            self._started = True
            self._liveness.update(now)

    # ---- peers -----------------------------------------------------------------------------------------------------

    def _hello(self, peer_id: str, hello: m.Hello, now: float) -> None:
        if hello.incarnation != peer_id:
            self.board.count("num_fenced")
            return
        if self.board.registry.get(peer_id) is None:
            if earlier := self.board.registry.named(hello.name):
                self._lose(earlier, "it registered again", now)
            self.board.patches.lift_quarantine(hello.name, now)
            known = {pool.pool_id for pool in self.board.pools()}
            self.board.registry.add(peer_id, hello, now)
            if hello.role is Role.ENCODE:
                self.board.encode_info = hello.info
            for pool in hello.pools:
                if pool.pool_id not in known:
                    self.board.patches.index.add_pool(pool)
            if hello.pools:
                self.board.tell_pools()
            self._liveness.update(now)
            self.board.tell_status()
        config = self.board.config
        welcome = m.Welcome(heartbeat_s=config.heartbeat_s, lost_after_s=config.lost_after_s, pools=self.board.pools())
        self.board.send(peer_id, welcome)
        if hello.role is Role.ENDPOINT:
            self.board.send(peer_id, self.board.status())

    def _lose(self, peer: Peer, reason: str, now: float, *, orderly: bool = False) -> None:
        """A peer is gone; `orderly` where it said so in time, so that nothing it had can be to blame."""
        self.board.registry.remove(peer.peer_id)
        lost: list[Lost] = []
        for pool in peer.pools:
            lost += self.board.patches.pool_lost(pool)
        if peer.role is Role.ENCODE:
            lost += self.board.patches.worker_lost(peer, now)
        for one in lost:
            self._flow.patch_lost(one, ErrorCode.WORKER_LOST, now, blame=not orderly)
        self._uploads.endpoint_lost(peer.peer_id)
        for waiting in list(self.board.releasing):
            self._endings.released(peer.peer_id, waiting)
        for request in list(self.board.requests.values()):
            if request.endpoint == peer.peer_id:
                self._endings.end(request, Event.CANCEL, now)
            elif peer.peer_id in (request.prefill, request.decode):
                self._leg_lost(peer, request, reason, now, blame=not orderly)
        if peer.pools:
            self.board.tell_pools()
        self._liveness.update(now)
        self._give_up_waiting(now)
        self.board.tell_status()

    def _leg_lost(self, peer: Peer, request: Request, reason: str, now: float, *, blame: bool) -> None:
        """One of the two workers of a request's leg is gone."""
        text = f"{peer.role} worker {peer.name} was lost ({reason})"
        if request.early_finish:
            if request.prefill == peer.peer_id:  # else PREFILLED is still to come
                self._answers.finish(request, *request.early_finish, now)
        elif request.decode == peer.peer_id:
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame)
        elif not request.pushed and request.state is State.DECODING:
            if request.prefilled or not request.submit.resumable:
                request.pushed = True  # there are tokens, so the KV has arrived
                self._flow.leave_patches(request)
            else:  # the prompt's log-probabilities may have been lost
                self._retries.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame)
        elif not request.pushed:
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame)

    def _give_up_waiting(self, now: float) -> None:
        """Requests that wait for a stage that has been away for too long fail."""
        encode = str(Role.ENCODE)
        nobody_encodes = self._liveness.gone([encode], now) and not self.board.registry.of(Role.ENCODE)
        for request in list(self.board.requests.values()):
            gone = []
            if request.state is State.QUEUED:
                gone = self._liveness.gone(needed(bool(request.patches)), now)
            elif request.missing and nobody_encodes:
                gone = [encode]
            if gone:
                text = f"{named(gone, 'the last')} was lost, and none came in time"
                self._endings.fail(request, ErrorCode.WORKER_LOST, text, now)

    # ---- messages of registered peers ------------------------------------------------------------------------------

    def _from_peer(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        match message:
            case m.Heartbeat():
                self._liveness.heard_steps(peer, message.num_steps, now)
                peer.held, peer.gauges = message.held, message.gauges
                self.board.send(peer.peer_id, m.HeartbeatAck())
                if peer.role is Role.ENDPOINT:
                    self.board.send(peer.peer_id, self.board.status())
            case m.Draining():
                peer.draining = True
                self._liveness.update(now)
                self._give_up_waiting(now)
                self.board.tell_status()
            case m.Goodbye():
                orderly = peer.draining or peer.role is Role.CACHE
                self._lose(peer, message.reason or "it said goodbye", now, orderly=orderly)
            case m.Submit():
                self._flow.submit(peer, message, frames, now)
            case m.Cancel():
                if (request := self.board.requests.get(message.request_id)) and request.endpoint == peer.peer_id:
                    request.tell(now, "cancelled", detail=message.reason)
                    self._endings.end(request, Event.CANCEL, now)
            case m.Upload():
                self._uploads.accept(peer, message, frames, now)
            case m.DropUpload():
                self._uploads.drop(peer.peer_id, message.upload_id)
            case m.GetCache():
                self.board.send(peer.peer_id, m.CacheState(pools=fills(self.board.patches.index)))
            case m.GetStory():
                self.board.send(peer.peer_id, self.board.story(message.request_id))
            case m.Encoded():
                self._flow.encoded(peer, message, now)
            case m.EncodeFailed():
                if lost := self.board.patches.not_encoded(peer, message, now):
                    self._flow.patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
            case m.Released():
                self._endings.released(peer.peer_id, message.request_id)
            case m.Prefilled() | m.Pushed() | m.Stale() | m.Tokens() | m.Finished() | m.Failed() | m.NeedPatches():
                self._flow.from_leg(peer, message, frames, now)
