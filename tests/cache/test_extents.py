"""Extents of one pool: the properties that `cache.extents` promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.extents import ALIGNMENT, Extents, align

SIZES = st.lists(st.integers(1, 20 * ALIGNMENT), min_size=1, max_size=30)


def fill(extents, size):
    """Allocates `size` until it does not fit; returns the offsets."""
    offsets = []
    while (offset := extents.allocate(size)) is not None:
        offsets.append(offset)
    return offsets


def check(extents):
    """Extents in use and free ones tile the pool, and no two free ones touch."""
    free = extents.free_extents()
    pieces = sorted([(offset, nbytes, True) for offset, nbytes in free] + [(o, n, False) for o, n in extents.used()])
    end, was_free = 0, False
    for offset, nbytes, is_free in pieces:
        assert offset == end and offset % ALIGNMENT == 0 and nbytes > 0
        assert not (is_free and was_free), "two free extents touch"
        end, was_free = offset + nbytes, is_free
    assert end == extents.capacity_bytes
    assert extents.free_bytes == sum(nbytes for _, nbytes in free) == extents.capacity_bytes - extents.used_bytes


def test_an_allocation_is_rounded_up_to_the_alignment():
    extents = Extents(4 * ALIGNMENT + 100)
    assert extents.capacity_bytes == 4 * ALIGNMENT
    assert [extents.allocate(1), extents.allocate(ALIGNMENT + 1)] == [0, ALIGNMENT]
    assert extents.used_bytes == 3 * ALIGNMENT
    assert extents.allocate(ALIGNMENT + 1) is None
    check(extents)


def test_the_smallest_hole_that_fits_is_taken():
    extents = Extents(100 * ALIGNMENT)
    big, _, small, _ = (extents.allocate(n * ALIGNMENT) for n in (5, 1, 2, 1))
    extents.free(big)
    extents.free(small)
    assert extents.allocate(2 * ALIGNMENT) == small
    assert extents.allocate(3 * ALIGNMENT) == big


def test_what_is_not_in_use_cannot_be_freed():
    extents = Extents(10 * ALIGNMENT)
    offset = extents.allocate(2 * ALIGNMENT)
    extents.free(offset)
    for wrong in (offset, ALIGNMENT, 7):
        with pytest.raises(ValueError, match="no extent in use"):
            extents.free(wrong)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError):
        Extents(-1)
    extents = Extents(0)
    assert extents.allocate(1) is None
    for call in (lambda: extents.allocate(0), lambda: extents.take(0, -1), lambda: extents.take(3, 1)):
        with pytest.raises(ValueError):
            call()


def test_exactly_those_bytes_are_taken_or_none():
    extents = Extents(10 * ALIGNMENT)
    assert extents.take(4 * ALIGNMENT, 2 * ALIGNMENT)
    check(extents)
    for offset, units in ((4, 1), (3, 2), (5, 2), (9, 2), (10, 1)):
        assert not extents.take(offset * ALIGNMENT, units * ALIGNMENT)
    check(extents)
    assert extents.take(0, 4 * ALIGNMENT) and extents.take(6 * ALIGNMENT, 4 * ALIGNMENT)
    assert extents.free_extents() == []


@given(st.integers(0, 200 * ALIGNMENT), st.data())
def test_extents_in_use_and_free_ones_always_tile_the_pool(nbytes, data):
    extents = Extents(nbytes)
    used = []
    for _ in range(data.draw(st.integers(0, 40))):
        if used and data.draw(st.booleans()):
            extents.free(used.pop(data.draw(st.integers(0, len(used) - 1))))
        elif (offset := extents.allocate(data.draw(st.integers(1, 20 * ALIGNMENT)))) is not None:
            used.append(offset)
        check(extents)


@given(SIZES, st.randoms(use_true_random=False))
def test_once_all_is_freed_one_extent_is_free_and_the_same_sizes_fit_in_any_order(sizes, random):
    extents = Extents(sum(align(size) for size in sizes))
    for _ in range(3):
        random.shuffle(sizes)
        offsets = [extents.allocate(size) for size in sizes]
        assert None not in offsets and extents.free_bytes == 0
        random.shuffle(offsets)
        for offset in offsets:
            extents.free(offset)
        assert extents.free_extents() == [(0, extents.capacity_bytes)]


@given(st.integers(1, 10 * ALIGNMENT), st.integers(1, 300 * ALIGNMENT), st.data())
def test_with_one_size_a_full_pool_has_as_many_as_can_be_whatever_came_before(size, nbytes, data):
    extents = Extents(nbytes)
    most = extents.capacity_bytes // align(size)
    used = []
    for _ in range(5):
        used += fill(extents, size)
        assert len(used) == most
        gone = data.draw(st.sets(st.sampled_from(used))) if used else set()
        for offset in gone:
            extents.free(offset)
        used = [offset for offset in used if offset not in gone]


def test_with_several_sizes_the_same_ones_in_another_order_may_not_fit_again():
    extents = Extents(15 * ALIGNMENT)
    three, three_too, _, three_again, four, _ = (extents.allocate(n * ALIGNMENT) for n in (3, 3, 1, 3, 4, 1))
    for offset in (three, three_too, three_again, four):
        extents.free(offset)
    again = [extents.allocate(n * ALIGNMENT) for n in (4, 3, 3, 3)]
    assert again.count(None) == 1
