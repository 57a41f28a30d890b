"""Answers chats with one plain vLLM engine: `python -m tests.models.plain MODEL`, JSON in and out.

Run in a process of its own by test_families.py.
"""

from __future__ import annotations

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """One JSON list of OpenAI-style messages in, one of `{"token_ids", "logprobs", "num_prompt_tokens"}` out."""
    task = json.load(sys.stdin)
    llm = LLM(model=sys.argv[1], distributed_executor_backend="uni", enforce_eager=True, **task["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], ignore_eos=True, logprobs=1)
    answers = []
    for messages in task["chats"]:
        output = llm.chat(messages, sampling, use_tqdm=False)[0]
        [one] = output.outputs
        chosen = [line[token].logprob for line, token in zip(one.logprobs, one.token_ids, strict=True)]
        answers.append(
            {
                "token_ids": list(one.token_ids),
                "logprobs": chosen,
                "num_prompt_tokens": len(output.prompt_token_ids),
            }
        )
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
