"""Answers chats with plain vLLM: `python -m tests.models.plain`, a line of JSON in and out for each model.

Imports vLLM once and forks for each model. `python -m tests.models.plain MODEL` reads one JSON object instead.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch
from vllm import LLM, SamplingParams


def main() -> None:
    """Reads `{"model", "engine", "max_tokens", "chats"}`, prints what `answers` gives; null where it failed."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(answers(sys.argv[1], **json.load(sys.stdin))), flush=True)
        return
    for line in sys.stdin:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(reader)
            _child(writer, json.loads(line))
        os.close(writer)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        os.wait()
        print(told or "null", flush=True)


def _child(writer: int, task: dict[str, Any]) -> None:
    os.dup2(2, 1)  # what vLLM prints is no answer
    try:
        told = json.dumps(answers(**task))
    except BaseException:
        traceback.print_exc()
        told = ""
    with os.fdopen(writer, "w") as pipe:
        pipe.write(told)
    os._exit(0)


def answers(model: str, engine: dict[str, Any], max_tokens: int, chats: list[Any]) -> list[dict[str, Any]]:
    """For each chat the greedy tokens, their log-probabilities and the length of the prompt."""
    llm = LLM(model=model, distributed_executor_backend="uni", enforce_eager=True, **engine)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    found = []
    for messages in chats:
        output = llm.chat(messages, sampling, use_tqdm=False)[0]
        [one] = output.outputs
        chosen = [line[token].logprob for line, token in zip(one.logprobs, one.token_ids, strict=True)]
        found.append(
            {
                "token_ids": list(one.token_ids),
                "logprobs": chosen,
                "num_prompt_tokens": len(output.prompt_token_ids),
            }
        )
    return found


if __name__ == "__main__":
    main()
