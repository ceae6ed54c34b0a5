"""What is bright in one source and dark in the other: how much of it the fused image keeps.

A calcification or fresh blood may be bright in CT and dark in MRI, at the same place. Where a
method adds both, nothing is left to see. evaluation/one_source.py does not count such places, as
each source explains the other there.

The detail of an image is its mean under a narrow gaussian less that under a wide one (Marr and
Hildreth 1980). Sources oppose each other where their details have opposite signs and both can be
seen. *opposed* is the share of the stronger source's detail that F keeps there.

Legend: S1 S2 sources, F fused image, H W pixels. Images are lumas (H, W), float64 in [0, 1].
"""

import math

import cv2
import numpy as np
from numpy import ndarray

from evaluation.filters import blur
from evaluation.one_source import BONE, LEVEL, ROUNDING

NARROW, WIDE = (9, 1.0), (33, 4.0)  # side and sigma of the gaussians, in pixels
VISIBLE = 8 * LEVEL  # detail of either source
NEAR_BONE = 0.01  # share of the wide window; bone is to be solid, whatever the other source shows


def opposed(source1: ndarray, source2: ndarray, fused: ndarray) -> float:
    """The share of the stronger detail that F keeps where the sources oppose each other, 0..1.

    NaN where they do so nowhere. A place weighs as much as the detail of its weaker source. The
    share is 0 where F shows nothing, or the detail of the weaker source. It is 1 where F shows all
    of the stronger one, or more.
    """
    weight, stronger = opposed_places(source1, source2)
    if not weight.any():
        return math.nan
    share = np.divide(_detail(fused), stronger, out=np.zeros_like(weight), where=weight > 0)
    return float((weight * share.clip(0, 1)).sum() / weight.sum())


def opposed_places(source1: ndarray, source2: ndarray) -> tuple[ndarray, ndarray]:
    """Where the sources oppose each other, as weights, and the stronger detail; (H, W) each."""
    detail1, detail2 = _detail(source1), _detail(source2)
    weaker = np.minimum(abs(detail1), abs(detail2))
    near_bone = blur((source1 >= BONE - ROUNDING) * 1.0, *WIDE, cv2.BORDER_REFLECT) > NEAR_BONE
    counts = (detail1 * detail2 < 0) & (weaker > VISIBLE) & ~near_bone
    return weaker * counts, np.where(abs(detail1) >= abs(detail2), detail1, detail2)


def _detail(image: ndarray) -> ndarray:
    """What the narrow gaussian shows and the wide one does not; the border is mirrored."""
    narrow, wide = (blur(image, *window, cv2.BORDER_REFLECT) for window in (NARROW, WIDE))
    return narrow - wide
