"""Light daemons for the supervisor's tests: functions that a zygote forks, or that run by `python -m`."""

import os
import signal
import sys
import threading
from pathlib import Path

from epd.local.environment import end_with_supervisor
from epd.process import activation
from epd.process.lifecycle import notify_systemd


def serve(name: str = "stand-in") -> int:
    """Is ready at once and waits for SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print(f"{name} serves", flush=True)
    notify_systemd("READY=1")
    stop.wait()
    return 0


def never_ready() -> int:
    """Hangs while it starts."""
    threading.Event().wait()
    return 0


def stubborn() -> int:
    """Does not stop when asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify_systemd("READY=1")
    threading.Event().wait()
    return 0


def crash() -> int:
    """Says why and ends."""
    print("the first line")
    raise RuntimeError("no such model")


def misconfigured() -> int:
    """Says what is wrong with its configuration and ends, as daemons do."""
    print("engine not configured, and much more")
    notify_systemd("STATUS=some/model: quantization 'fp9' is not known")
    return 2


def fail() -> int:
    """Says what has failed and ends."""
    print("Traceback, and much more")
    notify_systemd("STATUS=ValueError: no memory for the cache")
    return 1


def end_with(status: int) -> int:
    """Ends."""
    return status


def environment(path: str) -> int:
    """Writes down what a fork finds."""
    import random

    names = ("EPD_TEST", "PATH")
    lines = [f"{name}={os.environ.get(name, '')}" for name in names]
    Path(path).write_text("\n".join([*lines, f"random={random.random()}", f"threads={threading.active_count()}"]))
    return 0


def endpoint(config: str, name: str) -> int:
    """Answers 503 to the first GET /ready, then 200."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        num_asked = 0

        def do_GET(self):
            Handler.num_asked += 1
            self.send_response(503 if Handler.num_asked == 1 else 200)
            self.end_headers()

    sock = activation.inherited()
    assert sock is not None
    sock.setblocking(True)
    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return serve(name)


def leave_segment() -> int:
    """Owns a cache pool until it dies."""
    from cache.pools.shared_memory import SharedMemoryPool

    pool = SharedMemoryPool(f"stand-in-{os.getpid()}", 4096)
    print(pool.descriptor().name, flush=True)
    return serve("segment")


if __name__ == "__main__":
    end_with_supervisor()
    sys.exit(globals()[sys.argv[1]]())
