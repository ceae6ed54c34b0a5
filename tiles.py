"""How images go through the network: whole or in tiles that blend, so many at a time as fit.

The network looks at an image as a whole: AFF at its spectrum, CASF at all tokens, SFEF at a softmax
over all pixels. So it fuses a tile differently from the same pixels in their image, most of all a
tile without air. The difference is mostly a smooth change of brightness.

That change can be measured at a reduced size, at which the whole image fits into one tile. There
both are fused: the whole image, and the tile alone. Their difference is added to the fused tile.

What a pass takes of memory is known before, see `limits.needed_bytes`. If it is more than is free,
fewer images go through together, which gives the same result. If one is too much, it goes in tiles.

Legend: B images in a batch, of H x W pixels.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import limits
from cli import UserError, return_freed_memory
from limits import amount
from network import MIN_SIDE, ASFEFusion, pad_to_multiple

OVERLAP = 64  # pixels over which tiles blend
LEAST_TILE = 256  # side of a tile that is taken for lack of memory: the network learned such images
TILE_STEP = 128  # and by how much its side may grow


class Passes(NamedTuple):
    """How images of one size go through the network."""

    batch: int = 1  # so many at a time
    tile: int = 0  # side of the tiles in pixels; 0: whole
    overlap: int = OVERLAP  # pixels over which tiles blend
    line: str = ""  # what was changed for lack of memory, for the user; empty: nothing


def fitting(model: ASFEFusion, shape: tuple[int, int], wanted: Passes) -> Passes:
    """The wanted passes for images of H x W, or smaller ones that fit into the memory that is free.

    A GPU has its own memory, which is not looked at. Raises UserError if nothing fits.
    """
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    if parameter is None or parameter.device.type != "cpu" or not hasattr(model, "size"):
        return wanted
    if bytes_of(model, shape, wanted) <= limits.free_bytes():
        return wanted
    return_freed_memory()  # of earlier passes
    free = limits.free_bytes()
    for passes in smaller(model, shape, wanted):
        if bytes_of(model, shape, passes) <= free:
            return passes._replace(line=line_on(model, shape, passes, wanted, free))
    height, width = shape
    least = min(bytes_of(model, shape, passes) for passes in smaller(model, shape, wanted))
    raise UserError(
        f"a pair of {height}x{width} pixels needs about {amount(least)} of memory at the least, "
        f"but {amount(free)} are free; end other programs, make the images smaller, or take a "
        "larger machine"
    )


def smaller(model: ASFEFusion, shape: tuple[int, int], wanted: Passes) -> list[Passes]:
    """The wanted passes, then those that take less and less: smaller batches, smaller tiles."""
    found = [wanted._replace(batch=batch) for batch in range(wanted.batch, 0, -1)]
    step = -(-TILE_STEP // model.multiple) * model.multiple
    least = -(-LEAST_TILE // step) * step
    largest = min(wanted.tile or max(shape), max(shape)) - 1
    for tile in range(largest // step * step, least - 1, -step):
        overlap = min(wanted.overlap, tile - model.multiple)
        found.append(wanted._replace(batch=1, tile=tile, overlap=overlap))
    return found


def bytes_of(model: ASFEFusion, shape: tuple[int, int], passes: Passes) -> int:
    """About how many bytes of memory passes over images of H x W take."""
    height, width = shape
    if not passes.tile or passes.tile >= max(shape):
        return limits.needed_bytes(height * width, model.size, passes.batch)
    side = min(passes.tile, height) * min(passes.tile, width)
    whole = height * width * passes.batch * limits.BYTES_IN_TILES
    return limits.needed_bytes(side, model.size, passes.batch) + whole


def line_on(
    model: ASFEFusion, shape: tuple[int, int], passes: Passes, wanted: Passes, free: int
) -> str:
    """What is changed for lack of memory; empty for nothing."""
    height, width = shape
    if passes == wanted:
        return ""
    if passes.tile == wanted.tile:
        what = f"{wanted.batch} pairs of {height}x{width} pixels need about "
        how = f"{passes.batch} at a time, which gives the same values"
    else:
        what = f"a pair of {height}x{width} pixels needs about "
        how = f"in tiles of {passes.tile} pixels, which changes values a little"
        wanted = wanted._replace(batch=1)
    needed = amount(bytes_of(model, shape, wanted))
    return f"memory: {what}{needed} and {amount(free)} are free: fused {how}"


def check_tiles(tile: int, overlap: int, multiple: int) -> None:
    """UserError if `fuse_tiled` cannot take the tiles for a network of this `multiple`."""
    if tile and (tile % multiple or overlap > tile - multiple):
        raise UserError(
            f"tile is {tile} and overlap {overlap}, expected a tile that is a multiple of "
            f"{multiple}, and an overlap of at most {max(tile - multiple, 0)}"
        )


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
    """The factor by which an image shrinks to fit into a tile, or is as small as allowed.

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
