"""Train the digit reader on a CPU, in four stages measured in steps.

    python train.py /tmp/my-digit-reader
    python train.py /tmp/smoke --smoke

1. vision: the vision tower and the connector learn to name single cells.
2. language: the language model learns to answer, reading the frozen tower's tokens from a table.
3. joint: all of it learns together, from pixels.
4. refine: the same for longer, with more of the questions it finds hard.

The held-out digits are looked at for the log only; nothing is chosen by them.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import NO_TARGET, Batch, CellBank, Packer
from build import build_model, build_processor, build_tokenizer, load_trained, save_all
from data import CELL_SIZE_PX, QUESTION_KINDS, lanczos_matrix, load_split
from numpy.random import RandomState
from torch import Tensor
from torch.nn import Parameter, functional
from torch.optim import Optimizer
from transformers import Idefics3ForConditionalGeneration
from vision import balance_embeddings, cosine_decay, encode_bank, tint, train_vision, vision_tokens

BASIC_KINDS = (
    *("list", "list", "grid", "count", "largest", "smallest"),
    *("cell", "cell", "cell", "rowsum", "rowsum", "has", "has"),
)
REFINE_KINDS = (*QUESTION_KINDS, "rowsum", "rowsum", "rowsum", "has", "has")
"""The questions asked about each picture; a kind that is there twice is asked twice."""

WARM_UP_STEPS = 80

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Stage:
    """One stage of training to answer questions.

    Attributes:
        name: For the log.
        num_steps: Optimizer steps; 0 skips the stage.
        learning_rate: The peak, reached after the warm-up.
        train_vision: Whether gradients reach the vision tower and the connector.
        vision_lr_factor: Their learning rate divided by the language model's.
        kinds: The questions asked about each picture.
        seed: Of the renderings, the pictures and the questions.
    """

    name: str
    num_steps: int
    learning_rate: float
    train_vision: bool
    vision_lr_factor: float
    kinds: tuple[str, ...]
    seed: int


class Reader:
    """The model with the cells it looks at: makes logits from batches."""

    def __init__(self, model: Idefics3ForConditionalGeneration, bank: CellBank, *, use_table: bool) -> None:
        """Prepare, and encode the whole bank if cells are to be read from a table.

        Args:
            model: The model; not copied.
            bank: The cells that batches refer to.
            use_table: Whether detail tiles are looked up instead of encoded; the tower gets no gradient then.
        """
        self._model, self.bank = model, bank
        self._generator = torch.Generator().manual_seed(7)
        self._table = encode_bank(model, bank, self._generator) if use_table else None

    def answer_logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the answers' tokens, given all tokens before each.

        Returns:
            Logits (n, vocabulary) and true tokens (n,) of the n places to learn, and where in the batch
            they are: bool of shape (batch, length - 1), place i being that of token i + 1.
        """
        embeddings = self._model.model.text_model.embed_tokens(batch.token_ids)
        is_image = (batch.token_ids == self._model.config.image_token_id)[..., None]
        tokens = self._image_tokens(batch)
        embeddings = embeddings.masked_scatter(is_image, tokens.reshape(-1, tokens.shape[-1]).to(embeddings.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self._model.model.text_model(
                inputs_embeds=embeddings,
                attention_mask=batch.attention_mask,
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
        targets = batch.targets[:, 1:]
        is_target = targets != NO_TARGET
        return self._model.lm_head(hidden[:, :-1][is_target].float()), targets[is_target], is_target

    def _image_tokens(self, batch: Batch) -> Tensor:
        """Make the tokens of each picture's detail tiles and, last, of its overview tile."""
        num_pictures, (rows, columns) = len(batch.token_ids), batch.shape
        cells = self.bank.coverage[batch.cell_indices] * batch.occupied[..., None, None]
        grid = cells.view(num_pictures, rows, columns, CELL_SIZE_PX, CELL_SIZE_PX).permute(0, 1, 3, 2, 4)
        whole = grid.reshape(num_pictures, rows * CELL_SIZE_PX, columns * CELL_SIZE_PX).float()
        overview = lanczos_matrix(rows * CELL_SIZE_PX) @ whole @ lanczos_matrix(columns * CELL_SIZE_PX).T
        overview = overview.clamp(0, 255)[:, None]
        if self._table is not None:
            with torch.no_grad():
                last = vision_tokens(self._model, tint(overview, self._generator)[:, 0])
            blank = len(self._table) - 1
            details = self._table[torch.where(batch.occupied, batch.cell_indices, blank)]
            return torch.cat([details, last[:, None]], dim=1)
        pixels = tint(torch.cat([cells, overview], dim=1), self._generator).flatten(0, 1)
        return vision_tokens(self._model, pixels + 0.02 * torch.randn(pixels.shape, generator=self._generator))


def make_optimizers(model: Idefics3ForConditionalGeneration, stage: Stage) -> list[Optimizer]:
    """Choose what the stage trains, and how: Muon for the layers' matrices, AdamW for all else.

    Args:
        model: Parameters that the stage leaves alone stop requiring gradients.
        stage: Names the parts and their learning rates; each group keeps its peak as `peak_lr`.

    Returns:
        The optimizers; a group's `lr` is to be set before each step.
    """
    tower, text = model.model.vision_model, model.model.text_model
    vision_params = [*tower.parameters(), *model.model.connector.parameters()]
    for param in vision_params:
        param.requires_grad_(stage.train_vision)
    parts = [([*text.parameters(), *model.lm_head.parameters()], stage.learning_rate)]
    if stage.train_vision:
        parts.append((vision_params, stage.learning_rate * stage.vision_lr_factor))
    layer_params = [*text.layers.parameters(), *tower.encoder.parameters()]
    matrices = {id(param) for param in layer_params if param.ndim == 2}
    muon_groups, adamw_groups = [], []
    for params, peak_lr in parts:
        others = [param for param in params if id(param) not in matrices]
        muon_groups.append(_group([param for param in params if id(param) in matrices], 0.05, peak_lr))
        adamw_groups.append(_group([param for param in others if param.ndim > 1], 0.02, peak_lr))
        adamw_groups.append(_group([param for param in others if param.ndim < 2], 0.0, peak_lr))
    return [
        torch.optim.Muon(muon_groups, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw_groups, betas=(0.9, 0.95)),
    ]


def _group(params: list[Parameter], weight_decay: float, peak_lr: float) -> dict:
    return {"params": params, "weight_decay": weight_decay, "lr": peak_lr, "peak_lr": peak_lr}


def learning_rate_factor(stage: Stage, step: int) -> float:
    """Return what to multiply the peak learning rate with: warm-up, then decay.

    The language stage ends at half the peak, because training goes on; the others fall to zero.
    """
    progress = step / stage.num_steps
    return min(1, (step + 1) / WARM_UP_STEPS) * (cosine_decay(progress) if stage.train_vision else 1 - progress / 2)


def train_stage(
    model: Idefics3ForConditionalGeneration,
    packer: Packer,
    train: CellBank,
    held_out: CellBank,
    stage: Stage,
    batch_size: int,
) -> None:
    """Teach the model to answer questions.

    Args:
        model: Changes in place.
        packer: Makes the batches.
        train: Cells of the pictures to learn from.
        held_out: Cells of the pictures to report on.
        stage: What to train and for how long.
        batch_size: Pictures in a step.
    """
    optimizers = make_optimizers(model, stage)
    params = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    reader = Reader(model, train, use_table=not stage.train_vision)
    rng = RandomState(stage.seed)
    loss_sum = 0.0
    for step in range(stage.num_steps):
        factor = learning_rate_factor(stage, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        logits, targets, _ = reader.answer_logits(packer.make_batch(train, rng, batch_size, stage.kinds))
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        loss_sum += loss.item()
        if (step + 1) % 100 == 0:
            logger.info("%s step %d loss %.4f", stage.name, step + 1, loss_sum / 100)
            loss_sum = 0.0
    accuracies = answer_accuracy(packer, Reader(model, held_out, use_table=not stage.train_vision))
    words = [f"{kind} {accuracy:.3f}" for kind, accuracy in accuracies.items()]
    logger.info("%s done: %s", stage.name, ", ".join(words))


@torch.no_grad()
def answer_accuracy(packer: Packer, reader: Reader, num_batches: int = 12) -> dict[str, float]:
    """Estimate exact answers for each kind of question: all tokens right, given the true ones before."""
    rng = RandomState(5)
    results: dict[str, list[bool]] = {kind: [] for kind in QUESTION_KINDS}
    for _ in range(num_batches):
        batch = packer.make_batch(reader.bank, rng, 16, QUESTION_KINDS, first_phrasing=True)
        logits, targets, is_target = reader.answer_logits(batch)
        is_right = torch.ones_like(is_target)
        is_right[is_target] = logits.argmax(-1) == targets
        for picture, spans in enumerate(batch.spans):
            for kind, start, stop in spans:
                results[kind].append(bool(is_right[picture, start - 1 : stop - 1].all()))
    return {kind: sum(values) / len(values) for kind, values in results.items()}


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults train a model like the shipped one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="model folder to write")
    parser.add_argument("--vision-steps", type=int, default=429, metavar="N")
    parser.add_argument("--language-steps", type=int, default=663, metavar="N")
    parser.add_argument("--joint-steps", type=int, default=834, metavar="N")
    parser.add_argument("--refine-steps", type=int, default=2443, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures in a step (%(default)s)")
    parser.add_argument("--copies", type=int, default=12, help="renderings of each digit (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--start-from", type=Path, help="trained model folder to go on from; no vision stage")
    parser.add_argument("--smoke", action="store_true", help="three steps of each stage, to try the code")
    args = parser.parse_args()
    if args.smoke:
        args.vision_steps = args.language_steps = args.joint_steps = args.refine_steps = 3
        args.batch_size, args.copies = 2, 1
    return args


def main() -> None:
    """Train all stages and save the model folder."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    processor = build_processor(tokenizer)
    model = load_trained(args.start_from) if args.start_from else build_model(tokenizer)
    train_digits, held_out_digits = load_split()
    held_out = CellBank.render(held_out_digits, min(4, args.copies), seed=12)
    if not args.start_from:
        bank = CellBank.render(train_digits, 2 * args.copies, seed=1)
        train_vision(model, bank, held_out, args.vision_steps)
        balance_embeddings(model, bank)
    stages = (
        Stage("language", args.language_steps, 3e-3, False, 0.0, BASIC_KINDS, seed=11),
        Stage("joint", args.joint_steps, 2e-3, True, 0.5, BASIC_KINDS, seed=12),
        Stage("refine", args.refine_steps, 2e-3, True, 0.4, REFINE_KINDS, seed=21),
    )
    packer = Packer(tokenizer, processor)
    for stage in stages:
        if stage.num_steps:
            bank = CellBank.render(train_digits, args.copies, stage.seed)
            train_stage(model, packer, bank, held_out, stage, args.batch_size)
    save_all(args.output, model, tokenizer, processor)
    logger.info("saved %s", args.output)


if __name__ == "__main__":
    main()
