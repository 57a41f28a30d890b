"""What prefill and decode are given of items of M-RoPE models, and what is refused before an engine sees it."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine

START, END, IMAGE, VIDEO = 5, 6, 7, 8


def elem(data, keep_on_cpu=False):
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

    return MultiModalFieldElem(data, MultiModalBatchedField(keep_on_cpu=keep_on_cpu))


def made(grid, name="image_grid_thw", **more):
    """An item of this grid, with pixels of (patches, 12)."""
    import torch
    from vllm.multimodal.inputs import MultiModalKwargsItem

    pixels = "pixel_values" if name.startswith("image") else "pixel_values_videos"
    rows = torch.arange(float(torch.tensor(grid).prod() * 12)).view(-1, 12)
    fields = {pixels: rows, name: torch.tensor(grid)} | more
    return MultiModalKwargsItem({key: elem(value) for key, value in fields.items()})


def placed(length, offset=3, is_embed=None):
    from vllm.multimodal.inputs import PlaceholderRange

    return PlaceholderRange(offset=offset, length=length, is_embed=is_embed)


def positions(architecture="Qwen2_5_VLForConditionalGeneration"):
    from epd.multimodal.positions import FIELDS, Positions

    return Positions(FIELDS[architecture], 2, 1000.0, (START, END))


def feature(modality, item, place):
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    return MultiModalFeatureSpec(data=item, modality=modality, identifier="x", mm_position=place)


class Recorded(dict):
    """A dict that remembers what it was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


def model(architecture):
    """What vLLM's position code needs of its model: the class's own functions over a configuration."""
    from vllm.model_executor.models.registry import ModelRegistry

    cls = ModelRegistry._try_load_model_cls(architecture)
    config = SimpleNamespace(
        vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2),
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    stand_in = SimpleNamespace(config=config)
    if hasattr(cls, "iter_mm_grid_thw"):
        stand_in.iter_mm_grid_thw = lambda features: cls.iter_mm_grid_thw(stand_in, features)
    else:
        stand_in._get_mrope_input_positions = cls._get_mrope_input_positions
    return lambda tokens, features: cls.get_mrope_input_positions(stand_in, tokens, features)


def prompt(modality, framed):
    """Token ids and the place of an item: an image of 2 x 3 embeddings, or a video of 3 temporal grids of them."""
    import torch

    if modality == "image":
        return [1, 1, START, *[IMAGE] * 6, END, 2], placed(6)
    if not framed:
        return [1, 1, START, *[VIDEO] * 18, END, 2], placed(18)
    frame = [9, START, *[VIDEO] * 6, END]
    mask = torch.tensor([token == VIDEO for token in frame * 3])
    return [1, 1, 1, *frame * 3, 2], placed(27, is_embed=mask)


def everything(modality):
    """An item with every field that vLLM's processors of these families give."""
    import torch

    if modality == "image":
        return made([1, 4, 6])
    more = {"second_per_grid_ts": torch.tensor(1.5), "timestamps": [0.0, 1.0, 2.0]}
    return made([3, 4, 6], "video_grid_thw", **more)


def cases():
    from epd.multimodal.positions import FIELDS

    return [(architecture, modality) for architecture, fields in FIELDS.items() for modality in fields]


@pytest.mark.parametrize(("architecture", "modality"), cases())
def test_vllm_computes_the_same_positions_from_the_fields_that_are_picked(architecture, modality):
    from vllm.multimodal.inputs import MultiModalKwargsItem

    from epd.multimodal.positions import FIELDS

    fields = FIELDS[architecture][modality]
    tokens, place = prompt(modality, fields.framed)
    whole = Recorded(everything(modality))
    compute = model(architecture)
    expected, delta = compute(tokens, [feature(modality, whole, place)])
    read = set(whole.asked)
    picked = positions(architecture).pick(modality, MultiModalKwargsItem(whole), place)
    found, same = compute(tokens, [feature(modality, picked, place)])
    assert found.equal(expected) and same == delta and found.shape == (3, len(tokens))
    assert read == {fields.grid, fields.seconds} - {""}, "what vLLM reads is what is picked"
    assert set(picked) == {fields.grid, fields.seconds} - {""}
    assert all(each.field.keep_on_cpu for each in picked.values()), "vLLM strips others of items in the prefix cache"


