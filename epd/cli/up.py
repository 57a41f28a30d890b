"""`epd up`: a whole pipeline on this host, until Ctrl-C.

Lives in the user's process; owns the terminal, the signals and one `LocalPipeline`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from epd.cli import options

if TYPE_CHECKING:
    from epd.local import LocalPipeline
    from epd.local.display import Display

OK, FAILED, INTERRUPTED = 0, 1, 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``up`` to the command line."""
    parser = subparsers.add_parser(
        "up",
        help="run a whole pipeline on this host",
        description="Run broker, cache, endpoint and workers on this host until Ctrl-C. The first Ctrl-C finishes what "
        "runs, the second stops at once. Daemons that crash are restarted.",
    )
    options.add_listen(parser)
    options.add_stages(parser)
    options.add_common(parser)
    parser.add_argument("--verbose", action="store_true", help="also show the daemons' logs")
    parser.add_argument("--no-restart", action="store_true", help="do not restart daemons that crash")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the pipeline; returns 0 after a clean drain, 1 after trouble, 130 when it was stopped at once."""
    from epd.local import LocalPipeline
    from epd.local.display import Display, PatientConsole

    display = Display(PatientConsole(stderr=True), verbose=args.verbose)
    config = options.configure(args)
    return asyncio.run(_up(LocalPipeline(config, progress=display.on_change, restart=not args.no_restart), display))


class Stop:
    """What the user wants: `asked` after the first signal, `at_once` after the second."""

    def __init__(self) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()

    def on_signal(self) -> None:
        """A signal has come."""
        (self.at_once if self.asked.is_set() else self.asked).set()


@contextlib.asynccontextmanager
async def stop_signals() -> AsyncIterator[Stop]:
    """While entered, SIGINT, SIGTERM and SIGHUP (a closed terminal) are noted here instead of ending the process."""
    loop, stop = asyncio.get_running_loop(), Stop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop.on_signal)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _up(pipeline: LocalPipeline, display: Display) -> int:
    from epd.local import StartError

    async with stop_signals() as stop, display.logs():
        display.note(pipeline.note)
        try:
            async with display.starting():
                if not await _started(pipeline, stop):
                    return INTERRUPTED
        except StartError as error:
            display.print(f"epd up: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            return FAILED
        try:
            welcome(pipeline, display)
            await stop.asked.wait()
            return await _stopped(pipeline, display, stop)
        except BaseException:
            await pipeline.stop_now()
            raise


async def _started(pipeline: LocalPipeline, stop: Stop) -> bool:
    """Starts the pipeline; False if the user no longer wants it."""
    starting = asyncio.create_task(pipeline.start(), name="start")
    asked = asyncio.create_task(stop.asked.wait(), name="asked")
    try:
        await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            return True
        return False
    finally:
        for task in (starting, asked):
            task.cancel()
        await asyncio.gather(starting, asked, return_exceptions=True)


async def _stopped(pipeline: LocalPipeline, display: Display, stop: Stop) -> int:
    """Drains until it is done or the user loses patience."""
    display.stopping()
    display.print("finishing what runs (Ctrl-C again stops at once)", style="dim")
    closing = asyncio.create_task(pipeline.close(), name="close")
    at_once = asyncio.create_task(stop.at_once.wait(), name="at-once")
    await asyncio.wait({closing, at_once}, return_when=asyncio.FIRST_COMPLETED)
    if at_once.done():
        await pipeline.stop_now()
    at_once.cancel()
    await closing
    if stop.at_once.is_set():
        return INTERRUPTED
    if pipeline.clean:
        display.print("stopped", style="dim")
        return OK
    for daemon in pipeline.processes.values():
        if daemon.status:
            display.print(
                f"{daemon.name} {daemon.how_it_ended()}; log: {daemon.log_path}", highlight=False, soft_wrap=True
            )
    return FAILED


def welcome(pipeline: LocalPipeline, display: Display) -> None:
    """Says what to do with it now; commands are on separate lines, to be copied."""
    from rich.panel import Panel
    from rich.text import Text

    model = pipeline.config.served_model_name or pipeline.config.model
    roles = [daemon.role for daemon in pipeline.processes.values()]
    stages = ", ".join(f"{roles.count(stage)} {stage}" for stage in ("encode", "prefill", "decode"))
    url = pipeline.url
    text = Text.assemble(
        ("model  ", "dim"), model, ("\nstages ", "dim"), stages, ("\nlogs   ", "dim"), str(pipeline.run_dir),
        ("\nstop   ", "dim"), "Ctrl-C",
    )  # fmt: skip
    title = f"ready at {url} after {pipeline.ready_s:.1f} s"
    display.print(Panel(text, title=title, title_align="left", expand=False))
    where = "" if url == "http://127.0.0.1:8400" else f" --url {url}"
    image, question = _example(pipeline)
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    for command in (
        f'epd ask "{question}" --image {image}{where}',
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    ):
        display.print(command, soft_wrap=True, highlight=False, markup=False)


def _example(pipeline: LocalPipeline) -> tuple[str, str]:
    from epd import builtin

    if pipeline.config.model == str(builtin.model_path()):
        path = builtin.demo_image_path()
        return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path), builtin.DEMO_QUESTION
    return "picture.png", "What is this?"
