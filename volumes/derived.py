"""The fused slices as a derived DICOM series, through highdicom.

Each slice is a secondary capture image, which also says where it lies: it has the frame of
reference, position, orientation and pixel spacing (a standard extended SOP class, PS3.2).
Sources: DICOM PS3.3 (A.8.1 secondary capture, C.7.6.2 image plane), highdicom.sc.

Legend: N slices of (H, W) pixels as a reader looks at them, see volumes/grid.py.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from highdicom.sc import SCImage
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DA, TM, PersonName

from volumes.dicom import read_dataset_of
from volumes.grid import RAS_LPS, slices
from volumes.quiet import quiet

# where rows and columns go, as volumes/grid.py turns the slices
ORIENTATION = {"axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F")}
NOTE = "fused, not for diagnosis"
PATIENT = {  # highdicom's name of an argument -> the field that is copied
    "study_instance_uid": "StudyInstanceUID",
    "patient_id": "PatientID",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "accession_number": "AccessionNumber",
    "study_id": "StudyID",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "referring_physician_name": "ReferringPhysicianName",
}


# What a field becomes: names from text, so that they are stored in the new character set.
FORMS = {
    "patient_name": PersonName,
    "referring_physician_name": PersonName,
    "patient_birth_date": DA,
    "study_date": DA,
    "study_time": TM,
}
SEXES = ("M", "F", "O")
UTF8 = "ISO_IR 192"  # whatever the source has, every name can be written in it


def series(
    pictures: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    axis: str,
    frame_of_reference: str | None,
    who: dict,
) -> dict[str, Callable[[], bytes]]:
    """Slices as DICOM files: by the name of each, what makes its content.

    Args:
        pictures: (N, H, W) stored luma, or (N, H, W, 3) uint8 RGB.
        affine: of the volume (I, J, K) of `shape`, RAS mm.
        axis: of the slices.
        frame_of_reference: its UID; None makes a new one.
        who: patient and study, as of `patient_fields`.
    """
    uid, space = (generate_uid(prefix=None), frame_of_reference or generate_uid(prefix=None))
    starts, directions, sides = places(affine, shape, axis)

    def content(picture: np.ndarray, start: np.ndarray, number: int) -> bytes:
        ds = image(picture, axis, number, uid, who)
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = space, ""
        ds.ImagePositionPatient = [f"{v:.9g}" for v in start]
        ds.ImageOrientationPatient = [f"{v:.9g}" for v in directions.ravel()]
        ds.PixelSpacing = [f"{v:.9g}" for v in sides[:2]]
        ds.SpacingBetweenSlices = f"{sides[2]:.9g}"
        return encoded(ds)

    slices_of = enumerate(zip(pictures, starts, strict=True), 1)
    return {f"{axis}_{n:04d}.dcm": partial(content, *one, n) for n, one in slices_of}


@quiet()
def encoded(ds: pydicom.Dataset) -> bytes:
    """The bytes of a DICOM file."""
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


@quiet()
def patient_fields(patient: Path | None) -> dict:
    """Arguments for highdicom: of a DICOM file's patient and study, or of nobody.

    A field that is none by the standard, as a date of ten digits, stays empty.
    """
    if patient is None:
        return {"study_instance_uid": generate_uid(prefix=None)}
    ds = read_dataset_of(patient, [*PATIENT.values()])
    found = {}
    for argument, field in PATIENT.items():
        text = str(ds.get(field) or "").strip()
        found[argument] = FORMS.get(argument, str)(text) if is_valid(argument, text) else None
    found["study_instance_uid"] = found["study_instance_uid"] or generate_uid(prefix=None)
    return found


def is_valid(argument: str, text: str) -> bool:
    """Whether the text of a field is not empty, and one by the standard."""
    try:
        FORMS.get(argument, str)(text)
    except (TypeError, ValueError):
        return False
    known = SEXES if argument == "patient_sex" else (text,)
    uid = argument != "study_instance_uid" or UID(text).is_valid
    return bool(text) and text in known and uid


@quiet()  # highdicom's warnings quote a name
def image(picture: np.ndarray, axis: str, number: int, series: str, who: dict) -> SCImage:
    """A slice (H, W) of stored luma, or (H, W, 3) RGB, as an image without a place yet."""
    grey = picture.ndim == 2
    ds = SCImage(
        np.ascontiguousarray(picture.astype(np.uint16) if grey else picture),
        "MONOCHROME2" if grey else "RGB",
        16 if grey else 8,
        "PATIENT",
        series_instance_uid=series,
        series_number=9001,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=number,
        manufacturer="ASFE-Fusion",
        patient_orientation=ORIENTATION[axis],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=UTF8,
        **who,
    )
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.SeriesDescription = ds.DerivationDescription = NOTE
    ds.ImageComments, ds.BurnedInAnnotation = NOTE, "NO"
    ds.BodyPartExamined = "HEAD"  # not one of a pair, so no laterality is needed
    if grey:
        ds.WindowCenter, ds.WindowWidth = "16384", "32768"
    return ds


def places(
    affine: np.ndarray, shape: tuple[int, ...], axis: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the slices of a volume lie, in LPS mm.

    Returns: the middle of each slice's first pixel (N, 3); the unit vectors along its rows and
    columns (2, 3); the distances between rows, columns and slices (3,).
    """
    grid = np.indices(shape, sparse=True)  # no memory: each index, seen at every voxel
    seen = [slices(np.broadcast_to(index, shape), affine, axis) for index in grid]

    def xyz(n, h: int, w: int) -> np.ndarray:
        index = np.stack([view[n, h, w] for view in seen] + [np.ones_like(seen[0][n, h, w])])
        return ((RAS_LPS @ affine) @ index)[:3].T

    starts = xyz(slice(None), 0, 0)
    along = np.array([xyz(0, 0, 1) - starts[0], xyz(0, 1, 0) - starts[0]])  # a row, a column
    columns, rows = np.linalg.norm(along, axis=1)
    between = float(np.linalg.norm(starts[1] - starts[0])) if len(starts) > 1 else 1.0
    return starts, along / np.array([[columns], [rows]]), np.array([rows, columns, between])
