"""What a forked process calls: unpack the configuration, run the daemon.

Lives in the endpoint's and the workers' processes; owns nothing.
"""

from __future__ import annotations

from epd.config import parse


def endpoint(config: str, name: str) -> int:
    """Runs the endpoint until SIGTERM; `config` is JSON of `epd.config.dump`."""
    from epd.endpoint import daemon

    return daemon.run(parse(config), name)


def worker(config: str, stage: str, name: str) -> int:
    """Runs a worker until SIGTERM; `config` is JSON of `epd.config.dump`."""
    from workers import daemon

    return daemon.run(parse(config), stage, name)
