"""Fusions that nobody has to train; every method is compared with them.

Maximum, mean, the mean stretched to twice its contrast, the two copies of a source, and a Laplacian
pyramid in which the larger detail wins (Burt, Adelson, IEEE Trans. Commun. 1983; five levels). A
copy fuses nothing, and still wins some metrics: those that count what is left of one source. The
stretched mean has the contrast of both sources, and wins where plain gain is rewarded; what it cuts
off as black and white is lost.

Legend: lumas are (H, W) uint8.
"""

import cv2
import numpy as np
from numpy import ndarray

LEVELS = 5  # of the pyramid: four of detail and a base


def mean(source1: ndarray, source2: ndarray) -> ndarray:
    """The mean of the sources, halves rounded up."""
    return ((source1.astype(np.uint16) + source2 + 1) // 2).astype(np.uint8)


def stretched_mean(source1: ndarray, source2: ndarray) -> ndarray:
    """The sum of the sources less a quarter of the range, cut off at black and white."""
    total = source1.astype(np.float32) + source2 - 255 / 4
    return np.clip(np.rint(total), 0, 255).astype(np.uint8)


def pyramid(source1: ndarray, source2: ndarray) -> ndarray:
    """At each level the detail with the larger magnitude, at the base the mean."""
    (details1, base1), (details2, base2) = decompose(source1), decompose(source2)
    fused = (base1 + base2) / 2
    for detail1, detail2 in zip(reversed(details1), reversed(details2), strict=True):
        larger = np.where(np.abs(detail1) >= np.abs(detail2), detail1, detail2)
        fused = expand(fused, larger.shape) + larger
    return np.clip(np.rint(fused), 0, 255).astype(np.uint8)


def decompose(source: ndarray) -> tuple[list[ndarray], ndarray]:
    """Details, the finest first, and the base of a luma; the base has a 16th of its sides."""
    details, image = [], source.astype(np.float32)
    for _ in range(LEVELS - 1):
        coarse = cv2.pyrDown(image)
        details.append(image - expand(coarse, image.shape))
        image = coarse
    return details, image


def expand(image: ndarray, shape: tuple[int, int]) -> ndarray:
    """An image of a level on the next finer level, of `shape` (H, W)."""
    return cv2.pyrUp(image, dstsize=shape[::-1])


TRIVIAL = {
    "max": np.maximum,
    "mean": mean,
    "source 1": lambda source1, source2: source1,
    "source 2": lambda source1, source2: source2,
    "pyramid": pyramid,
    "stretched mean": stretched_mean,
}
