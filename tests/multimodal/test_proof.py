"""What is taken for a proof and what is not, with encoders made here in place of a model's."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.engine  # vLLM's types

WEIGHTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
CONFIG = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["Toy"])))


def by_tile(items, num_tokens=4):
    """An encoder without attention between tiles: `num_tokens` embeddings for each."""
    rows = [(one["pixel_values"].data.reshape(-1, 12) @ WEIGHTS).repeat_interleave(num_tokens, 0) for one in items]
    scale = torch.linspace(1, 2, num_tokens)
    return [one * scale.repeat(len(one) // num_tokens)[:, None] for one in rows]


def across_tiles(items):
    """One with a little attention between the tiles of an item."""
    return [rows + 0.1 * rows.mean(0, keepdim=True) for rows in by_tile(items)]


def with_rounding(items):
    """One whose last bits depend on the batch."""
    return [rows * (1 + 1e-3 * (len(rows) > 4)) for rows in by_tile(items)]


def with_newline(items):
    """One that ends each item with an embedding of its own."""
    return [torch.cat([rows, WEIGHTS[:1]]) for rows in by_tile(items)]


def blind(items):
    """One that does not look at the pixels."""
    return [torch.ones_like(rows) for rows in by_tile(items)]


def broken(items):
    raise RuntimeError("no kernel for this")


def by_batch(items):
    """One whose items are changed by others in the same batch."""
    return [rows + 0.2 * (len(items) > 1) for rows in by_tile(items)]


@pytest.fixture
def prove(monkeypatch):
    """The proof for pictures of one, two and five tiles with an encoder."""
    from epd.multimodal import proof
    from epd.multimodal.dummies import Dummy
    from tests.multimodal.items import place, tiles

    class Dummies:
        def __init__(self, config):
            self.modalities = ["image"]

        def of(self, modality):
            for count in (1, 2, 5):
                yield Dummy(tiles(count), place(*[4] * count), str(count))

    monkeypatch.setattr(proof, "Dummies", Dummies)

    def prove(encoder, dtype=torch.bfloat16):
        [told] = proof.prove(CONFIG, lambda modality, items: [rows.to(dtype) for rows in encoder(items)])
        return told

    return prove


def test_equal_pieces_prove_their_unit_on_the_smallest_item_that_has_enough(prove):
    told = prove(by_tile)
    assert (told.unit, told.difference, told.reason) == ("tile", 0.0, "")
    assert (told.num_tokens, told.tokens_per_patch, told.size) == ([4] * 5, 4, "5")


def test_rounding_is_taken_for_equal_in_its_own_dtype_only(prove):
    told = prove(with_rounding)
    assert told.unit == "tile"
    assert 0 < told.difference <= told.tolerance == 4 * 2**-7
    assert prove(with_rounding, torch.float32).unit == "item"


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (across_tiles, "other embeddings"),
        (by_batch, "other embeddings"),
        (with_newline, "embeddings, the item"),
        (blind, "hardly depend"),
        (broken, "no kernel for this"),
    ],
)
def test_anything_else_leaves_items_whole_and_says_why(prove, encoder, reason):
    told = prove(encoder)
    assert told.unit == "item"
    assert reason in told.reason


def test_a_model_without_dummy_items_is_still_served(monkeypatch):
    from epd.multimodal import proof

    def fail(config):
        raise ValueError("this processor wants a network")

    monkeypatch.setattr(proof, "Dummies", fail)
    assert proof.prove(CONFIG, lambda modality, items: by_tile(items)) == []
