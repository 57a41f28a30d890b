"""Which sizes of items are the model's: what all items of noise have in common, whatever they were made from."""

import pytest
import torch

from epd.multimodal.item_shapes import ItemShapes
from epd.multimodal.rules import UnsupportedItemError

from .items import BATCHED, FLAT, item

pytestmark = pytest.mark.engine


def picture(count=3, height=8, width=8, **more):
    return item(pixels=(torch.zeros(count, 3, height, width), FLAT), count=(torch.tensor(count), BATCHED), **more)


def shapes(*items):
    return ItemShapes(("image", each) for each in items)


def refused(known, given, words):
    with pytest.raises(UnsupportedItemError, match=words):
        known.check({"image": [given]})


def test_how_many_patches_there_are_is_the_mediums():
    shapes(picture(3)).check({"image": [picture(1), picture(100)], "video": [picture(1, 2, 2)]})


def test_a_size_that_all_have_is_the_models():
    known = shapes(picture(3), picture(5))
    refused(known, picture(3, 4, 4), "3x4x4; the model takes 3x8x8")
    refused(known, picture(3, 8, 16), "3x8x16")


def test_a_size_that_differs_among_them_is_the_mediums():
    known = shapes(picture(3, 8, 8), picture(3, 8, 16))
    known.check({"image": [picture(1, 8, 99)]})
    refused(known, picture(1, 4, 99), "3x4x99; the model takes 3x8xany")


def test_fields_are_all_there_and_no_others():
    known = shapes(picture())
    refused(known, picture(more=(torch.zeros(1), BATCHED)), "more")
    refused(known, item(count=(torch.tensor(1), BATCHED)), "pixels")


def test_another_number_of_sizes_is_another_shape():
    known = shapes(picture())
    refused(known, item(pixels=(torch.zeros(3, 8, 8), FLAT), count=(torch.tensor(1), BATCHED)), "pixels")
    refused(known, item(pixels=(torch.zeros(1, 3, 3, 8, 8), FLAT), count=(torch.tensor(1), BATCHED)), "pixels")


def test_lists_of_tensors_have_what_they_all_have():
    def listed(*sizes):
        return item(pixels=([torch.zeros(3, *size) for size in sizes], BATCHED))

    known = shapes(listed((8, 8), (8, 16)))
    known.check({"image": [listed((8, 8)), listed((8, 2), (8, 4), (8, 6))]})
    refused(known, listed((8, 8), (4, 8)), "pixels")


def test_an_item_of_which_nothing_is_told_passes():
    shapes(picture()).check({"image": [None]})


def test_the_built_in_model_takes_tiles_of_one_size():
    from epd.builtin import model_path
    from epd.config import Config
    from epd.endpoint.http.options import serve_args, vllm_config_of

    config = vllm_config_of(serve_args(Config(model=str(model_path()), engine={"max_model_len": 1024})))
    known = ItemShapes.of(config)
    assert known._fields["image"]["pixel_values"] == (3, 64, 64)
