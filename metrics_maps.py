"""What the metrics of metrics.py share: constants, and the maps of an image and of two images."""

import weakref
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import scipy.fft
from numpy import ndarray

SSIM_SIDE = 11
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
VIF_SIDES = (17, 9, 5, 3)  # of the Gaussian window at each scale, sigma a fifth of it
VIF_NOISE = 2.0
QABF_STRENGTH, QABF_ANGLE = (0.9994, -15.0, 0.5), (0.9879, -22.0, 0.8)  # gain, slope, centre
FMI_CHUNK = 2048  # windows at a time, so that the tables of a chunk stay in the cache
# The 80 bits of x86, for QCB; elsewhere a long double is no wider than float64, or slow.
EXTENDED = np.longdouble if np.finfo(np.longdouble).nmant == 63 else np.float64
TINY = 1e-300  # stands for 0 inside a logarithm; 0 * log2(TINY) is 0


class Moments(NamedTuple):
    """An image with its local mean and variance under a Gaussian window."""

    image: ndarray
    mean: ndarray
    variance: ndarray


class Windows(NamedTuple):
    """All 3x3 windows of an image, one a column, pixels ordered column by column."""

    low: ndarray  # (N,) uint8, the smallest level
    mass: ndarray  # (9, N) uint8, levels less the smallest: the pdf times `total`
    total: ndarray  # (N,)
    position_spread: ndarray  # (N,) variance of the position under the pdf, times total^2
    mass_spread: ndarray  # (N,) variance of the nine masses, times 81
    entropy: ndarray  # (N,) of the pdf, bits


class Luma:
    """An 8-bit luma image and the maps that several metrics ask of it, each worked out once."""

    def __init__(self, image: ndarray, name: str = "image"):
        image = np.asarray(image)
        if image.ndim != 2 or min(image.shape) < 3:
            raise ValueError(f"{name} has shape {image.shape}, expected (H, W) of at least 3x3")
        if not _holds_levels(image):
            raise ValueError(f"{name} holds other values than the expected levels 0, 1, .., 255")
        self.levels = np.ascontiguousarray(image, dtype=np.uint8)
        self.values = self.levels.astype(np.float64)
        self.shape = image.shape
        self._beside: dict[int, Pair] = {}
        self._moments: list[Moments] = []

    def beside(self, other: "Luma") -> "Pair":
        """What metrics share of this image and `other`."""
        if id(other) not in self._beside:
            self._beside[id(other)] = Pair(self, other)
        return self._beside[id(other)]

    @cached_property
    def counts(self) -> ndarray:
        return np.bincount(self.levels.ravel(), minlength=256)

    @cached_property
    def entropy(self) -> float:
        return _entropy(self.counts)

    @cached_property
    def total(self) -> int:
        return int(self.values.sum())

    @cached_property
    def variance(self) -> int:
        """Variance times the squared number of pixels: an exact integer."""
        return _scaled_covariance(self, self)

    @cached_property
    def stretched(self) -> ndarray:
        low, high = self.values.min(), self.values.max()
        if low == high:
            return np.zeros(self.shape)
        return np.floor((self.values - low) / (high - low) * 255 + 0.5)

    @cached_property
    def spectrum(self) -> ndarray:
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
    def saliency(self) -> ndarray:
        """Sum over each 16x16 block of the stretched image's Sobel magnitude to the 5th (QCV)."""
        dx, dy = sobel_gradient(self.stretched.astype(np.uint8), cv2.BORDER_CONSTANT)
        energy = dx * dx + dy * dy
        return block_sums(energy * energy * np.sqrt(energy))

    @cached_property
    def contrast(self) -> ndarray:
        """Masked local contrast of the CSF-filtered stretched image (QCB)."""
        spectrum = scipy.fft.rfft2(self.stretched.astype(EXTENDED)) * _csf_qcb(self.shape)
        filtered = scipy.fft.irfft2(spectrum, self.shape).astype(np.float64)
        fine, coarse = (
            cv2.sepFilter2D(filtered, -1, k, k, borderType=cv2.BORDER_CONSTANT)
            for k in (gaussian(31, 2.0), gaussian(31, 4.0))
        )
        ratio = np.divide(fine, coarse, out=np.ones(self.shape), where=coarse != 0)
        contrast = np.abs(ratio - 1)
        return contrast**3 / (contrast**2 + 1e-4)

    def ssim_moments(self, scale: int) -> Moments:
        """Local moments of SSIM, `scale` times halved by 2x2 means."""
        while len(self._moments) <= scale:
            image = _halved(self._moments[-1].image) if self._moments else self.values
            self._moments.append(_moments(image, gaussian(SSIM_SIDE, 1.5)))
        return self._moments[scale]

    @cached_property
    def vif_moments(self) -> list[Moments]:
        """Local moments at the scales of VIF that have a window in them."""
        # Variances know no level; without it a constant image has none, not a rounding error.
        image, scales = self.values - self.values.min(), []
        for side in VIF_SIDES:
            kernel = gaussian(side, side / 5)
            if scales:
                image = _blur_inside(image, kernel)[::2, ::2]
            if min(image.shape) < side:
                break
            scales.append(_moments(image, kernel))
        return scales

    @cached_property
    def windows(self) -> Windows:
        h, w = self.shape
        view = [self.levels[y : h - 2 + y, x : w - 2 + x] for x in range(3) for y in range(3)]
        levels = np.stack(view).reshape(9, -1)
        low = levels.min(axis=0)
        mass = levels - low
        wide, position = mass.astype(np.int32), np.arange(9, dtype=np.int32)
        total = np.einsum("kn->n", wide)
        first = np.einsum("k,kn->n", position, wide)
        second = np.einsum("k,kn->n", position * position, wide)
        n = np.maximum(total, 1)
        return Windows(
            low,
            mass,
            total,
            total * second - first * first,
            9 * np.einsum("kn,kn->n", wide, wide) - total * total,
            np.log2(n) - cv2.LUT(mass, _level_entropy()).sum(axis=0) / n,
        )


