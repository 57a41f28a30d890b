"""Plain vLLM on the same model: one engine with everything in it, for comparison with the pipeline.

Lives in a process that the pipeline's zygote has forked for it (`run`); owns its engine. Written against vLLM 0.32
(`LLM`, `LLMEngine`).
"""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

from epd.config import parse


def run(config: str, work: str, result: str) -> int:
    """Times requests from their arrival as chat messages to the first token, one after another.

    Args:
        config: JSON of `epd.config.dump`.
        work: A JSON file: `{"question", "pictures": [base64 of PNG], "num_warm_ups"}`; the first `num_warm_ups`
            pictures are asked about untimed.
        result: The JSON file to write: `{"ttft_s": [...], "answers": [...]}`.
    """
    parsed = parse(config)
    task = json.loads(Path(work).read_text())
    llm = _load(parsed.model, parsed.engine_options(""))
    measured = [_ask(llm, task["question"], picture, f"plain-{i}") for i, picture in enumerate(task["pictures"])]
    measured = measured[task["num_warm_ups"] :]
    done = {"ttft_s": [ttft_s for ttft_s, _ in measured], "answers": [answer for _, answer in measured]}
    part = Path(f"{result}.part")
    part.write_text(json.dumps(done))
    part.replace(result)
    return 0


def _load(model: str, options: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(model=model, **({"distributed_executor_backend": "uni"} | options))


def _ask(llm: Any, question: str, picture: str, request_id: str) -> tuple[float, str]:
    """Returns seconds to the first token, and the answer; reads the picture, too, as the endpoint has to."""
    from vllm import SamplingParams

    url = f"data:image/png;base64,{picture}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    engine, sampling = llm.llm_engine, SamplingParams(temperature=0.0, max_tokens=64)
    started = time.perf_counter()
    prompt = llm._preprocess_chat_one([{"role": "user", "content": content}])
    engine.add_request(request_id, prompt, sampling)
    ttft_s, answer = 0.0, ""
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs and output.outputs[0].token_ids:
                ttft_s = ttft_s or time.perf_counter() - started
                answer = output.outputs[0].text
    return ttft_s, answer


def pack(question: str, pictures: list[bytes], num_warm_ups: int) -> str:
    """The content of a `work` file."""
    encoded = [base64.b64encode(picture).decode() for picture in pictures]
    return json.dumps({"question": question, "pictures": encoded, "num_warm_ups": num_warm_ups})
