"""Runs a soak's plan against a pipeline and judges everything that comes back."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import signal
import time
from typing import Any

import httpx

from benchmarks.servers import DTYPE, MAX_IMAGES, MAX_MODEL_LEN, Running
from epd.config import BrokerConfig, Config, EndpointConfig
from epd.local import State
from tests.soak.outcomes import (
    BAD,
    CANCELLED,
    HUNG,
    LEFT,
    RIGHT,
    UNEXPLAINED,
    Answer,
    Choices,
    Outcome,
    judge,
)
from tests.soak.plan import VICTIMS, Ask, Fault, Plan

DEADLINE_S = 60.0
# What a burst that is too large gets; everybody else is to be answered.
REFUSED = ("overloaded",)
_GRACE_S = 15.0
_BACK_WITHIN_S = 60.0
_IDLE_WITHIN_S = 60.0


def soak_config() -> Config:
    """The pipeline's configuration: small queues, so that bursts are too much for it."""
    return Config(
        engine={"max_model_len": MAX_MODEL_LEN, "dtype": DTYPE, "limit_mm_per_prompt": {"image": MAX_IMAGES}},
        endpoint=EndpointConfig(port=0, max_images=MAX_IMAGES, request_timeout_s=DEADLINE_S),
        broker=BrokerConfig(max_queued=24, max_in_flight=48),
    )


@dataclasses.dataclass
class Result:
    """What a soak has found; it is fine if there is nothing in `complaints`."""

    plan: Plan
    outcomes: list[Outcome]
    faults: dict[str, int]
    complaints: list[str]

    def summary(self) -> str:
        """Counts per outcome and per fault, the rate of success, and what is wrong."""
        counts = collections.Counter(outcome.name for outcome in self.outcomes)
        wanted = [one for one in self.outcomes if one.kind not in (LEFT, CANCELLED) and one.detail not in REFUSED]
        right = sorted(one.took_s for one in wanted if one.kind == RIGHT)
        lines = [f"seed {self.plan.seed}, {self.plan.seconds:g} s: {len(self.outcomes)} requests"]
        lines += [f"  {count:5d}  {name}" for name, count in counts.most_common()]
        lines += [f"faults: {', '.join(f'{count} {name}' for name, count in sorted(self.faults.items())) or 'none'}"]
        if right:
            lines.append(
                f"{len(right) / len(wanted):.1%} of the {len(wanted)} that were let in and waited for were right; "
                f"they took {right[len(right) // 2]:.2f} s (median), {right[-1]:.1f} s at most"
            )
        return "\n".join([*lines, *(f"NOT FINE: {one}" for one in self.complaints)])


