"""The decision core: messages in, messages out. Pure: no sockets, no clocks, no asyncio.

`Core.handle` takes one message from one peer, and `Core.tick` the time; both return what to send. The daemon performs
it, tests and the simulator call it directly. Every accepted request ends in exactly one FINISHED or FAILED, or in
silence when its endpoint cancelled it or is gone. Peers come and go here; `broker.flow` moves requests,
`broker.endings` ends them, `broker.board` holds what they share.
"""

from __future__ import annotations

from broker.board import Board, Send
from broker.endings import Endings
from broker.fill import fills
from broker.flow import Flow
from broker.patches import Lost
from broker.registry import Peer
from broker.request import Event, State
from broker.uploads import Uploads
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import ErrorCode
from epd.messages import STAGES, Message, Role
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
        self._uploads = Uploads(self.board, self._endings)
        self._flow = Flow(self.board, self._endings, self._uploads)

    def handle(self, peer_id: str, message: Message, frames: list[bytes], now: float) -> list[Send]:
        """What to send after `message` from `peer_id` arrived at `now` (seconds of any monotonic clock)."""
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
        self._flow.start_queued(now)
        self._flow.dispatch(now)
        return self.board.take()

    def tick(self, now: float) -> list[Send]:
        """What to send because time has passed: silent peers are lost, late requests fail."""
        for peer in self.board.registry.silent_since(now - self.board.config.lost_after_s):
            self._lose(peer, f"silent for {now - peer.heard_at:.1f} s", now)
        for request in list(self.board.requests.values()):
            if now >= request.deadline_at:
                self._endings.fail(request, ErrorCode.DEADLINE, "the request's deadline has passed", now)
            elif request.state is State.QUEUED and now - request.accepted_at > self.board.config.max_queue_s:
                self._endings.fail(request, ErrorCode.OVERLOADED, "no worker became free in time", now)
        self.board.patches.lift_quarantine("", now)
        self._uploads.expire(now)
        self._flow.start_queued(now)
        self._flow.dispatch(now)
        return self.board.take()

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
            for pool in hello.pools:
                if pool.pool_id not in known:
                    self.board.patches.index.add_pool(pool)
            if hello.pools:
                self.board.tell_pools()
            self.board.tell_status()
        config = self.board.config
        welcome = m.Welcome(heartbeat_s=config.heartbeat_s, lost_after_s=config.lost_after_s, pools=self.board.pools())
        self.board.send(peer_id, welcome)
        if hello.role is Role.ENDPOINT:
            self.board.send(peer_id, self.board.status())

    def _lose(self, peer: Peer, reason: str, now: float) -> None:
        self.board.registry.remove(peer.peer_id)
        lost: list[Lost] = []
        for pool in peer.pools:
            lost += self.board.patches.pool_lost(pool)
        if peer.role is Role.ENCODE:
            lost += self.board.patches.worker_lost(peer, now)
        for one in lost:
            self._flow.patch_lost(one, ErrorCode.WORKER_LOST, now)
        self._uploads.endpoint_lost(peer.peer_id)
        for waiting in list(self.board.releasing):
            self._endings.released(peer.peer_id, waiting)
        for request in list(self.board.requests.values()):
            if request.endpoint == peer.peer_id:
                self._endings.end(request, Event.CANCEL, now)
            elif request.early_finish:
                if (decode := self.board.registry.get(request.decode)) and request.prefill == peer.peer_id:
                    self._flow.finish(decode, request, *request.early_finish, now)
            elif request.decode == peer.peer_id or (request.prefill == peer.peer_id and not request.pushed):
                text = f"{peer.role} worker {peer.name} was lost ({reason})"
                self._endings.fail(request, ErrorCode.WORKER_LOST, text, now)
        if peer.role in STAGES and not self.board.registry.of(peer.role):
            self._last_of_stage_lost(peer.role, now)
        if peer.pools:
            self.board.tell_pools()
        self.board.tell_status()

    def _last_of_stage_lost(self, role: Role, now: float) -> None:
        """Requests that wait for a worker of a stage that has none left fail now, not at the end of their patience."""
        text = f"the last {role} worker was lost"
        for request in list(self.board.requests.values()):
            waits = request.state is State.QUEUED and (role is not Role.ENCODE or request.patches)
            if waits or (role is Role.ENCODE and request.missing):
                self._endings.fail(request, ErrorCode.WORKER_LOST, text, now)

    # ---- messages of registered peers ------------------------------------------------------------------------------

    def _from_peer(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        match message:
            case m.Heartbeat():
                peer.num_steps, peer.held = message.num_steps, message.held
                self.board.send(peer.peer_id, m.HeartbeatAck())
                if peer.role is Role.ENDPOINT:
                    self.board.send(peer.peer_id, self.board.status())
            case m.Goodbye():
                self._lose(peer, message.reason or "it said goodbye", now)
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
                if lost := self.board.patches.not_encoded(peer, message.job_id, message.message):
                    self._flow.patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
            case m.Released():
                self._endings.released(peer.peer_id, message.request_id)
            case m.Prefilled() | m.Pushed() | m.Stale() | m.Tokens() | m.Finished() | m.Failed() | m.NeedPatches():
                self._flow.from_leg(peer, message, frames, now)
