"""What the metrics of metrics.py share: their constants, and the maps of an image and of a pair.

A map is worked out when a metric first asks for it, and kept for the others.

Legend: F fused image, S source, H W pixels. A grey level is a whole number in 0..255. Maps are
(H, W) float64 unless said otherwise.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import scipy.fft
from numpy import ndarray

from cli import UserError
from evaluation.filters import (
    EXTENDED,
    block_sums,
    blur,
    blur_inside,
    csf_qcb,
    csf_qcv,
    halved,
    sobel_gradient,
)
from evaluation.windows import Windows, local_windows

SMALLEST_SIDE = 3  # pixels, of any image that a metric takes
SSIM_SIDE, SSIM_SIGMA = 11, 1.5  # pixels, of the Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
VIF_SIDES = (17, 9, 5, 3)  # of the Gaussian window at each scale, sigma a fifth of it
VIF_NOISE = 2.0
QABF_STRENGTH, QABF_ANGLE = (0.9994, -15.0, 0.5), (0.9879, -22.0, 0.8)  # gain, slope, centre

T = TypeVar("T")


class Metric(NamedTuple):
    """A metric: `function(fused, source1, source2)`, its better direction and what it needs."""

    function: Callable[..., float]
    higher_is_better: bool
    min_side: int = SMALLEST_SIDE  # smallest image side, in pixels

    @property
    def arrow(self) -> str:
        """Which values are better: up for larger ones, down for smaller ones."""
        return "↑" if self.higher_is_better else "↓"


class Moments(NamedTuple):
    """An image with its local mean and variance under a Gaussian window."""

    image: ndarray
    mean: ndarray
    variance: ndarray


# --- one image -------------------------------------------------------------------------------


class Luma:
    """An 8-bit luma image (H, W) and the maps that several metrics ask of it.

    Raises ValueError if the image is no (H, W) of 3x3 or more, or holds other than grey levels.
    `name` is what the message calls the image.
    """

    def __init__(self, image: ndarray, name: str = "image"):
        image = np.asarray(image)
        if image.ndim != 2 or min(image.shape) < SMALLEST_SIDE:
            raise ValueError(f"{name} has shape {image.shape}, expected (H, W) of at least 3x3")
        if not _holds_grey_levels(image):
            raise ValueError(f"{name} holds other values than the expected levels 0, 1, .., 255")
        self.levels = np.ascontiguousarray(image, dtype=np.uint8)
        self.values = self.levels.astype(np.float64)
        self.shape = image.shape
        self._pairs: dict[int, LumaPair] = {}
        self._ssim_moments: list[Moments] = []

    def paired_with(self, other: "Luma") -> "LumaPair":
        """What metrics share of this image and `other`."""
        if id(other) not in self._pairs:
            self._pairs[id(other)] = LumaPair(self, other)
        return self._pairs[id(other)]

    @cached_property
    def counts(self) -> ndarray:
        """(256,) pixels of each grey level."""
        return np.bincount(self.levels.ravel(), minlength=256)

    @cached_property
    def entropy(self) -> float:
        """Bits, 0..8."""
        return _entropy(self.counts)

    @cached_property
    def level_sum(self) -> int:
        """Sum of the grey levels of all pixels."""
        return int(self.values.sum())

    @cached_property
    def variance(self) -> int:
        """Variance times the squared number of pixels: an exact integer."""
        return _scaled_covariance(self, self)

    @cached_property
    def stretched(self) -> ndarray:
        """Grey levels stretched to 0..255; all 0 for a constant image."""
        low, high = self.values.min(), self.values.max()
        if low == high:
            return np.zeros(self.shape)
        return np.floor((self.values - low) / (high - low) * 255 + 0.5)

    @cached_property
    def spectrum(self) -> ndarray:
        """(H, W/2+1) complex, of the stretched image."""
        return scipy.fft.rfft2(self.stretched)

    @cached_property
    def sobel(self) -> tuple[ndarray, ndarray]:
        """Magnitude and angle of the zero-padded Sobel gradient (the one of Qabf)."""
        dx, dy = sobel_gradient(self.levels, cv2.BORDER_CONSTANT)
        angle = np.arctan(np.divide(dy, -dx, out=np.full(self.shape, np.inf), where=dx != 0))
        return np.sqrt(dx * dx + dy * dy), angle

    @cached_property
    def sobel_reflected(self) -> tuple[ndarray, ndarray]:
        """Magnitude and angle of the Sobel gradient over 8, reflected border (the one of Nabf)."""
        dx, dy = (d / 8 for d in sobel_gradient(self.levels, cv2.BORDER_REFLECT_101))
        ratio = np.divide(dx, dy, out=np.copysign(np.inf, dx), where=dy != 0)
        ratio[(dx == 0) & (dy == 0)] = 0
        return np.sqrt(dx * dx + dy * dy), np.arctan(ratio)

    @cached_property
    def sobel_replicated(self) -> ndarray:
        """Magnitude of the Sobel gradient, replicated border (the one of EI)."""
        dx, dy = sobel_gradient(self.levels, cv2.BORDER_REPLICATE)
        return np.sqrt(dx * dx + dy * dy)

    @cached_property
    def saliency(self) -> ndarray:
        """Sum over each 16x16 block of the stretched image's Sobel magnitude to the 5th (QCV)."""
        dx, dy = sobel_gradient(self.stretched.astype(np.uint8), cv2.BORDER_CONSTANT)
        energy = dx * dx + dy * dy
        return block_sums(energy * energy * np.sqrt(energy))

    @cached_property
    def contrast(self) -> ndarray:
        """Masked local contrast of the CSF-filtered stretched image (QCB)."""
        spectrum = scipy.fft.rfft2(self.stretched.astype(EXTENDED)) * csf_qcb(self.shape)
        filtered = scipy.fft.irfft2(spectrum, self.shape).astype(np.float64)
        fine, coarse = (blur(filtered, 31, sigma, cv2.BORDER_CONSTANT) for sigma in (2.0, 4.0))
        ratio = np.divide(fine, coarse, out=np.ones(self.shape), where=coarse != 0)
        contrast = np.abs(ratio - 1)
        return contrast**3 / (contrast**2 + 1e-4)

    def ssim_moments(self, scale: int) -> Moments:
        """Local moments of SSIM, the image `scale` times halved by 2x2 means."""
        while len(self._ssim_moments) <= scale:
            image = halved(self._ssim_moments[-1].image) if self._ssim_moments else self.values
            self._ssim_moments.append(_moments(image, SSIM_SIDE, SSIM_SIGMA))
        return self._ssim_moments[scale]

    @cached_property
    def vif_moments(self) -> list[Moments]:
        """Local moments at the scales of VIF that are large enough for their window."""
        # A variance does not depend on the smallest value. Without it a constant image has a
        # variance of exactly 0, not of a rounding error.
        image, scales = self.values - self.values.min(), []
        for side in VIF_SIDES:
            if scales:
                image = blur_inside(image, side, side / 5)[::2, ::2]
            if min(image.shape) < side:
                break
            scales.append(_moments(image, side, side / 5))
        return scales

    @cached_property
    def windows(self) -> Windows:
        """All 3x3 windows (FMI)."""
        return local_windows(self.levels)


# --- two images ------------------------------------------------------------------------------


class LumaPair:
    """What metrics share of a fused image and a source, or of the two sources."""

    def __init__(self, image: Luma, reference: Luma):
        # The image owns the pair: a strong reference back would leave both to the cycle collector.
        self.image, self.reference = weakref.proxy(image), reference
        self._similarity: dict[int, tuple[float, float]] = {}

    @cached_property
    def information(self) -> float:
        """Mutual information in bits, from the 256x256 joint histogram."""
        joint = np.bincount(
            self.reference.levels.ravel() * np.intp(256) + self.image.levels.ravel(),
            minlength=65536,
        )
        return self.image.entropy + self.reference.entropy - _entropy(joint)

    @cached_property
    def covariance(self) -> int:
        """Covariance times the squared number of pixels: an exact integer."""
        return _scaled_covariance(self.image, self.reference)

    @cached_property
    def correlation(self) -> float:
        """Pearson's r, -1..1; 0 if either is constant."""
        return pearson(self.covariance, self.image.variance, self.reference.variance)

    @cached_property
    def squared_error(self) -> float:
        """Mean squared error, in squared grey levels."""
        return float(np.mean((self.image.values - self.reference.values) ** 2))

    def similarity(self, scale: int = 0) -> tuple[float, float]:
        """Means of SSIM and of its contrast-structure factor, `scale` times halved."""
        if scale not in self._similarity:
            x, y = self.image.ssim_moments(scale), self.reference.ssim_moments(scale)
            covariance = _covariance(x, y, SSIM_SIDE, SSIM_SIGMA)
            structure = (2 * covariance + C2) / (x.variance + y.variance + C2)
            product, squares = x.mean * y.mean, x.mean * x.mean + y.mean * y.mean
            ssim_map = (2 * product + C1) / (squares + C1) * structure
            self._similarity[scale] = float(ssim_map.mean()), float(structure.mean())
        return self._similarity[scale]

    @cached_property
    def fidelity(self) -> list[tuple[ndarray, ndarray, ndarray]]:
        """The gain, distortion variance and source variance of VIF at each scale."""
        return [
            _fidelity(x, y, _covariance(x, y, side, side / 5))
            for side, x, y in zip(
                VIF_SIDES, self.image.vif_moments, self.reference.vif_moments, strict=False
            )
        ]

    @cached_property
    def filtered_error(self) -> ndarray:
        """Sum over each 16x16 block of the squared CSF-filtered difference (QCV)."""
        shape = self.image.shape
        spectrum = (self.reference.spectrum - self.image.spectrum) * csf_qcv(shape)
        difference = scipy.fft.irfft2(spectrum, shape)
        return block_sums(difference * difference)


# --- any metric ------------------------------------------------------------------------------


def luma_triple(
    fused: ndarray | Luma,
    source1: ndarray | Luma,
    source2: ndarray | Luma,
    min_side: int = SMALLEST_SIDE,
) -> tuple[Luma, Luma, Luma]:
    """The three images of a metric as `Luma`.

    Raises ValueError if one is no image of grey levels, is too small or of another size.
    """
    named = {"fused": fused, "source1": source1, "source2": source2}
    lumas = [x if isinstance(x, Luma) else Luma(x, name) for name, x in named.items()]
    for x, name in zip(lumas, named, strict=True):
        if x.shape != lumas[0].shape:
            raise ValueError(f"{name} has shape {x.shape}, expected {lumas[0].shape} as fused")
    if min(lumas[0].shape) < min_side:
        raise ValueError(
            f"images have shape {lumas[0].shape}, expected sides of {min_side} or more"
        )
    return tuple(lumas)


def measure(
    metrics: dict[str, Metric], fused: Luma, source1: Luma, source2: Luma
) -> dict[str, float]:
    """The value of each metric by its name; one that needs a larger image is left out."""
    side = min(fused.shape)
    fitting = {name: metric for name, metric in metrics.items() if side >= metric.min_side}
    return {name: metric.function(fused, source1, source2) for name, metric in fitting.items()}


def check_names(names: Iterable[str], table: dict[str, T]) -> dict[str, T]:
    """The entries of a table that have these names; UserError if there is none of a name."""
    selected = {}
    for name in names:
        if name not in table:
            raise UserError(f"unknown metric {name!r}, expected some of {', '.join(table)}")
        selected[name] = table[name]
    return selected


def pearson(covariance: float, variance1: float, variance2: float) -> float:
    """Pearson's r; 0 without variance."""
    product = variance1 * variance2
    return covariance / math.sqrt(product) if product > 0 else 0.0


def sigmoid(x: ndarray, gain: float, slope: float, centre: float) -> ndarray:
    """gain / (1 + exp(slope (x - centre))), of the shape of x."""
    return gain / (1 + np.exp(slope * (x - centre)))


def vif_information(
    gain: ndarray, distortion: ndarray, variance: ndarray, noise: float
) -> tuple[ndarray, ndarray]:
    """Information about the source at each pixel: what F carries, and what S itself has."""
    carried = np.log10(1 + gain * gain * variance / (distortion + noise))
    return carried, np.log10(1 + variance / noise)


# --- helpers ---------------------------------------------------------------------------------


def _holds_grey_levels(image: ndarray) -> bool:
    if image.dtype == np.uint8:
        return True
    if image.dtype.kind not in "iuf":
        return False
    return bool(((image >= 0) & (image <= 255) & (image == np.floor(image))).all())


def _scaled_covariance(x: Luma, y: Luma) -> int:
    product = int(np.einsum("ij,ij->", x.values, y.values))  # not BLAS, whose threads cost more
    return x.values.size * product - x.level_sum * y.level_sum


def _entropy(counts: ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return 0.0 - float((p * np.log2(p)).sum())


def _moments(image: ndarray, side: int, sigma: float) -> Moments:
    mean = blur_inside(image, side, sigma)
    return Moments(image, mean, blur_inside(image * image, side, sigma) - mean * mean)


def _covariance(x: Moments, y: Moments, side: int, sigma: float) -> ndarray:
    return blur_inside(x.image * y.image, side, sigma) - x.mean * y.mean


def _fidelity(
    image: Moments, source: Moments, covariance: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    source_varies, image_varies = source.variance >= 1e-10, image.variance >= 1e-10
    gain = np.where(source_varies & image_varies, covariance / (source.variance + 1e-10), 0)
    np.maximum(gain, 0, out=gain)
    distortion = np.where(image_varies, image.variance - gain * covariance, 0)
    return gain, np.maximum(distortion, 1e-10), np.where(source_varies, source.variance, 0)
