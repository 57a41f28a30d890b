"""Patches of really rendered items: their cut, their tokens and their names."""

import io

import numpy
import pytest
from PIL import Image

from epd.builtin import demo_image_path
from tests.endpoint.serving import MODEL

pytestmark = pytest.mark.engine
IDENTITY = b"model"


@pytest.fixture(scope="module")
def vllm_config():
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(
        model=MODEL, dtype="bfloat16", max_model_len=1024, mm_processor_cache_gb=0, enforce_eager=True
    ).create_engine_config()


@pytest.fixture(scope="module")
def render(vllm_config):
    """Pictures and a text with as many <image> -> the features of an engine request."""
    from vllm import SamplingParams
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    renderer = renderer_from_config(vllm_config)
    processor = InputProcessor(vllm_config, renderer)

    def render(*pictures, text=None):
        prompt = {"prompt": text or "User:" + "<image>" * len(pictures) + " Read.\nAssistant:"}
        if pictures:
            prompt["multi_modal_data"] = {"image": list(pictures)}
        (rendered,) = renderer.render_cmpl([prompt])
        return processor.process_inputs("r", rendered, SamplingParams(max_tokens=1), supported_tasks=("generate",))

    yield render
    renderer.shutdown()


@pytest.fixture(scope="module")
def demo():
    return Image.open(demo_image_path()).convert("RGB")


def tiles(item, position):
    """The rule of the built-in model, once an encode worker has proved it."""
    from epd.multimodal.rules import Way, whole_item
    from epd.multimodal.rules.leading import leading_dimension

    return Way("tile", leading_dimension).cut(item, position, 4) or whole_item(item, position)


def cut(request, salt="", identity=IDENTITY):
    from epd.multimodal.splitter import split

    return split(request.mm_features or [], tiles, identity, salt)


def names(parts):
    return [patch.patch_hash for patch in parts.patches]


def items(parts):
    """Each patch's item, as an encode worker decodes it."""
    from vllm.multimodal.inputs import MultiModalKwargsItem
    from vllm.v1.serial_utils import MsgpackDecoder

    start = 0
    for patch in parts.patches:
        yield MsgpackDecoder(MultiModalKwargsItem).decode(parts.frames[start : start + patch.num_frames])
        start += patch.num_frames
    assert start == len(parts.frames)


def through(picture, kind):
    data = io.BytesIO()
    picture.save(data, kind)
    return Image.open(data).convert("RGB")


def test_the_tiles_joined_are_the_item(render, demo):
    import torch

    request = render(demo)
    whole = request.mm_features[0].data
    parts = list(items(cut(request)))
    assert len(parts) == 9 == int(whole["num_patches"].data)
    for field in set(whole) - {"num_patches"}:
        assert torch.equal(torch.cat([part[field].data for part in parts]), whole[field].data)
    assert all(int(part["num_patches"].data) == 1 for part in parts)
    assert all(type(part[name].field) is type(whole[name].field) for part in parts for name in whole)


def test_each_tile_has_its_own_run_of_the_prompt(render, demo):
    request = render(demo)
    parts = cut(request)
    place = request.mm_features[0].mm_position
    expected = [place.offset + i for i in place.is_embed.nonzero().flatten().tolist()]
    covered = [f.mm_position.offset + i for f in parts.features for i in range(f.mm_position.length)]
    assert covered == expected
    assert {request.prompt_token_ids[i] for i in covered} == {4}
    assert [patch.num_tokens for patch in parts.patches] == [4] * 9
    assert all(f.data is None and f.identifier == f.mm_hash for f in parts.features)


def test_equal_pixels_have_equal_names_whatever_the_file(render, demo):
    expected = names(cut(render(demo)))
    assert len(set(expected)) == 9 and all(len(name) == 32 for name in expected)
    for kind in ("PNG", "BMP", "TIFF"):
        assert names(cut(render(through(demo, kind)))) == expected


