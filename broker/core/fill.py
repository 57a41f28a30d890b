"""How the pools are filled, for people: sums by state, and a row of cells. Pure; reads the cache's index."""

from __future__ import annotations

from collections import Counter

from cache.index import CacheIndex
from epd.messages import Pool, PoolFill

NUM_CELLS = 256
FREE = "."


def fills(index: CacheIndex) -> list[PoolFill]:
    """Every pool of the index."""
    return [_fill(index, pool) for pool in index.pools]


def _fill(index: CacheIndex, pool: Pool) -> PoolFill:
    occupied = index.occupied(pool.pool_id)
    by_state: Counter[str] = Counter()
    for _, nbytes, state in occupied:
        by_state[state] += nbytes
    return PoolFill(
        pool=pool,
        bytes_by_state=dict(by_state),
        num_patches=sum(state != "quarantined" for _, _, state in occupied),
        cells=cells(pool.nbytes, occupied, NUM_CELLS),
    )


def cells(pool_bytes: int, occupied: list[tuple[int, int, str]], count: int) -> str:
    """`count` letters, one for each equal part of a pool: the first letter of the state that takes most of it.

    A part that is mostly free shows the little that is in it, so that an almost empty pool does not look empty.
    """
    shares: list[Counter[str]] = [Counter() for _ in range(count)]
    for offset, nbytes, state in occupied:
        first, last = offset * count // pool_bytes, (offset + nbytes - 1) * count // pool_bytes
        for cell in range(first, min(last, count - 1) + 1):
            low, high = cell * pool_bytes / count, (cell + 1) * pool_bytes / count
            shares[cell][state] += max(0, round(min(offset + nbytes, high) - max(offset, low)))
    return "".join(share.most_common(1)[0][0][0] if share else FREE for share in shares)
