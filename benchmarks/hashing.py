"""What naming patches by their content costs: seconds per megapixel of a picture, processor and hash apart."""

from __future__ import annotations

import time

from benchmarks.common import Figure


def run(rounds: int = 20) -> list[Figure]:
    """Measures BLAKE3 over pixels as the built-in model's processor gives them: float32, three channels."""
    import blake3

    megapixel = bytes(3 * 4 * 1_000_000)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        blake3.blake3(megapixel).hexdigest()
        times.append((time.perf_counter() - started) * 1000)
    return [Figure("content hash (BLAKE3, one thread), per megapixel", "ms", times)]
