"""`epd replay`: what a broker did, from the file of its flight recorder (`broker.record`).

Lives in the user's process; needs no running pipeline.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from broker.recording.replay import RecordingError, Replayed, replay
from epd.messages import Story

DIFFERS, USAGE = 1, 2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `replay` to the command line."""
    parser = subparsers.add_parser(
        "replay",
        help="replay what a broker has recorded",
        description="Give the events that a broker has recorded (broker.record) to the same decision core again, and "
        "say what became of the requests. The status is 1 if it decides differently than it did then.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a recording (broker-*.mpk)")
    parser.add_argument(
        "--request", default="", metavar="ID", help="tell the stories of requests whose ids contain this"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replays a recording and prints the result; returns the exit status."""
    try:
        with args.file.open("rb") as file:
            done = replay(file)
    except (OSError, RecordingError) as error:
        print(f"epd replay: {args.file}: {error}", file=sys.stderr)
        return USAGE
    print("\n".join(summary(done)))
    if args.request:
        told = done.core.stories
        stories = [told.story(one) for one in told.ids() if args.request in one]
        for story in stories:
            print("\n".join(["", *tell(story)]))
        if not stories:
            print(f"\nno request {args.request} in the recording, or it is forgotten (broker.story_keep)")
    return DIFFERS if done.first_difference or done.errors else 0


def summary(done: Replayed) -> list[str]:
    """A recording in a few lines."""
    counters = done.core.counters()
    failures = ", ".join(f"{code} {count}" for code, count in sorted(done.failures.items()))
    in_flight = len(done.core.requests)
    same = "as it was then, in every event"
    if done.first_difference:
        same = f"differs from event {done.first_difference} on: recorded by EPD {done.version}, or an error of EPD"
    return [
        f"recorded   {done.began}, {done.seconds:.1f} s, by EPD {done.version}",
        f"events     {done.num_messages} messages, {done.num_ticks} ticks",
        f"requests   {counters.num_accepted} accepted, {counters.num_refused} refused, {counters.num_finished} "
        f"finished, {counters.num_failed} failed, {counters.num_cancelled} cancelled, {in_flight} in flight at the end",
        f"failures   {failures or 'none'}",
        f"retried    {counters.num_retried}",
        f"replay     {same}",
        *(f"error      {error.strip()}" for error in done.errors),
    ]


def tell(story: Story) -> list[str]:
    """A request's story in lines."""
    lines = [f"request {story.request_id}: {story.state}"]
    for event in story.events:
        patch = f"patch {event.patch[:8]}" if event.patch else ""
        words = " ".join(filter(None, (event.worker, patch, event.detail)))
        lines.append(f"{event.at_s:10.3f} s  {event.event:<12} {words}".rstrip())
    return lines
