"""The cache index, one rule at a time."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.index import CacheIndex, FencedError, Outcome, PatchNeed, ShapeError, State
from cache.slot import slot_bytes
from epd.messages import Pool

UNIT = slot_bytes(1, 64, "float16")  # 256 bytes: 128 of header, 128 of data


def pool(units, pool_id="p"):
    return Pool(pool_id=pool_id, kind="shared_memory", name=pool_id, nbytes=units * UNIT, host="h")


def index_of(*units, **options):
    index = CacheIndex(**options)
    for number, size in enumerate(units):
        index.add_pool(pool(size, f"p{number}"))
    return index


def need(name, units=1, cost_s=0.0):
    return PatchNeed(name, 2 * units - 1, 64, "float16", cost_s)


def needs(names):
    return [need(name) for name in names]


def put(index, *wanted, holder="someone", prefer=None):
    """Acquires, encodes and releases: the patches are in the cache and nobody needs them."""
    for item in index.acquire_all(wanted, holder, prefer_pool=prefer):
        if item.outcome is Outcome.NEW:
            assert index.commit(item.patch_hash, item.slot.generation)
    index.release(holder)


def present(index, names):
    return {name for name in names if index.state(name) is State.READY}


def outcomes(acquired):
    return [(item.patch_hash, item.outcome) for item in acquired]


def test_the_unit_of_these_tests_is_one_slot():
    assert [need("a", units).nbytes for units in (1, 2, 5)] == [UNIT, 2 * UNIT, 5 * UNIT]


def test_a_patch_is_new_then_pending_for_others_then_a_hit():
    index = index_of(4)
    [new] = index.acquire_all(needs("a"), "r1")
    [pending] = index.acquire_all(needs("a"), "r2")
    assert (new.outcome, pending.outcome) == (Outcome.NEW, Outcome.PENDING)
    assert new.slot == pending.slot and index.readable("a") is None
    assert index.commit("a", new.slot.generation)
    [hit] = index.acquire_all(needs("a"), "r3")
    assert hit.outcome is Outcome.HIT and hit.slot == new.slot == index.readable("a")
    assert index.holders("a") == ("r1", "r2", "r3")
    stats = index.stats()
    assert (stats.num_new, stats.num_coalesced, stats.num_hits, stats.num_pins) == (1, 1, 1, 3)
    assert (stats.used_bytes, stats.pinned_bytes, stats.total_bytes) == (UNIT, UNIT, 4 * UNIT)


def test_a_patch_that_comes_twice_in_a_request_is_acquired_once():
    index = index_of(4)
    assert outcomes(index.acquire_all(needs("aba"), "r")) == [("a", Outcome.NEW), ("b", Outcome.NEW)]
    index.release("r")
    assert index.stats().num_pins == 0


def test_a_slot_says_where_and_what_its_patch_is():
    index = index_of(4)
    [item] = index.acquire_all([PatchNeed("a", 3, 40, "float32")], "r")
    slot = item.slot
    assert (slot.pool_id, slot.num_tokens, slot.width, slot.dtype) == ("p0", 3, 40, "float32")
    assert slot.nbytes == slot_bytes(3, 40, "float32") == 768
    assert index.slot("a") == slot and index.slot("b") is None


def test_what_does_not_fit_changes_nothing():
    index = index_of(4)
    put(index, need("a"), need("b"))
    index.acquire_all(needs("cd"), "r1")
    before = index.stats(), [index.slot(name) for name in "abcd"]
    assert index.acquire_all([need("a"), need("e", 2)], "r2") is None
    assert (index.stats(), [index.slot(name) for name in "abcd"]) == before
    assert index.holders("a") == ()


def test_a_request_never_evicts_what_it_needs_itself():
    index = index_of(3)
    put(index, need("a"), need("b"))
    got = index.acquire_all(needs("acd"), "r")
    assert outcomes(got) == [("a", Outcome.HIT), ("c", Outcome.NEW), ("d", Outcome.NEW)]
    assert index.state("b") is None


def test_patches_that_lie_in_the_way_are_encoded_again_where_waiting_would_not_help():
    index = index_of(5)
    put(index, *needs("ab"))
    put(index, need("c", 3))
    index.acquire_all(needs("b"), "r")
    put(index, need("a"))
    index.release("r")
    wanted = [need("b"), need("d", 4)]  # b lies at 1 of 5: no four units in a row are left beside it
    assert index.could_ever_fit(wanted)
    index.acquire_all([need("x", 3)], "other")
    assert index.acquire_all(wanted, "r") is None  # waiting does help
    index.drop("x", index.slot("x").generation)
    index.release("other")
    put(index, need("y", 3))
    assert outcomes(index.acquire_all(wanted, "r")) == [("b", Outcome.NEW), ("d", Outcome.NEW)]


def test_patches_that_are_not_in_the_way_stay_when_everything_is_placed_again():
    index = index_of(5, 3)
    put(index, need("a"), prefer="p0")
    put(index, need("b"), prefer="p0")
    put(index, *needs("xyz"), prefer="p1")
    got = index.acquire_all([need("b"), need("d", 4)], "r")
    assert outcomes(got) == [("b", Outcome.NEW), ("d", Outcome.NEW)]
    assert len(present(index, "axyz")) == 2, "b took the place of one of three, and d that of a"
    assert index.stats().num_evictions == 3


def test_a_request_larger_than_the_pools_never_fits():
    index = index_of(4, 3)
    assert index.could_ever_fit([need("a", 4), need("b", 3)])
    assert not index.could_ever_fit([need("a", 4), need("b", 4)])
    assert not index.could_ever_fit([need("a", 5)])
    assert index.could_ever_fit([need("a", 4), need("a", 4)])
    assert index.could_ever_fit([])
    assert not CacheIndex().could_ever_fit(needs("a"))


@given(st.lists(st.integers(1, 6), max_size=3), st.lists(st.integers(1, 4), max_size=6), st.data())
def test_what_could_ever_fit_fits_when_nobody_holds_anything(pools, units, data):
    index = index_of(*pools)
    wanted = [need(f"n{number}", size) for number, size in enumerate(units)]
    others = [need(f"o{number}", data.draw(st.integers(1, 3))) for number in range(8)]
    for item in data.draw(st.lists(st.sampled_from(wanted + others), max_size=20)):
        if index.could_ever_fit([item]):
            put(index, item)
    prefer = data.draw(st.sampled_from([None, "p0"]))
    fits, acquired = index.could_ever_fit(wanted), index.acquire_all(wanted, "r", prefer_pool=prefer)
    assert fits is (acquired is not None)
    if len(pools) == 1:
        assert fits is (sum({one.patch_hash: one.nbytes for one in wanted}.values()) <= index.stats().total_bytes)


def test_no_slot_is_smaller_than_the_least_of_any_pool():
    index = index_of(4)
    index.add_pool(msgspec.structs.replace(pool(8, "gpu"), min_slot_bytes=4 * UNIT))
    assert [item.slot.nbytes for item in index.acquire_all(needs("ab"), "r")] == [4 * UNIT] * 2
    assert index.acquire_all([need("c", 5)], "r") is None
    assert index.could_ever_fit([need("c", 5), need("d")])
    assert not index.could_ever_fit([need("c", 5), need("d"), need("e")])
    index.release("r")
    index.remove_pool("gpu")
    for name in "ab":
        if slot := index.slot(name):
            index.drop(name, slot.generation)
    assert [item.slot.nbytes for item in index.acquire_all(needs("c"), "r")] == [UNIT]


def test_a_commit_of_another_generation_is_refused():
    index = index_of(2)
    [item] = index.acquire_all(needs("a"), "r")
    old = item.slot.generation
    new = index.renew("a", old)
    assert not index.commit("a", old) and index.state("a") is State.ALLOCATED
    assert index.commit("a", new.generation)
    assert not index.commit("a", new.generation), "it was committed already"
    assert not index.commit("unknown", 1)


def test_generations_start_where_they_are_told_and_are_never_used_twice():
    index = index_of(2, first_generation=2**63)
    [item] = index.acquire_all(needs("a"), "r")
    assert item.slot.generation == 2**63
    assert index.renew("a", 2**63).generation == 2**63 + 1


def test_a_renewed_patch_keeps_its_memory_and_its_pins():
    index = index_of(2)
    put(index, need("a"))
    [hit] = index.acquire_all(needs("a"), "r")
    slot = index.renew("a", hit.slot.generation)
    assert slot.offset == hit.slot.offset and slot.generation > hit.slot.generation
    assert index.state("a") is State.ALLOCATED and index.holders("a") == ("r",)
    assert index.is_current("a", slot.generation) and not index.is_current("a", hit.slot.generation)
    with pytest.raises(FencedError, match="a is not at generation 1"):
        index.renew("a", hit.slot.generation)


def test_a_patch_renewed_while_nobody_needs_it_cannot_be_evicted():
    index = index_of(1)
    put(index, need("a"))
    index.renew("a", index.slot("a").generation)
    assert index.acquire_all(needs("b"), "r") is None


def test_quarantined_memory_is_out_of_use_until_the_quarantine_is_lifted():
    index = index_of(2)
    [item] = index.acquire_all(needs("a"), "r")
    slot = index.renew("a", item.slot.generation, quarantine=True)
    assert slot.offset != item.slot.offset
    assert index.stats().quarantined_bytes == UNIT
    assert index.acquire_all(needs("b"), "r2") is None
    assert index.lift_quarantine(item.slot.generation)
    assert not index.lift_quarantine(item.slot.generation)
    assert index.acquire_all(needs("b"), "r2")[0].slot.offset == item.slot.offset


def test_a_patch_for_which_there_is_no_other_room_is_lost_until_its_holders_leave():
    index = index_of(1)
    [item] = index.acquire_all(needs("a"), "r")
    assert index.renew("a", item.slot.generation, quarantine=True) is None
    assert index.state("a") is State.LOST and index.holders("a") == ("r",) and index.slot("a") is None
    assert not index.commit("a", item.slot.generation)
    assert index.stats().num_lost == 1
    assert index.release("r") == []
    assert index.state("a") is None
    assert index.stats().used_bytes == index.stats().quarantined_bytes == UNIT
    assert index.lift_quarantine(item.slot.generation)
    assert index.stats().used_bytes == 0


def test_a_lost_patch_can_be_renewed_or_acquired_again():
    for again in ("renew", "acquire"):
        index = index_of(1)
        [item] = index.acquire_all(needs("a"), "r")
        generation = item.slot.generation
        assert index.renew("a", generation, quarantine=True) is None
        assert index.renew("a", generation) is None
        assert index.acquire_all(needs("a"), "r2") is None
        index.lift_quarantine(generation)
        if again == "renew":
            slot = index.renew("a", generation)
        else:
            [acquired] = index.acquire_all(needs("a"), "r2")
            assert acquired.outcome is Outcome.NEW
            slot = acquired.slot
        assert index.commit("a", slot.generation)
        assert "r" in index.holders("a") and index.readable("a") == slot


def test_a_dropped_patch_frees_its_memory_or_leaves_it_in_quarantine():
    index = index_of(2)
    for quarantine, left in ((False, 0), (True, UNIT)):
        [item] = index.acquire_all(needs("a"), "r")
        assert index.release("r") == ["a"], "the encode that nobody needs is named"
        assert not index.drop("a", item.slot.generation + 1)
        assert index.drop("a", item.slot.generation, quarantine=quarantine)
        assert index.state("a") is None and index.stats().used_bytes == left
    assert not index.drop("a", item.slot.generation)


def test_a_patch_dropped_while_it_is_pinned_is_lost_to_its_holders_and_new_to_the_next():
    index = index_of(1)
    [item] = index.acquire_all(needs("a"), "r1")
    assert index.drop("a", item.slot.generation)
    assert index.state("a") is State.LOST and index.holders("a") == ("r1",)
    assert index.acquire_all(needs("a"), "r2")[0].outcome is Outcome.NEW
    assert index.release("r1") == []
    assert index.release("r2") == ["a"]


def test_a_stale_patch_that_nobody_needs_can_be_dropped():
    index = index_of(1)
    put(index, need("a"))
    assert index.drop("a", index.slot("a").generation)
    assert index.stats().used_bytes == 0
    assert index.acquire_all(needs("b"), "r")


def test_releasing_keeps_ready_patches_for_reuse_and_does_nothing_twice():
    index = index_of(2)
    put(index, need("a"))
    assert index.release("someone") == [] and index.release("nobody") == []
    assert index.acquire_all(needs("a"), "r")[0].outcome is Outcome.HIT


def test_an_encode_finished_for_nobody_is_kept_for_reuse():
    index = index_of(1)
    [item] = index.acquire_all(needs("a"), "r")
    index.release("r")
    assert index.acquire_all(needs("b"), "r2") is None, "it is being written"
    assert index.commit("a", item.slot.generation)
    assert index.acquire_all(needs("b"), "r2"), "it may leave now"


def test_a_removed_pool_takes_its_patches_with_it():
    index = index_of(2, 2)
    put(index, *needs("abcd"))
    kept = [name for name in "abcd" if index.slot(name).pool_id == "p0"]
    gone = sorted(set("abcd") - set(kept))
    index.acquire_all(needs(gone[0]), "r")
    assert sorted(index.in_pool("p1")) == gone
    assert sorted(index.remove_pool("p1")) == gone
    assert [pool.pool_id for pool in index.pools] == ["p0"]
    assert index.state(gone[0]) is State.LOST and index.state(gone[1]) is None
    assert index.stats().total_bytes == 2 * UNIT
    index.release("r")
    put(index, *needs(gone))
    assert present(index, "abcd") == set(gone)
    with pytest.raises(KeyError):
        index.remove_pool("p1")


def test_quarantine_ends_with_its_pool():
    index = index_of(2)
    [item] = index.acquire_all(needs("a"), "r")
    index.renew("a", item.slot.generation, quarantine=True)
    index.remove_pool("p0")
    index.add_pool(pool(2, "p0"))
    assert not index.lift_quarantine(item.slot.generation)
    assert index.stats().used_bytes == 0


def test_the_preferred_pool_is_used_while_anything_can_leave_it():
    index = index_of(2, 8)
    for name in "abcd":
        put(index, need(name))
    [item] = index.acquire_all(needs("e"), "r", prefer_pool="p0")
    assert item.slot.pool_id == "p0"
    got = index.acquire_all(needs("fg"), "r", prefer_pool="p0")
    assert [item.slot.pool_id for item in got] == ["p0", "p1"]
    assert index.acquire_all(needs("h"), "r", prefer_pool="unknown")[0].slot.pool_id == "p1"


def test_a_pool_is_not_emptied_for_a_patch_that_is_larger_than_it():
    index = index_of(2, 4)
    put(index, *needs("abcdef"))
    small = {name for name in "abcdef" if index.slot(name).pool_id == "p0"}
    put(index, need("large", 4), holder="r")
    assert present(index, "abcdef") == small


def test_a_hash_with_another_shape_is_refused():
    index = index_of(4)
    put(index, need("a"))
    for wanted in ([need("a", 2)], [need("b"), need("b", 2)]):
        with pytest.raises(ShapeError, match="asked for as"):
            index.acquire_all(wanted, "r")
        with pytest.raises(ShapeError):
            index.could_ever_fit(wanted)
    assert index.stats().num_pins == 0


def test_an_impossible_patch_is_refused_before_anything_changes():
    index = index_of(4)
    for wrong in (PatchNeed("b", 0, 64, "float16"), PatchNeed("b", 1, 64, "int4")):
        with pytest.raises(ValueError):
            index.acquire_all([need("a"), wrong], "r")
    assert index.stats().num_pins == index.stats().used_bytes == 0


def test_a_pool_cannot_be_added_twice():
    index = index_of(1)
    with pytest.raises(ValueError, match="p0 exists already"):
        index.add_pool(pool(1, "p0"))
