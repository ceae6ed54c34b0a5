"""From measured values to [0, 1].

CT by a window in HU, MRI by percentiles inside the head, PET by SUV and SPECT by its maximum.
Sources: soft tissue windows as in general use in head CT; Otsu's threshold (IEEE Trans. SMC 9,
1979) through scikit-image.

Legend: I J K voxels as stored, see volumes/grid.py.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu

from cli import UserError
from volumes.grid import Volume

# Level and width in HU. `wide` is ours: air is black, and brain (20 to 45 HU) and dense bone
# (1000 HU) are both inside.
WINDOWS = {"wide": (450, 1100), "brain": (40, 80), "bone": (600, 2800), "subdural": (75, 215)}
PERCENTILES = (0.5, 99.5)
SAMPLES = 2_000_000  # voxels that decide on percentiles, at most about
DICOM_MODALITY = {"CT": "CT", "PET": "PT", "SPECT": "NM", "MRI": "MR"}  # from our names
AIR = (-1200, -800)  # HU that air has, with noise
# shares of a CT's voxels: at least in its window, at least near air, at most below air
IN_WINDOW, NEAR_AIR, BELOW_AIR = 0.005, 0.005, 0.05
NOISY, FILLED = 0.7, 0.9  # of the field: a mask with noise in it, perhaps; and more than a head
SMOOTH = 2.0  # voxels, of the Gaussian that takes noise away
STORED_ONE = 32767  # a fused luma of 1, as the int16 that is stored


class Scaling(NamedTuple):
    """The values that become 0 and 1, in the volume's unit, and how they were chosen."""

    low: float
    high: float
    text: str  # short, for the header and the screen
    method: dict  # for the sidecar

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Values as float32 in [0, 1], of the same shape; what lies beyond is clipped."""
        scaled = (values - np.float32(self.low)) / np.float32(self.high - self.low)
        return np.clip(scaled, 0, 1).astype(np.float32, copy=False)


def scaling_of(volume: Volume, kind: str, window: str, suv: float) -> Scaling:
    """The scaling of a volume of `kind` CT, PET, SPECT or MRI.

    Args:
        window: for CT, see `ct_scaling`.
        suv: for PET, the SUV in g/ml that becomes 1; 0 takes the maximum.

    Raises:
        UserError: `window` is neither LEVEL,WIDTH nor a name, or the volume has no contrast.
    """
    if kind == "CT":
        return ct_scaling(window)
    if kind == "MRI":
        return mri_scaling(volume.data)
    return uptake_scaling(volume, kind, suv)


def is_usable(low: float, high: float) -> bool:
    """Whether float32, in which volumes are scaled, holds both values and their difference."""
    with np.errstate(over="ignore"):
        ends = np.float32([low, high, high - low])
    return bool(np.isfinite(ends).all() and ends[2] > 0)


def ct_scaling(window: str) -> Scaling:
    """A window in HU: "LEVEL,WIDTH", or a name of WINDOWS; UserError for anything else."""
    try:
        level, width = WINDOWS.get(window) or map(float, window.split(","))
    except ValueError:
        level = width = 0.0
    low, high = level - width / 2, level + width / 2
    if not is_usable(low, high):
        raise UserError(
            f"window is {window!r}, expected LEVEL,WIDTH in HU, or one of {', '.join(WINDOWS)}"
        )
    method = {"method": "window", "level": level, "width": width, "unit": "HU"}
    return Scaling(low, high, f"CT {low:g}..{high:g} HU", method)


def units_doubt(data: np.ndarray, window: str) -> str:
    """Why a CT (I, J, K) does not look as if it was in HU, or in the window's unit; else empty.

    A window in numbers may be in another unit, so air is looked for only where it has a name.
    """
    scaling, values = ct_scaling(window), data[sampling(data)].ravel()
    found = f"its values go from {data.min():g} to {data.max():g}"
    how = "give --window LEVEL,WIDTH in its own values, or --force units takes them as HU"
    inside = float(((values > scaling.low) & (values < scaling.high)).mean())
    if inside < IN_WINDOW:
        window = f"{scaling.low:g} to {scaling.high:g}"
        return f"{found}, and {inside:.1%} of them lie in the window of {window} HU; {how}"
    lowest = values.min()
    if (
        lowest < AIR[0] and (values == lowest).mean() > IN_WINDOW
    ):  # what is beyond the scanner's field
        values = values[values > lowest]
    near = float(((values >= AIR[0]) & (values <= AIR[1])).mean())
    below = float((values < AIR[0]).mean())
    if window in WINDOWS and (near < NEAR_AIR or below > BELOW_AIR):
        return f"{found}, and {near:.1%} of them are near -1000 HU, as air is; {how}"
    return ""


def sampling(data: np.ndarray) -> tuple[slice, ...]:
    """Which of many voxels (I, J, K) are looked at: about SAMPLES, evenly."""
    step = max(1, int(np.ceil((data.size / SAMPLES) ** (1 / 3))))
    return tuple(slice(None, None, step if n > 4 * step else 1) for n in data.shape)


def mri_scaling(data: np.ndarray) -> Scaling:
    """The percentiles of PERCENTILES among the voxels of the head, (I, J, K).

    Raises UserError if all voxels are equal.
    """
    sample = data[sampling(data)]
    if sample.min() == sample.max():
        raise UserError(f"MRI: all voxels are {sample.flat[0]:g}, there is nothing to fuse")
    mask = head(sample)
    low, high = np.percentile(sample[mask], PERCENTILES)
    if not low < high:
        low, high = sample.min(), sample.max()
    where = "of the whole field, as no head stands out" if fills(mask) else "inside the head"
    method = {"method": f"percentiles {where}", "percentiles": list(PERCENTILES)}
    method |= {"low": float(low), "high": float(high)}
    text = f"MRI 0.5-99.5 % {low:.4g}..{high:.4g}"
    text += f" ({where})" if fills(mask) else ""
    return Scaling(float(low), float(high), text, method)


def head(data: np.ndarray) -> np.ndarray:
    """The voxels of the head, (I, J, K) bool of (I, J, K) values.

    That is the largest part above half of Otsu's threshold, its holes filled. Half, because the
    threshold itself also cuts fluid off. The holes are filled slice by slice along each axis, since
    the nose and the neck open the head. Where noise around the head would make nearly the whole
    field part of it, the values are smoothed first.
    """
    mask = _brightest_part(data)
    if mask.mean() > NOISY:
        smooth = ndimage.gaussian_filter(data.astype(np.float32, copy=False), SMOOTH)
        mask = _brightest_part(smooth)
    return mask


def fills(mask: np.ndarray) -> bool:
    """Whether a mask of the head, (I, J, K), is nearly the whole field, so that none was found."""
    return bool(mask.mean() > FILLED)


def _brightest_part(data: np.ndarray) -> np.ndarray:
    """The largest part above half of Otsu's threshold, its holes filled slice by slice."""
    mask = data > (data.min() + threshold_otsu(data)) / 2
    parts, count = ndimage.label(mask)
    if count > 1:
        mask = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    filled = mask
    for axis in range(3):
        across = np.moveaxis(mask, axis, 0)
        holes = np.stack([ndimage.binary_fill_holes(plane) for plane in across])
        filled = filled | np.moveaxis(holes, 0, axis)
    return filled


def uptake_scaling(volume: Volume, kind: str, suv: float) -> Scaling:
    """PET and SPECT from 0 to an SUV of `suv` (PET with the fields for it), else to the maximum.

    Raises UserError if no voxel is above 0.
    """
    peak = float(volume.data.max())
    if not peak > 0:
        raise UserError(f"{kind}: no voxel is above 0, there is nothing to fuse")
    if kind == "PET" and suv and volume.suv:
        above = float((volume.data > suv / volume.suv).mean())
        method = {"method": "SUV (body weight)", "high": suv, "unit": "g/ml", "share_above": above}
        method["share_used"] = min(peak * volume.suv / suv, 1.0)
        return Scaling(0.0, suv / volume.suv, f"PET 0..{suv:g} SUV", method)
    unit = f"summed {volume.unit}".strip() if volume.summed else volume.unit or "as stored"
    method = {"method": "maximum", "high": peak, "unit": unit, "share_used": 1.0}
    if kind == "PET":
        method["no_suv"] = volume.no_suv if suv else "not asked for"
    return Scaling(0.0, peak, f"{kind} 0..max {peak:.4g}", method)
