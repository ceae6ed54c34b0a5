"""Fuse large slices in tiles that blend, and that know of the rest of their slice.

The network looks at an image as a whole: AFF at its spectrum, CASF at all tokens, SFEF at a softmax
over all pixels. So a tile is fused otherwise than the same pixels in their slice, most of all one
without air, and mostly by a smooth change of brightness. That change is seen at a reduced size,
too, where the slice fits into one tile: fused there once as a whole and once as the tile, it is the
difference of the two, and added to the tile.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from network import MIN_SIDE, ASFEFusion, pad_to_multiple


def fuse_tiled(
    model: ASFEFusion, img1: np.ndarray, img2: np.ndarray, tile: int, overlap: int
) -> np.ndarray:
    """Fuse (B, 1, H, W) in tiles that blend over `overlap` pixels; `tile` 0 takes images whole.

    Tiles start on multiples of the network's padding, so their tokens are those of the whole image;
    `tile` is such a multiple and `overlap` at least one of them less.
    """
    height, width = img1.shape[-2:]
    if not tile or tile >= max(height, width):
        return model.fuse(img1, img2).cpu().numpy()

    def fuse(pair: list[Tensor], place: tuple = np.s_[...]) -> Tensor:
        return model.fuse(*(img[place].numpy() for img in pair)).cpu()

    pair = [pad_to_multiple(torch.from_numpy(img), model.multiple) for img in (img1, img2)]
    factor = reduction(*pair[0].shape[2:], tile)
    small = [F.avg_pool2d(img, factor) for img in pair]
    overview = fuse(small)
    total, weights = torch.zeros_like(pair[0]), torch.zeros(pair[0].shape[2:])
    for top in tile_starts(height, tile, overlap, model.multiple):
        for left in tile_starts(width, tile, overlap, model.multiple):
            place = np.s_[..., top : top + tile, left : left + tile]
            ends = (top + tile) // factor, (left + tile) // factor
            near = np.s_[..., top // factor : ends[0], left // factor : ends[1]]
            change = overview[near] - fuse(small, near)
            fused = fuse(pair, place)
            fused += F.interpolate(change, fused.shape[2:], mode="bilinear")
            weight = torch.outer(*(ramp(side, overlap) for side in fused.shape[2:]))
            total[place] += fused * weight
            weights[place[1:]] += weight
    return (total / weights).clamp(0, 1)[..., :height, :width].numpy()


def tile_starts(length: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles begin along a side: on multiples, with at least `overlap` pixels in common."""
    padded = -(-length // multiple) * multiple
    if tile >= padded:
        return [0]
    step = (tile - overlap) // multiple * multiple
    return [*range(0, padded - tile, step), padded - tile]


def reduction(height: int, width: int, tile: int) -> int:
    """By how much a slice shrinks to fit into a tile: a power of 2, so that pixels stay aligned.

    Less where a tile would become smaller than the network takes.
    """
    factor = 1
    while max(height, width) > factor * tile and min(height, width, tile) >= 2 * factor * MIN_SIDE:
        factor *= 2
    return factor


def ramp(side: int, overlap: int) -> Tensor:
    """The weight of a tile's pixels along a side: it falls to 0 over `overlap` at both ends."""
    ends = torch.minimum(torch.arange(side) + 0.5, torch.arange(side).flip(0) + 0.5) / overlap
    return torch.sin(torch.pi / 2 * ends.clamp(max=1)) ** 2
