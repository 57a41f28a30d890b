"""Engines without a model, for real stages: what they compute is a digest of everything they were given.

So a wrong embedding, KV of another request, a lost or a repeated token each change the answer. Slots are real
(`cache.slot`), in a pool that is a bytearray; KV goes from engine to engine through the cluster's transport.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from broker.virtual.endpoint import Flight
from cache import slot as slots
from cache.slot import StaleSlotError
from epd.messages import EncodeJob, KvPeer, Patch, Slot, Submit

WIDTH, DTYPE = 64, "bfloat16"


def digest(*parts: bytes) -> bytes:
    """Of several byte strings, each with its length."""
    return hashlib.blake2b(b"".join(len(one).to_bytes(4, "big") + one for one in parts), digest_size=8).digest()


def embedding(pixels: bytes, num_tokens: int) -> bytes:
    """What a patch is encoded to."""
    nbytes = slots.data_bytes(num_tokens, WIDTH, DTYPE)
    return (digest(b"pixels", pixels) * (nbytes // 8 + 1))[:nbytes]


def context(prompt: bytes, embeddings: Iterable[bytes]) -> bytes:
    """What the KV of a prompt and its patches holds."""
    return digest(prompt, *embeddings)


def next_token(context: bytes, outputs: Sequence[int]) -> int:
    """The token after a context and the output so far."""
    return int.from_bytes(digest(context, msgspec.msgpack.encode(list(outputs)))[:2], "big")


class EngineRequest(msgspec.Struct):
    """What the endpoint puts into the opaque frames of a request."""

    prompt: bytes
    max_tokens: int
    patches: list[str]


class Ask(Flight):
    """A request and what its client has got."""

    def __init__(
        self,
        request_id: str,
        request: EngineRequest,
        pixels: dict[str, bytes],
        resumable: bool,
        prefill_samples: bool,
        deadline_s: float,
    ) -> None:
        patches = [Patch(patch_hash=one, modality="image", num_tokens=4, num_frames=1) for one in pixels]
        submit = Submit(
            request_id=request_id, num_prompt_tokens=len(request.prompt), max_tokens=request.max_tokens,
            num_engine_frames=1, patches=patches, deadline_s=deadline_s, resumable=resumable,
            prefill_samples=prefill_samples,
        )  # fmt: skip
        super().__init__(submit, [msgspec.msgpack.encode(request), *pixels.values()])
        self.request, self.pixels = request, pixels

    def truth(self) -> list[int]:
        """The answer of an undisturbed run."""
        kv = context(self.request.prompt, [embedding(self.pixels[one], 4) for one in self.request.patches])
        outputs: list[int] = []
        while len(outputs) < self.request.max_tokens:
            outputs.append(next_token(kv, outputs))
        return outputs


@dataclasses.dataclass
class Output:
    """The fields of vLLM's engine output that stages look at."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    kv_transfer_params: Any = None
    prefill_stats: Any = None
    new_prompt_logprobs_tensors: Any = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class Connector:
    """The encoder-cache connector's side towards stages, over real slots."""

    def __init__(self, pools: dict[str, bytearray], owner: str) -> None:
        self._pools, self._owner = pools, owner
        self._known: set[str] = set()
        self.wants: dict[str, set[str]] = {}
        self.read: dict[str, bytes] = {}
        self.write_slots: dict[str, Slot] = {}

    def set_pools(self, pools: Iterable[Any]) -> list[str]:
        self._known = {pool.pool_id for pool in pools}
        return []

    def memory(self, slot: Slot) -> memoryview:
        if slot.pool_id not in self._pools or slot.pool_id not in self._known:
            raise StaleSlotError(f"pool {slot.pool_id} is gone")
        return memoryview(self._pools[slot.pool_id])

    def write(self, slot: Slot, data: bytes) -> None:
        slots.write(self.memory(slot), slot, data, self._owner)

    def expect(self, request_id: str, patch_hashes: Iterable[str]) -> None:
        self.wants.setdefault(request_id, set()).update(patch_hashes)

    def patch_ready(self, patch_hash: str, slot: Slot) -> None:
        if patch_hash not in self.read and any(patch_hash in wanted for wanted in self.wants.values()):
            self.read[patch_hash] = bytes(slots.read(self.memory(slot), slot))

    def forget(self, request_id: str) -> None:
        self.wants.pop(request_id, None)
        needed = set().union(*self.wants.values()) if self.wants else set()
        self.read = {patch_hash: data for patch_hash, data in self.read.items() if patch_hash in needed}

    def forget_job(self, job: str) -> None:
        self.write_slots.pop(job, None)

    def take_needed(self) -> dict[str, list[str]]:
        return {}

    def look_at_unwritten(self) -> list[Any]:
        return []

    num_unwritten = 0


