"""Packing patches into several pools."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.packing import pack


def named(prefix: str, numbers: Sequence[int]) -> dict[str, int]:
    return {f"{prefix}{at}": number for at, number in enumerate(numbers)}


def load(packing: dict[str, str], sizes: dict[str, int], pool: str) -> int:
    return sum(sizes[key] for key, taker in packing.items() if taker == pool)


@given(st.lists(st.integers(0, 7), max_size=3), st.lists(st.integers(1, 5), max_size=6))
def test_a_packing_is_found_where_there_is_one(rooms, sizes):
    pools, patches = named("p", rooms), named("n", sizes)
    packing = pack(patches, pools)
    ways = itertools.product(pools, repeat=len(patches))
    possible = any(
        all(load(way, patches, pool) <= room for pool, room in pools.items())
        for way in (dict(zip(patches, takers, strict=True)) for takers in ways)
    )
    assert (packing is not None) is possible
    if packing is not None:
        assert packing.keys() == patches.keys()
        assert all(load(packing, patches, pool) <= room for pool, room in pools.items())


def test_one_that_takes_another_order_than_the_largest_first_is_found():
    packing = pack(named("n", [1, 1, 3, 3, 4]), named("p", [1, 5, 6]))
    assert packing is not None
    assert sorted(packing.values()) == ["p0", "p1", "p1", "p2", "p2"]


def test_a_thousand_patches_of_one_size_fill_eight_pools():
    assert pack(named("n", [7] * 1000), named("p", [7 * 125 + 6] * 8)) is not None
    assert pack(named("n", [7] * 1001), named("p", [7 * 125 + 6] * 8)) is None


@pytest.mark.timeout(20)  # it takes hundredths of a second
def test_a_puzzle_that_is_too_hard_is_given_up_soon():
    sizes = named("n", [10_007 + 211 * number for number in range(48)])
    rooms = named("p", [sum(sizes.values()) // 8] * 8)
    assert pack(sizes, rooms) is None
