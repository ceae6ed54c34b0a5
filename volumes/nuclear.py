"""Multi-frame files of nuclear medicine: which have slices, and where each frame lies.

Sources: DICOM PS3.3 (C.8.4.8 NM multi-frame with its index vectors, C.8.4.11 NM detector, C.8.4.15
NM reconstruction, where the sign of the spacing is the direction of stacking).

Legend: P planes, each a (rows, columns) image, see volumes/planes.py.
"""

from pathlib import Path

import numpy as np
import pydicom

from cli import UserError
from volumes.planes import FRAME, Plane

NO_SLICES = {
    "TOMO": "raw views of a SPECT",
    "GATED TOMO": "raw views of a gated SPECT",
    "RECON GATED TOMO": "gated slices",
    "GATED": "gated frames",
    "DYNAMIC": "frames over time",
    "STATIC": "planar images",
    "WHOLE BODY": "planar images",
}
SLICES = "RECON TOMO"
# what else may tell two frames of one slice apart, a number for each frame
VECTORS = ("EnergyWindowVector", "DetectorVector", "RotationVector", "PhaseVector",
    "TimeSliceVector")  # fmt: skip


def check_nuclear(file: Path, ds: pydicom.Dataset) -> None:
    """UserError for frames of nuclear medicine that are views or gates, not slices."""
    kind = str((*(ds.get("ImageType") or ()), "", "", "")[2]) if ds.get("Modality") == "NM" else ""
    if what := NO_SLICES.get(kind):
        raise UserError(
            f"{file}: its frames are {what} ({kind}), expected reconstructed slices ({SLICES}); "
            "choose that series of the same examination, or have it reconstructed"
        )


def is_reconstruction(ds: pydicom.Dataset) -> bool:
    """Whether an image of nuclear medicine is a reconstructed volume, by its ImageType."""
    return SLICES in (ds.get("ImageType") or ())


def place_of(ds: pydicom.Dataset) -> tuple[pydicom.Dataset, bool]:
    """The data set that holds position and orientation, and whether it says a position.

    In nuclear medicine it may be the detector's. A reconstruction that tells no position is taken
    to begin at 0 and, without an orientation, to be axial.
    """
    detector = (ds.get("DetectorInformationSequence") or [pydicom.Dataset()])[0]
    if "ImagePositionPatient" in ds or ds.get("Modality") != "NM":
        return ds, True
    if detector.get("ImagePositionPatient"):
        return detector, True
    if not is_reconstruction(ds):
        return ds, True  # and its fields will be missed
    place = pydicom.Dataset()
    place.ImagePositionPatient = [0, 0, 0]
    place.ImageOrientationPatient = (
        detector.get("ImageOrientationPatient")
        or ds.get("ImageOrientationPatient")
        or [1, 0, 0, 0, 1, 0]
    )
    return place, False


def frames_of(first: Plane, ds: pydicom.Dataset) -> list[Plane]:
    """The planes of a reconstruction's frames, each at the slice that SliceVector names.

    Args:
        first: the plane of slice 1.

    Raises:
        ValueError: not a reconstruction, or vectors that do not fit its frames.
    """
    if not is_reconstruction(ds):
        raise ValueError("frames without a position")
    count = int(ds.NumberOfFrames)
    gap = float(ds.get("SpacingBetweenSlices") or ds.SliceThickness)
    step = np.cross(*first.directions) * gap
    vectors = {name: numbers_of(ds, name, count) for name in ("SliceVector", *VECTORS)}
    numbers = vectors.pop("SliceVector") or range(1, count + 1)
    return [
        first._replace(
            frame=i,
            position=first.position + (n - 1) * step,
            fields=first.fields
            | {name: str(v[i]) for name, v in vectors.items() if v}
            | {FRAME: str(i + 1)},
        )
        for i, n in enumerate(numbers)
    ]


def numbers_of(ds: pydicom.Dataset, name: str, count: int) -> list[int]:
    """The numbers of an index vector, one for each frame; [] where the file has none."""
    value = ds.get(name)
    numbers = [] if value is None or value == "" else np.ravel(value).astype(int).tolist()
    if numbers and len(numbers) != count:
        raise ValueError("a vector of another length than the frames")
    return numbers
