"""How many patches a picture is cut into, by the rules of the published processors. Pure."""

from __future__ import annotations

import math

_Grid = tuple[int, int]


def internvl_tiles(width: int, height: int, tile: int, most: int, thumbnail: bool) -> int:
    """InternVL: the grid of at most `most` tiles whose shape is nearest, and a thumbnail if there are several.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        tile: side of a tile, in pixels.
        most: `max_dynamic_patch`.
        thumbnail: whether the whole picture is a further tile.
    """
    grids = sorted({(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if x * y <= most}, key=_area)
    best, distance = (1, 1), math.inf
    for x, y in grids:
        found = abs(width / height - x / y)
        # The same shape in more tiles is taken for pictures that have the pixels for it.
        if found < distance or (found == distance and width * height > 0.5 * tile * tile * x * y):
            best, distance = (x, y), found
    count = _area(best)
    return count + 1 if thumbnail and count > 1 else count


def minicpm_slices(width: int, height: int, side: int, most: int) -> int:
    """MiniCPM-V: the whole picture, and for one larger than a slice a grid of at most `most` slices.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        side: of a slice, in pixels.
        most: `max_slice_nums`.
    """
    ideal = min(math.ceil(width * height / (side * side)), most)
    if ideal <= 1:
        return 1
    counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= most]
    grids = [(x, count // x) for count in counts for x in range(1, count + 1) if count % x == 0]
    wanted = math.log(width / height)
    return 1 + _area(min(grids, key=lambda grid: abs(wanted - math.log(grid[0] / grid[1]))))


def idefics3_tiles(width: int, height: int, tile: int, longest: int) -> int:
    """Idefics3 and SmolVLM: the picture resized to `longest` pixels, in tiles, and the whole picture.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        tile: side of a tile, in pixels.
        longest: the longer side after resizing, in pixels.
    """
    scale = longest / max(width, height)
    columns, rows = (max(1, math.ceil(round(side * scale) / tile)) for side in (width, height))
    return columns * rows + 1 if columns * rows > 1 else 1


def area_positions(width: int, height: int, patch: int, merge: int, most_pixels: int) -> int:
    """Qwen-VL: positions of a picture in its tower, each `patch` pixels wide, in whole groups of `merge` x `merge`.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        patch: side of a position, in pixels.
        merge: positions that become one token, along a side.
        most_pixels: larger pictures are made smaller.
    """
    unit = patch * merge
    scale = min(1.0, math.sqrt(most_pixels / (width * height)))
    across, down = (max(1, int(side * scale / unit + 0.5)) for side in (width, height))
    return across * down * merge * merge


def _area(grid: _Grid) -> int:
    return grid[0] * grid[1]
