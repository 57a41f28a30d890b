"""How items are cut, on items made here: what a rule makes of fields, runs and counts."""

import pytest
import torch

from epd.messages import Stage, WorkerInfo, WorkerStatus
from epd.multimodal.units import Unit, agreed_units, described

pytestmark = pytest.mark.engine  # vLLM's types


def leading(has_shorter_last=False):
    from epd.multimodal.rules import Way
    from epd.multimodal.rules.leading import leading_dimension

    return Way("tile", leading_dimension, has_shorter_last)


def tokens(pieces):
    return [piece.position.get_num_embeds() for piece in pieces]


def starts(pieces):
    return [piece.position.offset for piece in pieces]


def test_each_tile_gets_its_pixels_and_a_count_of_one():
    from tests.multimodal.items import place, tiles

    whole = tiles(3)
    pieces = leading().cut(whole, place(4, 4, 4), 4)
    assert torch.equal(torch.cat([piece.item["pixel_values"].data for piece in pieces]), whole["pixel_values"].data)
    assert [int(piece.item["num_patches"].data) for piece in pieces] == [1, 1, 1]
    assert [int(piece.item["token"].data) for piece in pieces] == [7, 7, 7]
    assert starts(pieces) == [12, 18, 24]


def test_one_run_is_shared_out_equally_whatever_the_size_of_a_piece():
    from tests.multimodal.items import place, tiles

    assert tokens(leading().cut(tiles(3), place(12), 4)) == [4, 4, 4]
    assert tokens(leading().cut(tiles(3), place(9), 4)) == [3, 3, 3]
    assert starts(leading().cut(tiles(3), place(9), 4)) == [12, 15, 18]
    assert leading().cut(tiles(3), place(10), 4) is None


def test_the_last_window_of_a_sound_may_be_shorter():
    from tests.multimodal.items import place, tiles

    way = leading(has_shorter_last=True)
    assert tokens(way.cut(tiles(3), place(12), 4)) == [4, 4, 4]
    assert tokens(way.cut(tiles(3), place(9), 4)) == [4, 4, 1]
    assert starts(way.cut(tiles(3), place(9), 4)) == [12, 16, 20]
    assert way.cut(tiles(3), place(8), 4) is None
    assert way.cut(tiles(3), place(13), 4) is None


def test_a_run_for_each_piece_may_have_any_length():
    from tests.multimodal.items import place, tiles

    assert tokens(leading().cut(tiles(3), place(4, 6, 2), 6)) == [4, 6, 2]


def test_a_piece_across_two_runs_keeps_a_mask():
    from tests.multimodal.items import place, tiles

    first, second = leading().cut(tiles(2), place(3, 2, 3), 4)
    assert (first.position.offset, first.position.length) == (12, 6)
    assert first.position.is_embed.tolist() == [True, True, True, False, False, True]
    assert second.position.is_embed.tolist() == [True, False, False, True, True, True]


@pytest.mark.parametrize("case", ["no count", "count of something else", "rows that differ", "a shared number"])
def test_fields_that_do_not_name_pieces_are_not_cut(case):
    from tests.multimodal.items import BATCHED, FLAT, SHARED, item, place

    pixels, count = torch.zeros(6, 4), torch.tensor(6)
    fields = {
        "no count": {"pixel_values": (pixels, FLAT), "image_grid_thw": (torch.tensor([1, 2, 3]), BATCHED)},
        "count of something else": {"pixel_values": (pixels, FLAT), "num": (torch.tensor(3), BATCHED)},
        "rows that differ": {"a": (pixels, FLAT), "b": (pixels[:3], FLAT), "num": (count, BATCHED)},
        "a shared number": {"pixel_values": (pixels, FLAT), "token_id": (count, SHARED)},
    }[case]
    assert leading().cut(item(**fields), place(12), 2) is None


def test_slices_lose_their_padding():
    from epd.multimodal.rules import Way
    from epd.multimodal.rules.slices import navit_slices
    from tests.multimodal.items import BATCHED, item, place

    pixels, grids = torch.randn(2, 3, 4, 40), torch.tensor([[2, 5], [2, 2]])
    whole = item(video_pixel_values=(pixels, BATCHED), video_tgt_sizes=(grids, BATCHED))
    first, second = Way("frame", navit_slices).cut(whole, place(5, 2), 5)
    assert torch.equal(first.item["video_pixel_values"].data, pixels[:1])
    assert torch.equal(second.item["video_pixel_values"].data, pixels[1:, ..., :16])
    assert second.item["video_tgt_sizes"].data.tolist() == [[2, 2]]


def worker(units, num_tokens=4, stage=Stage.ENCODE):
    info = WorkerInfo(units=units, tokens_per_patch=dict.fromkeys(units, num_tokens))
    return WorkerStatus(name="w", stage=stage, incarnation="i", host="h", pid=1, info=info)


def test_a_unit_counts_only_where_all_encode_workers_have_proved_it():
    both = {"image": "tile", "video": "item"}
    tile = {"image": Unit("tile", 4)}
    assert agreed_units([worker(both), worker(both), worker({}, stage=Stage.DECODE)]) == tile
    assert agreed_units([worker(both), worker({"image": "item"})]) == {}
    assert agreed_units([worker(both), worker({})]) == {}
    assert agreed_units([worker(both), worker(both, num_tokens=5)]) == {}
    assert agreed_units([worker({}, stage=Stage.DECODE)]) is None


def test_people_see_whole_items_too():
    workers = [worker({"image": "tile", "video": "frame"}), worker({"image": "tile", "video": "item"})]
    assert described(workers) == {"units": {"image": "tile", "video": "item"}, "tokens_per_patch": {"image": 4}}
    assert described([]) == {"units": {}, "tokens_per_patch": {}}


def test_the_fields_of_families_that_are_not_tried_here_tell_pieces_too():
    """As vLLM 0.32 declares them (internvl, ultravox and minicpmv in `vllm.model_executor.models`)."""
    from epd.multimodal.rules import Way
    from epd.multimodal.rules.slices import navit_slices
    from tests.multimodal.items import BATCHED, FLAT, SHARED, item, place

    three, pixels = torch.tensor(3), torch.randn(3, 3, 2, 2)
    video = item(
        pixel_values_flat_video=(pixels, FLAT), video_num_patches=(three, BATCHED), video_token_id=(three, SHARED)
    )
    assert tokens(leading().cut(video, place(4, 4, 4), 4)) == [4, 4, 4]
    sound = item(
        audio_features=(torch.randn(3, 8, 20), FLAT),
        audio_token_len=(torch.tensor([6, 6, 2]), FLAT),
        audio_lens=(torch.tensor([20, 20, 7]), FLAT),
        audio_num_chunks=(three, BATCHED),
    )
    chunks = leading(has_shorter_last=True).cut(sound, place(14), 6)
    assert tokens(chunks) == [6, 6, 2] == [int(chunk.item["audio_token_len"].data) for chunk in chunks]
    slices = [torch.randn(3, 4, 4 * count) for count in (6, 4)]
    picture = item(pixel_values=(slices, BATCHED), tgt_sizes=(torch.tensor([[2, 3], [2, 2]]), BATCHED))
    first, second = Way("slice", navit_slices).cut(picture, place(64, 64), 64)
    assert [one.shape for one in second.item["pixel_values"].data] == [(3, 4, 16)]
    assert tokens([first, second]) == [64, 64]
