"""What a fused image does to the colours of PET and SPECT.

Legend: H W pixels. Images are RGB (H, W, 3), uint8 or floats in [0, 1].
"""

import math

import numpy as np
from numpy import ndarray
from skimage.color import rgb2lab

COLOURED = 10.0  # chroma in CIELAB from which a pixel of the source has a clear hue
VISIBLE = 2.0  # chroma of the fused pixel below which rounding decides its hue


def hue_shift(fused: ndarray, source: ndarray) -> float:
    """Mean angle in degrees between the hues of fused and source colour in CIELAB (D65), 0..180.

    It counts the pixels in which the source has a clear hue and the fused image has any; NaN where
    there are none, as in grey images.
    """
    if fused.ndim != 3 or source.ndim != 3:
        return math.nan
    own, given = _hue(fused), _hue(source)
    counts = (np.abs(given) > COLOURED) & (np.abs(own) > VISIBLE)
    angles = np.abs(np.angle(own[counts] * given[counts].conj(), deg=True))
    return float(angles.mean()) if angles.size else math.nan


def _hue(image: ndarray) -> ndarray:
    """a* + i b* of each pixel (H, W): its angle is the hue, its length the chroma."""
    lab = rgb2lab(image)
    return lab[..., 1] + 1j * lab[..., 2]
