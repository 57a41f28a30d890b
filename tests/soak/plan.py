"""What a soak does and when: requests, impatient clients, bursts and faults, as a pure function of a seed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from tests.pipeline.chats import chat, scribble

WORKERS = ("encode-0", "encode-1", "prefill-0", "decode-0", "decode-1")
VICTIMS = (*WORKERS, "cache", "broker")
QUESTIONS = ("What digits are in the image?", "List the digits.", "How many digits are there?", "Which is the largest?")
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
NUM_PROMPTS = 24
# Faults keep away from the end, so that every request has a pipeline to end in.
CALM_S = 10.0


@dataclasses.dataclass(frozen=True)
class Ask:
    """A client: at `at_s` it sends prompt `prompt`, perhaps goes away after `leaves_after_s`, or cancels by id.

    With `salt` its pictures are in no cache; without, they are shared with other requests for the same prompt.
    """

    number: int
    at_s: float
    prompt: int
    stream: bool
    salt: str = ""
    leaves_after_s: float | None = None
    cancels_after_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """At `at_s` something happens to a daemon: "kill" (SIGKILL), "stop" (SIGSTOP for `for_s`), "drain" (SIGTERM)."""

    at_s: float
    kind: str
    victim: str
    for_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a soak will do."""

    seed: int
    seconds: float
    asks: list[Ask]
    faults: list[Fault]

    def lines(self) -> list[str]:
        """The plan for people, in order of time."""
        events = sorted([*self.asks, *self.faults], key=lambda event: event.at_s)
        return [f"seed {self.seed}, {self.seconds:g} s", *(f"{event.at_s:7.2f}  {_line(event)}" for event in events)]


def make_plan(seed: int, seconds: float, *, rate: float = 2.0, fault_every_s: float = 6.0, burst: int = 60) -> Plan:
    """The plan of a seed.

    Args:
        seed: anything; the same gives the same plan.
        seconds: when the last request is sent, and `CALM_S` after the last fault.
        rate: requests a second, on average.
        fault_every_s: seconds between faults, on average.
        burst: how many requests come at once now and then, about every 25 s.
    """
    rng = random.Random(f"soak {seed}")
    times = []
    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    at = 0.0
    while (at := at + rng.uniform(15.0, 35.0)) < seconds:
        times += [at + rng.uniform(0.0, 0.3) for _ in range(burst)]
    asks = [_ask(rng, number, at) for number, at in enumerate(sorted(times))]
    faults = []
    at = 1.0
    while (at := at + rng.uniform(0.3, 1.7) * fault_every_s) < seconds - CALM_S:
        faults.append(_fault(rng, at))
    return Plan(seed, seconds, asks, faults)


def _ask(rng: random.Random, number: int, at_s: float) -> Ask:
    impatience = rng.random()
    return Ask(
        number=number,
        at_s=at_s,
        prompt=rng.randrange(NUM_PROMPTS),
        stream=rng.random() < 0.5,
        salt=f"salt {number}" if rng.random() < 0.5 else "",
        leaves_after_s=rng.uniform(0.0, 1.0) if impatience < 0.12 else None,
        cancels_after_s=rng.uniform(0.0, 0.6) if 0.12 <= impatience < 0.2 else None,
    )


def _fault(rng: random.Random, at_s: float) -> Fault:
    kind = rng.choices(("kill", "stop", "drain"), (5, 3, 2))[0]
    if kind == "drain":
        return Fault(at_s, kind, rng.choice(WORKERS))
    if kind == "stop":
        return Fault(at_s, kind, rng.choice(VICTIMS), for_s=rng.choice((0.5, 2.0, 6.0)))
    return Fault(at_s, kind, rng.choice(VICTIMS))


def _line(event: Ask | Fault) -> str:
    if isinstance(event, Fault):
        return f"{event.kind} {event.victim}" + (f" for {event.for_s:g} s" if event.for_s else "")
    words = [f"ask #{event.number}: prompt {event.prompt}", "stream" if event.stream else "whole"]
    words += [event.salt] if event.salt else []
    words += [f"leaves after {event.leaves_after_s:.2f} s"] if event.leaves_after_s is not None else []
    words += [f"cancels after {event.cancels_after_s:.2f} s"] if event.cancels_after_s is not None else []
    return ", ".join(words)


def make_prompts() -> list[dict[str, Any]]:
    """The bodies that are asked, always the same: text and 1 to 4 pictures, short and long, sampled and constrained."""
    rng = random.Random("prompts")
    prompts = []
    for number in range(NUM_PROMPTS):
        pictures = 0 if number % 3 == 0 else 1 + number % 4
        sizes = [(256, 128), (128, 256), (192, 192)]
        images = [scribble(2000 + 10 * number + i, rng.choice(sizes)) for i in range(pictures)]
        body = chat(rng.choice(QUESTIONS), images, max_tokens=rng.choice((4, 16, 48, 160)), ignore_eos=True)
        match number % 8:
            case 5:
                body |= {"n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 12}
            case 6:
                body |= {"presence_penalty": 1.5, "frequency_penalty": 0.5}
            case 7:
                form = {"type": "json_schema", "json_schema": {"name": "digits", "schema": SCHEMA, "strict": True}}
                body |= {"response_format": form, "max_tokens": 24, "ignore_eos": False}
        prompts.append(body)
    return prompts