@dataclasses.dataclass
class Written:
    """As `cache.ec_connector.Written`."""

    done: set[str] = dataclasses.field(default_factory=set)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    unstored: dict[str, str] = dataclasses.field(default_factory=dict)
    storing: set[str] = dataclasses.field(default_factory=set)
    num_unsettled: int = 0


class Engine:
    """What `workers.engine.Engine` is to its stage; `kv_send` sends leg id, word and bytes to an engine by its id."""

    def __init__(
        self, engine_id: str, pools: dict[str, bytearray], kv_send: Callable[[str, str, str, bytes], None]
    ) -> None:
        self.engine_id, self._kv_send = engine_id, kv_send
        self.connector = Connector(pools, owner=engine_id[:16])
        self._jobs: dict[str, tuple[EncodeJob, bytes]] = {}
        self._written = Written()
        self._prefills: dict[str, EngineRequest] = {}
        self._outputs: dict[str, list[int]] = {}
        self._registered: dict[str, str] = {}
        self._kv: dict[str, bytes] = {}
        self._refused: set[str] = set()
        self._decodes: dict[str, tuple[EngineRequest, str]] = {}
        self._aborted: dict[str, str] = {}
        self._failed: set[str] = set()
        self._awaiting: set[str] = set()
        self._ending: set[str] = set()  # prefills whose KV nobody wants

    # ---- feeding it ------------------------------------------------------------------------------------------------

    def add_encode(self, job: EncodeJob, frames: Sequence[bytes]) -> str:
        name = str(job.job_id)
        self.connector.write_slots[name] = job.slot
        self._jobs[name] = (job, b"".join(frames))
        return name

    def add_prefill(
        self,
        leg_id: str,
        frames: Sequence[bytes],
        output_token_ids: Sequence[int] = (),
        samples: bool = False,
        keeps_kv: bool = True,
    ) -> bool:
        request = msgspec.msgpack.decode(frames[0], type=EngineRequest)
        self.connector.expect(leg_id, request.patches)
        self._prefills[leg_id], self._outputs[leg_id] = request, list(output_token_ids)
        if not keeps_kv:
            self._ending.add(leg_id)
        return len(output_token_ids) + 1 >= request.max_tokens

    def add_decode(
        self,
        leg_id: str,
        frames: Sequence[bytes],
        peer: KvPeer,
        output_token_ids: Sequence[int] = (),
        awaits_token: bool = False,
    ) -> None:
        request = msgspec.msgpack.decode(frames[0], type=EngineRequest)
        self._decodes[leg_id], self._outputs[leg_id] = (request, peer.engine_id), list(output_token_ids)
        if awaits_token:
            self._awaiting.add(leg_id)
        self._kv_send(peer.engine_id, leg_id, "register", self.engine_id.encode())

    def give_token(self, leg_id: str, token_ids: Sequence[int]) -> bool:
        if leg_id not in self._awaiting:
            return False
        self._awaiting.discard(leg_id)
        self._outputs[leg_id] += token_ids
        return True

    def lacking_token(self) -> frozenset[str]:
        return frozenset(self._awaiting & self._kv.keys())

    def abort(self, request_ids: Iterable[str]) -> None:
        for leg_id in list(request_ids):
            self._jobs.pop(leg_id, None)
            self._awaiting.discard(leg_id)
            if leg_id in self._decodes:
                _, prefill = self._decodes.pop(leg_id)
                if self._kv.pop(leg_id, None) is not None:
                    del self._outputs[leg_id]
                else:  # the prefill engine may still write
                    self._aborted[leg_id] = prefill
                    self._kv_send(prefill, leg_id, "call off", self.engine_id.encode())
            else:
                self._give_up(leg_id)
            self.connector.forget(leg_id)

    def _give_up(self, leg_id: str) -> None:
        self._refused.add(leg_id)
        self._prefills.pop(leg_id, None)
        self._ending.discard(leg_id)
        self._kv.pop(leg_id, None)
        self._outputs.pop(leg_id, None)
        if decode := self._registered.pop(leg_id, None):
            self._kv_send(decode, leg_id, "refused", b"")

    def kv_receive(self, leg_id: str, word: str, data: bytes) -> None:
        """Takes in what another engine sends."""
        match word:
            case "register" | "call off":
                self._registered[leg_id] = data.decode()
                if word == "call off" or leg_id in self._refused:
                    self._give_up(leg_id)
                else:
                    self._push(leg_id)
            case "kv" if leg_id in self._decodes:
                self._kv.setdefault(leg_id, data)
            case "refused" if leg_id in self._decodes and leg_id not in self._kv:
                self._failed.add(leg_id)
        if word in ("kv", "refused") and self._aborted.pop(leg_id, None):
            self._outputs.pop(leg_id, None)

    def peer_gone(self, engine_id: str) -> None:
        """An engine that does not exist any more writes nothing."""
        for leg_id in [leg_id for leg_id, prefill in self._aborted.items() if prefill == engine_id]:
            self._aborted.pop(leg_id)
            self._outputs.pop(leg_id, None)

    def _push(self, leg_id: str) -> None:
        if leg_id in self._kv and leg_id in self._registered:
            self._kv_send(self._registered.pop(leg_id), leg_id, "kv", self._kv.pop(leg_id))
            self._outputs.pop(leg_id, None)

    # ---- stepping it -----------------------------------------------------------------------------------------------

    def step(self) -> tuple[list[Output], bool]:
        outputs = [*self._encode(), *self._prefill(), *self._decode()]
        return outputs, bool(outputs or self._written.done)

    def _encode(self) -> list[Output]:
        for name, (job, pixels) in list(self._jobs.items()):
            del self._jobs[name]
            try:
                self.connector.write(job.slot, embedding(pixels, job.num_tokens))
                self._written.done.add(name)
            except (StaleSlotError, ValueError) as error:
                self._written.failed[name] = str(error)
        return []

    def _prefill(self) -> list[Output]:
        done = []
        for leg_id, request in list(self._prefills.items()):
            if all(patch_hash in self.connector.read for patch_hash in request.patches):
                del self._prefills[leg_id]
                kv = context(request.prompt, [self.connector.read[patch_hash] for patch_hash in request.patches])
                done.append(Output(leg_id, [next_token(kv, self._outputs[leg_id])], "length"))
                if leg_id in self._ending:
                    self._ending.discard(leg_id)
                    del self._outputs[leg_id]
                    continue
                self._kv[leg_id] = kv + msgspec.msgpack.encode(self._outputs[leg_id])
                self._push(leg_id)
        return done

    def _decode(self) -> list[Output]:
        done = []
        for leg_id in list(self._failed):
            self._failed.discard(leg_id)
            self._awaiting.discard(leg_id)
            if self._decodes.pop(leg_id, None):
                self._outputs.pop(leg_id, None)
                done.append(Output(leg_id, [], "error"))
        for leg_id, (request, _) in list(self._decodes.items()):
            if (kv := self._kv.get(leg_id)) is None or leg_id in self._awaiting:
                continue
            outputs = self._outputs[leg_id]
            given = len(msgspec.msgpack.decode(kv[8:]))  # what the prompt was prefilled with
            token = next_token(kv[:8], msgspec.msgpack.decode(kv[8:]) + outputs[given:])
            outputs.append(token)
            finished = len(outputs) >= request.max_tokens
            done.append(Output(leg_id, [token], "length" if finished else None))
            if finished:
                del self._decodes[leg_id], self._kv[leg_id], self._outputs[leg_id]
        return done

    def has_requests(self) -> bool:
        return bool(self._jobs or self._prefills or self._kv or self._decodes or self._aborted)

    def holds(self, leg_id: str) -> bool:
        return leg_id in self._prefills or leg_id in self._kv

    def waiting(self) -> list[str]:
        return list(self._jobs)

    def kv_arrived(self) -> bool:
        return bool(self._kv.keys() - self._awaiting)

    def take_written(self) -> Written:
        written, self._written = self._written, Written()
        return written

    def pack(self, output: Output) -> list[bytes]:
        return [msgspec.msgpack.encode(output.new_token_ids)]

    def held(self) -> dict[str, int]:
        """What it has for requests; all 0 when nothing is in flight."""
        tables = {
            "jobs": self._jobs, "prefills": self._prefills, "outputs": self._outputs, "kv": self._kv,
            "decodes": self._decodes, "aborted": self._aborted, "read": self.connector.read,
            "wants": self.connector.wants, "awaiting": self._awaiting, "slots": self.connector.write_slots,
            "ending": self._ending,
        }  # fmt: skip
        return {name: len(table) for name, table in tables.items()}
