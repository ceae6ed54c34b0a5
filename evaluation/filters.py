"""The filters behind the maps: in space by windows, in frequency by contrast sensitivity (CSF).

Legend: H W pixels. Images are (H, W), float64 unless said otherwise.
"""

from functools import lru_cache

import cv2
import numpy as np
import scipy.fft
from numpy import ndarray

# The 80 bits of x86, for QCB; elsewhere a long double is no wider than float64, or slow.
EXTENDED = np.longdouble if np.finfo(np.longdouble).nmant == 63 else np.float64


# --- space -----------------------------------------------------------------------------------


@lru_cache
def gaussian(side: int, sigma: float) -> ndarray:
    """(side,) weights of sum 1."""
    x = np.arange(side) - side // 2
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def blur(image: ndarray, side: int, sigma: float, border: int) -> ndarray:
    """Gaussian window of `side` pixels, (H, W) -> (H, W); `border` is one of OpenCV's."""
    kernel = gaussian(side, sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=border)


def blur_inside(image: ndarray, side: int, sigma: float) -> ndarray:
    """The same, only where the whole window lies inside the image."""
    r = side // 2
    blurred = blur(image, side, sigma, cv2.BORDER_REPLICATE)
    return blurred[r : image.shape[0] - r, r : image.shape[1] - r]


def halved(image: ndarray) -> ndarray:
    """Means of 2x2 pixels, (H, W) -> (H/2, W/2), rounded up."""
    h, w = image.shape
    if h % 2 or w % 2:  # as pytorch-msssim does: a line of zeros before an odd side
        image = np.pad(image, ((h % 2, 0), (w % 2, 0)))
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def sobel_gradient(image: ndarray, border: int) -> tuple[ndarray, ndarray]:
    """Correlation with [-1 0 1; -2 0 2; -1 0 1] and its transpose; `border` is one of OpenCV's."""
    return tuple(cv2.Sobel(image, cv2.CV_64F, *d, borderType=border) for d in ((1, 0), (0, 1)))


def block_sums(image: ndarray, side: int = 16) -> ndarray:
    """Sum over each block, (H, W) -> (H/side, W/side), rounded up; zeros fill the last blocks."""
    h, w = image.shape
    image = np.pad(image, ((0, -h % side), (0, -w % side)))
    return image.reshape(-1, side, image.shape[1] // side, side).sum(axis=(1, 3))


# --- frequency -------------------------------------------------------------------------------


def _frequency(shape: tuple[int, int], divisor: int, kind: type) -> ndarray:
    """Radial frequency of `rfft2`, 1 at the Nyquist frequency of a side of `divisor` pixels."""
    h, w = shape
    u, v = (2 * x.astype(kind) for x in (scipy.fft.rfftfreq(w), scipy.fft.fftfreq(h)))
    return np.hypot(w * u / divisor, (h * v / divisor)[:, None])


@lru_cache(maxsize=8)
def csf_qcb(shape: tuple[int, int]) -> ndarray:
    """Contrast sensitivity (H, W/2+1) of an image's `rfft2`, in extended precision (QCB)."""
    r = _frequency(shape, 30, EXTENDED)
    return np.exp(-((r / 15.3870) ** 2)) - 0.7622 * np.exp(-((r / 1.3456) ** 2))


@lru_cache(maxsize=8)
def csf_qcv(shape: tuple[int, int]) -> ndarray:
    """Contrast sensitivity (H, W/2+1) of an image's `rfft2` (QCV)."""
    r = 0.144 * _frequency(shape, 8, np.float64)
    return 2.6 * (0.0192 + r) * np.exp(-(r**1.1))
