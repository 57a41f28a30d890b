"""What pools in GPU memory need of CUDA: a small protocol, and that protocol through CuPy and torch.

Lives in the cache daemon, which needs CuPy alone, and in the workers, which have torch as well. Both are imported only
when used. Owns the mappings of other processes' memory: each closes when the last tensor that shows it is gone.

`CupyRuntime` was written against CuPy 14.2 (`cupy.cuda.runtime`). CuPy carries its own CUDA runtime; both it and
torch use the device's primary context, so addresses, streams and events of one are valid in the other. All IPC goes
through CuPy's, as CUDA demands the same runtime (and driver) on both sides.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from cache.pools.base import PoolKindError

_NOT_READY = 600  # cudaErrorNotReady


class Runtime(Protocol):
    """CUDA as `cache.pools.cuda_ipc` uses it. Devices are ordinals of this process; failures are RuntimeErrors.

    Work goes to the calling thread's current torch stream of a device, and no method waits for the GPU unless it says
    so. Tests have an implementation without a GPU.
    """

    def bus_id(self, device: int) -> str:
        """The PCI bus id of a device."""
        ...

    def device_at(self, bus_id: str) -> int:
        """The device with that PCI bus id."""
        ...

    def allocate(self, device: int, nbytes: int) -> int:
        """Device memory by plain cudaMalloc: its address."""
        ...

    def free(self, device: int, address: int) -> None:
        """Gives it back. Waits for the device."""
        ...

    def export_memory(self, device: int, address: int) -> bytes:
        """The IPC handle of memory that `allocate` gave."""
        ...

    def open_memory(self, device: int, handle: bytes, nbytes: int) -> Any:
        """Maps another process's memory as a uint8 tensor of `nbytes`; unmapped when no tensor shows it any more."""
        ...

    def create_event(self, device: int) -> int:
        """A new event that other processes may wait for."""
        ...

    def export_event(self, event: int) -> bytes:
        """Its IPC handle."""
        ...

    def open_event(self, device: int, handle: bytes) -> int:
        """Another process's event."""
        ...

    def record(self, event: int, device: int) -> None:
        """Makes the event stand for all that is on the current stream now."""
        ...

    def wait(self, event: int, device: int) -> None:
        """Makes everything later on the current stream run after the event's most recent record."""
        ...

    def is_done(self, event: int) -> bool:
        """Whether all that the event stands for has run; true for one that was never recorded."""
        ...

    def synchronize(self, device: int) -> None:
        """Waits for all work of this process on the device."""
        ...

    def device_of(self, tensor: Any) -> int | None:
        """The device a tensor is on; None for one on the CPU."""
        ...

    def copy(self, target: Any, source: Any) -> None:
        """Copies between tensors of the same shape and type, on the current stream of the source's device."""
        ...


