"""A picture of a registration: source 2 over source 1 before and after, in three planes.

Legend: slices (H, W) as a reader looks at them, see volumes/grid.py; pictures are uint8 RGB.
"""

from dataclasses import replace

import cv2
import numpy as np

from images import to_uint8
from volumes.grid import AXES, Volume, cubic, onto_grid, slices

SIDE, TILE, GAP = 240, 30, 4  # pixels of a cell, of a square of the checkerboard, between cells
FINEST = 150  # voxels along the longest side of the field, at most
EDGE = (255, 220, 60)


def overlay(source1: Volume, before: Volume, after: Volume, low_high: tuple) -> np.ndarray:
    """Rows: checkerboard before, edges before, and the same after; columns: the three planes.

    Args:
        before, after: source 2 where it was, and where it is now, in the space of `source1`.
        low_high: for source 1 and source 2, the values that are black and white.
    """
    extent = np.array(after.data.shape) * after.spacing
    grid = cubic(after, max(float(extent.max()) / FINEST, float(after.spacing.min())))
    volumes = [onto_grid(v, grid)[0] for v in (source1, before, after)]
    first, *others = (
        np.clip((data - low) / (high - low), 0, 1)
        for data, (low, high) in zip(volumes, (low_high[0], low_high[1], low_high[1]), strict=True)
    )
    middle = middle_of(others[-1])
    named = []
    for name, second in zip(("before", "after"), others, strict=True):
        planes = [plane_of(first, second, grid, axis, middle) for axis in AXES[::-1]]
        named.append((name, planes))
    return compared(named)


def compared(named: list[tuple[str, list]]) -> np.ndarray:
    """Two rows for each name, checkerboard and edges; a column for each of its pairs of (H, W)."""
    rows, font = [], cv2.FONT_HERSHEY_SIMPLEX
    for name, pairs in named:
        for draw in (checkerboard, edges):
            rows.append(np.hstack([framed(draw(*pair)) for pair in pairs]))
            cv2.putText(rows[-1], name, (6, 18), font, 0.5, EDGE, 1, cv2.LINE_AA)
    return np.vstack(rows)[:-GAP, :-GAP]


def middle_of(values: np.ndarray) -> tuple[int, int, int]:
    """The middle voxel of what is bright."""
    index = np.argwhere(values > 0.5 * values.max())
    return tuple(int(n) for n in index.mean(0).round()) if len(index) else (0, 0, 0)


def plane_of(first, second, grid: Volume, axis: str, middle: tuple) -> tuple:
    """The slices of both that hold the middle voxel: two of (H, W)."""
    marked = np.zeros(grid.data.shape, bool)
    marked[middle] = True
    n = int(np.argmax(slices(marked, grid.affine, axis).any((1, 2))))
    return tuple(slices(data, grid.affine, axis)[n] for data in (first, second))


def fitted(image: np.ndarray, pixel: tuple[float, float] = (1, 1), side: int = SIDE) -> np.ndarray:
    """A slice (H, W) or (H, W, 3) in [0, 1] in the middle of a cell, uint8 (side, side, …).

    `pixel` is the height and width of one of its pixels.
    """
    size = np.array(image.shape[:2]) * pixel
    size = [max(1, round(n * side / max(size))) for n in size]
    inner = cv2.resize(np.ascontiguousarray(image, np.float32), size[::-1])
    cell = np.zeros((side, side, *image.shape[2:]), np.uint8)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    cell[top : top + size[0], left : left + size[1]] = to_uint8(inner)
    return cell


def checkerboard(first: np.ndarray, second: np.ndarray, *cell) -> np.ndarray:
    """Squares of one and of the other in turn, RGB; `cell` goes to `fitted`."""
    first, second = fitted(first, *cell), fitted(second, *cell)
    y, x = np.mgrid[: len(first), : len(first)] // TILE
    return cv2.cvtColor(np.where((x + y) % 2, second, first), cv2.COLOR_GRAY2RGB)


def edges(first: np.ndarray, second: np.ndarray, *cell) -> np.ndarray:
    """The edges of `second` drawn over `first`, RGB; `cell` goes to `fitted`."""
    smooth = cv2.GaussianBlur(fitted(second, *cell), (0, 0), 2.0)
    cell = cv2.cvtColor(fitted(first, *cell), cv2.COLOR_GRAY2RGB)
    cell[cv2.Canny(smooth, 25, 60) > 0] = EDGE
    return cell


def framed(cell: np.ndarray) -> np.ndarray:
    """A cell with the gap at its right and bottom."""
    return np.pad(cell, ((0, GAP), (0, GAP), (0, 0)))


def moved(volume: Volume, matrix: np.ndarray) -> Volume:
    """The volume after a matrix (4, 4) moved its points; its values stay."""
    return replace(volume, affine=matrix @ volume.affine)
