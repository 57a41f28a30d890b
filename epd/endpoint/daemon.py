"""The endpoint daemon: starts, listens, drains, stops.

Lives in the endpoint process; owns its life. vLLM is imported when the daemon starts, not when this module is imported.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import structlog

from epd.config import Config, ConfigError
from epd.errors import one_line
from epd.process import lifecycle
from epd.process.lifecycle import Life

log = structlog.get_logger()

PORT_FILE = "EPD_PORT_FILE"


async def main(config: Config, name: str, life: Life) -> int:
    """Serves until it is stopped, then drains.

    Returns:
        The exit status: 0 after a drain, 1 where the endpoint cannot start or has died.
    """
    started_at = time.monotonic()
    _set_vllm_environment(config)
    from epd.endpoint.http.server import Endpoint

    imported_at = time.monotonic()
    endpoint = Endpoint(config, name)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(endpoint)
        except (ConfigError, OSError) as error:
            log.error("the endpoint cannot start", reason=str(error))
            lifecycle.notify_systemd(f"STATUS={one_line(error)}")
            return lifecycle.MISCONFIGURED if isinstance(error, ConfigError) else lifecycle.FAILED
        log.info(
            "listening",
            host=config.endpoint.host,
            port=endpoint.port,
            import_s=round(imported_at - started_at, 2),
            start_s=round(time.monotonic() - started_at, 2),
        )
        _write_port(endpoint.port)
        life.ready()
        died = await life.end(endpoint.died.wait())
        if died:
            log.error("vLLM's output handler has died")
        await endpoint.drain(0.0 if died else config.endpoint.drain_s)
        log.info("drained")
    return lifecycle.FAILED if died else lifecycle.OK


def run(config: Config, name: str) -> int:
    """Runs the daemon until a signal; returns the exit status."""
    return lifecycle.run(config.log, name, lambda life: main(config, name, life))


def _write_port(port: int) -> None:
    """Writes the port into the file named by EPD_PORT_FILE, whole or not at all."""
    name = os.environ.get(PORT_FILE)
    if name:
        part = Path(f"{name}.part")
        part.write_text(f"{port}\n")
        part.replace(name)


def _set_vllm_environment(config: Config) -> None:
    """Sets vLLM's own limits on media that it fetches itself; what the user has set stays."""
    endpoint = config.endpoint
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(endpoint.max_pixels))
    os.environ.setdefault("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", str(max(endpoint.max_body_bytes >> 20, 1)))
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