def why_unavailable() -> str | None:
    """Why there can be no pools in GPU memory here; None if there can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed (pip install cupy-cuda13x)"
    try:
        from cupy.cuda import runtime

        return None if runtime.getDeviceCount() > 0 else "there is no CUDA device"
    except Exception as error:  # a CuPy that does not fit its numpy raises all kinds
        return f"{type(error).__name__}: {error}"


class CupyRuntime:
    """`Runtime` on the GPUs of this machine.

    Raises:
        PoolKindError: there is no GPU, or CuPy is not installed.
    """

    def __init__(self) -> None:
        if (reason := why_unavailable()) is not None:
            raise PoolKindError(reason)
        from cupy.cuda import runtime

        self._cuda: Any = runtime

    def bus_id(self, device: int) -> str:
        """As in `Runtime`."""
        return str(self._cuda.deviceGetPCIBusId(device))

    def device_at(self, bus_id: str) -> int:
        """As in `Runtime`."""
        return int(self._cuda.deviceGetByPCIBusId(bus_id))

    def allocate(self, device: int, nbytes: int) -> int:
        """As in `Runtime`. Managed and stream-ordered memory (cudaMallocAsync) have no such IPC handles."""
        with self._on(device):
            return int(self._cuda.malloc(nbytes))

    def free(self, device: int, address: int) -> None:
        """As in `Runtime`."""
        with self._on(device):
            self._cuda.free(address)

    def export_memory(self, device: int, address: int) -> bytes:
        """As in `Runtime`."""
        with self._on(device):
            return bytes(self._cuda.ipcGetMemHandle(address))

    def open_memory(self, device: int, handle: bytes, nbytes: int) -> Any:
        """As in `Runtime`, through DLPack.

        The handle stands for the whole allocation and gives its start. It cannot be opened in the process that made it.
        """
        import cupy
        import torch

        with self._on(device):
            mapping = _Mapping(self, device, int(self._cuda.ipcOpenMemHandle(handle)))
            memory = cupy.cuda.UnownedMemory(mapping.address, nbytes, mapping, device)
            array = cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
            return torch.from_dlpack(array)

    def create_event(self, device: int) -> int:
        """As in `Runtime`. Events for IPC need cudaEventInterprocess and cudaEventDisableTiming."""
        with self._on(device):
            flags = self._cuda.eventInterprocess | self._cuda.eventDisableTiming
            return int(self._cuda.eventCreateWithFlags(flags))

    def export_event(self, event: int) -> bytes:
        """As in `Runtime`."""
        return bytes(self._cuda.ipcGetEventHandle(event))

    def open_event(self, device: int, handle: bytes) -> int:
        """As in `Runtime`."""
        with self._on(device):
            return int(self._cuda.ipcOpenEventHandle(handle))

    def record(self, event: int, device: int) -> None:
        """As in `Runtime`. Stream 0 is that of the current device, hence the guard."""
        with self._on(device):
            self._cuda.eventRecord(event, _stream(device))

    def wait(self, event: int, device: int) -> None:
        """As in `Runtime`: cudaStreamWaitEvent captures the most recent record at the time of the call."""
        with self._on(device):
            self._cuda.streamWaitEvent(_stream(device), event)

    def is_done(self, event: int) -> bool:
        """As in `Runtime`."""
        status = int(self._cuda.eventQuery(event))  # CuPy hands the status out and leaves CUDA's "last error" set
        if status != 0:
            with suppress(RuntimeError):
                self._cuda.check_status(status)  # clears it
        if status not in (0, _NOT_READY):
            self._cuda.check_status(status)
        return status == 0

    def synchronize(self, device: int) -> None:
        """As in `Runtime`."""
        with self._on(device):
            self._cuda.deviceSynchronize()

    def close_memory(self, device: int, address: int) -> None:
        """Unmaps what `open_memory` mapped, after everything on the device has run."""
        with self._on(device):
            self._cuda.deviceSynchronize()
            self._cuda.ipcCloseMemHandle(address)

    def device_of(self, tensor: Any) -> int | None:
        """As in `Runtime`."""
        return int(tensor.device.index) if tensor.device.type == "cuda" else None

    def copy(self, target: Any, source: Any) -> None:
        """As in `Runtime`: torch makes one cudaMemcpyAsync of contiguous tensors on one device."""
        target.copy_(source, non_blocking=True)

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """Makes a device current for this thread, and afterwards the previous one, so that torch notices nothing."""
        previous = self._cuda.getDevice()
        if previous != device:
            self._cuda.setDevice(device)
        try:
            yield
        finally:
            if previous != device:
                self._cuda.setDevice(previous)


class _Mapping:
    """Memory of another process at `address`; unmapped when it is collected, but not while Python shuts down."""

    def __init__(self, runtime: CupyRuntime, device: int, address: int) -> None:
        self.address = address
        self._runtime = runtime
        self._device = device

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._runtime.close_memory(self._device, self.address)


def _stream(device: int) -> int:
    import torch

    return int(torch.cuda.current_stream(device).cuda_stream)
