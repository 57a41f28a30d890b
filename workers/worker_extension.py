"""What `workers.engine` does to its own process, for the processes that vLLM starts if a worker has several devices.

Lives in those processes: vLLM imports this module there (`worker_extension_cls`) before it builds anything.
"""

from __future__ import annotations

from workers.adapters import spare_base_requests
from workers.amx import permit_amx
from workers.quiet_threads import calm_nixl


class WorkerExtension:
    """Adds nothing to vLLM's worker class; it exists to be imported."""


permit_amx()
calm_nixl()
spare_base_requests()
