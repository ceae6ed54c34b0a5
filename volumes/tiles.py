"""Fuse the slices of two volumes in batches, large ones in tiles that blend: see tiles.py.

Legend: N slices of (H, W) pixels, B of them in a batch.
"""

from collections.abc import Iterator

import numpy as np

from network import ASFEFusion
from tiles import Passes, fitting, fuse_tiled
from volumes.intensity import STORED_ONE, Scaling
from volumes.requests import Slicing

BATCH_PIXELS = 256**2  # batch_size counts pairs of this size, so that large slices fit, too


def passes_of(model: ASFEFusion, shape: tuple[int, int], how: Slicing) -> Passes:
    """How slices of (H, W) go through the network, as far as the memory that is free allows.

    Raises UserError if nothing fits.
    """
    height, width = shape
    tile = how.tile or max(height, width)
    pixels = min(tile, height) * min(tile, width)
    batch = max(1, min(how.batch_size, how.batch_size * BATCH_PIXELS // pixels))
    return fitting(model, shape, Passes(batch, how.tile, how.overlap))


def fuse_slices(
    model: ASFEFusion,
    stacks: tuple[np.ndarray, np.ndarray],
    scalings: tuple[Scaling, Scaling],
    out: np.ndarray,
    passes: Passes,
) -> Iterator[int]:
    """Fuse the slices of two (N, H, W) stacks into `out`, (N, H, W) int16: luma times STORED_ONE.

    Yields how many slices are done, batch by batch.
    """
    for start in range(0, len(out), passes.batch):
        part = slice(start, start + passes.batch)
        pair = [s.apply(v[part])[:, None] for s, v in zip(scalings, stacks, strict=True)]
        luma = fuse_tiled(model, *pair, passes.tile, passes.overlap)
        out[part] = np.rint(luma[:, 0] * STORED_ONE)
        yield min(start + passes.batch, len(out))