class Pair:
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
    def squared_error(self) -> float:
        return float(np.mean((self.image.values - self.reference.values) ** 2))

    def similarity(self, scale: int = 0) -> tuple[float, float]:
        """Means of SSIM and of its contrast-structure factor, `scale` times halved."""
        if scale not in self._similarity:
            x, y = self.image.ssim_moments(scale), self.reference.ssim_moments(scale)
            covariance = _covariance(x, y, gaussian(SSIM_SIDE, 1.5))
            structure = (2 * covariance + C2) / (x.variance + y.variance + C2)
            product, squares = x.mean * y.mean, x.mean * x.mean + y.mean * y.mean
            ssim_map = (2 * product + C1) / (squares + C1) * structure
            self._similarity[scale] = float(ssim_map.mean()), float(structure.mean())
        return self._similarity[scale]

    @cached_property
    def fidelity(self) -> list[tuple[ndarray, ndarray, ndarray]]:
        """The gain, distortion variance and source variance of VIF at each scale."""
        return [
            _fidelity(x, y, _covariance(x, y, gaussian(side, side / 5)))
            for side, x, y in zip(
                VIF_SIDES, self.image.vif_moments, self.reference.vif_moments, strict=False
            )
        ]


def _holds_levels(image: ndarray) -> bool:
    if image.dtype == np.uint8:
        return True
    if image.dtype.kind not in "iuf":
        return False
    return bool(((image >= 0) & (image <= 255) & (image == np.floor(image))).all())


def _scaled_covariance(x: Luma, y: Luma) -> int:
    product = int(np.einsum("ij,ij->", x.values, y.values))  # not BLAS, whose threads cost more
    return x.values.size * product - x.total * y.total


