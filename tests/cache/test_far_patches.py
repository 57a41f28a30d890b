"""The EC connector and slots of another host: fetched and stored while the engine goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cache.slot import StaleSlotError
from epd.messages import Slot
from tests.cache.served import DATA, Served

pytestmark = pytest.mark.engine


def connector_of(served: Served, monkeypatch: pytest.MonkeyPatch, *, writes: bool = False, ranks: int = 1) -> Any:
    """A connector, as beside a scheduler and a model runner in one process; its pool is another host's."""
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole

    from cache import ec_connector

    monkeypatch.setattr(ec_connector, "_verified", {})
    monkeypatch.setattr(ec_connector, "get_tensor_model_parallel_rank", lambda: 0)
    config = SimpleNamespace(
        ec_transfer_config=SimpleNamespace(
            is_ec_producer=writes, is_ec_consumer=not writes, ec_connector_extra_config={"owner": "encoder"}
        ),
        device_config=SimpleNamespace(device="cpu"),
        parallel_config=SimpleNamespace(world_size=ranks),
    )
    made = ec_connector.PatchCacheConnector(config, ECConnectorRole.SCHEDULER)
    assert made.set_pools([served.pool]) == []
    return made


@pytest.fixture
def reader(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = connector_of(served, monkeypatch)
    yield made
    made.shutdown()


def request_of(*patches: str) -> Any:
    features = [
        SimpleNamespace(identifier=one, mm_position=SimpleNamespace(offset=3 * i, length=3))
        for i, one in enumerate(patches)
    ]
    return SimpleNamespace(request_id="r", num_tokens=3 * len(features), mm_features=features)


def load(connector: Any, *patches: str) -> dict[str, Any]:
    """The encoder cache after a step that needs these patches."""
    request = request_of(*patches)
    for index in range(len(patches)):
        connector.update_state_after_alloc(request, index)
    connector.bind_connector_metadata(connector.build_connector_meta(None))
    found: dict[str, Any] = {}
    connector.start_load_caches(found)
    return found


def test_a_patch_is_available_when_it_has_been_fetched(served: Served, reader: Any) -> None:
    import torch

    slot = served.slot()
    served.local.write(slot, DATA, "encoder")
    reader.expect("r", ["a"])
    fetch = reader.patch_ready("a", slot)
    assert reader.patch_ready("a", slot) is None, "it is on its way"
    fetch.result(5)
    assert not reader.has_cache_item("a"), "only the engine's thread may change that"
    assert reader.num_held == 1
    reader.patch_fetched("a", slot, fetch)
    assert reader.has_cache_item("a")
    assert reader.num_held == 1
    assert reader.patch_ready("a", slot) is None
    served.stop()  # from now on nothing can be read from there
    assert load(reader, "a")["a"].equal(torch.frombuffer(bytearray(DATA), dtype=torch.float32).view(3, 8))
    reader.forget("r")
    assert reader.num_held == 0


def test_model_runners_in_other_processes_get_what_was_fetched(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from cache import ec_connector

    reader = connector_of(served, monkeypatch, ranks=2)
    for number in range(2):
        served.local.write(served.slot(number), DATA[:: -1 if number else 1], "encoder")
    reader.expect("r", ["a", "b"])
    for number, name in enumerate("ab"):
        fetch = reader.patch_ready(name, served.slot(number))
        fetch.exception(5)
        reader.patch_fetched(name, served.slot(number), fetch)
    expected = load(reader, "a", "b")
    monkeypatch.setattr(ec_connector, "_verified", {})  # as in another process
    served.stop()
    found = load(reader, "a", "b")
    assert sorted(found) == ["a", "b"]
    assert all(found[name].equal(expected[name]) for name in "ab")
    assert not load(reader)
    assert reader.build_connector_meta(None).fetched == {}, "only with the step that needs it"
    reader.forget("r")
    assert load(reader, "a") == {}
    reader.shutdown()


def test_a_slot_that_holds_something_else_is_stale_to_those_who_still_want_it(served: Served, reader: Any) -> None:
    served.local.write(served.slot(generation=8), DATA, "encoder")
    old, new = served.slot(generation=7), served.slot(generation=8)
    reader.expect("r", ["a"])
    late = reader.patch_ready("a", old)
    with pytest.raises(StaleSlotError):
        late.result(5)
    with pytest.raises(StaleSlotError):
        reader.patch_fetched("a", old, late)
    assert reader.readers("a") == ["r"]
    late = reader.patch_ready("a", old)
    now = reader.patch_ready("a", new)  # encoded again meanwhile
    late.exception(5)
    reader.patch_fetched("a", old, late)
    assert not reader.has_cache_item("a")
    now.result(5)
    reader.patch_fetched("a", new, now)
    assert reader.has_cache_item("a")


def test_a_fetch_that_nobody_waits_for_any_more_leaves_nothing(served: Served, reader: Any) -> None:
    reader.expect("r", ["a"])
    fetch = reader.patch_ready("a", served.slot())
    reader.forget("r")
    fetch.exception(5)
    reader.patch_fetched("a", served.slot(), fetch)  # stale, and no matter
    assert reader.readers("a") == []
    assert reader.num_held == 0


def test_a_patch_is_not_blamed_for_a_cache_that_was_restarted_at_its_address(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers before the broker has heard of it."""
    import torch

    writer = connector_of(served, monkeypatch, writes=True)
    assert served.server
    served.server._pool = msgspec.structs.replace(served.pool, pool_id="next")
    writer.set_write_slot("1", served.slot())
    writer.update_state_after_alloc(request_of("1"), 0)
    writer.bind_connector_metadata(writer.build_connector_meta(None))
    writer.save_caches({"1": torch.zeros(3, 8)}, "1")
    until = time.monotonic() + 5
    while (report := writer.take_report()).storing and time.monotonic() < until:
        time.sleep(0.001)
    assert "is gone" in report.unstored["1"]
    assert not report.failed
    writer.shutdown()


def test_a_write_is_reported_when_it_is_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    writer = connector_of(served, monkeypatch, writes=True)
    embeddings = torch.frombuffer(bytearray(DATA), dtype=torch.float32).view(3, 8)
    slots: dict[str, Slot] = {
        "1": served.slot(0, owner=""),
        "2": served.slot(1, owner=""),
        "3": msgspec.structs.replace(served.slot(1 << 12), owner=""),
    }
    for job, slot in slots.items():
        writer.set_write_slot(job, slot)
        writer.update_state_after_alloc(request_of(job), 0)
    writer.bind_connector_metadata(writer.build_connector_meta(None))
    for job in slots:
        writer.save_caches({job: embeddings}, job)
    done: set[str] = set()
    failed: dict[str, str] = {}
    until = time.monotonic() + 5
    while len(done) + len(failed) < 3 and time.monotonic() < until:
        report = writer.take_report()
        done |= report.done
        failed |= report.failed
        assert report.storing == slots.keys() - done - failed.keys()
    assert done == {"1", "2"}
    assert "of a pool of" in failed["3"]
    assert bytes(served.local.read(served.slot(1))) == DATA
    writer.shutdown()
