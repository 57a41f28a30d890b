"""A soak of 75 seconds with a seed of its own: many faults in a short time; `make soak` runs ten minutes."""

from __future__ import annotations

from concurrent.futures import Future

import httpx
import pytest

from tests.soak.plan import VICTIMS, make_plan
from tests.soak.storm import soak

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SEED, SECONDS = 361, 75.0


@pytest.mark.usefixtures("nursery")
def test_after_a_storm_of_faults_every_request_has_ended_right_or_with_a_reason_and_nothing_is_held(
    plain_starting: Future[httpx.Client],
) -> None:
    plan = make_plan(SEED, SECONDS, rate=3.0, fault_every_s=3.5)
    assert {fault.victim for fault in plan.faults if fault.kind in ("kill", "stop")} == set(VICTIMS)
    assert len({fault.victim for fault in plan.faults if fault.kind == "drain"}) >= 3
    result = soak(plan, plain_starting.result())
    print(result.summary())
    assert not result.complaints, "\n".join([*plan.lines(), result.summary()])
    assert {"kill", "stop", "drain"} <= {name.split()[0] for name in result.faults}
