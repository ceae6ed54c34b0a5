"""The ASFE-Fusion network, in the order and the terms of its paper.

Gu, Wang, Deng, Cao, Huang, Zhu: "Adaptive spatial and frequency experts fusion network for medical
image fusion", Biomedical Signal Processing and Control 96 (2024) 106478. An encoder with shared
weights makes features of both images at four scales, a fusion module joins them at each scale
(CASF in space, AFF in frequency, SFEF mixes both), and a decoder makes the fused image.

One path serves training and inference; `inference.optimise` makes it faster on a CPU.
`args_setting.SIZES` has two sizes: `paper`, the published one, and `compact`, ours.

Legend: B batch, C channels of one modality at a scale, H W pixels of that scale, K = W/2+1
frequencies along W, p patch side, N tokens, D width of a CASF token, d = 2C width of an SFEF token,
E experts, S slots of an expert. x comes from img1 (CT, or the luma of PET or SPECT), y from img2
(MRI). Maps are (B, C, H, W), channels last in memory.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from args_setting import SIZES, ModelSize
from cli import UserError

HEADS = {"image": 1, "blend": 2, "bands": 6}  # head -> channels that the decoder makes for it
STRONG = 0.08  # mean absolute detail, of the range, that a blend keeps beside any other
MIN_SIDE = 16  # pixels, the smallest image side that `fuse` takes
WHITE = {torch.uint8: 255, torch.uint16: 65535}  # of images of integers


# --- encoder ---------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Conv 3x3 and BatchNorm, twice without an activation between, x2 in the decoder, GELU."""

    def __init__(self, c_in: int, c_hidden: int, c_out: int, upsample: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(c_hidden)
        self.conv2 = nn.Conv2d(c_hidden, c_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H, W) or 2H, 2W
        x = self.bn1(self.conv1(x))  # (B, c_hidden, H, W)
        x = self.bn2(self.conv2(x))  # (B, c_out, H, W)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.gelu(x)


class BlurPool(nn.Module):
    """Max-pool of stride 1, then a fixed low-pass filter of stride 2 (Zhang, ICML 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        # On the CPU, so it has values also under torch.device("meta"): no file of weights has it.
        row = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu")
        kernel = torch.outer(row, row).expand(channels, 1, 4, 4) / 64
        self.register_buffer("filt", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        x = F.max_pool2d(x, 2, stride=1)  # (B, C, H-1, W-1)
        x = F.pad(x, (1, 2, 1, 2), mode="reflect")  # (B, C, H+2, W+2)
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class Encoder(nn.Module):
    """Features of one image at four scales, the finest first; both images share the weights."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.inlayer = nn.Conv2d(1, channels[0], 1)
        self.blocks = nn.ModuleList(ConvBlock(c, c // 2, c_out) for c, c_out in pairwise(channels))
        self.pools = nn.ModuleList(BlurPool(c) for c in channels[1:-1])

    def forward(self, img: Tensor) -> list[Tensor]:  # (B, 1, H, W) -> four of (B, C, H, W)
        x = self.inlayer(img).contiguous(memory_format=torch.channels_last)
        scales = [self.blocks[0](x)]
        for pool, block in zip(self.pools, self.blocks[1:], strict=True):
            scales.append(block(F.gelu(pool(scales[-1]))))  # (B, C, H/2, W/2)
        return scales


# --- fusion module ---------------------------------------------------------------------------


class PatchEmbed(nn.Conv2d):
    """A p x p convolution of stride p, computed as a product of weights and patches."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        p = self.stride[0]
        patches = x.permute(0, 2, 3, 1).unflatten(2, (-1, p)).unflatten(1, (-1, p))
        patches = patches.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, p*p*C)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class CASF(nn.Module):
    """Cross-attention spatial fusion: the self-similarity of one image weighs the other's values.

    A p x p convolution of stride p makes the tokens; A1 = softmax(q1 k1^T / sqrt(D/heads)) acts on
    v2, A2 on v1. Their mean is laid back as patches and added to x + y.
    """

    def __init__(self, channels: int, patch: int, dim: int, heads: int):
        super().__init__()
        self.patch, self.heads = patch, heads
        self.embed1 = PatchEmbed(channels, dim, patch, stride=patch)
        self.embed2 = PatchEmbed(channels, dim, patch, stride=patch)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv1 = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv2 = nn.Linear(dim, 3 * dim, bias=False)
        self.proj1, self.proj2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.unpatch = nn.Linear(dim, patch * patch * channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, C, H, W)
        tokens1 = self.norm1(self.embed1(x))  # (B, N, D)
        tokens2 = self.norm2(self.embed2(y))
        q1, k1, v1 = self.split_heads(self.qkv1(tokens1))  # (B, heads, N, D/heads) each
        q2, k2, v2 = self.split_heads(self.qkv2(tokens2))
        crossed1 = F.scaled_dot_product_attention(q1, k1, v2).transpose(1, 2).flatten(2)  # A1 v2
        crossed2 = F.scaled_dot_product_attention(q2, k2, v1).transpose(1, 2).flatten(2)  # A2 v1
        patches = self.unpatch((self.proj1(crossed1) + self.proj2(crossed2)) / 2)  # (B, N, p*p*C)
        return x + y + self.lay_back(patches, x.shape[2] // self.patch, x.shape[3] // self.patch)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(B, N, 3D) -> q, k, v, each (B, heads, N, D/heads)."""
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def lay_back(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """(B, N, p*p*C), ordered by row, column and channel in a patch -> (B, C, H, W)."""
        patches = patches.unflatten(2, (self.patch, self.patch, -1)).unflatten(1, (rows, columns))
        return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2).movedim(3, 1)


class AFF(nn.Module):
    """Adaptive frequency fusion: one modality's spectrum, mixed, masked and transformed back.

    `aff="full"` uses the whole spectrum in the inverse transform, as the paper describes.
    `aff="published"` keeps what the authors' code computes: rows 0 and 1 of the spectrum's H axis
    serve as real and imaginary part of a K x 2 map, and every other row is dropped.
    """

    def __init__(self, channels: int, fft_norm: str, aff: str = "full"):
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.mask = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.fft_norm, self.aff = fft_norm, aff

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W), in float32
        # Half precision has too little range for a spectrum, and no FFT on most devices.
        with torch.autocast(x.device.type, enabled=False):
            return self.inverse(self.masked(self.transform(x.float())), x.shape[2], x.shape[3])

    def masked(self, z: Tensor) -> Tensor:
        """A spectrum mixed over its channels and masked: (B, 2C, H, K) -> (B, 2C, H, K)."""
        z = F.relu(self.bn(self.conv(z)))
        pooled = torch.cat([z.mean(1, keepdim=True), z.amax(1, keepdim=True)], 1)
        return z * torch.sigmoid(self.mask(pooled))  # the mask is (B, 1, H, K)

    def transform(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2C, H, K): real and imaginary parts, c0.re, c0.im, c1.re, …"""
        # A transform is fast along neighbours in memory; in channels last, channels are neighbours.
        x = x.permute(0, 2, 1, 3).contiguous()  # (B, H, C, W)
        z = torch.fft.rfft2(x, dim=(1, 3), norm=self.fft_norm)  # complex (B, H, C, K)
        return torch.view_as_real(z.transpose(2, 3).contiguous()).flatten(3).permute(0, 3, 1, 2)

    def inverse(self, z: Tensor, height: int, width: int) -> Tensor:
        """(B, 2C, H, K) -> (B, C, H, W)."""
        z = z.permute(0, 2, 3, 1).unflatten(3, (-1, 2))  # (B, H, K, C, 2)
        if self.aff == "published":
            z = torch.stack([z[:, 0], z[:, 1]], -1).transpose(2, 3)  # (B, K, 2, C, 2)
        z = torch.view_as_complex(z.contiguous())
        return torch.fft.irfft2(z, (height, width), (1, 2), self.fft_norm).permute(0, 3, 1, 2)


class RMSNorm(nn.Module):
    """t / max(||t||, 1e-12) * sqrt(d) * gamma."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, t: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return F.normalize(t, dim=-1) * (self.gamma * len(self.gamma) ** 0.5)


class SFEF(nn.Module):
    """Spatial and frequency experts fusion: a soft mixture of experts over the pixels.

    Puigcerver, Riquelme, Mustafa, Houlsby: "From sparse to soft mixtures of experts" (ICLR 2024).
    The logits are L = tokens slots^T. Dispatch: a slot's input is the tokens, weighted by the
    softmax of L over the tokens. Combine: a token's output is what the experts return for the
    slots, weighted by the softmax of L over the slots. Both are attentions without 1/sqrt(d), so
    the N x E*S logits need not exist as a whole.
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

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        tokens = self.norm(x.flatten(2).mT)  # (B, N, d)
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1).expand(len(x), -1, -1)  # (B, E*S, d)
        slot_in = attend(slots, tokens, tokens)  # dispatch, (B, E*S, d)
        per_expert = slot_in.chunk(len(self.experts), 1)  # E of (B, S, d)
        slot_out = [expert(t) for expert, t in zip(self.experts, per_expert, strict=True)]
        out = attend(tokens, slots, torch.cat(slot_out, 1))  # combine, (B, N, d)
        out = out.mT.unflatten(2, x.shape[2:])  # (B, d, H, W)
        return x + out if self.residual else out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of (B, Nq, d), (B, Nk, d), (B, Nk, d): (B, Nq, d)."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)[:, 0]


class FusionModule(nn.Module):
    """SFEF(concat[CASF(x, y), AFF2(x) + AFF1(y)]) at one scale (AFF numbers as published).

    `size` may leave modules out. Then x + y takes the place of CASF, the spatial part that of AFF,
    and a 1x1 convolution that of SFEF.
    """

    def __init__(self, channels: int, patch: int, size: ModelSize, aff: str):
        super().__init__()
        d, experts = 2 * channels, (size.experts, size.slots, size.sfef_residual)
        self.casf = CASF(channels, patch, size.dim, size.heads) if size.casf else None
        self.aff1 = AFF(channels, size.fft_norm, aff) if size.aff else None
        self.aff2 = AFF(channels, size.fft_norm, aff) if size.aff else None
        self.sfef = SFEF(d, *experts) if size.sfef else nn.Conv2d(d, d, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, 2C, H, W)
        spatial = self.casf(x, y) if self.casf else x + y
        frequency = self.aff2(x) + self.aff1(y) if self.aff1 else spatial
        # Channels last in memory, unlike torch.cat(…, 1): SFEF's tokens need no copy then.
        maps = spatial.movedim(1, 3), frequency.to(spatial.dtype).movedim(1, 3)  # (B, H, W, C)
        return self.sfef(torch.cat(maps, 3).movedim(3, 1))


# --- decoder ---------------------------------------------------------------------------------


class Decoder(nn.Module):
    """From the coarsest fused scale to full size; each step takes in the next finer scale."""

    def __init__(self, channels: tuple[int, ...], tail: int, head: str):
        super().__init__()
        _, c1, c2, c3, c4 = channels
        self.up4 = ConvBlock(2 * c4, c3 // 2, c3, upsample=True)
        self.up3 = ConvBlock(c3 + 2 * c3, c2 // 2, c2, upsample=True)
        self.up2 = ConvBlock(c2 + 2 * c2, c1 // 2, c1, upsample=True)
        self.up1 = ConvBlock(c1 + 2 * c1, tail // 2, tail)
        self.outlayer = nn.Conv2d(tail, HEADS[head], 1)
        nn.init.normal_(self.outlayer.weight, std=0.01)  # gains begin near zero
        nn.init.zeros_(self.outlayer.bias)

    def forward(self, z1: Tensor, z2: Tensor, z3: Tensor, z4: Tensor) -> Tensor:
        """Fused maps (B, 2C, H, W), …, (B, 2C, H/8, W/8) -> (B, HEADS, H, W)."""
        z = self.up4(z4)  # (B, C, H/4, W/4)
        z = self.up3(torch.cat([z, z3], 1))  # (B, C, H/2, W/2)
        z = self.up2(torch.cat([z, z2], 1))  # (B, C, H, W)
        z = self.up1(torch.cat([z, z1], 1))  # (B, tail, H, W)
        return self.outlayer(z)


class ASFEFusion(nn.Module):
    """The whole network: encoder, four fusion modules, decoder.

    `size` is a name of `SIZES` or a `ModelSize`, `aff` a variant of `AFF`. Raises ValueError for
    another name.
    """

    def __init__(self, size: str | ModelSize = "paper", aff: str = "full"):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise ValueError(f"size is {size!r}, expected one of {', '.join(SIZES)}")
        if aff not in ("full", "published"):
            raise ValueError(f"aff is {aff!r}, expected full or published")
        self.size = size = SIZES[size] if isinstance(size, str) else size
        self.encoder = Encoder(size.channels)
        scales = zip(size.channels[1:], size.patch, strict=True)
        self.fusion = nn.ModuleList(FusionModule(c, p, size, aff) for c, p in scales)
        self.decoder = Decoder(size.channels, size.tail, size.head)
        self.multiple = max(2**k * p for k, p in enumerate(size.patch))  # of H and W, in pixels
        self.aff = aff
        self.weights_sha256: str | None = None  # of the file that its values were loaded from
        self.to(memory_format=torch.channels_last)

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        """Fuse two (B, 1, H, W) float images in [0, 1] into (B, 1, H, W), not clipped.

        H and W must be multiples of `self.multiple` (128 for `paper`, 16 for `compact`); `fuse`
        takes any size. Raises ValueError for other shapes.
        """
        if img1.shape != img2.shape or img1.ndim != 4 or img1.shape[1] != 1:
            got = f"{tuple(img1.shape)} and {tuple(img2.shape)}"
            raise ValueError(f"img1 and img2 have shapes {got}, expected (B, 1, H, W) twice")
        if img1.shape[2] % self.multiple or img1.shape[3] % self.multiple:
            raise ValueError(f"images are {sides(img1)}, expected multiples of {self.multiple}")
        # As one batch: so BatchNorm trains on joint statistics of both images, as it uses later.
        scales = self.encoder(torch.cat([img1, img2]))  # four of (2B, C, H, W), x then y
        fused = [m(*scale.chunk(2)) for m, scale in zip(self.fusion, scales, strict=True)]
        return self.head(self.decoder(*fused), img1, img2)

    def head(self, out: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
        """The fused (B, 1, H, W) from the decoder's output, as `ModelSize.head` says."""
        if self.size.head == "image":
            return out
        if self.size.head == "bands":
            parts = bands(torch.cat([img1, img2], 1))  # three of (B, 2, H, W)
            added = (out * torch.cat(parts, 1)).sum(1, keepdim=True)  # six gains for each pixel
            return torch.minimum(blend(img1, img2) + added, img1 + img2)  # black stays black
        gain1, gain2 = out.chunk(2, 1)  # (B, 1, H, W) each
        white = ((img1 - 0.75) / 0.1).clamp(0, 1) * (img1 - 0.03)  # bone, calcium, fresh blood
        return torch.maximum(blend(img1, img2) + gain1 * img1 + gain2 * img2, white)

    @torch.no_grad()
    def fuse(
        self, img1: Tensor | np.ndarray, img2: Tensor | np.ndarray, stretch: bool = False
    ) -> Tensor:
        """Fuse two images of any size from 16 x 16 up, in evaluation mode.

        Args:
            img1, img2: (H, W) or (B, 1, H, W), tensor or array; float in [0, 1] or unsigned
                integers of 8 or 16 bits (divided by 255 or 65535).
            stretch: as the published code, a min-max stretch of each image in place of the clip.

        Returns a float32 tensor of the input's shape, on the model's device, in [0, 1]. Raises
        ValueError for shapes that differ or are too small, values out of range or not finite.
        UserError, which is a ValueError too, for a result that is not finite.
        """
        device = next(self.parameters()).device
        a, b = as_batch("img1", img1, device), as_batch("img2", img2, device)
        if a.shape != b.shape:
            raise ValueError(f"img1 is {sides(a)} and img2 is {sides(b)}, expected equal sizes")
        padded = (pad_to_multiple(t, self.multiple) for t in (a, b))
        modes = {module: module.training for module in self.modules()}
        try:
            out = self.eval()(*padded).float()[..., : a.shape[2], : a.shape[3]]
        finally:  # each module as it was: a trainer may have frozen some
            for module, mode in modes.items():
                module.training = mode
        if not torch.isfinite(out).all():
            raise UserError("the fused image has values that are not finite: damaged weights?")
        if stretch:
            low, high = out.amin((1, 2, 3), keepdim=True), out.amax((1, 2, 3), keepdim=True)
            out = (out - low) / (high - low).clamp(min=torch.finfo(out.dtype).tiny)
        return out.clamp(0, 1) if np.ndim(img1) == 4 else out.clamp(0, 1)[0, 0]


def as_batch(name: str, img: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """What `fuse` takes as (B, 1, H, W) float32 in [0, 1]; ValueError for anything else."""
    t = img if isinstance(img, Tensor) else torch.from_numpy(np.stack([img])[0, ...])  # native
    if not t.is_floating_point() and t.dtype not in WHITE:
        raise ValueError(f"{name} is of {t.dtype}, expected floats, uint8 or uint16")
    if t.ndim not in (2, 4) or (t.ndim == 4 and t.shape[1] != 1):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected (H, W) or (B, 1, H, W)")
    if not len(t) or min(t.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"{name} is {sides(t)}, expected at least {MIN_SIDE}x{MIN_SIDE}")
    t = t.to(device, torch.float32) / WHITE.get(t.dtype, 1)
    if not torch.isfinite(t).all():
        raise ValueError(f"{name} has values that are not finite")
    if t.min() < -1e-3 or t.max() > 1 + 1e-3:  # a luma may round to just over 1
        raise ValueError(f"{name} has values from {t.min():g} to {t.max():g}, expected 0 to 1")
    return t if t.ndim == 4 else t[None, None]


def blend(img1: Tensor, img2: Tensor) -> Tensor:
    """The brighter image's low frequencies, and the details of both that are strong: (B, 1, H, W).

    In each of two bands a detail counts in full where it is as strong as the other image's or as
    STRONG, else by the square of that ratio. Black in both stays black.
    """
    fine, middle, rest = bands(torch.cat([img1, img2], 1))  # (B, 2, H, W) each
    details = strong_details(fine, 5) + strong_details(middle, 9)
    return torch.minimum(rest.amax(1, keepdim=True) + details, img1 + img2)


def bands(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Details of up to about 4 pixels, of up to about 16, and the rest; their sum is the images.

    (B, C, H, W) -> three of (B, C, H, W).
    """
    smooth = low_pass(images, 2)
    smoother = low_pass(smooth, 8)
    return images - smooth, smooth - smoother, smoother


def strong_details(detail: Tensor, window: int) -> Tensor:
    """The details of one band of both images, weaker where the other's are stronger.

    (B, 2, H, W) -> (B, 1, H, W). Strength is the mean absolute detail in a window, in pixels.
    """
    rows = F.avg_pool2d(detail.abs(), (window, 1), 1, (window // 2, 0))
    own = F.avg_pool2d(rows, (1, window), 1, (0, window // 2)) + 1 / 255
    share = (own / own.flip(1).clamp(max=STRONG)).square().clamp(max=1)
    return (share * detail).sum(1, keepdim=True)


def low_pass(img: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) without details that are smaller than about 2 `factor` pixels."""
    coarse = F.avg_pool2d(F.avg_pool2d(img, factor), 3, 1, 1, count_include_pad=False)
    return F.interpolate(coarse, scale_factor=factor, mode="bilinear")


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Mirror (B, C, H, W) at its lower and right edge, again and again, until both sides fit."""
    for axis in (2, 3):
        n = x.shape[axis]
        if n % multiple:
            i = torch.arange(n + -n % multiple, device=x.device) % (2 * n)
            x = x.index_select(axis, torch.minimum(i, 2 * n - 1 - i))
    return x


def sides(t: Tensor) -> str:
    """Height and width of (…, H, W) for a message, as "256x192"."""
    return f"{t.shape[-2]}x{t.shape[-1]}"
