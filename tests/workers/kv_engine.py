"""Run by test_kv_leaks.py in a process of its own: a real prefill or decode engine that does what its test says.

Reads one command a line (JSON) and answers each with one JSON object. The engine steps only when told to, so that a
test decides what has happened on each side when something is aborted.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import PUSH_REG_NOTIF_PREFIX
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from epd.builtin import model_path
from epd.config import Config
from epd.messages import KvPeer, Stage
from workers import push_connector
from workers.engine import Engine
from workers.resources import blocks

PROMPT = [100 + i % 50 for i in range(200)]


class Host:
    """One engine and the commands for it."""

    def __init__(self, role: Stage) -> None:
        config = Config(model=str(model_path()), engine={"max_model_len": 512, "dtype": "bfloat16"})
        for stage in (config.prefill, config.decode):
            stage.engine = {"enable_prefix_caching": False}  # a second request has to be computed and pushed, too
        self.engine = Engine(config, role, role.value)
        self.connector = self.engine.scheduler.get_kv_connector()
        runner = self.engine.core.model_executor.driver_worker.worker.model_runner
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        assert runner
        self.kv = get_kv_transfer_group().connector_worker
        self.nixl = self.kv.nixl_wrapper
        self.real = {name: getattr(self.nixl, name) for name in ("check_xfer_state", "transfer")}
        self.prompt = PROMPT
        self.ended: dict[str, str] = {}
        self.tokens: dict[str, list[int]] = {}

    def add(
        self, request_id: str, max_tokens: int = 4, peer: dict[str, Any] | None = None, handover: bool = False
    ) -> None:
        """Adds a text request, to a decode engine with where its KV will come from; `handover` of its first token.

        KV of a prefill request of one token that counts is not kept.
        """
        request = EngineCoreRequest(
            request_id=request_id, prompt_token_ids=list(self.prompt), mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        frames = [bytes(frame) for frame in MsgpackEncoder().encode(request)]
        if peer:
            self.engine.add_decode(request_id, frames, msgspec.convert(peer, KvPeer), awaits_token=handover)
        else:
            self.engine.add_prefill(request_id, frames, samples=handover, keeps_kv=not (handover and max_tokens == 1))

    def prompt_of(self, num_tokens: int) -> None:
        """From now on prompts have so many tokens."""
        self.prompt = PROMPT[:num_tokens]

    def give(self, request_id: str, token_ids: list[int]) -> None:
        """What a stage does with the token that PREFILLED brings."""
        self.engine.give_token(request_id, token_ids)

    def abort(self, *request_ids: str) -> None:
        """What a stage does with ABORT."""
        self.engine.abort(list(request_ids))

    def step(self, number: int = 1) -> None:
        """Makes so many steps."""
        for _ in range(number):
            for output in self.engine.step()[0]:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finished:
                    self.ended[output.request_id] = str(output.finish_reason)

    def settle(self, within_s: float) -> float:
        """Steps as a worker's thread does, until there is nothing to do and nothing is held; returns the seconds."""
        started = time.monotonic()
        while (self.engine.has_requests() or self.held()) and time.monotonic() - started < within_s:
            if self.engine.has_requests():
                self.step()
            time.sleep(0.01)
        return time.monotonic() - started

    def run(self, seconds: float) -> None:
        """Steps for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.engine.has_requests():
                self.step()
            time.sleep(0.01)

    def held(self) -> int:
        """Requests that either half of the connector remembers something for."""
        halves = (self.connector.connector_scheduler, self.kv)
        return sum(half.num_held for half in halves if hasattr(half, "num_held"))

    def state(self) -> dict[str, Any]:
        """What the engine holds."""
        pool = self.engine.scheduler.kv_cache_manager.block_pool
        return {
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "requests": sorted(self.engine.scheduler.requests),
            "has_requests": self.engine.has_requests(),
            "held": self.held() + len(self.engine.handover),
            "lacking": sorted(self.engine.lacking_token()),
            "ended": self.ended,
            "tokens": self.tokens,
            "tables": {
                name: len(value) for name, value in vars(self.kv).items()
                if name in ("_recving_metadata", "_reqs_to_send", "_pending_d_registrations", "_push_finished_blocks",
                            "_sending_transfers", "_reqs_to_process", "_handshake_futures", "_registered") and value
            },
        }  # fmt: skip

    def hold_writes(self) -> None:
        """From now on writes are under way for ever."""
        self.nixl.check_xfer_state = lambda handle: "PROC"

    def fail_writes(self) -> None:
        """From now on writes fail."""
        self.nixl.check_xfer_state = lambda handle: "ERR"

    def refuse_writes(self) -> None:
        """From now on writes cannot be started."""

        def transfer(*args: Any) -> None:
            raise RuntimeError("NIXL_ERR_BACKEND")

        self.nixl.transfer = transfer

    def heal(self) -> None:
        """Writes are NIXL's again."""
        for name, function in self.real.items():
            setattr(self.nixl, name, function)

    def hear(self, text: str) -> None:
        """Has the connector receive a notification, as if from a peer."""
        notifications = {"peer": [text.encode("latin-1").replace(b"PUSH_REG:", PUSH_REG_NOTIF_PREFIX)]}
        self.nixl.get_new_notifs = lambda: self._heard(notifications)

    def _heard(self, notifications: dict[str, list[bytes]]) -> dict[str, list[bytes]]:
        del self.nixl.get_new_notifs
        return notifications

    def lease(self, seconds: float) -> None:
        """How long finished blocks are kept for a decode worker."""
        self.connector.connector_scheduler._kv_lease_duration = seconds

    def missing(self, *wanted: str) -> int:
        """Blocks in use that none of these requests holds."""
        seen = blocks(self.engine, wanted)
        return seen["num_in_use"] - seen["num_wanted"]

    def peer(self) -> dict[str, Any]:
        """Where decode engines register."""
        return msgspec.to_builtins(self.engine.info().kv)


def main() -> None:
    if "--plain" in sys.argv:  # vLLM's own connector, to see what it does
        push_connector.MODULE = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
        push_connector.PushScheduler.give_up = lambda *_: None
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl import push_scheduler

        push_scheduler.NixlPushConnectorScheduler.give_up = lambda *_: None
    host = Host(Stage(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps({"result": getattr(host, name)(*arguments)}), flush=True)


if __name__ == "__main__":
    main()
