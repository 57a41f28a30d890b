"""Pictures of handwritten digits, and questions about them with their true answers.

A picture is a grid of cells; a cell is blank or holds one real handwritten digit, drawn as dark ink on
light paper. Everything is a function of a seed. The held-out fifth of the digit images is never used
to train, only to test.

Legacy `numpy.random.RandomState` is used on purpose: its stream is frozen for ever, and both the split
that the shipped model was trained on and the pictures it is tested with depend on it.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

CELL_SIZE_PX = 64
"""Width and height of a cell; also of the tiles that the image processor cuts, so a cell is a tile."""

GRID_SHAPE_WEIGHTS = {
    (4, 4): 0.40,
    (3, 4): 0.18,
    (4, 3): 0.10,
    (2, 4): 0.14,
    (4, 2): 0.06,
    (1, 4): 0.08,
    (4, 1): 0.04,
}
"""How often a picture has so many (rows, columns)."""

BLANK_FRACTION_WEIGHTS = {0.0: 0.35, 0.1: 0.2, 0.3: 0.2, 0.6: 0.15, 0.9: 0.1}
"""How often a picture's cells are blank with this probability."""

BLANK = -1
"""The label of a cell without a digit."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "list": ("What digits are in the image?", "Which digits do you see?", "List the digits."),
    "grid": ("Read the image row by row.", "Read the grid."),
    "count": ("How many digits are there?", "How many digits are in the image?"),
    "largest": ("What is the largest digit?", "Which digit is the largest?"),
    "smallest": ("What is the smallest digit?", "Which digit is the smallest?"),
    "cell": ("What digit is in row {row}, column {column}?", "Which digit is in row {row}, column {column}?"),
    "rowsum": ("What is the sum of row {row}?",),
    "has": ("Is there a {digit} in the image?", "Do you see a {digit}?"),
}
"""The phrasings of each kind of question. The first one is the one that tests ask."""

QUESTION_KINDS = tuple(QUESTIONS)

DIGITS_FILE = Path(__file__).with_name("digits.npz")
HELD_OUT_FRACTION = 1 / 5


@dataclass(frozen=True)
class Digits:
    """Handwritten digits.

    Attributes:
        images: Float32 of shape (n, 8, 8), from 0 (paper) to 1 (ink).
        labels: Int64 of shape (n,), from 0 to 9.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about one picture, and the only answer that counts as right."""

    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A picture with one question of every kind.

    Attributes:
        picture: RGB, `CELL_SIZE_PX` times the grid's columns wide and times its rows high.
        labels: Int64 of shape (rows, columns): the digit in each cell, or `BLANK`.
        questions: One question for each of `QUESTION_KINDS`.
    """

    picture: Image.Image
    labels: NDArray[np.int64]
    questions: dict[str, QuestionAnswer]


