"""Measure a digit reader through vLLM: exact answers about pictures of held-out digits.

    python evaluate.py --n 400
    python evaluate.py --n 100 --model /tmp/my-digit-reader --output my-accuracy.json

An answer is right when it equals the true one to the letter; a picture gets one question of every kind.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data import QUESTION_KINDS, Example, QuestionAnswer, held_out_examples

from epd import builtin

if TYPE_CHECKING:
    from vllm import LLM

MAX_ANSWER_TOKENS = 48
KV_CACHE_BYTES = 64 << 20
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""One process and one thread: the model is too small to gain from more. What is set already wins.
Logging is at ERROR because vLLM's CPU worker repeats one warning for every batch of pictures."""


@dataclass(frozen=True)
class Answered:
    """One question, the true answer and the model's."""

    kind: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether the model's answer is the true one, to the letter."""
        return self.answer == self.expected


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        num_pictures: Pictures, and so questions of each kind.
        seed: Of the test set.
        elapsed_s: Seconds that generation took, without loading the model.
        accuracy: Exact answers divided by questions, for each kind of question.
        cell_accuracy: Cells read right divided by cells, in the answers to "grid" questions.
        wrong: Every wrong answer.
    """

    num_pictures: int
    seed: int
    elapsed_s: float
    accuracy: dict[str, float]
    cell_accuracy: float
    wrong: list[Answered]


def load_engine(model: Path) -> "LLM":
    """Start vLLM with the model, small enough for any machine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Only now, because vLLM reads its environment when it is imported.
    from vllm import LLM

    return LLM(
        str(model),
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        distributed_executor_backend="uni",
    )


def answer_all(engine: "LLM", example: Example) -> list[Answered]:
    """Ask all the questions about one picture, greedily, in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0)
    conversations = [_conversation(example, qa) for qa in example.questions.values()]
    outputs = engine.chat(conversations, sampling, use_tqdm=False)
    return [
        Answered(kind, qa.question, qa.answer, output.outputs[0].text.strip())
        for (kind, qa), output in zip(example.questions.items(), outputs, strict=True)
    ]


def _conversation(example: Example, qa: QuestionAnswer) -> list[dict]:
    picture = {"type": "image_pil", "image_pil": example.picture}
    return [{"role": "user", "content": [picture, {"type": "text", "text": qa.question}]}]


def evaluate(engine: "LLM", num_pictures: int, seed: int) -> Report:
    """Ask every kind of question about each picture of the test set.

    Args:
        engine: From `load_engine`.
        num_pictures: Size of the test set, at least 1.
        seed: Names the test set.

    Returns:
        The accuracies and the mistakes.
    """
    examples = held_out_examples(num_pictures, seed)
    started_s = time.monotonic()
    answered = [one for example in examples for one in answer_all(engine, example)]
    elapsed_s = time.monotonic() - started_s
    accuracy = {kind: _fraction_right([one for one in answered if one.kind == kind]) for kind in QUESTION_KINDS}
    wrong = [one for one in answered if not one.is_right]
    return Report(num_pictures, seed, elapsed_s, accuracy, _cell_accuracy(answered), wrong)


def _fraction_right(answered: list[Answered]) -> float:
    return sum(one.is_right for one in answered) / len(answered)


def _cell_accuracy(answered: list[Answered]) -> float:
    grids = [one for one in answered if one.kind == "grid"]
    num_cells = sum(len(one.expected.split()) for one in grids)
    # A cell that is missing from the answer is wrong too, so the shorter of the two ends the count.
    num_right = sum(
        expected == read
        for one in grids
        for expected, read in zip(one.expected.split(), one.answer.split(), strict=False)
    )
    return num_right / num_cells


def print_table(report: Report) -> None:
    """Print the accuracies as a Markdown table."""
    print(f"{report.num_pictures} pictures, seed {report.seed}, {report.elapsed_s:.0f} s\n")
    print("| question | exact answers |")
    print("|---|---|")
    for kind, accuracy in report.accuracy.items():
        print(f"| {kind} | {accuracy:.4f} |")
    print(f"| (cells of grid) | {report.cell_accuracy:.4f} |")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=builtin.model_path(), help="model folder (the built-in one)")
    parser.add_argument("--n", type=int, default=100, metavar="PICTURES", help="pictures to test with (%(default)s)")
    parser.add_argument("--seed", type=int, default=123, help="names the test set (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("accuracy.json"), help="JSON to write (%(default)s)")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n must be at least 1, not {args.n}")
    return args


def main() -> None:
    """Measure, print and write."""
    args = parse_args()
    report = evaluate(load_engine(args.model), args.n, args.seed)
    print_table(report)
    args.output.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
