"""Fuse the slices of two volumes in batches, large ones in tiles that blend.

The network looks at an image as a whole: AFF at its spectrum, CASF at all tokens, SFEF at a softmax
over all pixels. So it fuses a tile differently from the same pixels in their slice, most of all a
tile without air. The difference is mostly a smooth change of brightness.

That change can be measured at a reduced size, at which the whole slice fits into one tile. There
both are fused: the whole slice, and the tile alone. Their difference is added to the fused tile.

Legend: N slices of (H, W) pixels, B of them in a batch.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError
from network import MIN_SIDE, ASFEFusion, pad_to_multiple
from volumes.intensity import STORED_ONE, Scaling
from volumes.requests import Slicing

BATCH_PIXELS = 256**2  # batch_size counts pairs of this size, so that large slices fit, too


def check_tiles(how: Slicing, multiple: int) -> None:
    """UserError if `fuse_tiled` cannot take the tiles for a network of this `multiple`."""
    if how.tile and (how.tile % multiple or how.overlap > how.tile - multiple):
        raise UserError(
            f"tile is {how.tile} and overlap {how.overlap}, expected a tile that is a multiple of "
            f"{multiple}, and an overlap of at most {max(how.tile - multiple, 0)}"
        )


def fuse_slices(
    model: ASFEFusion,
    stacks: tuple[np.ndarray, np.ndarray],
    scalings: tuple[Scaling, Scaling],
    out: np.ndarray,
    how: Slicing,
) -> Iterator[int]:
    """Fuse the slices of two (N, H, W) stacks into `out`, (N, H, W) int16: luma times STORED_ONE.

    Yields how many slices are done, batch by batch.
    """
    count, height, width = out.shape
    tile = how.tile or max(height, width)
    pixels = min(tile, height) * min(tile, width)
    batch = max(1, min(how.batch_size, how.batch_size * BATCH_PIXELS // pixels))
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        pair = [s.apply(v[part])[:, None] for s, v in zip(scalings, stacks, strict=True)]
        luma = fuse_tiled(model, *pair, how.tile, how.overlap)
        out[part] = np.rint(luma[:, 0] * STORED_ONE)
        yield min(start + batch, count)


def fuse_tiled(
    model: ASFEFusion, img1: np.ndarray, img2: np.ndarray, tile: int, overlap: int
) -> np.ndarray:
    """Fuse (B, 1, H, W) images in [0, 1] in tiles that blend, into the same shape.

    Tiles start on multiples of the network's padding. So their tokens are those of the whole image.

    Args:
        tile: side in pixels, a multiple of `model.multiple`; 0 takes images whole.
        overlap: pixels over which tiles blend, at least one multiple less.
    """
    height, width = img1.shape[-2:]
    if not tile or tile >= max(height, width):
        return model.fuse(img1, img2).cpu().numpy()

    def fuse(pair: list[Tensor], window: tuple = np.s_[...]) -> Tensor:
        return model.fuse(*(img[window].numpy() for img in pair)).cpu()

    pair = [pad_to_multiple(torch.from_numpy(img), model.multiple) for img in (img1, img2)]
    factor = reduction(*pair[0].shape[2:], tile)
    small = [F.avg_pool2d(img, factor) for img in pair]
    overview = fuse(small)
    total, weights = torch.zeros_like(pair[0]), torch.zeros(pair[0].shape[2:])
    for top in tile_starts(height, tile, overlap, model.multiple):
        for left in tile_starts(width, tile, overlap, model.multiple):
            window = np.s_[..., top : top + tile, left : left + tile]
            bottom, right = (top + tile) // factor, (left + tile) // factor
            reduced = np.s_[..., top // factor : bottom, left // factor : right]
            change = overview[reduced] - fuse(small, reduced)
            fused = fuse(pair, window)
            fused += F.interpolate(change, fused.shape[2:], mode="bilinear")
            weight = torch.outer(*(ramp(side, overlap) for side in fused.shape[2:]))
            total[window] += fused * weight
            weights[window[1:]] += weight
    return (total / weights).clamp(0, 1)[..., :height, :width].numpy()


def tile_starts(length: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles begin along a side: on multiples, with at least `overlap` pixels in common."""
    padded = -(-length // multiple) * multiple
    if tile >= padded:
        return [0]
    step = (tile - overlap) // multiple * multiple
    return [*range(0, padded - tile, step), padded - tile]


def reduction(height: int, width: int, tile: int) -> int:
    """The factor by which a slice shrinks to fit into a tile, or is as small as allowed.

    It is a power of 2, so that pixels stay aligned. The tile must not become smaller than the
    network takes.
    """
    factor = 1
    while max(height, width) > factor * tile and min(height, width, tile) >= 2 * factor * MIN_SIDE:
        factor *= 2
    return factor


def ramp(side: int, overlap: int) -> Tensor:
    """The weight of a tile's pixels along a side: it falls to 0 over `overlap` at both ends."""
    ends = torch.minimum(torch.arange(side) + 0.5, torch.arange(side).flip(0) + 0.5) / overlap
    return torch.sin(torch.pi / 2 * ends.clamp(max=1)) ** 2
