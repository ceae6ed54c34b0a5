"""The ASFE-Fusion network, and loading and saving of its weights.

Gu, Wang, Deng, Cao, Huang, Zhu: "Adaptive spatial and frequency experts fusion network for medical
image fusion", Biomedical Signal Processing and Control 96 (2024) 106478. Two sizes (args_setting):
`paper`, the published network, and `compact`, ours, with the same modules and topology.

Legend: B batch, C channels of one modality at a scale, H W pixels of that scale, N tokens, D width
of a CASF token, d = 2C width of a SFEF token, E experts, S slots of an expert, p patch side.
x comes from img1 (CT, or the luma of PET or SPECT), y from img2 (MRI). Maps are (B, C, H, W).
"""

import ctypes
import json
import pickle
import platform
import re
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from args_setting import SIZES, CommonArgs, ModelSize
from mixing import mix, mix_in_place

MIN_SIDE = 16  # smallest image side that `fuse` takes
PATCH_ROWS = 4  # of all patches of CASF at a time
CHANNELS, ROWS = 32, 16  # of a map: what a CPU takes at a time at inference
LEVELS = {torch.uint8: 255, torch.uint16: 65535}  # the white of images of integers


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, *maps: Tensor) -> Tensor:
    """bn(conv(maps side by side)).

    At inference the normalisation moves into the weights, and each map meets its own part of them:
    two passes over large maps less.
    """
    if bn.training or torch.is_grad_enabled():
        return bn(conv(torch.cat(maps, 1) if len(maps) > 1 else maps[0]))
    weight, bias = folded(conv, bn)
    parts = weight.split([m.shape[1] for m in maps], 1)
    out = F.conv2d(maps[0], parts[0], bias, padding=conv.padding)
    for m, part in zip(maps[1:], parts[1:], strict=True):
        out += F.conv2d(m, part, padding=conv.padding)
    return out


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that is bn(conv(x)) at inference."""
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    return fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)


def gelu(x: Tensor) -> Tensor:
    """GELU; at inference in place."""
    return F.gelu(x) if torch.is_grad_enabled() else F.gelu(x, out=x)


class BlurPool(nn.Module):
    """Max-pool of stride 1, then a fixed low-pass filter of stride 2 (Zhang, ICML 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu")  # also under torch.device("meta")
        kernel = torch.outer(row, row) / 64
        self.channels = channels
        # Rebuilt from the formula, so it is not stored with the weights.
        self.register_buffer("filt", kernel.expand(channels, 1, 4, 4).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self._rows(x, 1, 2)
        b, c, h, w = x.shape
        out = x.new_empty(b, h // 2, w // 2, c).permute(0, 3, 1, 2)
        top = 0
        for rows in out.tensor_split(-(-h // (2 * ROWS)), 2):
            end = top + 2 * rows.shape[2]
            part = x[:, :, max(top - 1, 0) : end + 2]
            rows.copy_(self._rows(part, 1 if top == 0 else 0, 2 if end + 2 > h else 0))
            top = end
        return out

    def _rows(self, x: Tensor, above: int, below: int) -> Tensor:
        """Of all rows, or of some: so many are mirrored at the edges above and below."""
        # Two maxima of shifted maps: on a CPU several times faster than max_pool2d of stride 1.
        x = torch.maximum(x[..., :-1, :], x[..., 1:, :])
        x = torch.maximum(x[..., :-1], x[..., 1:])
        x = F.pad(x, (1, 2, above, below), mode="reflect")
        return F.conv2d(x, self.filt, stride=2, groups=self.channels)


class ConvBlock(nn.Module):
    """Conv 3x3, BatchNorm, conv 3x3, BatchNorm; no activation between the two convolutions."""

    def __init__(self, c_in: int, c_hidden: int, c_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c_hidden)
        self.conv2 = nn.Conv2d(c_hidden, c_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, *maps: Tensor) -> Tensor:  # c_in channels in all -> (B, c_out, H, W)
        return conv_bn(self.conv2, self.bn2, conv_bn(self.conv1, self.bn1, *maps))


class EncoderBlock(ConvBlock):
    """A block of the encoder."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_in // 2, c_out)

    def forward(self, x: Tensor, inlayer: nn.Conv2d | None = None) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H, W); or what `inlayer`, if given, makes of (B, 1, H, W).

        No activation lies between a 1x1 `inlayer` and the first convolution. At inference the two
        are one, of the image and of a map of ones, which carries the bias as far as the border.
        """
        if inlayer is None:
            return gelu(super().forward(x))
        if self.training or torch.is_grad_enabled():
            return gelu(super().forward(inlayer(x)))
        lift = torch.stack([inlayer.weight.flatten(), inlayer.bias], 1)  # (c_in, 2)
        weight, bias = folded(self.conv1, self.bn1)
        weight = torch.einsum("ochw,ci->oihw", weight, lift)
        x = torch.cat([x, torch.ones_like(x)], 1).to(memory_format=torch.channels_last)
        return gelu(conv_bn(self.conv2, self.bn2, F.conv2d(x, weight, bias, padding=1)))


class Encoder(nn.Module):
    """Features of one image at four scales; both images share the weights.

    The first scale is `first`, each further one `blocks[k]` of `down` of the one before.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.inlayer = nn.Conv2d(1, channels[0], 1)
        self.blocks = nn.ModuleList(map(EncoderBlock, channels, channels[1:]))
        self.pools = nn.ModuleList(BlurPool(c) for c in channels[1:-1])

    def first(self, img: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, C, H, W)
        return self.blocks[0](img, self.inlayer)

    def down(self, k: int, x: Tensor) -> Tensor:  # of scale k, (B, C, H, W) -> (B, C, H/2, W/2)
        return gelu(self.pools[k](x))


class AFF(nn.Module):
    """Adaptive frequency fusion: one modality's spectrum, mixed, masked and transformed back.

    `aff="full"` uses the whole spectrum in the inverse transform, as the paper describes.
    `aff="published"` keeps what the authors' code computes: rows 0 and 1 of the spectrum's H axis
    serve as real and imaginary part of a (W/2+1) x 2 map, and every other row is dropped.
    """

    def __init__(self, channels: int, fft_norm: str, aff: str = "full"):
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.mask = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.fft_norm, self.aff = fft_norm, aff

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return self.inverse(self.spectrum(x), x.shape[2:])

    def spectrum(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 2C, H, W/2+1), in float32
        # Half precision has too little range for a spectrum, and no FFT on most devices.
        with torch.autocast(x.device.type, enabled=False):
            if self.training or torch.is_grad_enabled() or x.device.type != "cpu":
                z = conv_bn(self.conv, self.bn, _as_channels(self._rfft2(x))).relu_()
            else:  # part by part, the second time in its own place
                b, c, h, w = x.shape
                z = x.new_empty(b, h, w // 2 + 1, c, dtype=torch.complex64)
                for part, place in zip(x.split(CHANNELS, 1), z.split(CHANNELS, 3), strict=True):
                    place.copy_(self._rfft2(part))
                z, (weight, bias) = _as_channels(z), folded(self.conv, self.bn)
                for rows in z.split(ROWS, 2):
                    torch.clamp_min(F.conv2d(rows, weight, bias), 0, out=rows)
            pooled = torch.cat([z.mean(1, keepdim=True), z.amax(1, keepdim=True)], 1)  # (B, 2, …)
            mask = torch.sigmoid(self.mask(pooled))  # (B, 1, H, W/2+1)
            return z * mask if torch.is_grad_enabled() else z.mul_(mask)

    def _rfft2(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> complex (B, H, W/2+1, C)
        # Transforms run along neighbours in memory; convolutions like the channels to be those.
        x = x.float().permute(0, 2, 1, 3).contiguous()  # (B, H, C, W)
        return torch.fft.rfft2(x, dim=(1, 3), norm=self.fft_norm).transpose(2, 3)

    def inverse(self, z: Tensor, sides: tuple[int, int]) -> Tensor:
        """From a masked spectrum (B, 2C, H, W/2+1) to (B, C, H, W); linear in the spectrum."""
        z = self._as_complex(z)
        out = torch.fft.irfft2(z, s=sides, dim=(1, 2), norm=self.fft_norm)  # (B, H, W, C)
        return out.permute(0, 3, 1, 2)

    def inverse_columns(self, z: Tensor, height: int) -> Tensor:
        """The part of `inverse` along H: complex (B, H, W/2+1, C); published: (B, H, 2, C)."""
        return torch.fft.ifft(self._as_complex(z), n=height, dim=1, norm=self.fft_norm)

    def inverse_rows(self, columns: Tensor, out: Tensor) -> None:
        """The rest of `inverse`, some rows at a time, into `out` (B, H, W, C)."""
        for rows, place in zip(columns.split(ROWS, 1), out.split(ROWS, 1), strict=True):
            place.copy_(torch.fft.irfft(rows, n=out.shape[2], dim=2, norm=self.fft_norm))

    def _as_complex(self, z: Tensor) -> Tensor:
        z = z.permute(0, 2, 3, 1).unflatten(3, (-1, 2))  # (B, H, W/2+1, C, 2)
        if self.aff == "published":
            z = torch.stack([z[:, 0], z[:, 1]], -1).transpose(2, 3)  # (B, W/2+1, 2, C, 2)
        return torch.view_as_complex(z.contiguous())  # without the last 2


def _as_channels(z: Tensor) -> Tensor:
    """Complex (B, H, K, C) -> (B, 2C, H, K): c0.re, c0.im, c1.re, …"""
    return torch.view_as_real(z.contiguous()).flatten(3).permute(0, 3, 1, 2)


class CASF(nn.Module):
    """Cross-attention spatial fusion: the self-similarity of one image weighs the other's values.

    A p x p convolution of stride p makes the tokens; A1 = softmax(q1 k1^T / sqrt(D/heads)) acts on
    v2, A2 on v1. Their mean is laid back as patches and added to x + y.
    """

    def __init__(self, channels: int, patch: int, dim: int, heads: int):
        super().__init__()
        self.patch, self.heads = patch, heads
        self.embed1 = nn.Conv2d(channels, dim, patch, stride=patch)
        self.embed2 = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv1 = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv2 = nn.Linear(dim, 3 * dim, bias=False)
        self.proj1, self.proj2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.unpatch = nn.Linear(dim, patch * patch * channels)

    def forward(self, x: Tensor, y: Tensor, in_place: bool = False) -> Tensor:
        """Two (B, C, H, W) -> (B, C, H, W), which takes the place of x if `in_place`."""
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        q1, k1, v1 = self._heads(self.qkv1(self.norm1(self._embed(self.embed1, x))))
        q2, k2, v2 = self._heads(self.qkv2(self.norm2(self._embed(self.embed2, y))))
        a1 = F.scaled_dot_product_attention(q1, k1, v2)  # (B, heads, N, D/heads)
        a2 = F.scaled_dot_product_attention(q2, k2, v1)
        t1 = self.proj1(a1.transpose(1, 2).flatten(2))  # (B, N, D)
        t2 = self.proj2(a2.transpose(1, 2).flatten(2))
        t = ((t1 + t2) / 2).unflatten(1, (rows, columns))  # (B, H/p, W/p, D)
        # Some rows of all patches at a time, which need no other order than that of the map.
        weights = self.unpatch.weight.unflatten(0, (self.patch, -1)).transpose(1, 2)
        biases = self.unpatch.bias.unflatten(0, (self.patch, 1, -1))  # (p, 1, p*C)
        pairs = zip(weights.split(PATCH_ROWS), biases.split(PATCH_ROWS), strict=True)
        patches = ((t.flatten(0, 2) @ w).add_(b) for w, b in pairs)  # (<=p, B*N, p*C)
        sides = -1, rows, columns  # not a slice of a shape, which a trace would fix
        patches = (r.unflatten(2, (-1, x.shape[1])).unflatten(1, sides) for r in patches)
        patches = (r.flatten(3, 4).movedim(0, 2) for r in patches)  # (B, H/p, <=p, W, C)
        if not in_place:
            patches = torch.cat(list(patches), 2).flatten(1, 2)  # (B, H, W, C)
            return (x + y).add_(patches.permute(0, 3, 1, 2))
        x += y
        places = x.permute(0, 2, 3, 1).unflatten(1, (rows, -1)).split(PATCH_ROWS, 2)
        for place, r in zip(places, patches, strict=True):
            place += r
        return x

    def _embed(self, conv: nn.Conv2d, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        # The convolution as matrix products: patches do not overlap, and a library's convolution
        # would rearrange its large weight at every call. Some rows of all patches at a time.
        patches = x.permute(0, 2, 3, 1).unflatten(2, (-1, self.patch))
        patches = patches.unflatten(1, (-1, self.patch)).movedim(2, 0)  # (p, B, H/p, W/p, p, C)
        weights = conv.weight.permute(2, 3, 1, 0).flatten(1, 2)  # (p, p*C, D)
        tokens = conv.bias
        for rows, w in zip(patches.split(PATCH_ROWS), weights.split(PATCH_ROWS), strict=True):
            tokens = tokens + (rows.flatten(4).flatten(1, 3) @ w).sum(0)  # (B*N, D)
        return tokens.unflatten(0, (x.shape[0], -1))  # not len(x), which a trace would fix

    def _heads(self, qkv: Tensor) -> Tensor:
        qkv = qkv.unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        return qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, N, D/heads)


class RMSNorm(nn.Module):
    """t / max(||t||, 1e-12) * sqrt(d) * gamma."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    @property
    def scale(self) -> Tensor:  # (d,)
        return self.gamma * len(self.gamma) ** 0.5

    def forward(self, t: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return F.normalize(t, dim=-1) * self.scale


class SFEF(nn.Module):
    """Spatial and frequency experts fusion: a soft mixture of experts over the pixels.

    Puigcerver, Riquelme, Mustafa, Houlsby: "From sparse to soft mixtures of experts" (ICLR 2024).
    Dispatch (softmax over the tokens) and combine (softmax over the slots) are written as two
    attentions without 1/sqrt(d), so the N x E*S logits need not exist as a whole (`mixing.py`). At
    inference, and without a residual path, the tokens are normalised in the input's place, and the
    result takes it, too.
    """

    def __init__(self, dim: int, experts: int, slots: int, residual: bool):
        super().__init__()
        self.slot_embeds = nn.Parameter(torch.randn(experts, slots, dim))
        self.norm, self.slot_norm = RMSNorm(dim), RMSNorm(dim)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(experts)
        )
        self.residual = residual

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(B, d, H, W) -> (B, d, H, W), or times `weight` (d, n): (B, n, H, W).

        `weight` is for inference without a residual path.
        The sum over the slots is linear, so a narrow `weight` saves work if it acts on the slots.
        """
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, d)
        in_place = not self.residual and not torch.is_grad_enabled()
        unit = F.normalize(tokens, dim=-1, out=tokens if in_place else None)
        # The scale of the tokens' norm is per channel: it acts on the few slots instead.
        scale = self.norm.scale  # (d,)
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1) * scale  # (E*S, d)
        slots = slots.expand(len(x), -1, -1)  # (B, E*S, d)

        def experts(slot_in: Tensor) -> Tensor:  # (B, E*S, d) -> (B, E*S, d or n)
            per_expert = (slot_in * scale).chunk(len(self.experts), dim=1)  # E of (B, S, d)
            slot_out = [expert(t) for expert, t in zip(self.experts, per_expert, strict=True)]
            slot_out = torch.cat(slot_out, 1)
            return slot_out if weight is None else slot_out @ weight

        out = (mix_in_place if in_place else mix)(unit, slots, experts)  # (B, N, d or n)
        out = out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # (B, d or n, H, W)
        return x + out if self.residual else out


class FusionModule(nn.Module):
    """SFEF(concat[CASF(x, y), AFF2(x) + AFF1(y)]) at one scale (AFF numbers as published)."""

    def __init__(self, channels: int, patch: int, size: ModelSize, aff: str):
        super().__init__()
        self.casf = CASF(channels, patch, size.dim, size.heads)
        self.aff1 = AFF(channels, size.fft_norm, aff)
        self.aff2 = AFF(channels, size.fft_norm, aff)
        self.sfef = SFEF(2 * channels, size.experts, size.slots, size.sfef_residual)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, 2C, H, W)
        return self.sfef(self.concat([x, y]))

    def concat(self, pair: list[Tensor], in_place: bool = False) -> Tensor:
        """The maps of the spatial and the frequency expert, side by side: (B, 2C, H, W).

        Empties `pair`, so that x and y can go before the larger map comes; overwrites x, if
        `in_place`.
        """
        x, y = pair
        pair.clear()
        sides = x.shape[2:]
        # The inverse transform is linear, so one of the sum stands for the sum of two.
        z = self.aff2.spectrum(x).add_(self.aff1.spectrum(y))  # (B, 2C, H, W/2+1)
        spatial = self.casf(x, y, in_place).permute(0, 2, 3, 1)  # (B, H, W, C)
        del x, y
        if in_place:
            columns = self.aff1.inverse_columns(z, sides[0])  # complex
            del z
            both = spatial.new_empty(*spatial.shape[:3], 2 * spatial.shape[3])  # (B, H, W, 2C)
            spatial_part, frequency_part = both.chunk(2, -1)
            spatial_part.copy_(spatial)
            self.aff1.inverse_rows(columns, frequency_part)
        else:
            frequency = self.aff1.inverse(z, sides).permute(0, 2, 3, 1)  # (B, H, W, C)
            del z
            both = torch.cat([spatial, frequency.to(spatial.dtype)], -1)  # (B, H, W, 2C)
        return both.permute(0, 3, 1, 2)


class DecoderBlock(ConvBlock):
    """A block of the decoder; all but the last double their output's sides."""

    def __init__(self, c_in: int, c_out: int, upsample: bool):
        super().__init__(c_in, c_out // 2, c_out)
        self.upsample = upsample

    def forward(self, *maps: Tensor, taps: bool = False) -> Tensor:
        """c_in channels in all -> (B, c_out, H, W) or 2H, 2W.

        With `taps`, at inference, the last map comes multiplied with its part of `tap_weights`.
        """
        x = self._sum_taps(*maps) if taps else super().forward(*maps)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return gelu(x)

    def tap_weights(self) -> tuple[Tensor, Tensor]:
        """The first convolution as (c_in, 9D): what a pixel gives to its neighbours' D channels.

        And its bias, (D,). Where D is small, this product and the sum of the nine are faster than
        the convolution.
        """
        weight, bias = folded(self.conv1, self.bn1)
        return weight.permute(1, 3, 2, 0).flatten(1), bias  # columns, rows, D

    def _sum_taps(self, x: Tensor, taps: Tensor) -> Tensor:  # (B, C, H, W), (B, 9D, H, W)
        weight, bias = self.tap_weights()
        taps += F.conv2d(x, weight[: x.shape[1]].mT.unsqueeze(2).unsqueeze(3))
        taps = taps.permute(0, 2, 3, 1)
        left, middle, right = taps.unflatten(3, (3, -1)).unbind(3)  # (B, H, W, 3D)
        middle[:, :, 1:] += left[:, :, :-1]
        middle[:, :, :-1] += right[:, :, 1:]
        above, middle, below = middle.unflatten(3, (3, -1)).unbind(3)  # (B, H, W, D)
        out = middle + bias
        out[:, 1:] += above[:, :-1]
        out[:, :-1] += below[:, 1:]
        return conv_bn(self.conv2, self.bn2, out.permute(0, 3, 1, 2))


class Decoder(nn.Module):
    """From the coarsest fused scale to the image; each step takes in the next finer scale."""

    def __init__(self, channels: tuple[int, ...], tail: int, head: str):
        super().__init__()
        _, c1, c2, c3, c4 = channels
        self.up4 = DecoderBlock(2 * c4, c3, upsample=True)
        self.up3 = DecoderBlock(c3 + 2 * c3, c2, upsample=True)
        self.up2 = DecoderBlock(c2 + 2 * c2, c1, upsample=True)
        self.up1 = DecoderBlock(c1 + 2 * c1, tail, upsample=False)
        self.outlayer = nn.Conv2d(tail, 2 if head == "max" else 1, 1)
        if head == "max":
            nn.init.zeros_(self.outlayer.bias)  # begin near the brighter source

    def forward(self, fused: list[Tensor], taps: bool = False) -> Tensor:
        """From fused maps, finest first, to (B, tail, H, W). Empties the list, to free memory.

        With `taps` the finest is in the form that `up1` takes with it.
        """
        z = []  # of (B, C, H/4, W/4), (B, C, H/2, W/2), (B, C, H, W)
        for up in (self.up4, self.up3, self.up2):
            z = [up(*z, fused.pop())]
        return self.up1(*z, fused.pop(), taps=taps)  # (B, tail, H, W)


class ASFEFusion(nn.Module):
    """The whole network.

    Args:
        size: widths, see `args_setting.ModelSize`; a name of `SIZES` or the dataclass itself.
        aff: "full" or "published", see `AFF`.
    """

    def __init__(self, size: str | ModelSize = "paper", aff: str = "full"):
        super().__init__()
        size = SIZES[size] if isinstance(size, str) else size
        self.size = size
        self.encoder = Encoder(size.channels)
        self.fusion = nn.ModuleList(
            FusionModule(c, p, size, aff)
            for c, p in zip(size.channels[1:], size.patch, strict=True)
        )
        self.decoder = Decoder(size.channels, size.tail, size.head)
        self.multiple = max(2**k * p for k, p in enumerate(size.patch))
        self.arrange()

    def arrange(self) -> "ASFEFusion":
        """Lay the weights out in memory as they are read fastest; returns itself.

        Convolutions like their channels last, and pixels become SFEF's tokens without a copy. The
        large weights of CASF's embeddings, which become matrix products, are read row by row.
        """
        self.to(memory_format=torch.channels_last)
        for fusion in self.fusion:
            for weight in (fusion.casf.embed1.weight, fusion.casf.embed2.weight):
                weight.data = weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
        return self

    @property
    def narrow(self) -> bool:
        """Whether taps (`DecoderBlock.tap_weights`) are fewer than the finest fused channels."""
        taps = 9 * self.decoder.up1.conv1.out_channels
        return taps < 2 * self.size.channels[1] and not self.size.sfef_residual

    @property
    def aff(self) -> str:
        """Which inverse transform AFF uses: "full" or "published"."""
        return self.fusion[0].aff1.aff

    @aff.setter
    def aff(self, aff: str) -> None:
        for module in self.modules():
            if isinstance(module, AFF):
                module.aff = aff

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        """Fuse two (B, 1, H, W) float images in [0, 1] into (B, 1, H, W), not clipped.

        H and W must be multiples of `self.multiple` (128 for `paper`, 16 for `compact`); `fuse`
        takes any size. Raises ValueError for other shapes.
        """
        _check_shapes(img1, img2, self.multiple)
        # One pass for both images: BatchNorm then trains on the joint statistics that it uses at
        # test. A CPU at inference takes one after the other, for the sake of its memory.
        together = self.training or torch.is_grad_enabled() or img1.device.type != "cpu"
        taps = self.narrow and not together
        fused = self.fuse_scales([torch.cat([img1, img2])] if together else [img1, img2], taps)
        return self.head(self.decoder(fused, taps), img1, img2)

    def fuse_scales(self, images: list[Tensor], taps: bool = False) -> list[Tensor]:
        """(B, 2C, H, W), …, (B, 2C, H/8, W/8) of img1 and img2, or of one batch of them all.

        Scale by scale, the finest first, so that what is large is soon done with. With `taps` the
        finest is in the form that the decoder takes with it.
        """
        encoder, fused = self.encoder, []
        in_place = len(images) == 2 and not torch.is_grad_enabled()
        maps = [encoder.first(img) for img in images]  # (B, C, H, W)
        for k, (fusion, c) in enumerate(zip(self.fusion, self.size.channels[1:], strict=True)):
            pair = list(maps[0].chunk(2)) if len(maps) == 1 else maps
            maps = [encoder.down(k, m) for m in maps] if k < len(encoder.pools) else []
            # Not fusion(x, y), whose caller would hold x and y to the end.
            weight = self.decoder.up1.tap_weights()[0][-2 * c :] if taps and k == 0 else None
            fused.append(fusion.sfef(fusion.concat(pair, in_place), weight))
            maps = [encoder.blocks[k + 1](m) for m in maps]  # (B, C, H/2, W/2)
        return fused

    def head(self, z: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
        """The fused (B, 1, H, W) from the decoder's last map, as `ModelSize.head` says."""
        out = self.decoder.outlayer(z)  # (B, 1 or 2, H, W)
        if self.size.head == "max":
            correction = (out * torch.cat([img1, img2], 1)).sum(1, keepdim=True)
            out = torch.maximum(img1, img2) + correction
        return out

    @torch.no_grad()
    def fuse(
        self, img1: Tensor | np.ndarray, img2: Tensor | np.ndarray, stretch: bool = False
    ) -> Tensor:
        """Fuse two images of any size from 16 x 16 up, in evaluation mode.

        Args:
            img1, img2: (H, W) or (B, 1, H, W), tensor or array; float in [0, 1] or unsigned
                integers of 8 or 16 bits (divided by 255 or 65535).
            stretch: as the published code, stretch each fused image from its minimum and maximum
                to [0, 1] in place of the clip; a constant one becomes 0.

        Returns:
            A float32 tensor of the input's shape, on the model's device, clipped to [0, 1].

        Raises:
            ValueError: shapes that differ or are too small, values out of range or not finite.
        """
        device = next(self.parameters()).device
        a, b = _as_batch("img1", img1, device), _as_batch("img2", img2, device)
        if a.shape != b.shape:
            raise ValueError(f"img1 is {_sides(a)} and img2 is {_sides(b)}, expected equal sizes")
        height, width = a.shape[-2:]
        a, b = (pad_to_multiple(t, self.multiple) for t in (a, b))
        was_training = self.training
        out = self.eval()(a, b).float()
        self.train(was_training)
        out = out[..., :height, :width]
        if stretch:
            low, high = out.amin((1, 2, 3), keepdim=True), out.amax((1, 2, 3), keepdim=True)
            out = (out - low) / (high - low).clamp(min=torch.finfo(out.dtype).tiny)
        out = out.clamp(0, 1)
        return out[0, 0] if img1.ndim == 2 else out


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Mirror (B, C, H, W) at its lower and right edge until both sides are multiples.

    The mirror repeats where the padding is larger than the image; nothing is copied where no
    padding is needed.
    """
    for axis in (2, 3):
        n = x.shape[axis]
        if n % multiple:
            i = torch.arange(n + -n % multiple, device=x.device) % (2 * n)
            x = x.index_select(axis, torch.minimum(i, 2 * n - 1 - i))
    return x


def _as_batch(name: str, img: Tensor | np.ndarray, device: torch.device) -> Tensor:
    t = img if isinstance(img, Tensor) else torch.from_numpy(np.array(img))
    if not t.is_floating_point() and t.dtype not in LEVELS:
        raise ValueError(f"{name} is of {t.dtype}, expected floats, uint8 or uint16")
    if t.ndim not in (2, 4) or (t.ndim == 4 and t.shape[1] != 1):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected (H, W) or (B, 1, H, W)")
    if min(t.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"{name} is {_sides(t)}, expected at least {MIN_SIDE}x{MIN_SIDE}")
    t = t.to(device, torch.float32) / LEVELS.get(t.dtype, 1)
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} has values that are not finite")
    if t.min() < -1e-3 or t.max() > 1 + 1e-3:  # a luma may round to just over 1
        low, high = t.min().item(), t.max().item()
        raise ValueError(f"{name} has values from {low:g} to {high:g}, expected 0 to 1")
    return t if t.ndim == 4 else t[None, None]


def _check_shapes(img1: Tensor, img2: Tensor, multiple: int) -> None:
    if img1.shape != img2.shape or img1.ndim != 4 or img1.shape[1] != 1:
        got = f"{tuple(img1.shape)} and {tuple(img2.shape)}"
        raise ValueError(f"img1 and img2 have shapes {got}, expected (B, 1, H, W) twice")
    if img1.shape[-2] % multiple or img1.shape[-1] % multiple:
        raise ValueError(f"images are {_sides(img1)}, expected multiples of {multiple}; use fuse()")


def _sides(t: Tensor) -> str:
    return f"{t.shape[-2]}x{t.shape[-1]}"


def pick_device(name: str) -> torch.device:
    """The device that `--DEVICE` names; "auto" is CUDA, then MPS, then CPU.

    Raises ValueError if the device is unknown or absent.
    """
    absent = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((d for d in ("cuda", "mps") if not absent[d]), "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # as wrong as any other that follows
    if device.type not in ("cpu", *absent):
        raise ValueError(f"DEVICE is {name!r}, expected auto, cpu, cuda, cuda:N or mps")
    if absent.get(device.type) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(f"DEVICE is {name!r}, but this machine has no such device")
    return device


def start(args: CommonArgs) -> torch.device:
    """What every script does first: subnormal numbers, threads, and the device that it returns."""
    # Subnormal numbers slow a CPU down and carry no information. First of all, because a thread
    # inherits this setting from the one that starts it, and those that run do not hear of it.
    torch.set_flush_denormal(True)
    if args.threads:
        torch.set_num_threads(args.threads)
    return pick_device(args.DEVICE)


def keep_freed_memory(model: ASFEFusion) -> None:
    """From here on have glibc, where it is the C library, reuse what is freed, not return it.

    Otherwise a pass on a CPU gets its maps of tens of MB from the system anew, page by page, which
    is about a twentieth of its time. For after the weights are loaded, which leaves much to return.
    See mallopt(3), malloc_trim(3). And have MKL take the buffers that `model` needs.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: what is larger comes and goes on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end that may stay
        if torch.backends.mkl.is_available():
            # MKL keeps its buffers, larger ones beside smaller ones. So the product that needs the
            # largest comes first, CASF's widest, and none comes to lie in the way of the maps.
            wide = max(f.casf.unpatch.out_features // f.casf.patch for f in model.fusion)
            tokens = torch.ones(PATCH_ROWS, 256, model.size.dim)  # of a 256 x 256 pair
            torch.bmm(tokens, torch.ones(PATCH_ROWS, model.size.dim, wide))


# --- weights ---------------------------------------------------------------------------------

# Where the published checkpoints call a part otherwise; applied in this order.
_RENAME = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^module\.", ""),
        (r"^encoder\.block(\d)\.", lambda m: f"encoder.blocks.{int(m[1]) - 1}."),
        (r"^fusionnet(\d)\.", lambda m: f"fusion.{int(m[1]) - 1}."),
        (r"^conv_up", "decoder.up"),
        (r"^outlayer\.", "decoder.outlayer."),
        (r"\.AFFusion(\d)\.conv_layer1\.", r".aff\1.mask."),
        (r"\.AFFusion(\d)\.conv_layer\.", r".aff\1.conv."),
        (r"\.AFFusion(\d)\.", r".aff\1."),
        (r"\.CASFusion\.", ".casf."),
        (r"\.patchembed(\d)\.proj\.", r".embed\1."),
        (r"\.QKV_Block(\d)\.norm1\.", r".norm\1."),
        (r"\.QKV_Block(\d)\.attn\.qkv\.", r".qkv\1."),
        (r"\.depatch\.projection\.0\.", ".unpatch."),
        (r"\.SFEFusion\.experts\.", ".sfef."),
        (r"\.SFEFusion\.", ".sfef."),
        (r"(\.experts\.\d)\.3\.", r"\1.2."),  # the published expert has a dropout at place 2
    )
)
# Stored by the published code but never used in its forward pass, or rebuilt from a formula here.
_UNUSED = re.compile(r"\.QKV_Block\d\.(attn\.proj|norm2|mlp)\.|\.down_anti\.filt$")


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a state dict of the published code; its unused tensors are left out."""
    ours = {}
    for key, value in state.items():
        if not _UNUSED.search(key):
            for pattern, name in _RENAME:
                key = pattern.sub(name, key)
            ours[key] = value
    return ours


def save_weights(model: ASFEFusion, path: Path, metadata: dict, half: bool = True) -> None:
    """Write safetensors, in float16 if `half`, with JSON-able `metadata`.

    Size, widths and AFF variant are added. Written beside `path` and renamed: never half a file.
    """
    kind = torch.float16 if half else torch.float32
    state = {
        key: value.to("cpu", kind if value.is_floating_point() else value.dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    _check_finite(state, f"weights for {path}")
    name = next((n for n, s in SIZES.items() if s == model.size), "custom")
    metadata = {"size": name, "widths": asdict(model.size), "aff": model.aff, **metadata}
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(save(state, {"asfe": json.dumps(metadata)}))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_weights(path: Path, device: torch.device | str = "cpu") -> tuple[ASFEFusion, dict]:
    """A model in evaluation mode and the metadata of its file.

    Takes our safetensors, and state dicts (`.pth`) made by the published code, also wrapped in
    `module.` by DataParallel; those select `aff="published"`. Pickled code is never run.

    Raises:
        ValueError: the file is absent, damaged, of another model, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
    else:
        state = from_published(_read_state_dict(path))
        metadata = {"size": "paper", "widths": asdict(SIZES["paper"]), "aff": "published"}
    try:
        widths = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["widths"].items()}
        with torch.device("meta"):  # no time spent on random weights that are replaced at once
            model = ASFEFusion(ModelSize(**widths), metadata["aff"])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"weights {path}: the metadata do not describe a network") from None
    expected = model.state_dict()
    shapes = {k: (expected.get(k), state.get(k)) for k in {**expected, **state}}
    for key, (want, got) in shapes.items():
        if want is None or got is None or want.shape != got.shape:
            want, got = (None if t is None else tuple(t.shape) for t in (want, got))
            raise ValueError(f"weights {path}: {key} has shape {got}, expected {want}")
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    _check_finite(state, f"weights {path}")
    model.load_state_dict(state, assign=True)
    return model.to(device).arrange().eval(), metadata


def _check_finite(state: dict[str, Tensor], name: str) -> None:
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: {key} has values that are not finite")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("asfe", "null"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights {path}: damaged or not safetensors ({error})") from None
    if not isinstance(metadata, dict) or not {"size", "widths", "aff"} <= metadata.keys():
        raise ValueError(f"weights {path}: not made by this project, expected `asfe` metadata")
    return state, metadata


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():  # the error that follows says enough
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"weights {path}: damaged, or pickled code, which is not run") from None
    except Exception as error:  # a parser of strange bytes may stumble in any way
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights {path}: damaged or not a checkpoint ({first_line})") from None
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        raise ValueError(f"weights {path}: expected a state dict of tensors")
    return state
