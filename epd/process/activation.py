"""A listening socket that somebody else holds: systemd's socket activation, or the supervisor of `epd up`.

While its owner keeps it open, connections wait in its backlog for the next process to accept them, so a restart refuses
nobody. Lives in the endpoint's process and in the supervisor's; whoever asks for a socket owns it.
"""

from __future__ import annotations

import os
import socket

LISTEN_FD = "EPD_LISTEN_FD"
_FIRST_SYSTEMD_FD = 3
_BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on `host` and `port`; port 0 picks a free one.

    Raises:
        OSError: it cannot listen there.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def is_offered() -> bool:
    """Whether `inherited` will find one."""
    return os.environ.get("LISTEN_PID") == str(os.getpid()) or LISTEN_FD in os.environ


def inherited() -> socket.socket | None:
    """The listening socket that this process was started with, or None.

    systemd announces it by LISTEN_PID and LISTEN_FDS (sd_listen_fds(3)), of whose sockets the first is taken, `epd up`
    by EPD_LISTEN_FD. The variables are removed, so that no child takes the socket for its own.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    number = os.environ.pop(LISTEN_FD, "")
    if pid == str(os.getpid()) and count.isdigit() and int(count) > 0:
        number = str(_FIRST_SYSTEMD_FD)
    if not number:
        return None
    sock = socket.socket(fileno=int(number))
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock
