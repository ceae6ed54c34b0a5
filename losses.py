"""Training losses, and the two recipes made of them.

`paper`: Gu et al., BSPC 96 (2024) 106478, with the defects of the published code mended: the SSIM
term is differentiable, and norms are taken per image and divided by its size, so that the loss
depends on neither batch nor patch. `reduction="published"` gives the published values.
`sources`, ours: the brighter source's intensity, the steeper source's gradient, SSIM, how much
information of the sources is left (VIF), what only one source shows, nothing brighter than both
sources, and solid bone.

Legend: B batch, C channels, H W pixels. Images are (B, 1, H, W) in [0, 1]; a loss is a tensor
without axes.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError

NOISE = (1 / 255) ** 2  # variance of one 8-bit level
WHITE = 250 / 255  # from here on, source 1 is bone in CT

# total = sum of weight * term
WEIGHTS = {
    "paper": {"content": 0.5, "gradient": 0.5, "structure": 1.0},
    "sources": {
        "content": 1.0,
        "gradient": 80.0,
        "structure": 2.0,
        "information": 0.1,
        "one_source": 1.2,
        "brightness": 30.0,
        "bone": 20.0,
    },
}


def content_loss(fused: Tensor, img1: Tensor, img2: Tensor, reduction: str = "mean") -> Tensor:
    """Distance to the mean of the sources: root mean square per image, averaged over the batch.

    reduction="published" is the Euclidean norm over all pixels of the batch.
    """
    difference = fused - (img1 + img2) / 2  # (B, 1, H, W)
    if reduction == "published":
        return difference.norm()
    return _rms(difference).mean()


def gradient_loss(fused: Tensor, img1: Tensor, img2: Tensor, reduction: str = "mean") -> Tensor:
    """log(1 + distance of the 2x2 structure tensors), the sources' summed (Di Zenzo 1986).

    The distance is the Frobenius norm per pixel count and image, averaged over the batch;
    reduction="published" takes the norm over the whole batch.
    """
    difference = structure_tensor(fused) - structure_tensor(torch.cat([img1, img2], 1))
    if reduction == "published":
        return torch.log1p(difference.norm())
    return torch.log1p(_rms(difference) * difference.shape[1] ** 0.5).mean()


def structure_tensor(img: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4, H, W): xx, xy, yx, yy from forward differences, summed over C."""
    dx = F.pad(img.diff(dim=-1), (0, 1))  # last column 0
    dy = F.pad(img.diff(dim=-2), (0, 0, 0, 1))  # last row 0
    products = [(a * b).sum(1) for a, b in ((dx, dx), (dx, dy), (dy, dx), (dy, dy))]
    return torch.stack(products, 1)


def structure_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """2 - SSIM(fused, img1) - SSIM(fused, img2)."""
    return 2 - ssim(fused, img1).mean() - ssim(fused, img2).mean()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pair, (B,): gaussian 11x11 of sigma 1.5, zero padding, range 1 (Wang 2004)."""
    maps = torch.stack([a, b, a * a, b * b, a * b]).squeeze(2)  # (5, B, H, W)
    # A banded matrix from either side: one-channel convolutions are many times slower on a CPU.
    maps = gaussian_matrix(a.shape[-2], a) @ maps @ gaussian_matrix(a.shape[-1], a)
    mean_a, mean_b, aa, bb, ab = maps.unbind(0)  # (B, H, W) each
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    covariance = ab - mean_a * mean_b
    variances = (aa - mean_a**2) + (bb - mean_b**2)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2))


def gaussian_matrix(n: int, like: Tensor, radius: int = 5, sigma: float = 1.5) -> Tensor:
    """(n, n): a gaussian of 2 radius + 1 taps at each of n places, cut off at the ends."""
    i = torch.arange(n, dtype=like.dtype, device=like.device)
    distance = i[:, None] - i  # (n, n)
    total = sum(math.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1))
    return torch.exp(-(distance**2) / (2 * sigma**2)) * (distance.abs() <= radius) / total


def information_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """2 - VIF(fused, img1) - VIF(fused, img2); below 0 where contrast exceeds a source's."""
    return 2 - vif(fused, torch.cat([img1, img2], 1)).sum(1).mean()


def vif(fused: Tensor, sources: Tensor) -> Tensor:
    """Visual information fidelity in the pixel domain (Sheikh, Bovik 2006).

    Like the metric VIF: windows of 17, 9, 5 and 3 at four scales, without a border, noise 2 in
    squared 8-bit levels; but variances near zero are damped, so that the gradient is finite.

    Args:
        fused: (B, 1, H, W). From 41 pixels on a side all four scales count, below 17 none: VIF 1.
        sources: (B, C, H, W).

    Returns:
        (B, C).
    """
    noise, tiny = 2 / 255**2, 1e-6
    images = torch.cat([fused, sources], 1)  # (B, 1+C, H, W)
    carried = total = fused.new_zeros(len(fused), sources.shape[1])
    for scale, radius in enumerate((8, 4, 2, 1)):
        if scale:
            images = _blur_inside(images, radius)[..., ::2, ::2]
        if min(images.shape[-2:]) <= 2 * radius:
            break
        f, s = images[:, :1], images[:, 1:]
        moments = _blur_inside(torch.cat([images, images * images, f * s], 1), radius)
        mean_f, mean_s, ff, ss, fs = moments.split([1, s.shape[1], 1, *[s.shape[1]] * 2], 1)
        var_f, var_s = (ff - mean_f**2).clamp(min=0), (ss - mean_s**2).clamp(min=0)
        gain = ((fs - mean_f * mean_s) / (var_s + tiny)).clamp(min=0)
        distortion = (var_f - gain**2 * var_s).clamp(min=0)
        carried = carried + torch.log1p(gain**2 * var_s / (distortion + noise)).sum((2, 3))
        total = total + torch.log1p(var_s / noise).sum((2, 3))
    return (carried + tiny) / (total + tiny)


def _blur_inside(maps: Tensor, radius: int) -> Tensor:
    """Gaussian of 2 radius + 1 taps, sigma a fifth of it, of (…, H, W), without the border."""
    rows, columns = (
        gaussian_matrix(n, maps, radius, (2 * radius + 1) / 5)[radius : n - radius]
        for n in maps.shape[-2:]
    )
    return rows @ maps @ columns.T


def max_content_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """Mean absolute distance to the brighter source at each pixel."""
    return (fused - torch.maximum(img1, img2)).abs().mean()


def max_gradient_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """Mean absolute distance of the gradient to that of the source with the steeper one."""
    g1, g2, g = sobel(img1), sobel(img2), sobel(fused)  # (B, 2, H, W)
    steeper1 = g1.square().sum(1, keepdim=True) >= g2.square().sum(1, keepdim=True)
    return (g - torch.where(steeper1, g1, g2)).abs().mean()


def sobel(img: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 2, H, W): derivatives per pixel in x and y, replicated border."""
    x = F.pad(img, (1, 1, 1, 1), mode="replicate")
    dx = x[..., 2:] - x[..., :-2]  # (B, 1, H+2, W)
    dy = x[..., 2:, :] - x[..., :-2, :]  # (B, 1, H, W+2)
    gx = (dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :]) / 8
    gy = (dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]) / 8
    return torch.cat([gx, gy], 1)


def one_source_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """What the fused image lacks of the contrast that only one source shows; 0 is best.

    The measure of evaluation/one_source.py, made differentiable. In a gaussian window around each
    pixel the fused image is explained as a1 img1 + a2 img2 + constant (least squares). The contrast
    of source s that the other source does not show should come through in full, so a_s should be 1:
    what lacks counts in full, what is too much a fifth.

    Bone (white in img1) is to be solid, so that nothing of img2 is owed there. Values beyond black
    and white count a tenth: a stored image does not show them, but their gradient leads back.
    """
    shown = fused.lerp(fused.clamp(0, 1), 0.9)
    images = torch.cat([img1, img2, shown], 1)  # (B, 3, H, W)
    mean = _window_mean(images)
    first, second = (0, 1, 2, 0, 0, 1), (0, 1, 2, 1, 2, 2)  # whose product with whose
    moments = _window_mean(images[:, first] * images[:, second]) - mean[:, first] * mean[:, second]
    var1, var2, _, cov12, cov1f, cov2f = moments.split(1, 1)  # (B, 1, H, W) each
    var1, var2 = (var.clamp(min=0) + NOISE / 10 for var in (var1, var2))
    det = torch.maximum(var1 * var2 - cov12**2, 0.01 * var1 * var2)
    gain1 = (var2 * cov1f - cov12 * cov2f) / det
    gain2 = (var1 * cov2f - cov12 * cov1f) / det
    alone1, alone2 = var1 - cov12**2 / var2, var2 - cov12**2 / var1  # variance of one source only
    loss = 0
    for gain, alone, owed in ((gain1, alone1, 1), (gain2, alone2, img1 < WHITE)):
        weight = torch.sqrt(alone.clamp(min=0) + 1e-9) * (alone > 4 * NOISE) * owed
        gain = gain.clamp(-3, 3)
        missing = (1 - gain).clamp(min=0) + 0.2 * (gain - 1).clamp(min=0)
        # An image with hardly any such contrast counts little.
        enough = weight.mean((1, 2, 3)).clamp(min=0.005)
        loss = loss + ((weight * missing).mean((1, 2, 3)) / enough).mean()
    return loss


def _window_mean(maps: Tensor) -> Tensor:
    """(B, C, H, W) under a gaussian window of 4 pixels, the border mirrored."""
    rows, columns = (mirrored_gaussian(n, maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


def mirrored_gaussian(n: int, like: Tensor, radius: int = 16, sigma: float = 4.0) -> Tensor:
    """(n, n): a gaussian of 2 radius + 1 taps at each of n places, mirrored at the ends."""
    taps = torch.arange(-radius, radius + 1, device=like.device)
    weights = torch.exp(-(taps.to(like.dtype) ** 2) / (2 * sigma**2))
    place = torch.arange(n, device=like.device)[:, None] + taps  # (n, taps)
    place = place.remainder(2 * n)  # the mirrored line repeats after 2n
    place = torch.minimum(place, 2 * n - 1 - place)
    matrix = like.new_zeros(n, n)
    return matrix.scatter_add_(1, place, (weights / weights.sum()).expand(n, -1))


def brightness_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """Mean of what is brighter than both sources, beyond a fiftieth of the range."""
    return (fused - torch.maximum(img1, img2) - 0.02).clamp(min=0).mean()


def bone_loss(fused: Tensor, img1: Tensor, img2: Tensor) -> Tensor:
    """Mean of what bone (white in img1) lacks of its brightness, beyond a fiftieth of the range."""
    return ((img1 - 0.02 - fused).clamp(min=0) * (img1 >= WHITE)).mean()


def term_weights(recipe: str, changes: Iterable[str] = ()) -> dict[str, float]:
    """The weight of each term of a recipe, after changes like "gradient=60".

    Raises UserError for an unknown recipe or term, a weight that is no number from 0 up, or two
    for one term.
    """
    if recipe not in WEIGHTS:
        raise UserError(f"recipe is {recipe!r}, expected {' or '.join(WEIGHTS)}")
    weights, changed = dict(WEIGHTS[recipe]), set()
    for change in changes:
        name, _, value = change.partition("=")
        if name not in weights or not value.replace(".", "", 1).isdecimal():
            terms = ", ".join(weights)
            raise UserError(f"loss weight {change!r}, expected TERM=NUMBER with one of {terms}")
        if name in changed:
            raise UserError(f"loss weight {change!r}: {name} has one already, expected one a term")
        weights[name] = float(value)
        changed.add(name)
    return weights


def fusion_loss(
    fused: Tensor,
    img1: Tensor,
    img2: Tensor,
    recipe: str = "sources",
    reduction: str = "mean",
    weights: dict[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of a recipe's terms, and the terms by name (unweighted).

    `weights` takes the place of the recipe's own. Raises UserError for an unknown recipe.
    """
    defaults = term_weights(recipe)  # which also refuses an unknown recipe
    if reduction not in ("mean", "published"):
        raise UserError(f"reduction is {reduction!r}, expected mean or published")
    weights = weights or defaults
    images = fused, img1, img2
    if recipe == "paper":
        terms = {
            "content": content_loss(*images, reduction),
            "gradient": gradient_loss(*images, reduction),
            "structure": structure_loss(*images),
        }
    else:
        terms = {
            "content": max_content_loss(*images),
            "gradient": max_gradient_loss(*images),
            "structure": structure_loss(*images),
            "information": information_loss(*images),
            "one_source": one_source_loss(*images),
            "brightness": brightness_loss(*images),
            "bone": bone_loss(*images),
        }
    return sum(weights[name] * term for name, term in terms.items()), terms


def _rms(t: Tensor) -> Tensor:
    """Root of the mean square of each image, (B,); its gradient is finite also at zero."""
    return torch.sqrt(t.square().mean((1, 2, 3)) + 1e-12)
