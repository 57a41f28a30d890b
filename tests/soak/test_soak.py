"""Two minutes of the soak, with a seed of its own; `make soak` runs ten."""

from __future__ import annotations

import pytest

from tests.soak.plan import make_plan
from tests.soak.storm import soak

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SEED, SECONDS = 44, 120.0


def test_after_two_minutes_of_faults_every_request_has_ended_right_or_with_a_reason_and_nothing_is_held() -> None:
    plan = make_plan(SEED, SECONDS)
    result = soak(plan)
    print(result.summary())
    assert not result.complaints, "\n".join([*plan.lines(), result.summary()])
    assert {"kill", "stop", "drain"} <= {name.split()[0] for name in result.faults}