def load_split(seed: int = 0) -> tuple[Digits, Digits]:
    """Read the digits and split them by image (not by writer, whom the data do not name).

    Args:
        seed: Names the split. The shipped model was trained with seed 0.

    Returns:
        The digits to train with, and the held-out ones.
    """
    with np.load(DIGITS_FILE) as arrays:
        images = arrays["x"].astype(np.float32) / 16
        labels = arrays["y"].astype(np.int64)
    order = RandomState(seed).permutation(len(labels))
    num_held_out = int(len(labels) * HELD_OUT_FRACTION)
    held_out, train = order[:num_held_out], order[num_held_out:]
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def render_cells(images: NDArray[np.float32], generator: torch.Generator) -> Tensor:
    """Draw digits at cell size, each turned, scaled, sheared, shifted and inked a little differently.

    Args:
        images: Float32 of shape (n, 8, 8), from 0 to 1.
        generator: Source of the variations.

    Returns:
        Ink coverage: uint8 of shape (n, 64, 64), 255 where there is only ink.
    """
    num_cells = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num_cells, generator=generator) * (high - low) + low

    angle_rad = uniform(-0.20, 0.20)
    scale_x, scale_y = uniform(1.20, 1.50), uniform(1.14, 1.40)
    shear = uniform(-0.15, 0.15)
    shift_x, shift_y = uniform(-0.16, 0.16), uniform(-0.12, 0.12)
    cos, sin = torch.cos(angle_rad), torch.sin(angle_rad)
    row_x = torch.stack([scale_x * cos, scale_x * (shear - sin), shift_x], dim=1)
    row_y = torch.stack([scale_y * sin, scale_y * cos, shift_y], dim=1)
    # The 8x8 digit sits in the middle of 12x12, so that what is turned out of it is still there.
    affine = torch.stack([row_x, row_y], dim=1) * (8 / 12)
    padded = functional.pad(torch.as_tensor(images)[:, None], (2, 2, 2, 2))
    smooth = functional.interpolate(padded, scale_factor=4, mode="bicubic", align_corners=False)
    grid = functional.affine_grid(affine, [num_cells, 1, CELL_SIZE_PX, CELL_SIZE_PX], align_corners=False)
    grey = functional.grid_sample(smooth, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # A steep sigmoid makes a crisp stroke of a blurred one; its threshold is the width of the pen.
    threshold = uniform(0.36, 0.50)[:, None, None]
    sharpness = uniform(9, 16)[:, None, None]
    return (torch.sigmoid((grey[:, 0] - threshold) * sharpness) * 255).round().to(torch.uint8)


def random_shape(rng: RandomState) -> tuple[int, int]:
    """Draw a grid shape (rows, columns) by `GRID_SHAPE_WEIGHTS`."""
    shapes = list(GRID_SHAPE_WEIGHTS)
    return shapes[rng.choice(len(shapes), p=list(GRID_SHAPE_WEIGHTS.values()))]


def random_occupancy(rng: RandomState, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw which cells hold a digit, by `BLANK_FRACTION_WEIGHTS`; bool of the given shape."""
    fractions, weights = list(BLANK_FRACTION_WEIGHTS), list(BLANK_FRACTION_WEIGHTS.values())
    blank_fraction = rng.choice(fractions, p=weights)
    return rng.rand(*shape) >= blank_fraction


def random_colours(rng: RandomState) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw a light paper and a dark ink, each as float32 RGB from 0 to 255."""
    paper, ink = rng.randint(222, 256, 3), rng.randint(0, 100, 3)
    return paper.astype(np.float32), ink.astype(np.float32)


def compose_picture(coverage: NDArray[np.uint8], paper: NDArray[np.float32], ink: NDArray[np.float32]) -> Image.Image:
    """Put cells together and colour them.

    Args:
        coverage: Ink coverage, uint8 of shape (rows, columns, 64, 64).
        paper: RGB of the paper.
        ink: RGB of the ink.

    Returns:
        The picture, RGB.
    """
    rows, columns = coverage.shape[:2]
    flat = coverage.transpose(0, 2, 1, 3).reshape(rows * CELL_SIZE_PX, columns * CELL_SIZE_PX)
    alpha = (flat.astype(np.float32) / 255)[..., None]
    return Image.fromarray(np.clip(np.rint(paper + (ink - paper) * alpha), 0, 255).astype(np.uint8))


def ask(kind: str, labels: NDArray[np.int64], rng: RandomState, *, first_phrasing: bool = False) -> QuestionAnswer:
    """Make a question about a picture, and answer it from the picture's labels.

    Args:
        kind: One of `QUESTION_KINDS`.
        labels: Int64 of shape (rows, columns), `BLANK` where there is no digit.
        rng: Chooses the phrasing, the row, the column and the digit asked about.
        first_phrasing: Whether to use only the kind's first phrasing, as tests do.

    Returns:
        The question and its answer.

    Raises:
        KeyError: The kind is unknown.
    """
    phrasings = QUESTIONS[kind]
    phrasing = phrasings[0 if first_phrasing else rng.randint(len(phrasings))]
    present = [int(digit) for digit in labels.ravel() if digit != BLANK]
    row, column = rng.randint(labels.shape[0]), rng.randint(labels.shape[1])
    if kind == "has":
        digit = int(rng.choice(present)) if present and rng.rand() < 0.5 else rng.randint(10)
        return QuestionAnswer(phrasing.format(digit=digit), "yes" if digit in present else "no")
    question = phrasing.format(row=row + 1, column=column + 1)
    return QuestionAnswer(question, _answer(kind, labels, present, row, column))


def _answer(kind: str, labels: NDArray[np.int64], present: list[int], row: int, column: int) -> str:
    match kind:
        case "list":
            return " ".join(map(str, present)) or "none"
        case "grid":
            return "\n".join(" ".join("." if digit == BLANK else str(digit) for digit in line) for line in labels)
        case "count":
            return str(len(present))
        case "largest":
            return str(max(present)) if present else "none"
        case "smallest":
            return str(min(present)) if present else "none"
        case "cell":
            return "none" if labels[row, column] == BLANK else str(labels[row, column])
        case "rowsum":
            return str(sum(int(digit) for digit in labels[row] if digit != BLANK))
        case _:
            raise KeyError(kind)


def held_out_examples(num_pictures: int, seed: int = 123) -> list[Example]:
    """Make the test set: pictures of held-out digits, with one question of every kind for each.

    Args:
        num_pictures: How many; the first ones are the same whatever the number.
        seed: Names the test set. The first picture of seed 123 is EPD's built-in demo picture.

    Returns:
        The examples.
    """
    _, digits = load_split()
    generator = torch.Generator().manual_seed(seed)
    rng = RandomState(seed)
    return [_make_example(digits, rng, generator) for _ in range(num_pictures)]


def _make_example(digits: Digits, rng: RandomState, generator: torch.Generator) -> Example:
    shape = random_shape(rng)
    occupied = random_occupancy(rng, shape)
    chosen = rng.randint(len(digits.labels), size=shape)
    cells = render_cells(digits.images[chosen.ravel()], generator).numpy()
    coverage = cells.reshape(*shape, CELL_SIZE_PX, CELL_SIZE_PX) * occupied[..., None, None]
    labels = np.where(occupied, digits.labels[chosen], BLANK)
    picture = compose_picture(coverage, *random_colours(rng))
    questions = {kind: ask(kind, labels, rng, first_phrasing=True) for kind in QUESTION_KINDS}
    return Example(picture, labels, questions)


@cache
def lanczos_matrix(num_in: int, num_out: int = CELL_SIZE_PX) -> Tensor:
    """Return Pillow's Lanczos resize along one axis as a matrix, to resize whole batches at once.

    Args:
        num_in: Pixels before.
        num_out: Pixels after.

    Returns:
        Float32 of shape (num_out, num_in).
    """
    if num_in == num_out:
        return torch.eye(num_in)
    columns = []
    for unit in np.eye(num_in, dtype=np.float32):
        # Two equal lines, because Pillow wants a picture; resizing does not mix them.
        line = Image.fromarray(np.stack([unit, unit]), mode="F")
        columns.append(np.asarray(line.resize((num_out, 2), Image.Resampling.LANCZOS))[0])
    return torch.from_numpy(np.stack(columns, axis=1))
