"""Plain vLLM on the same model, for comparison: `vllm serve`'s own server, API process and engine process.

Lives in a process that the pipeline's zygote has forked for it, so that vLLM is imported already (`serve`). Written
against vLLM 0.32 (`make_arg_parser`, `run_server`).
"""

from __future__ import annotations

import os
import sys
from typing import Any

from epd.config import parse


def serve(config: str, port: int) -> int:
    """Serves the model of a pipeline's configuration, with its engine options, until SIGTERM.

    Args:
        config: JSON of `epd.config.dump`.
        port: Where to listen on the loopback interface.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = parse(config)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--host", "127.0.0.1", "--port", str(port)])
    args.model, args.model_tag = parsed.model, parsed.model
    args.served_model_name = [parsed.served_model_name or parsed.model]
    options: dict[str, Any] = {"distributed_executor_backend": "uni", "disable_uvicorn_access_log": True}
    for name, value in (options | parsed.engine_options("")).items():
        setattr(args, name, value)
    validate_parsed_serve_args(args)
    sys.setswitchinterval(0.005)
    uvloop.run(run_server(args))
    return 0
