"""The seeing half of the digit reader: colouring tiles, encoding them, and the first stage of training."""

import logging
import math

import torch
from batches import CellBank
from data import CELL_SIZE_PX
from torch import Tensor
from torch.nn import functional
from transformers import Idefics3ForConditionalGeneration

BLANK_CLASS = 10
NUM_CLASSES = 11
"""What a single cell can be: one of ten digits, or blank."""

WARM_UP_STEPS = 60

logger = logging.getLogger("vision")


def cosine_decay(progress: float) -> float:
    """Return a learning rate's factor, from 1 at progress 0 to 0 at progress 1."""
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def tint(coverage: Tensor, generator: torch.Generator) -> Tensor:
    """Colour tiles with random dark ink on light paper, alike for all tiles of a picture.

    Args:
        coverage: From 0 to 255, of shape (pictures, tiles, 64, 64).
        generator: Source of the colours.

    Returns:
        Float32 of shape (pictures, tiles, 3, 64, 64), from -1 to 1 as the processor makes it.
    """
    num_pictures = len(coverage)
    paper = (222 + 34 * torch.rand(num_pictures, 1, 3, 1, 1, generator=generator)).floor()
    ink = (100 * torch.rand(num_pictures, 1, 3, 1, 1, generator=generator)).floor()
    return (paper + (ink - paper) * (coverage[:, :, None] / 255)).round() / 127.5 - 1


def vision_tokens(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Encode tiles (n, 3, 64, 64) into what the language model reads (n, 4, hidden size)."""
    hidden = model.model.vision_model(pixels, return_dict=True).last_hidden_state
    return model.model.connector(hidden)


def train_vision(model: Idefics3ForConditionalGeneration, train: CellBank, held_out: CellBank, num_steps: int) -> None:
    """Teach the tower and the connector to name single cells: every token of a tile says its class.

    Args:
        model: Its vision tower and connector change.
        train: Cells to learn from.
        held_out: Cells to report on.
        num_steps: Optimizer steps of 256 cells.
    """
    batch_size, peak_lr = 256, 1.5e-3
    torch.manual_seed(0)
    head = torch.nn.Linear(model.config.text_config.hidden_size, NUM_CLASSES)
    generator = torch.Generator().manual_seed(3)
    modules = (model.model.vision_model, model.model.connector, head)
    params = [param for module in modules for param in module.parameters()]
    groups = [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": 0.05},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98))
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1, (step + 1) / WARM_UP_STEPS) * cosine_decay(step / num_steps)
        chosen = torch.randint(len(train.labels), (batch_size,), generator=generator)
        is_blank = torch.rand(batch_size, generator=generator) < 0.06
        coverage = train.coverage[chosen] * ~is_blank[:, None, None]
        classes = torch.where(is_blank, BLANK_CLASS, train.labels[chosen])
        pixels = tint(coverage[:, None], generator)[:, 0]
        pixels = pixels + 0.03 * torch.randn(batch_size, 1, CELL_SIZE_PX, CELL_SIZE_PX, generator=generator)
        logits = head(vision_tokens(model, pixels))
        loss = functional.cross_entropy(
            logits.flatten(0, 1), classes.repeat_interleave(logits.shape[1]), label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % 60 == 0:
            logger.info("vision step %d loss %.4f", step + 1, loss.item())
    logger.info("vision done: held-out cells named right %.4f", _cell_accuracy(model, head, held_out))


@torch.no_grad()
def _cell_accuracy(model: Idefics3ForConditionalGeneration, head: torch.nn.Module, bank: CellBank) -> float:
    generator = torch.Generator().manual_seed(9)
    num_right = 0
    for coverage, labels in zip(bank.coverage.split(360), bank.labels.split(360), strict=True):
        logits = head(vision_tokens(model, tint(coverage[:, None], generator)[:, 0]))
        num_right += int((logits.log_softmax(-1).mean(1).argmax(1) == labels).sum())
    return num_right / len(bank.labels)


@torch.no_grad()
def balance_embeddings(model: Idefics3ForConditionalGeneration, bank: CellBank) -> None:
    """Bring image tokens and word embeddings to a like size, once, before they first meet."""
    pixels = tint(bank.coverage[:512, None], torch.Generator().manual_seed(7))[:, 0]
    rms = vision_tokens(model, pixels).pow(2).mean().sqrt()
    model.model.connector.modality_projection.proj.weight.mul_(0.4 / rms)
    model.model.text_model.embed_tokens.weight.mul_(6)


@torch.no_grad()
def encode_bank(model: Idefics3ForConditionalGeneration, bank: CellBank, generator: torch.Generator) -> Tensor:
    """Encode every cell of a bank once: (cells + 1, 4, hidden size), the last one a blank cell."""
    blank = torch.zeros(1, CELL_SIZE_PX, CELL_SIZE_PX, dtype=torch.uint8)
    cells = torch.cat([bank.coverage, blank])
    return torch.cat([vision_tokens(model, tint(part[:, None], generator)[:, 0]) for part in cells.split(512)])
