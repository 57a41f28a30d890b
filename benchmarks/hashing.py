"""What naming by content costs: for a patch in the pipeline, and for a picture in the client."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

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
    return [Figure("content hash (BLAKE3, one thread), per megapixel", "ms", times), *of_the_client(rounds)]


def of_the_client(rounds: int = 20) -> list[Figure]:
    """Measures what the client does with each picture, as it may have uploaded it before: reads and names it."""
    from PIL import Image

    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.bmp"
        path.write_bytes(b"BM" + os.urandom(5_000_000))
        image = Image.effect_noise((4000, 3000), 50).convert("RGB")
        for name, picture in (("a file of 5 MB", path), ("a PIL image of 12 megapixels", image)):
            times = [_named_ms(picture) for _ in range(rounds)]
            figures.append(Figure(f"client: {name}, read and named", "ms", times))
    return figures


def _named_ms(picture: Any) -> float:
    from epd.client.pictures import LocalPicture

    started = time.perf_counter()
    local = LocalPicture(picture)
    local.load()
    assert local.digest
    return (time.perf_counter() - started) * 1000
