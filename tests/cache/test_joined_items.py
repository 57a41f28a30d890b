"""Items that are made of several patches: available when they all are, and their embeddings are joined in order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cache.slot import StaleSlotError
from epd.messages import Slot
from epd.multimodal.item_identifiers import identifier_of, patches_of
from tests.cache.test_tensors import POOL, DeviceView

pytestmark = pytest.mark.engine
ITEM = identifier_of(["a", "b", "a"])


@pytest.fixture(params=["host", "device"])
def connector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A reader whose pool is a stand-in in this process: one that it copies out of, or one that it reads in place."""
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from cache import ec_connector, tensors

    monkeypatch.setattr(tensors, "open_view", DeviceView)
    for module in (ec_connector, tensors):
        monkeypatch.setattr(module, "DEVICE_KINDS", {POOL.kind} if request.param == "device" else set())
    monkeypatch.setattr(ec_connector, "_verified", {})
    ec = SimpleNamespace(is_ec_producer=False, is_ec_consumer=True, ec_connector_extra_config={"min_overlap_tokens": 8})
    config = SimpleNamespace(ec_transfer_config=ec, device_config=SimpleNamespace(device="cpu"))
    made = ec_connector.PatchCacheConnector(config, ECConnectorRole.SCHEDULER)
    made.set_pools([POOL])
    return made


def slot_of(connector: Any, number: int, rows: int) -> Slot:
    """A slot that holds `rows` rows of 8 times this number."""
    import torch

    slot = Slot(
        pool_id=POOL.pool_id, offset=number << 10, nbytes=1 << 10, generation=number, num_tokens=rows, width=8,
        dtype="bfloat16",
    )  # fmt: skip
    connector._pools.view(slot).write(slot, torch.full((rows, 8), float(number), dtype=torch.bfloat16), "e")
    return slot


def request_of(*identifiers: str, gap: int = 10) -> Any:
    """A request of items of 5 tokens, each after some text."""
    features = [
        SimpleNamespace(
            identifier=name, mm_position=SimpleNamespace(offset=gap + i * (gap + 5), length=5)
        )
        for i, name in enumerate(identifiers)
    ]  # fmt: skip
    return SimpleNamespace(request_id="r", num_tokens=(gap + 5) * len(features) + gap, mm_features=features)


def load(connector: Any, request: Any) -> dict[str, Any]:
    """The encoder cache after a step that needs all items of a request."""
    for index in range(len(request.mm_features)):
        connector.update_state_after_alloc(request, index)
    connector.bind_connector_metadata(connector.build_connector_meta(None))
    cache: dict[str, Any] = {}
    connector.start_load_caches(cache)
    return cache


@pytest.mark.parametrize("connector", ["device"], indirect=True)
def test_a_patch_on_a_device_is_available_once_it_is_written(connector: Any) -> None:
    connector.expect("r", ["a", "b"])
    slots = {"a": slot_of(connector, 1, 2), "b": slot_of(connector, 2, 1)}
    view = connector._pools.view(slots["a"])
    view.unwritten = {slot.offset for slot in slots.values()}
    for name, slot in slots.items():
        connector.patch_ready(name, slot)
    assert (connector.num_unwritten, connector.num_held) == (2, 2)
    assert connector.look_at_unwritten() == []
    assert not connector.has_cache_item("a")
    view.unwritten.discard(slots["a"].offset)
    del view.tensors[slots["b"].offset]  # its writer has died
    [(name, slot, reason)] = connector.look_at_unwritten()
    assert (name, slot) == ("b", slots["b"])
    assert "is here" in reason
    assert connector.has_cache_item("a")
    assert (connector.num_unwritten, connector.num_held) == (0, 1)
    connector.expect("r", ["c"])
    view.unwritten = {3 << 10}
    connector.patch_ready("c", slot_of(connector, 3, 1))
    connector.forget("r")
    assert (connector.num_unwritten, connector.num_held) == (0, 0)


def test_an_item_is_available_when_all_its_patches_are(connector: Any) -> None:
    connector.expect("r", patches_of(ITEM))
    request = request_of("c", ITEM)
    assert not connector.has_cache_item(ITEM)
    connector.patch_ready("a", slot_of(connector, 1, 2))
    assert not connector.has_cache_item(ITEM)
    assert not connector.ensure_cache_available(request, 20)
    connector.patch_ready("b", slot_of(connector, 2, 1))
    assert connector.has_cache_item(ITEM)
    assert connector.ensure_cache_available(request, 20)


def test_its_embeddings_are_those_of_its_patches_in_their_order(connector: Any) -> None:
    connector.expect("r", patches_of(ITEM))
    connector.patch_ready("b", slot_of(connector, 2, 1))
    connector.patch_ready("a", slot_of(connector, 1, 2))
    cache = load(connector, request_of(ITEM))
    assert list(cache) == [ITEM]
    assert cache[ITEM].shape == (5, 8)
    assert cache[ITEM][:, 0].tolist() == [1, 1, 2, 1, 1]


def test_what_is_needed_of_it_are_the_patches_that_are_missing_each_once(connector: Any) -> None:
    request = request_of("c", ITEM)
    assert connector.ensure_cache_available(request, 0), "ten tokens of text are worth a step"
    assert not connector.ensure_cache_available(request, 9)
    assert connector.take_needed() == {"r": ["c", "a", "b"]}
    connector.expect("r", ["c", "a", "b"])
    connector.patch_ready("a", slot_of(connector, 1, 2))
    assert not connector.ensure_cache_available(request, 9)
    assert connector.take_needed() == {}, "they have been asked for"


def test_a_patch_that_two_requests_share_stays_until_both_have_ended(connector: Any) -> None:
    connector.expect("r", patches_of(ITEM))
    connector.expect("s", ["a"])
    for name, rows in (("a", 2), ("b", 1)):
        connector.patch_ready(name, slot_of(connector, ord(name), rows))
    connector.forget("r")
    assert connector.has_cache_item("a") and not connector.has_cache_item(ITEM)
    connector.forget("s")
    assert connector.num_held == 0


def test_a_patch_that_was_overwritten_leaves_the_item_waiting(connector: Any) -> None:
    connector.expect("r", patches_of(ITEM))
    connector.patch_ready("a", slot_of(connector, 1, 2))
    stale = slot_of(connector, 2, 1)
    slot_of(connector, 2, 1)
    connector._pools.view(stale).tensors[stale.offset] = (9, "e", None)
    with pytest.raises(StaleSlotError):
        connector.patch_ready("b", stale)
    assert not connector.has_cache_item(ITEM)


def test_a_long_videos_identifier_names_every_patch() -> None:
    names = [f"{i:032x}" for i in range(384)]
    assert patches_of(identifier_of(names)) == names
    assert patches_of(identifier_of(names[:1])) == names[:1]