def _entropy(counts: ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return 0.0 - float((p * np.log2(p)).sum())


@lru_cache
def _level_entropy() -> ndarray:
    """d * log2(d) for d = 0..255."""
    d = np.arange(256.0)
    return d * np.log2(np.maximum(d, 1))


@lru_cache
def gaussian(side: int, sigma: float) -> ndarray:
    x = np.arange(side) - side // 2
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def _blur_inside(image: ndarray, kernel: ndarray) -> ndarray:
    """Separable filter, only the places where the whole window lies inside the image."""
    r = len(kernel) // 2
    blurred = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    return blurred[r : image.shape[0] - r, r : image.shape[1] - r]


def _moments(image: ndarray, kernel: ndarray) -> Moments:
    mean = _blur_inside(image, kernel)
    return Moments(image, mean, _blur_inside(image * image, kernel) - mean * mean)


def _covariance(x: Moments, y: Moments, kernel: ndarray) -> ndarray:
    return _blur_inside(x.image * y.image, kernel) - x.mean * y.mean


def _halved(image: ndarray) -> ndarray:
    h, w = image.shape
    if h % 2 or w % 2:  # as pytorch-msssim does: a line of zeros before an odd side
        image = np.pad(image, ((h % 2, 0), (w % 2, 0)))
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def sobel_gradient(image: ndarray, border: int) -> tuple[ndarray, ndarray]:
    """Correlation with [-1 0 1; -2 0 2; -1 0 1] and its transpose."""
    return tuple(cv2.Sobel(image, cv2.CV_64F, *d, borderType=border) for d in ((1, 0), (0, 1)))


def block_sums(image: ndarray, side: int = 16) -> ndarray:
    h, w = image.shape
    image = np.pad(image, ((0, -h % side), (0, -w % side)))
    return image.reshape(-1, side, image.shape[1] // side, side).sum(axis=(1, 3))


def _frequency(shape: tuple[int, int], divisor: int, kind: type) -> ndarray:
    """Radial frequency of `rfft2`, 1 at the Nyquist frequency of a side of `divisor` pixels."""
    h, w = shape
    u, v = (2 * x.astype(kind) for x in (scipy.fft.rfftfreq(w), scipy.fft.fftfreq(h)))
    return np.hypot(w * u / divisor, (h * v / divisor)[:, None])


@lru_cache(maxsize=8)
def _csf_qcb(shape: tuple[int, int]) -> ndarray:
    r = _frequency(shape, 30, EXTENDED)
    return np.exp(-((r / 15.3870) ** 2)) - 0.7622 * np.exp(-((r / 1.3456) ** 2))


@lru_cache(maxsize=8)
def csf_qcv(shape: tuple[int, int]) -> ndarray:
    r = 0.144 * _frequency(shape, 8, np.float64)
    return 2.6 * (0.0192 + r) * np.exp(-(r**1.1))


def _fidelity(
    image: Moments, source: Moments, covariance: ndarray
) -> tuple[ndarray, ndarray, ndarray]:
    busy, seen = source.variance >= 1e-10, image.variance >= 1e-10
    gain = np.where(busy & seen, covariance / (source.variance + 1e-10), 0)
    np.maximum(gain, 0, out=gain)
    distortion = np.where(seen, image.variance - gain * covariance, 0)
    return gain, np.maximum(distortion, 1e-10), np.where(busy, source.variance, 0)


def window_information(f: Windows, s: Windows) -> float:
    """Mean over the windows of 2 I/(H_F + H_S)."""
    equal = (f.mass == s.mass).all(axis=0) & (f.low == s.low)
    flat = (f.total == 0) & (s.total == 0)
    # Elsewhere one pdf is flat or a single peak: the two are independent, and I is 0.
    chosen = np.flatnonzero((f.position_spread > 0) & (s.position_spread > 0) & ~equal)
    total = float(np.count_nonzero(equal | flat))
    for k in range(0, len(chosen), FMI_CHUNK):
        index = chosen[k : k + FMI_CHUNK]
        total += _normalised_information(
            Windows(*(x[..., index] for x in f)), Windows(*(x[..., index] for x in s))
        )
    return total / equal.size


def _normalised_information(f: Windows, s: Windows) -> float:
    """Sum of 2 I/(H_F + H_S) over windows with two or more positions each."""
    mass_f, mass_s = f.mass.astype(np.float64), s.mass.astype(np.float64)
    correlation = 9 * np.einsum("kn,kn->n", mass_f, mass_s) - f.total * s.total
    # Coupling of least correlation: the one of greatest correlation with one window reversed.
    mass_s = np.where(correlation < 0, mass_s[::-1], mass_s)
    p_f, p_s = mass_f / f.total, mass_s / s.total
    cdf_f, cdf_s = _cumulated(mass_f) / f.total, _cumulated(mass_s) / s.total
    covariance = -cdf_f.sum(axis=0) * cdf_s.sum(axis=0)
    for row in cdf_f:
        covariance += np.minimum(row, cdf_s).sum(axis=0)
    spread = np.sqrt(f.position_spread / s.mass_spread * (s.position_spread / f.mass_spread))
    phi = np.abs(correlation) * spread / (f.total * s.total * covariance)

    # The coupling lives on a staircase of 17 cells; elsewhere the joint pdf is the product alone.
    mass, product = _staircase(p_f, p_s, cdf_f, cdf_s)
    product *= 1 - phi
    joint = phi * mass + product
    entropies = f.entropy + s.entropy
    off_stairs = _plogp(1 - phi) - (1 - phi) * entropies - _plogp(product).sum(axis=0)
    information = entropies + off_stairs + _plogp(joint).sum(axis=0)
    return float((2 * information / entropies).sum())


def _cumulated(mass: ndarray) -> ndarray:
    cumulated = mass[:-1].copy()
    for k in range(1, len(cumulated)):
        cumulated[k] += cumulated[k - 1]
    return cumulated


def _staircase(
    p_f: ndarray, p_s: ndarray, cdf_f: ndarray, cdf_s: ndarray
) -> tuple[ndarray, ndarray]:
    """Mass of the coupling of greatest correlation, and p_f·p_s, on the 17 cells of its path."""
    n = p_f.shape[1]
    beyond = np.full((1, n), 2.0)
    cdf_f, cdf_s = np.vstack([cdf_f, beyond]).ravel(), np.vstack([cdf_s, beyond]).ravel()
    p_f, p_s = p_f.ravel(), p_s.ravel()
    at_f, at_s = np.arange(n), np.arange(n)
    edges, product = np.zeros((18, n)), np.empty((17, n))
    for k in range(17):
        end_f, end_s = cdf_f.take(at_f, mode="clip"), cdf_s.take(at_s, mode="clip")
        np.multiply(p_f.take(at_f, mode="clip"), p_s.take(at_s, mode="clip"), out=product[k])
        np.minimum(end_f, end_s, out=edges[k + 1])
        step_f = end_f <= end_s
        at_f += step_f * n
        at_s += ~step_f * n
    edges[17] = 1
    return np.diff(edges, axis=0), product


def _plogp(x: ndarray) -> ndarray:
    logs = np.abs(x)
    np.maximum(logs, TINY, out=logs)
    np.log2(logs, out=logs)
    logs *= x
    return logs


def known(names: Iterable[str], table: dict) -> list[str]:
    """The names, all of which `table` has."""
    names = list(names)
    for name in names:
        if name not in table:
            raise ValueError(f"unknown metric {name!r}, expected some of {', '.join(table)}")
    return names
