"""`python -m tests.soak --seconds 600 --seed 7`: a storm of requests and faults, judged to the last request."""

from __future__ import annotations

import argparse
import sys
import time

from tests.soak.plan import make_plan
from tests.soak.storm import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long requests are sent (600)")
    parser.add_argument("--seed", type=int, default=None, help="decides everything (the time)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, bursts apart (2)")
    parser.add_argument("--fault-every", type=float, default=6.0, help="seconds between faults, on average (6)")
    parser.add_argument("--burst", type=int, default=60, help="requests that come at once now and then (60)")
    parser.add_argument("--plan", action="store_true", help="print the plan and do nothing")
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    plan = make_plan(seed, args.seconds, rate=args.rate, fault_every_s=args.fault_every, burst=args.burst)
    if args.plan:
        print("\n".join(plan.lines()))
        return 0
    print(f"seed {seed}: {len(plan.asks)} requests and {len(plan.faults)} faults in {args.seconds:g} s", flush=True)
    result = soak(plan)
    if result.complaints:
        print("\n".join(plan.lines()))
    print(result.summary())
    return 1 if result.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
