"""What only one source shows: how much of it the fused image keeps, and what it adds.

It needs the two sources and the fused image only, so it judges any published result on its real
content. In a window around each pixel the fused image is explained as

    F = a1 S1 + a2 S2 + constant + residual        (least squares, gaussian weights)

What one source shows there and the other does not is its variance that the other does not explain.
*kept* is the gain a of such content, *conspicuous* is how far it stands out among all contrast of F
there, and *foreign* is the share of F's contrast that the residual holds. docs/metrics.md explains
how to read them; `tests/test_metrics_one_source.py` has values of an independent evaluator.

Legend: S1 S2 sources, F fused image, H W pixels. Images are lumas (H, W), float64 in [0, 1].
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

from evaluation.filters import blur

LEVEL = 1 / 255  # one grey level of 8 bits
SIDE, SIGMA = 33, 4.0  # pixels, of the gaussian window
FLOOR = LEVEL**2 / 10  # is added to each variance, so that a flat window has one
VISIBLE = 4 * LEVEL**2  # variance above which content counts
BONE = 250 * LEVEL  # where source 1 is as bright, nothing of source 2 is owed
HEAD = 0.05  # the head is where a source is brighter
TRACE = 0.02  # source 1 above it shows uptake
BRIGHTER = 15 * LEVEL
ROUNDING = 1e-9  # no difference of two grey levels is nearer to a bound


class OneSource(NamedTuple):
    """The values of one fused image; NaN where one is undefined."""

    kept1: float  # 0..1, share of the contrast that only source 1 has; 1 is best
    kept2: float  # of source 2
    conspicuous1: float  # 0..1, how far that contrast stands out in F; 1 is best
    conspicuous2: float
    foreign: float  # 0..1, share of F's contrast that no mix of the sources explains; 0 is best
    brighter: float  # 0..1, share of the head clearly brighter than both sources; 0 is best
    rise: float  # grey levels that F adds in the lowest quarter of source 1's uptake; 0 is best


class OneSourceMaps(NamedTuple):
    """The same at each pixel, (H, W) each; contrasts are standard deviations in [0, 1]."""

    owed1: ndarray  # contrast that only source 1 has, 0 where it does not count
    owed2: ndarray
    gain1: ndarray  # a1, clipped to [0, 1]: the share of it that F keeps
    gain2: ndarray
    standing1: ndarray  # the same share, against the contrast of F, clipped to [0, 1]
    standing2: ndarray
    contrast: ndarray  # of F
    foreign: ndarray  # contrast of F that no mix of the sources explains

    @property
    def lost1(self) -> ndarray:
        """Contrast of source 1 alone that F does not keep."""
        return self.owed1 * (1 - self.gain1)

    @property
    def lost2(self) -> ndarray:
        """Contrast of source 2 alone that F does not keep."""
        return self.owed2 * (1 - self.gain2)


def one_source(source1: ndarray, source2: ndarray, fused: ndarray) -> OneSource:
    """The values of a fused image. Source 1 is CT, or the luma of PET or SPECT; source 2 is MRI.

    `foreign` is undefined where both sources are equal, `brighter` and `rise` without a head.

    Raises ValueError if the images differ in shape or are no (H, W).
    """
    maps = one_source_maps(source1, source2, fused)
    equal = np.array_equal(source1, source2)
    return OneSource(
        _mean(maps.gain1, maps.owed1),
        _mean(maps.gain2, maps.owed2),
        _mean(maps.standing1, maps.owed1),
        _mean(maps.standing2, maps.owed2),
        math.nan if equal else float(maps.foreign.sum() / maps.contrast.sum()),
        brighter_than_both(source1, source2, fused),
        luma_rise(source1, source2, fused),
    )


def one_source_maps(source1: ndarray, source2: ndarray, fused: ndarray) -> OneSourceMaps:
    """Where the fused image keeps what only one source shows, and where it adds something.

    Raises ValueError if the images differ in shape or are no (H, W).
    """
    source1, source2, fused = (np.asarray(x, np.float64) for x in (source1, source2, fused))
    if source1.ndim != 2 or not source1.shape == source2.shape == fused.shape:
        shapes = source1.shape, source2.shape, fused.shape
        raise ValueError(f"images have shapes {shapes}, expected three equal (H, W)")
    mean1, mean2, mean_f = (_blur(x) for x in (source1, source2, fused))
    v1 = _variance(source1, mean1)
    v2 = _variance(source2, mean2)
    v_f = _variance(fused, mean_f)
    c = _blur(source1 * source2) - mean1 * mean2
    c1 = _blur(source1 * fused) - mean1 * mean_f
    c2 = _blur(source2 * fused) - mean2 * mean_f

    determinant = np.maximum(v1 * v2 - c * c, 0.001 * v1 * v2)
    a1 = (v2 * c1 - c * c2) / determinant
    a2 = (v1 * c2 - c * c1) / determinant
    owed1, owed2 = _own_contrast(v1, v2, c), _own_contrast(v2, v1, c)
    owed2[source1 >= BONE - ROUNDING] = 0  # bone is to be solid
    return OneSourceMaps(
        owed1,
        owed2,
        a1.clip(0, 1),
        a2.clip(0, 1),
        (a1 * np.sqrt(v1 / v_f)).clip(0, 1),
        (a2 * np.sqrt(v2 / v_f)).clip(0, 1),
        np.sqrt(v_f),
        np.sqrt(np.maximum(v_f - a1 * c1 - a2 * c2, 0)),
    )


def brighter_than_both(source1: ndarray, source2: ndarray, fused: ndarray) -> float:
    """Share of the head where F is more than 15 grey levels above both sources; NaN without one."""
    brightest = np.maximum(source1, source2)
    excess = (fused - brightest)[brightest > HEAD]
    return float((excess > BRIGHTER + ROUNDING).mean()) if excess.size else math.nan


def luma_rise(source1: ndarray, source2: ndarray, fused: ndarray) -> float:
    """Grey levels that F has more than source 1 where its uptake is low; NaN without uptake.

    Low is the lowest quarter of the levels of source 1 (PET or SPECT) in the head, without those
    that show no uptake at all.
    """
    uptake = (np.maximum(source1, source2) > HEAD) & (source1 > TRACE)
    if not uptake.any():
        return math.nan
    low = uptake & (source1 <= np.quantile(source1[uptake], 0.25))
    return float((fused - source1)[low].mean() / LEVEL)


def _blur(image: ndarray) -> ndarray:
    """Local mean; the border is mirrored with the edge repeated."""
    return blur(image, SIDE, SIGMA, cv2.BORDER_REFLECT)


def _variance(image: ndarray, mean: ndarray) -> ndarray:
    return np.maximum(_blur(image * image) - mean * mean, 0) + FLOOR


def _own_contrast(variance: ndarray, other: ndarray, covariance: ndarray) -> ndarray:
    """Standard deviation that the other source does not explain, 0 where it is not visible."""
    own = np.maximum(variance - covariance**2 / other, 0)
    return np.where(own > VISIBLE, np.sqrt(own), 0)


def _mean(values: ndarray, weights: ndarray) -> float:
    """The weighted mean; NaN where nothing counts."""
    total = weights.sum()
    return float((values * weights).sum() / total) if total > 0 else math.nan
