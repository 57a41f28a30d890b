"""Answers chats about one model with plain vLLM: run by `tests.forks`, a JSON object in, a list of answers out."""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams


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
    told = json.dumps(answers(**json.load(sys.stdin)))
    print("\n" + told, flush=True)