class Soak:
    """One run of a plan.

    Args:
        running: the pipeline; its daemons are started again when they end.
        plan: what to do.
        prompts: the bodies that the plan's asks name.
        truths: what plain vLLM answers to each.
    """

    def __init__(self, running: Running, plan: Plan, prompts: list[dict[str, Any]], truths: list[Choices]) -> None:
        self._running, self._plan, self._prompts, self._truths = running, plan, prompts, truths
        self._baseline = held(running)
        self._faults: collections.Counter[str] = collections.Counter()
        self._complaints: list[str] = []

    def run(self) -> Result:
        """Runs it all; returns when the pipeline is at rest again, or has failed to come to rest."""
        outcomes = asyncio.run(self._storm())
        for outcome in outcomes:
            if outcome.kind in BAD:
                text = f"request #{outcome.number} ({outcome.request_id}): {outcome.kind}: {outcome.detail}"
                self._complaints.append(f"{text}; its story: {self._story(outcome.request_id)}")
        if len(outcomes) != len(self._plan.asks):
            self._complaints.append(f"{len(outcomes)} outcomes for {len(self._plan.asks)} requests")
        self._wait_back()
        self._wait_idle()
        return Result(self._plan, outcomes, dict(self._faults), self._complaints)

    # ---- the storm -------------------------------------------------------------------------------------------------

    async def _storm(self) -> list[Outcome]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self._running.pipeline.url, timeout=None, limits=limits) as http:
            self._http, self._started = http, time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                asks = [tasks.create_task(self._ask(ask), name=f"ask-{ask.number}") for ask in self._plan.asks]
                for fault in self._plan.faults:
                    tasks.create_task(self._fault(fault), name=f"{fault.kind}-{fault.victim}")
            return [task.result() for task in asks]

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._started + at_s - time.monotonic()))

    async def _ask(self, ask: Ask) -> Outcome:
        await self._until(ask.at_s)
        started = time.monotonic()
        answer = Answer(request_id=f"chatcmpl-soak-{self._plan.seed}-{ask.number}")
        patience_s = DEADLINE_S + _GRACE_S if ask.leaves_after_s is None else ask.leaves_after_s
        cancelling = None
        if ask.cancels_after_s is not None:
            cancelling = asyncio.create_task(self._cancel(answer.request_id, ask.cancels_after_s))
        kind, detail = HUNG, f"no end {patience_s:.0f} s after it was sent"
        try:
            async with asyncio.timeout(patience_s):
                status = await self._post(ask, answer)
            kind, detail = judge(answer, status, self._truths[ask.prompt], cancels=ask.cancels_after_s is not None)
        except TimeoutError:
            if ask.leaves_after_s is not None:
                kind, detail = LEFT, ""
        except (httpx.HTTPError, ValueError, KeyError) as error:
            kind, detail = UNEXPLAINED, repr(error)
        finally:
            if cancelling is not None:
                await asyncio.gather(cancelling, return_exceptions=True)
        return Outcome(ask.number, kind, detail, answer.request_id, time.monotonic() - started)

    async def _post(self, ask: Ask, answer: Answer) -> int:
        body = self._prompts[ask.prompt] | {"stream": ask.stream}
        if ask.salt:
            body |= {"cache_salt": f"{self._plan.seed} {ask.salt}"}
        headers = {"X-Request-Id": f"soak-{self._plan.seed}-{ask.number}"}
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
            if ask.stream and reply.status_code == 200:
                async for line in reply.aiter_lines():
                    answer.take_event(line)
            else:
                answer.take_body(json.loads(await reply.aread()))
            return reply.status_code

    async def _cancel(self, request_id: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._http.post(f"/v1/requests/{request_id}/cancel", timeout=10)

    async def _fault(self, fault: Fault) -> None:
        await self._until(fault.at_s)
        daemon = self._running.pipeline.processes[fault.victim]
        if daemon.state is not State.READY or not daemon.alive:
            self._faults[f"{fault.kind} skipped ({fault.victim} was away)"] += 1
            return
        self._faults[f"{fault.kind} {fault.victim}"] += 1
        pid = daemon.pid
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "drain": signal.SIGTERM}[fault.kind]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            if fault.for_s:
                await asyncio.sleep(fault.for_s)
                if daemon.pid == pid and daemon.alive:
                    os.kill(pid, signal.SIGCONT)

    # ---- the calm after it -----------------------------------------------------------------------------------------

    def _wait_back(self) -> None:
        """All daemons are ready again, and the endpoint says so."""
        deadline = time.monotonic() + _BACK_WITHIN_S
        processes = self._running.pipeline.processes
        while True:
            away = [name for name in (*VICTIMS, "endpoint") if processes[name].state is not State.READY]
            ready = self._running.http.get("/ready").json()
            if not away and ready["ready"]:
                return
            if time.monotonic() > deadline:
                self._complaints.append(f"after {_BACK_WITHIN_S:.0f} s {away or ready} is not back")
                return
            time.sleep(0.2)

    def _wait_idle(self) -> None:
        """Nobody holds more than before the storm."""
        deadline = time.monotonic() + _IDLE_WITHIN_S
        while more := self._held_more():
            if time.monotonic() > deadline:
                self._complaints.append(f"after {_IDLE_WITHIN_S:.0f} s still held: {more}")
                return
            time.sleep(0.5)

    def _held_more(self) -> dict[str, str]:
        before, now = self._baseline, held(self._running)
        slack = {"fds": 16, "tasks": 4, "threads": 24}  # connections that are kept open, and pools that have grown
        return {
            f"{name} {kind}": f"{before.get(name, {}).get(kind, 0)} -> {count}"
            for name, kinds in now.items()
            for kind, count in kinds.items()
            if count > before.get(name, {}).get(kind, 0) + slack.get(kind, 0)
        }

    def _story(self, request_id: str) -> str:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            return json.dumps(self._running.http.get(f"/v1/requests/{request_id}").json())[:4000]
        return "unknown"


def held(running: Running) -> dict[str, dict[str, int]]:
    """What each daemon holds, by kind."""
    return running.http.get("/debug/held").json()["daemons"]
