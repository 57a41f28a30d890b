"""All daemons of a pipeline as processes of this host: what `epd up`, `epd demo`, tests and benchmarks run.

    async with LocalPipeline(encode=2) as pipeline:
        async with AsyncClient(pipeline.url) as client:
            ...

Lives in the supervisor's process and, `zygote` and what it imports, in the zygote and its children. Importing this
package is light.
"""

from epd.local.daemon import Daemon, Spec, StartError, State
from epd.local.pipeline import LocalPipeline
from epd.local.supervisor import Supervisor

__all__ = ["Daemon", "LocalPipeline", "Spec", "StartError", "State", "Supervisor"]
