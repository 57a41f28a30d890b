"""The half of our NIXL push connector that is beside a model runner: it asks, refuses and lets go.

Lives in prefill and decode workers; `workers.push_connector` describes the whole. vLLM's half has two threads: the
engine's, which receives what the scheduler wants and reports what is done, and the writer, which alone sends
registrations and starts writes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import errno
import queue
import re
import socket
import threading
import time
from collections import OrderedDict
from typing import Any

import msgspec
import zmq
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import push_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    GET_META_MSG,
    PUSH_REG_NOTIF_PREFIX,
    NixlConnectorMetadata,
    NixlHandshakePayload,
)
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path
from vllm.v1.kv_cache_interface import KVCacheConfig

from epd.transport.factory import SocketFactory

logger = init_logger(__name__)

_REFUSED = b"EPD_REFUSED:"
# What a prefill worker says of a request: that it has been written or will not be; and the worker's world size.
_TOLD = re.compile(r"(?P<refused>EPD_REFUSED:)?(?!HB:)(?P<id>.+):(?P<size>[0-9]{1,6})", re.DOTALL)
_ASK_EVERY_S = 1.0
_PROBE_S = 1.0
_IDLE_LOOK_S = 0.25
_MAX_REMEMBERED = 8192


class _Order(enum.Enum):
    """What the writer thread is asked to do for a request, instead of blocks to push."""

    GIVE_UP = enum.auto()
    REFUSE = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Peer:
    """A prefill engine as a decode worker knows it: its id and its side channel."""

    engine_id: str
    host: str
    port: int


class _Agent(msgspec.Struct):
    """What we read of a `NixlAgentMetadata`: who answers at a side channel."""

    engine_id: str


class _Alarm(threading.Event):
    """Wakes its waiter now and then, so that an idle worker hears what its peers call off."""

    def wait(self, timeout: float | None = None) -> bool:
        """Waits as an event does, but not for ever."""
        return super().wait(_IDLE_LOOK_S if timeout is None else timeout)


class PushWorker(push_worker.NixlPushConnectorWorker):
    """Asks, refuses and lets go. Each table belongs to one thread, the engine's or the writer's."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._push_writer_wake = _Alarm()
        # Decode, engine thread: aborted requests whose blocks a prefill worker may still write to, and when to ask.
        self._orphans: dict[str, tuple[dict[str, Any], float]] = {}
        self._refused: set[str] = set()
        self._probes: dict[Peer, concurrent.futures.Future[bool]] = {}
        self._prober = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kv-probe")
        # Decode, writer thread: registrations that were sent, and those that never will be.
        self._registered: dict[str, None] = {}
        self._void: dict[str, None] = {}
        # Prefill, writer thread: requests not to push, and whether that was said; those that were pushed; registrations
        # for which writes were started, and the one that is just being handled.
        self._given_up: OrderedDict[str, bool] = OrderedDict()
        self._pushed: OrderedDict[str, bool] = OrderedDict()
        self._writing_for: dict[str, dict[str, Any]] = {}
        self._starting: dict[str, Any] = {}
        # Prefill, engine thread: pushes that failed in part, and requests that the writer thread has let go of.
        self._failed_pushes: set[str] = set()
        self._unwanted: set[str] = set()
        self._let_go: queue.SimpleQueue[str] = queue.SimpleQueue()

    @property
    def num_held(self) -> int:
        """How many requests something is remembered for; 0 when idle (those given up are bounded and do not count)."""
        tables: tuple[Any, ...] = (
            *(self._orphans, self._refused, self._writing_for, self._failed_pushes, self._registered, self._void),
            *(self._recving_metadata, self._recving_transfers, self._recv_failures, self._sending_transfers),
            *(self._send_failures, self._push_finished_blocks, self._pending_d_registrations, self._reqs_to_send),
            *(self._reqs_to_process, self._unwanted, self.consumer_notification_counts_by_req),
        )
        return sum(map(len, tables))

    def shutdown(self) -> None:
        """Stops the probes too."""
        if hasattr(self, "_prober"):
            self._prober.shutdown(wait=False, cancel_futures=True)
        super().shutdown()

    # ---- engine thread ---------------------------------------------------------------------------------------------

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        """Handles what the scheduler's side has called off or given up."""
        super().start_load_kv(metadata)
        for request_id, registration in metadata.called_off.items():
            self._orphans[request_id] = (registration, 0.0)
        for request_id in metadata.given_up:
            self._order(request_id, _Order.GIVE_UP, {})

    def _order(self, request_id: str, order: _Order, registration: dict[str, Any]) -> None:
        self._deferred_push_inbox.put((request_id, order, registration))
        self._push_writer_wake.set()

    def get_transfer_results(self) -> Any:
        """Asks about orphans before the results are collected, and ends leases that nobody needs."""
        self._chase_orphans()
        while True:
            try:
                request_id = self._let_go.get_nowait()
            except queue.Empty:
                break
            if request_id in self._reqs_to_send:
                self._unwanted.add(request_id)
        results = super().get_transfer_results()
        for request_id in results.finished_recving:
            self._orphans.pop(request_id, None)
            self._refused.discard(request_id)
            self._reg_send_inbox.put((request_id, {"ended": True}))
        return results

    def _chase_orphans(self) -> None:
        now = time.monotonic()
        for request_id, (registration, ask_at) in list(self._orphans.items()):
            if request_id not in self._recving_metadata:
                del self._orphans[request_id]
            elif now >= ask_at:
                self._orphans[request_id] = (registration, now + _ASK_EVERY_S)
                self._reg_send_inbox.put((request_id, registration | {"called_off": True}))
                self._push_writer_wake.set()
                if ask_at:
                    self._look_for(_peer(registration))
        for peer, probe in list(self._probes.items()):
            if probe.done():
                del self._probes[peer]
                if not probe.result():
                    for request_id, (registration, _) in self._orphans.items():
                        if _peer(registration) == peer:
                            self._failed_recv_reqs.put(request_id)

    def _look_for(self, peer: Peer) -> None:
        if peer not in self._probes:
            self._probes[peer] = self._prober.submit(may_exist, peer)

    def _get_new_notifs(self) -> set[str]:
        """Sorts out refusals; a request that one of its writers has refused fails once all have answered."""
        others = []
        while True:
            try:
                notification = self._pending_completion_notifs.get_nowait()
            except queue.Empty:
                break
            text = notification.decode("utf-8", "replace")
            told = _TOLD.fullmatch(text)
            if told and told["refused"]:
                self._take_refusal(told["id"], int(told["size"]))
            elif "\ufffd" not in text and (told or text.startswith("HB:")):
                others.append(notification)
            else:
                logger.warning("not a notification: %d bytes", len(notification))
        for notification in others:
            self._pending_completion_notifs.put(notification)
        done: set[str] = super()._get_new_notifs()
        self._recv_failures.update(self._refused & self._recving_transfers.keys())
        return done

    def _take_refusal(self, request_id: str, tp_size: int) -> None:
        if (meta := self._recving_metadata.get(request_id)) is None:
            return
        self._refused.add(request_id)
        counts = self.consumer_notification_counts_by_req
        counts[request_id] += 1
        if counts[request_id] >= meta.pp_size * max(1, tp_size // self.world_size):
            del counts[request_id]
            self._recving_transfers.setdefault(request_id, [])

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """Finishes pushes; one that has failed is refused once nothing of it can still be under way."""
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._sending_transfers:
            self._failed_pushes |= failed
            for request_id in done:
                self._order(request_id, _Order.FAILED if request_id in self._failed_pushes else _Order.DONE, {})
            self._failed_pushes -= done
        return done, failed

    def _reap_expired_send_leases(self, done_sending: set[str]) -> None:
        """Ends leases, but only those that the writer thread has let go of, so that no block is freed under a write."""
        now = time.perf_counter()
        for request_id, expires in list(self._reqs_to_send.items()):
            if request_id in self._unwanted:
                self._reqs_to_send[request_id] = now
            elif now >= expires:
                self._reqs_to_send[request_id] = now + 1.0
                self._order(request_id, _Order.GIVE_UP, {})
        super()._reap_expired_send_leases(done_sending)
        self._unwanted &= self._reqs_to_send.keys()

    # ---- writer thread, decode -------------------------------------------------------------------------------------

    def _send_registration_to_p(self, req_id: str, reg_data: dict[str, Any]) -> None:
        """Sends a registration, or calls one off; the latter only if it was sent."""
        if reg_data.get("ended"):
            self._registered.pop(req_id, None)
            self._void.pop(req_id, None)
        elif req_id not in self._recving_metadata or req_id in self._void:
            return
        elif not reg_data.get("called_off"):
            super()._send_registration_to_p(req_id, reg_data)
        elif req_id in self._registered:
            self._notify(reg_data["remote_engine_id"], PUSH_REG_NOTIF_PREFIX + msgspec.msgpack.encode(reg_data))
        else:  # the prefill worker has never heard of it
            self._void[req_id] = None
            self._failed_recv_reqs.put(req_id)

    def _do_send_reg_notif(self, req_id: str, reg_data: dict[str, Any]) -> None:
        self._registered[req_id] = None
        super()._do_send_reg_notif(req_id, reg_data)

    def _notify(self, engine_id: str, notification: bytes) -> bool:
        """Sends to all ranks of an engine; returns whether NIXL has taken it. If not, the caller asks again later."""
        with self._handshake_lock:
            agents = list((self._remote_agents.get(engine_id) or {}).values())
        for agent in agents:
            try:
                self.nixl_wrapper.send_notif(agent, notif_msg=notification)
            except Exception as error:  # NIXL's own exceptions differ by transport
                logger.debug("not sent to %s: %r", engine_id, error)
                return False
        return bool(agents)

    # ---- writer thread, prefill ------------------------------------------------------------------------------------

    def _handle_push_reg_notif(self, notif: bytes) -> None:
        """Accepts a registration, unless it is called off or its request was given up."""
        registration = _decode(notif)
        request_id = registration.get("request_id")
        if isinstance(request_id, str) and registration.get("called_off"):
            self._give_up(request_id, registration)
        elif isinstance(request_id, str) and request_id in self._given_up:
            self._refuse(request_id, registration)
        else:
            super()._handle_push_reg_notif(notif)

    def _pop_matching_registration(self, request_id: str) -> dict[str, Any] | None:
        """The registration of a request that was just prefilled, under exactly its id."""
        if request_id in self._given_up:
            self._evict_finished_inbox.put(request_id)
            self._let_go.put(request_id)
            return None
        registration: dict[str, Any] | None = self._pending_d_registrations.pop(request_id, None)
        return registration

    def _pop_matching_finished_blocks(self, request_id: str) -> tuple[str, BlockIds] | None:
        blocks = self._push_finished_blocks.pop(request_id, None)
        return None if blocks is None else (request_id, blocks)

    def _do_start_push_kv(self, request_id: str, local_block_ids: Any, registration_data: dict[str, Any]) -> None:
        """Starts a write, or does what the engine thread has asked for instead."""
        if local_block_ids is _Order.DONE:
            self._writing_for.pop(request_id, None)
            _remember(self._pushed, request_id, True)
        elif local_block_ids is _Order.FAILED:
            self._give_up(request_id, self._writing_for.pop(request_id, None))
        elif local_block_ids is _Order.GIVE_UP:
            self._give_up(request_id, None)
        elif local_block_ids is _Order.REFUSE or request_id in self._given_up:
            self._refuse(request_id, registration_data)
        else:
            self._start_write(request_id, local_block_ids, registration_data)

    def _start_write(self, request_id: str, block_ids: BlockIds, registration: dict[str, Any]) -> None:
        self._starting = registration
        try:
            super()._do_start_push_kv(request_id, block_ids, registration)
        except Exception:
            self._give_up(request_id, self._writing_for.pop(request_id, registration))
            raise
        with self._sending_transfers_lock:
            failed = request_id in self._send_failures and request_id not in self._sending_transfers
            if failed:
                self._send_failures.discard(request_id)
        if failed:
            self._give_up(request_id, self._writing_for.pop(request_id, registration))

    def _xfer_blocks_for_req(self, req_id: str, meta: Any) -> None:
        """Starts the write itself: the handshake with its decode worker is done."""
        self._writing_for[req_id] = self._starting
        super()._xfer_blocks_for_req(req_id, meta)

    def _give_up(self, request_id: str, registration: dict[str, Any] | None) -> None:
        """From now on this request is not pushed; a write that was started ends by itself and reports."""
        if request_id in self._pushed:
            return
        _remember(self._given_up, request_id, self._given_up.get(request_id, False))
        if request_id in self._writing_for:
            return
        waiting = self._pending_d_registrations.pop(request_id, None)
        self._push_finished_blocks.pop(request_id, None)
        self._let_go.put(request_id)
        if registration := registration or waiting:
            self._refuse(request_id, registration)

    def _refuse(self, request_id: str, registration: dict[str, Any]) -> None:
        """Tells a decode worker that there is no write and will be none; if this fails, it asks again."""
        engine_id = registration["decode_engine_id"]
        host, port, tp_size = (registration[f"decode_{key}"] for key in ("host", "port", "tp_size"))
        if (handshake := self._ensure_handshake(engine_id, host, port, tp_size)) is not None:

            def again(done: concurrent.futures.Future[Any]) -> None:
                if done.exception() is None:
                    self._order(request_id, _Order.REFUSE, registration)

            handshake.add_done_callback(again)
            return
        # Once: if several prefill ranks write to one decode rank, that one counts the answers.
        if not self._given_up.get(request_id):
            sent = self._notify(engine_id, _REFUSED + f"{request_id}:{self.world_size}".encode())
            _remember(self._given_up, request_id, sent)


def _remember(table: OrderedDict[str, bool], request_id: str, value: bool) -> None:
    table[request_id] = value
    if len(table) > _MAX_REMEMBERED:
        table.popitem(last=False)


def may_exist(peer: Peer, timeout_s: float = _PROBE_S) -> bool:
    """Whether a prefill engine may still be there; blocks up to twice `timeout_s`.

    False is certain: its host refuses the connection to its side channel, or another engine answers there.
    """
    try:
        socket.create_connection((peer.host, peer.port), timeout_s).close()
    except OSError as error:
        return error.errno != errno.ECONNREFUSED
    with SocketFactory() as sockets:
        sock = sockets.connect_request(make_zmq_path("tcp", peer.host, peer.port), timeout_s=timeout_s)
        try:
            sock.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
            payload = msgspec.msgpack.decode(sock.recv_multipart()[0], type=NixlHandshakePayload)
            agent = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=_Agent)
        except (zmq.ZMQError, msgspec.MsgspecError, IndexError):
            return True
    return bool(agent.engine_id == peer.engine_id)


def _peer(registration: dict[str, Any]) -> Peer:
    return Peer(registration["remote_engine_id"], registration["remote_host"], registration["remote_port"])


def _decode(notif: bytes) -> dict[str, Any]:
    try:
        registration = msgspec.msgpack.decode(notif[len(PUSH_REG_NOTIF_PREFIX) :])
    except msgspec.MsgspecError:
        return {}
    return registration if isinstance(registration, dict) else {}
