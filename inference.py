"""How the network is run: an equivalent that is faster on a CPU, and passes that fit into memory.

`network.py` is the definition. What only makes it faster is here, behind `optimise`. Tests hold the
results equal to 1e-5. docs/speed.md says how much time each part saves, and what was tried in vain.

* BlurPool: the largest of four neighbours is computed as two maxima.
* Fusion: the inverse transform is linear. So the spectra of both modalities are added first, and
  transformed back once.
* SFEF: both softmaxes share their logits, if no exponential can overflow.
* Decoder: BatchNorm becomes part of the convolution before it. Maps are not joined before a
  convolution: each meets its own part of the weights. The activation works in place.

The second part of the file is about memory. What a pass takes is known before, see
`limits.needed_bytes`. If it is more than is free, fewer images go through together, which gives the
same result. If one is too much, it goes in tiles that blend.

The network looks at an image as a whole: AFF at its spectrum, CASF at all tokens, SFEF at a softmax
over all pixels. So it fuses a tile differently from the same pixels in their image, most of all a
tile without air. The difference is mostly a smooth change of brightness. That change can be
measured at a reduced size, at which the whole image fits into one tile. There both are fused: the
whole image, and the tile alone. Their difference is added to the fused tile.

Legend: as in network.py; B images in a batch, of H x W pixels.
"""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import limits
from cli import UserError, return_freed_memory
from limits import amount
from network import (
    MIN_SIDE,
    SFEF,
    ASFEFusion,
    BlurPool,
    ConvBlock,
    Decoder,
    FusionModule,
    pad_to_multiple,
)

LARGEST_EXPONENT = 80  # exp(80) is 6e34, and float32 ends at 3e38
LARGEST_LOGITS = 2**23  # at most so many: glibc does not reuse a piece of memory of 32 MB
OVERLAP = 64  # pixels over which tiles blend
LEAST_TILE = 256  # side of a tile that is taken for lack of memory: the network learned such images
TILE_STEP = 128  # and by how much its side may grow


# --- a faster equivalent ---------------------------------------------------------------------


def optimise(model: ASFEFusion) -> ASFEFusion:
    """An equivalent of `model` that is faster on a CPU; on another device the model itself.

    It is a new model in evaluation mode that shares the parameters and buffers of `model`. Its
    `forward` and `fuse` give the same as the model's, to 1e-5, and never write into their
    arguments. With gradients enabled, in training mode, under autocast and in another type than
    float32 it computes as the definition does. To move or cast it, move or cast `model` and call
    this again. Hooks on inner modules may not fire.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared).eval()
    # Not the encoder's convolutions: AFF's spectra would amplify the rounding of folded weights.
    slow = set(fast.encoder.blocks.modules())
    for module in fast.modules():
        if module not in slow:
            module.__class__ = FASTER.get(type(module), type(module))
    return fast


def as_defined(module: nn.Module, x: Tensor) -> bool:
    """Whether this pass has to go the way of the definition."""
    other = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
    return module.training or torch.is_grad_enabled() or other or x.device.type != "cpu"


class FastBlurPool(BlurPool):
    """BlurPool, without the places of the maxima, which only training asks for."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        if as_defined(self, x):
            return super().forward(x)
        x = torch.maximum(x[:, :, 1:], x[:, :, :-1])
        x = torch.maximum(x[..., 1:], x[..., :-1])  # (B, C, H-1, W-1)
        x = F.pad(x, (1, 2, 1, 2), mode="reflect")  # (B, C, H+2, W+2)
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class FastFusionModule(FusionModule):
    """FusionModule with one inverse transform."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, 2C, H, W)
        if as_defined(self, x) or not self.aff1 or not self.casf:
            return super().forward(x, y)
        z = self.aff2.masked(self.aff2.transform(x))  # (B, 2C, H, K)
        z += self.aff1.masked(self.aff1.transform(y))
        maps = self.casf(x, y), self.aff1.inverse(z, *x.shape[2:])
        return self.sfef(torch.cat([m.movedim(1, 3) for m in maps], 3).movedim(3, 1))


class FastSFEF(SFEF):
    """SFEF with its logits as one matrix; a softmax divides by its sum after the product."""

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        if as_defined(self, x):
            return super().forward(x)
        gamma = self.norm.gamma * x.shape[1] ** 0.5
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1) * gamma  # (E*S, d)
        tokens = F.normalize(x.flatten(2).mT, dim=2)  # (B, N, d), without their gamma
        # Tokens have length one, so a logit is at most the length of its slot. A sum has N terms.
        exponent = slots.norm(dim=1).max() + math.log(tokens.shape[1])
        many = tokens.shape[0] * tokens.shape[1] * len(slots) >= LARGEST_LOGITS
        if many or exponent > LARGEST_EXPONENT:
            return super().forward(x)
        weights = (tokens @ (slots.T * math.log2(math.e))).exp2_()  # (B, N, E*S)
        slot_in = weights.mT @ tokens * (gamma / weights.sum(1).unsqueeze(2))  # (B, E*S, d)
        per_expert = slot_in.chunk(len(self.experts), 1)  # E of (B, S, d)
        slot_out = [expert(t) for expert, t in zip(self.experts, per_expert, strict=True)]
        out, total = weights @ torch.cat(slot_out, 1), weights.sum(2, keepdim=True)
        out = x.flatten(2).mT.addcdiv(out, total) if self.residual else out.div_(total)
        return out.mT.unflatten(2, x.shape[2:])


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, *maps: Tensor) -> Tensor:
    """bn(conv(torch.cat(maps, 1))) in evaluation mode; the maps are (B, C, H, W) each."""
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    first, *others = zip(maps, weight.split([m.shape[1] for m in maps], 1), strict=True)
    out = F.conv2d(*first, bias, padding=conv.padding)
    for m, part in others:
        out += F.conv2d(m, part, padding=conv.padding)
    return out


class FastConvBlock(ConvBlock):
    """ConvBlock of the decoder; takes several maps in place of one that joins them."""

    def forward(self, *maps: Tensor) -> Tensor:  # c_in channels in all -> (B, c_out, H, W)
        if as_defined(self, maps[0]):
            return super().forward(torch.cat(maps, 1))
        x = conv_bn(self.conv2, self.bn2, conv_bn(self.conv1, self.bn1, *maps))
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.gelu(x, out=x)


class FastDecoder(Decoder):
    """Decoder, without joining maps."""

    def forward(self, z1: Tensor, z2: Tensor, z3: Tensor, z4: Tensor) -> Tensor:
        z = self.up3(self.up4(z4), z3)  # (B, C, H/2, W/2)
        z = self.up2(z, z2)  # (B, C, H, W)
        return self.outlayer(self.up1(z, z1))  # (B, HEADS, H, W)


KINDS = (FastBlurPool, FastFusionModule, FastSFEF, FastConvBlock, FastDecoder)
FASTER = {kind.__base__: kind for kind in KINDS}


# --- passes that fit into memory -------------------------------------------------------------


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
