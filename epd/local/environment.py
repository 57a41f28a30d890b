"""What a pipeline on one host needs from that host: environment variables, free ports, a run directory, a model.

Lives in the supervisor's process (`epd up`, `epd demo`, tests); owns nothing.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from epd import builtin
from epd.config import Config, ConfigError
from epd.process import activation
from epd.process.service import die_with_parent

PARENT_PID = "EPD_PARENT_PID"  # set for daemons that must end with the process of this id
ORPHANED_S = 3.0  # how long forked daemons may take to stop when the supervisor has died
_RUN_PREFIX = "epd-run-"
_SCRATCH = "tmp"
_PORTS = (20_000, 32_000)  # below what Linux gives to outgoing connections
_STALE_AFTER_S = 24 * 3600.0
_MAX_SOCKET_PATH = 100  # sockaddr_un holds 108 bytes, and file names are added

# These make the built-in model start quickly and stay small; the user's own options win.
_BUILTIN_ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 16,
}


def resolve_model(config: Config) -> Config:
    """Returns `config` with the built-in model if it names none (or "builtin"), and checks the model's name.

    Raises:
        ConfigError: the model looks like a folder but is not one, or has no `config.json`.
    """
    if config.model in ("", "builtin"):
        return msgspec.structs.replace(
            config,
            model=str(builtin.model_path()),
            served_model_name=config.served_model_name or builtin.MODEL_NAME,
            engine=_BUILTIN_ENGINE | config.engine,
        )
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model {config.model}: the folder has no config.json")
        return msgspec.structs.replace(config, model=str(folder.resolve()))
    if config.model.startswith(("/", ".", "~")) or config.model.count("/") > 1:
        raise ConfigError(f"model {config.model}: no such folder")
    return config


def has_cuda() -> bool:
    """Whether this host has an NVIDIA driver; loads nothing to find out."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def set_engine_environment(model: str, log_level: str = "info") -> None:
    """Sets what vLLM reads from the environment when it is imported; except for one variable, existing values win."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level.lower() == "debug" else "WARNING",
        "VLLM_CONFIGURE_LOGGING": "1" if "VLLM_LOGGING_CONFIG_PATH" in os.environ else "0",  # `epd.process.logs` does
        "TOKENIZERS_PARALLELISM": "false",
        # torch would put one (154 MB) below TMPDIR, which goes with the run, and so make it again in each start, for 14
        # to 24 s when log-probabilities are first asked for. Without it the first start compiles for half that time,
        # and later ones find what it has compiled.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    if Path(model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    if not has_cuda():
        # Several engines share the cores: more threads each, or threads bound to cores, only get in the way.
        defaults |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # NIXL pushes the recurrent state of hybrid models (MiniCPM-V 4.6) only in this layout; a process that has made a
    # vLLM configuration before may have another one from it.
    os.environ["VLLM_SSM_CONV_STATE_LAYOUT"] = "DS"


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Returns `count` different TCP ports of `host` on which nobody listens at this moment.

    They will be bound only seconds later. So they are not chosen by `bind` with port 0: the system could give such
    ports to outgoing connections meanwhile, and vLLM's NIXL connector would then wait for ever.

    Raises:
        ConfigError: there are not enough.
    """
    first, last = _PORTS
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(first, last), last - first):
        if len(ports) == count:
            break
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((host, port))
            ports.append(port)
    if len(ports) < count:
        raise ConfigError(f"no {count} free TCP ports between {first} and {last} on {host}")
    return ports


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens where the endpoint will, before anything is started; port 0 picks a free one.

    Raises:
        ConfigError: it cannot listen there; the text says why.
    """
    try:
        return activation.bind(host, port)
    except OSError as error:
        hint = "; choose another with --port" if error.errno == 98 else ""
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}{hint}") from None


def make_run_directory() -> Path:
    """Makes a private folder for sockets and logs, short enough for a Unix socket's path.

    Folders that earlier runs left behind are removed after a day.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(_RUN_PREFIX) + 40 > _MAX_SOCKET_PATH:
        base = Path("/tmp")
    for left in base.glob(f"{_RUN_PREFIX}*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            owner = int(left.name.removeprefix(_RUN_PREFIX).split("-")[0])
            if not Path(f"/proc/{owner}").exists() and time.time() - left.stat().st_mtime > _STALE_AFTER_S:
                shutil.rmtree(left)
    return Path(tempfile.mkdtemp(prefix=f"{_RUN_PREFIX}{os.getpid()}-", dir=base))  # 0700


def scratch_environment(run_dir: Path) -> dict[str, str]:
    """Variables that make the daemons' temporary files go with the run: vLLM's engines leave sockets and files there.

    What torch compiles stays in its default place, so that the next run finds it.
    """
    folder = run_dir / _SCRATCH
    folder.mkdir(exist_ok=True)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # this user id has no name
        user = str(os.getuid())
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{user}"
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(compiled))}


def sweep(run_dir: Path) -> None:
    """Removes what killed daemons could not remove: temporary files, and cache segments without an owner."""
    for path in run_dir.glob("*.sock"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(run_dir / _SCRATCH, ignore_errors=True)
    with contextlib.suppress(ImportError):
        from cache.pools import shared_memory

        shared_memory.sweep_stale()


def end_with_supervisor() -> None:
    """In a daemon that is a separate process: asks the kernel for SIGTERM when the supervisor, if any, dies."""
    parent = os.environ.get(PARENT_PID)
    if parent is None:
        return
    die_with_parent()
    if os.getppid() != int(parent):  # it has died already
        sys.exit(1)


def title(text: str) -> None:
    """Names this process in `ps`, if setproctitle is installed."""
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(text)


def python(*arguments: str) -> list[str]:
    """The command line of another Python like this one."""
    return [sys.executable, *arguments]