def test_one_pixel_changes_its_tile_and_the_overview_only(render, demo):
    pixels = numpy.array(demo)
    pixels[3, 3] = 255 - pixels[3, 3]
    before, after = names(cut(render(demo))), names(cut(render(Image.fromarray(pixels))))
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert 0 in changed and set(changed) <= {0, 8}


def test_another_salt_or_model_gives_other_names(render, demo):
    request = render(demo)
    plain = set(names(cut(request)))
    assert not plain & set(names(cut(request, salt="tenant")))
    assert not plain & set(names(cut(request, identity=b"other")))


def test_a_picture_smaller_than_a_tile(render):
    parts = cut(render(Image.new("RGB", (5, 3), "red")))
    assert len(parts.patches) >= 1 and all(patch.num_tokens == 4 for patch in parts.patches)


def test_several_pictures_keep_their_order(render, demo):
    other = Image.new("RGB", (64, 64), "blue")
    request = render(demo, other, demo)
    parts = cut(request)
    single, blue = names(cut(render(demo))), names(cut(render(other)))
    assert names(parts) == [*single, *blue, *single]
    offsets = [feature.mm_position.offset for feature in parts.features]
    assert offsets == sorted(offsets)


def test_text_alone_has_no_patches(render):
    parts = cut(render(text="hello"))
    assert not parts.patches and not parts.features and not parts.frames


def test_without_a_rule_the_item_is_one_patch_that_keeps_its_mask(render, demo):
    import torch

    from epd.multimodal.rules import whole_item
    from epd.multimodal.splitter import split

    request = render(demo)
    parts = split(request.mm_features, whole_item, IDENTITY, "")
    (patch,), (feature,), (item,) = parts.patches, parts.features, items(parts)
    place = request.mm_features[0].mm_position
    assert patch.num_tokens == 36 and feature.mm_position == place
    assert torch.equal(item["pixel_values"].data, request.mm_features[0].data["pixel_values"].data)


@pytest.mark.parametrize("broken", ["count", "rows", "mask", "fields"])
def test_items_that_do_not_fit_the_rule_stay_whole(render, demo, broken):
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    request = render(demo)
    (feature,) = request.mm_features
    item, place = feature.data, feature.mm_position
    if broken == "count":
        item["num_patches"].data = torch.tensor(7)
    elif broken == "rows":
        item["pixel_values"].data = item["pixel_values"].data[:-1]
    elif broken == "mask":
        feature.mm_position = PlaceholderRange(place.offset, place.length, torch.ones_like(place.is_embed))
    else:
        del item["num_patches"]
    ((patch,), (found,)) = (parts := cut(request)).patches, parts.features
    assert found.mm_position == feature.mm_position
    assert patch.num_tokens == feature.mm_position.get_num_embeds()


@pytest.mark.parametrize("broken", ["no data", "embeds"])
def test_items_without_pixels_are_refused(render, demo, broken):
    from epd.multimodal.rules import UnsupportedItemError

    request = render(demo)
    (feature,) = request.mm_features
    if broken == "no data":
        feature.data = None
    else:
        feature.data["image_embeds"] = feature.data.pop("pixel_values")
    with pytest.raises(UnsupportedItemError):
        cut(request)


def test_the_identity_follows_the_model_and_its_settings(vllm_config):
    from copy import copy

    from epd.multimodal.naming import identity_of

    assert identity_of(vllm_config) == identity_of(vllm_config)
    other = copy(vllm_config)
    other.model_config = copy(vllm_config.model_config)
    other.model_config.revision = "v2"
    assert identity_of(other) != identity_of(vllm_config)


def test_a_prompt_that_ends_inside_a_picture_is_refused(render, demo):
    from vllm.exceptions import VLLMValidationError

    from epd.endpoint.engine.submission import check_request

    check_request(render(demo))
    with pytest.raises(VLLMValidationError, match="must not end inside"):
        check_request(render(demo, text="User:<image>"))
