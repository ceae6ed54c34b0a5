"""Metrics of metrics.py on batches of tensors, on their own device: for validation in training.

Legend: B batch, H W pixels, F fused image, S source. Images are (B, 1, H, W) of grey levels, whole
numbers in 0..255 as floats. A metric makes (B,) of them.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from evaluation.filters import gaussian
from evaluation.maps import (
    C1,
    C2,
    QABF_ANGLE,
    QABF_STRENGTH,
    SSIM_SIDE,
    VIF_NOISE,
    VIF_SIDES,
    check_names,
)


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = (t - t.mean(dim=(2, 3), keepdim=True) for t in (x, y))
    product = (x * x).sum(dim=(1, 2, 3)) * (y * y).sum(dim=(1, 2, 3))
    return (x * y).sum(dim=(1, 2, 3)) / torch.where(product > 0, product, 1).sqrt()


def _entropy(codes: Tensor, bins: int) -> Tensor:
    n = len(codes)
    offset = torch.arange(n, device=codes.device).view(-1, 1, 1, 1) * bins
    counts = torch.bincount((codes.long() + offset).flatten(), minlength=n * bins)
    p = counts.view(n, bins).to(codes.dtype) / codes[0].numel()
    return -torch.special.xlogy(p, p).sum(dim=1) / math.log(2)


def _information(f: Tensor, s: Tensor) -> Tensor:
    return _entropy(f, 256) + _entropy(s, 256) - _entropy(256 * s + f, 65536)


def _blur(x: Tensor, side: int, sigma: float) -> Tensor:
    for dim in (2, 3):  # shifted sums: conv2d is many times slower in float64 on the CPU
        length = x.shape[dim] - side + 1
        shifts = (x.narrow(dim, k, length) for k in range(side))
        blurred = torch.zeros_like(x.narrow(dim, 0, length))
        for weight, shifted in zip(gaussian(side, sigma).tolist(), shifts, strict=True):
            blurred.add_(shifted, alpha=weight)
        x = blurred
    return x


def _moments(x: Tensor, y: Tensor, side: int, sigma: float) -> tuple[Tensor, ...]:
    """Local means, variances and covariance of two images."""
    mx, my, xx, yy, xy = (_blur(m, side, sigma) for m in (x, y, x * x, y * y, x * y))
    return mx, my, xx - mx * mx, yy - my * my, xy - mx * my


def _ssim(f: Tensor, s: Tensor) -> Tensor:
    mf, ms, vf, vs, cov = _moments(f, s, SSIM_SIDE, 1.5)
    luminance = (2 * mf * ms + C1) / (mf * mf + ms * ms + C1)
    return (luminance * (2 * cov + C2) / (vf + vs + C2)).mean(dim=(1, 2, 3))


def _vif(f: Tensor, s: Tensor) -> Tensor:
    f, s = (x - x.amin(dim=(2, 3), keepdim=True) for x in (f, s))
    carried = total = f.new_zeros(len(f))
    for k, side in enumerate(VIF_SIDES):
        if k:
            f, s = (_blur(x, side, side / 5)[..., ::2, ::2] for x in (f, s))
        if min(f.shape[2:]) < side:
            break
        _, _, vf, vs, cov = _moments(f, s, side, side / 5)
        gain = torch.where((vs >= 1e-10) & (vf >= 1e-10), cov / (vs + 1e-10), 0).clamp_min(0)
        distortion = torch.where(vf >= 1e-10, vf - gain * cov, 0).clamp_min(1e-10)
        vs = torch.where(vs >= 1e-10, vs, 0)
        ratio = gain * gain * vs / (distortion + VIF_NOISE)
        carried = carried + torch.log10(1 + ratio).sum(dim=(1, 2, 3))
        total = total + torch.log10(1 + vs / VIF_NOISE).sum(dim=(1, 2, 3))
    return torch.where(total > 0, carried / torch.where(total > 0, total, 1), 1.0)


def _sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and angle of the zero-padded Sobel gradient."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(x)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    dx, dy = nn.functional.conv2d(x, kernels, padding=1).split(1, dim=1)
    angle = torch.where(dx != 0, torch.atan(dy / torch.where(dx != 0, -dx, 1)), math.pi / 2)
    return (dx * dx + dy * dy).sqrt(), angle


def _qabf(f: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    (gf, af), preserved, total = _sobel(f), 0, 0
    for gs, angle in (_sobel(s1), _sobel(s2)):
        low, high = torch.minimum(gf, gs), torch.maximum(gf, gs)
        strength = torch.where(low == high, gf, low / torch.where(high > 0, high, 1))
        quality = 1.0
        for x, (gain, slope, centre) in (
            (strength, QABF_STRENGTH),
            (1 - (angle - af).abs() / (math.pi / 2), QABF_ANGLE),
        ):
            quality = quality * gain * torch.sigmoid(-slope * (x - centre))
        preserved = preserved + (quality * gs).sum(dim=(1, 2, 3))
        total = total + gs.sum(dim=(1, 2, 3))
    return preserved / torch.where(total > 0, total, 1)


def _sf(f: Tensor) -> Tensor:
    squares = (f.diff(dim=d).square().mean(dim=(1, 2, 3)) for d in (2, 3))
    return sum(squares).sqrt()


def _ag(f: Tensor) -> Tensor:
    gy, gx = torch.gradient(f, dim=(2, 3))
    total = ((gx * gx + gy * gy) / 2).sqrt().sum(dim=(1, 2, 3))
    return total / ((f.shape[2] - 1) * (f.shape[3] - 1))


def _psnr(f: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
    mse = sum((f - s).square().mean(dim=(1, 2, 3)) for s in (s1, s2)) / 2
    return 10 * torch.log10(255**2 / mse)


BATCH_METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "EN": lambda f, s1, s2: _entropy(f, 256),
    "SD": lambda f, s1, s2: f.std(dim=(1, 2, 3), correction=0),
    "SF": lambda f, s1, s2: _sf(f),
    "AG": lambda f, s1, s2: _ag(f),
    "MI": lambda f, s1, s2: _information(f, s1) + _information(f, s2),
    "CC": lambda f, s1, s2: (_pearson(f, s1) + _pearson(f, s2)) / 2,
    "SCD": lambda f, s1, s2: _pearson(f - s2, s1) + _pearson(f - s1, s2),
    "PSNR": _psnr,
    "SSIM": lambda f, s1, s2: (_ssim(f, s1) + _ssim(f, s2)) / 2,
    "VIF": lambda f, s1, s2: _vif(f, s1) + _vif(f, s2),
    "Qabf": _qabf,
}


@torch.no_grad()
def evaluate_batch(
    fused: Tensor, img1: Tensor, img2: Tensor, names: Iterable[str] = tuple(BATCH_METRICS)
) -> dict[str, Tensor]:
    """The named metrics of a batch on its own device: (B, 1, H, W) in [0, 1] to one (B,) each.

    Images are rounded to the 8 bits that a stored file would have, then as in metrics.evaluate.

    Raises:
        ValueError: a tensor has another shape; as UserError, a name is not in BATCH_METRICS.
    """
    named = {"fused": fused, "img1": img1, "img2": img2}
    batch = [_grey_levels(x, fused.shape, name) for name, x in named.items()]
    selected = check_names(names, BATCH_METRICS)
    return {name: metric(*batch) for name, metric in selected.items()}


def _grey_levels(x: Tensor, shape: torch.Size, name: str) -> Tensor:
    if x.ndim != 4 or x.shape[1] != 1 or x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, 1, H, W) as fused")
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # MPS knows no float64
    return (x.to(dtype).clamp(0, 1) * 255).round()