@pytest.mark.parametrize(
    ("modality", "item", "length", "words"),
    [
        ("image", lambda: None, 6, "without its grid"),
        ("image", lambda: made([3, 4, 6], "video_grid_thw"), 18, "without its grid"),
        ("image", lambda: made([1, 4, 6]), 7, "does not fit its 7 tokens"),
        ("image", lambda: made([1, 3, 8]), 6, "does not fit"),
        ("image", lambda: made([2, 4, 6]), 12, "cannot be"),
        ("image", lambda: made([1, 0, 6]), 6, "cannot be"),
        ("image", lambda: made([1, 4, 6, 1]), 6, "three integers"),
        ("image", lambda: made([1.0, 4.0, 6.0]), 6, "three integers"),
        ("audio", lambda: made([1, 4, 6]), 6, "no positions for audio"),
        ("video", lambda: made([3, 4, 6], "video_grid_thw", second_per_grid_ts=[1.0]), 18, "one number"),
        ("video", lambda: made([3, 4, 6], "video_grid_thw", second_per_grid_ts=tensor(1e9)), 18, "too long"),
        ("video", lambda: made([3, 4, 6], "video_grid_thw", second_per_grid_ts=tensor(float("nan"))), 18, "too long"),
        ("video", lambda: made([3, 4, 6], "video_grid_thw", second_per_grid_ts=tensor(-1.0)), 18, "too long"),
    ],
)
def test_an_item_without_the_right_metadata_is_refused(modality, item, length, words):
    from epd.multimodal.positions import PositionsError

    with pytest.raises(PositionsError, match=words):
        positions().check(modality, item(), placed(length))


def tensor(value):
    import torch

    return torch.tensor(value)


def test_a_video_without_a_frame_of_tokens_for_each_grid_is_refused():
    from epd.multimodal.positions import PositionsError

    checks = positions("Qwen3VLForConditionalGeneration")
    tokens, place = prompt("video", framed=True)
    item = everything("video")
    checks.check("video", item, place, tokens)
    without = [9 if token == START else token for token in tokens]
    with pytest.raises(PositionsError, match="each of 3 grids"):
        checks.check("video", item, place, without)


def by_grid(item, place):
    """A video cut into its temporal grids."""
    from epd.multimodal.rules import Way
    from epd.multimodal.rules.grids import temporal_grids

    return Way("temporal grid", temporal_grids).cut(item, place, 0)


def test_each_temporal_grid_is_a_piece_with_what_is_its_own():
    import torch

    item, (_, place) = everything("video"), prompt("video", framed=True)
    pieces = by_grid(item, place)
    assert [piece.position.offset for piece in pieces] == [5, 14, 23]
    assert all(piece.position.length == 6 and piece.position.is_embed is None for piece in pieces)
    assert all(piece.item["video_grid_thw"].data.tolist() == [1, 4, 6] for piece in pieces)
    assert [piece.item["timestamps"].data for piece in pieces] == [[0.0], [1.0], [2.0]]
    assert all(float(piece.item["second_per_grid_ts"].data) == 1.5 for piece in pieces)
    name = "pixel_values_videos"
    assert torch.cat([piece.item[name].data for piece in pieces]).equal(item[name].data)


@pytest.mark.parametrize("length", [17, 2])
def test_a_video_that_does_not_fit_its_tokens_has_no_pieces(length):
    assert by_grid(everything("video"), placed(length)) is None
    assert by_grid(everything("image"), placed(6)) is None


def test_a_video_is_one_item_for_prefill_and_a_patch_for_each_grid():
    from epd.multimodal.item_identifiers import patches_of
    from epd.multimodal.splitter import assemble, cut

    item, place = everything("video"), placed(18)
    asked = feature("video", item, place)
    split = assemble([asked], [cut(asked, by_grid, positions())], b"model", "")
    [spec] = split.features
    names = [patch.patch_hash for patch in split.patches]
    assert len(set(names)) == 3 and patches_of(spec.identifier) == names and spec.mm_hash == spec.identifier
    assert [patch.num_tokens for patch in split.patches] == [6, 6, 6]
    assert set(spec.data) == {"video_grid_thw", "second_per_grid_ts"}
    assert spec.data["video_grid_thw"].data.tolist() == [3, 4, 6]
    assert (spec.mm_position.offset, spec.mm_position.length) == (3, 18)


def test_the_same_frames_at_another_rate_are_another_item():
    """Their positions differ, so the prefix cache must not take one for the other."""
    from epd.multimodal.splitter import assemble, cut

    identifiers = set()
    for seconds in (1.0, 2.0):
        item = made([3, 4, 6], "video_grid_thw", second_per_grid_ts=tensor(seconds))
        asked = feature("video", item, placed(18))
        [spec] = assemble([asked], [cut(asked, by_grid, positions())], b"model", "").features
        identifiers.add(spec.identifier)
    assert len(identifiers) == 2
