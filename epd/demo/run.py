"""The demo from beginning to end: start, ask, show, measure, compare, stop.

Lives in the user's process; owns one `LocalPipeline`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

from rich.console import Console

from epd import builtin
from epd.client import AsyncClient, EPDError
from epd.config import Config, dump
from epd.demo import measure, pictures, show, timeline
from epd.local import LocalPipeline, Spec
from epd.local.display import Display
from epd.local.environment import free_ports

NUM_BLOCKS, BLOCK, NUM_WARM_UPS = 3, 4, 2
_POLL_S = 0.1
_COLUMNS = 48


class Demo:
    """Runs the demo once.

    Args:
        config: The pipeline's configuration; its model is the built-in one.
        console: Where to.
        encode: Number of encode workers.
        compare: Also measure plain vLLM.
        verbose: Also show the daemons' logs.
    """

    def __init__(
        self, config: Config, console: Console, *, encode: int = 2, compare: bool = True, verbose: bool = False
    ) -> None:
        self._console, self._compare = console, compare
        self._display = Display(console, verbose=verbose)
        self._pipeline = LocalPipeline(config, encode=encode, progress=self._display.on_change)
        self._picture = builtin.demo_image_path()

    async def run(self) -> bool:
        """Returns whether the answer was the truth.

        Raises:
            ConfigError, StartError: as `LocalPipeline`.
            EPDError: the endpoint did not answer as it should.
        """
        async with self._display.logs():
            self._display.note(self._pipeline.note)
            async with self._display.starting():
                await self._pipeline.start()
            keep_logs = True
            try:
                async with AsyncClient(self._pipeline.url) as client:
                    right = await self._show(client)
                keep_logs = not right
            except asyncio.CancelledError:
                keep_logs = False
                raise
            finally:
                self._display.stopping()
                await self._pipeline.close(keep_logs=keep_logs)
        return right

    async def _show(self, client: AsyncClient) -> bool:
        console = self._console
        console.print()
        console.print(
            show.question(pictures.characters(self._picture, _COLUMNS), builtin.DEMO_ANSWER, builtin.DEMO_QUESTION)
        )
        console.print("answer:", style="dim")
        first = await measure.ask(client, builtin.DEMO_QUESTION, self._picture, self._print_text)
        right = measure.normal(first.answer) == measure.normal(builtin.DEMO_ANSWER)
        console.print("\n[green]✓ that is the truth[/]" if right else "\n[bold red]✗ that is not the truth[/]")
        second = await measure.ask(client, builtin.DEMO_QUESTION, self._picture)
        await self._show_story(client, first.request_id, second.request_id)
        show.heading(console, "Figures")
        console.print(show.figures(await self._figures(client, first, second)))
        return right

    def _print_text(self, text: str) -> None:
        self._console.print(text, end="", markup=False, highlight=False, style="bold")

    async def _show_story(self, client: AsyncClient, first_id: str, second_id: str) -> None:
        console = self._console
        first, second = _events(await client.request(first_id)), _events(await client.request(second_id))
        numbers = timeline.number_patches(second, first)
        palette = show.colours([event.get("worker", "") for event in first])
        show.heading(console, "Which encode worker took which patch of the picture")
        answer_rows = builtin.DEMO_ANSWER.split("\n")
        shape = (len(answer_rows), len(answer_rows[0].split()))
        console.print(show.patches(timeline.encoded_by(first), numbers, shape, palette))
        show.heading(console, "Where the time went, in the broker's eyes")
        width = min(console.width, show.MAX_WIDTH)
        unicode = (console.encoding or "").lower().startswith("utf")
        console.print(show.story(timeline.rows(first, numbers), width, palette, unicode=unicode))

    async def _figures(self, client: AsyncClient, first: measure.Asked, second: measure.Asked) -> show.Figures:
        pipeline = self._pipeline
        pids = [daemon.pid for daemon in pipeline.processes.values()] + [(await pipeline.supervisor.zygote()).pid]
        with self._console.status("measuring idle CPU"):
            idle_cpu = await measure.idle_cpu(pids)
        pipeline_s, plain_s = await self._compare_with_plain(client) if self._compare else ([], [])
        return show.Figures(
            ready_s=pipeline.ready_s,
            imported_s=pipeline.imported_s,
            num_processes=len(pids),
            first_s=first.ttft_s,
            second_s=second.ttft_s,
            idle_cpu=idle_cpu,
            pipeline_s=pipeline_s,
            plain_s=plain_s,
        )

    async def _compare_with_plain(self, client: AsyncClient) -> tuple[list[float], list[float]]:
        """Times to first token of the pipeline and of a plain vLLM beside it, in blocks that alternate."""
        fresh = iter(pictures.variants(self._picture, 2 * (NUM_WARM_UPS + NUM_BLOCKS * BLOCK)))
        with self._console.status("starting a plain vLLM beside the pipeline"):
            url = await self._start_plain()
        if not url:
            return [], []

        async def ask(to: AsyncClient, count: int) -> list[float]:
            asked = [await measure.ask(to, builtin.DEMO_QUESTION, next(fresh)) for _ in range(count)]
            right = all(measure.normal(one.answer) == measure.normal(builtin.DEMO_ANSWER) for one in asked)
            return [one.ttft_s for one in asked] if right else []

        pipeline_s: list[float] = []
        plain_s: list[float] = []
        with self._console.status("asking both about pictures that are new to them"):
            async with AsyncClient(url) as plain:
                await ask(client, NUM_WARM_UPS)
                await ask(plain, NUM_WARM_UPS)
                for _ in range(NUM_BLOCKS):
                    pipeline_s += await ask(client, BLOCK)
                    plain_s += await ask(plain, BLOCK)
        self._pipeline.kill("plain", signal.SIGTERM)
        return pipeline_s, plain_s

    async def _start_plain(self) -> str:
        """The URL of a plain vLLM that answers; empty, with a word to the user, if there is none."""
        [port] = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        args = [dump(self._pipeline.config), port]
        spec = Spec(name="plain", role="plain", target="epd.demo.plain:serve", args=args, once=True)
        daemon = await self._pipeline.supervisor.start(spec)
        async with AsyncClient(url) as client:
            while not daemon.exited.is_set():
                with contextlib.suppress(EPDError):
                    if await client.health():
                        return url
                await asyncio.sleep(_POLL_S)
        self._console.print(f"plain vLLM {daemon.how_it_ended()}; log: {daemon.log_path}", style="red")
        return ""


def _events(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return list(answer.get("events") or answer["requests"][0]["events"])
