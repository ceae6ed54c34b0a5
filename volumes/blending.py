"""The untouched sources, blended in place: a presentation state, and the registration it names.

The presentation state tells a viewer to show both series of the sources, each in its window and
colours, on top of each other. It holds no pixels. Where the sources do not lie in one frame of
reference, or one was moved, it refers to a spatial registration, which says how they lie.

Sources: DICOM PS3.3 (A.33.6 and C.11.29 to C.11.30 advanced blending, A.39.1 and C.20.2 spatial
registration, C.12.2 common instance reference), PS3.16 (context group 7100, types of registration),
through highdicom.pr.

highdicom asks for images of one study and one frame of reference. The standard does not: each input
of a blend names its study, and a registration joins the frames. So highdicom is given a stand-in
for each series, in one study and one frame, and the true references are set afterwards.

Legend: a matrix is (4, 4), from points of source 1 to points of source 2, RAS in mm; in the files
it is LPS.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from highdicom import PaletteColorLUT, PaletteColorLUTTransformation
from highdicom.base import SOPClass
from highdicom.pr import (
    AdvancedBlending,
    AdvancedBlendingPresentationState,
    BlendingDisplay,
    BlendingDisplayInput,
)
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SpatialRegistrationStorage,
    generate_uid,
)

from args_setting import VERSION
from fusing import SOFTWARE
from volumes.derived import PATIENT, UTF8, encoded
from volumes.dicom import read_dataset_of
from volumes.grid import RAS_LPS, Volume
from volumes.intensity import Scaling
from volumes.planes import Plane
from volumes.quiet import quiet

NOTE = "sources blended in place, not for diagnosis"
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
FIELDS = [*UIDS, "NumberOfFrames", "PhotometricInterpretation", "Rows", "Columns"]
TYPES = {  # how the sources came to lie on each other -> a code of DICOM's context group 7100
    "rigid": ("125024", "Image Content-based Alignment"),
    "off": ("125021", "Frame of Reference Identity"),
    "check": ("125021", "Frame of Reference Identity"),
}
ORTHOGONAL = 1e-6  # for rounding


class Input(NamedTuple):
    """A source as a presentation state refers to it."""

    volume: Volume
    scaling: Scaling  # which of its values are black and white
    palette: np.ndarray  # (256, 3) in [0, 1], colours from black to white
    headers: dict[Path, pydicom.Dataset]  # the UIDs of its files
    displays: bool  # whether the result, and the blend in a viewer, lies on its grid

    @property
    def first(self) -> pydicom.Dataset:
        """The header of one of its images."""
        return next(iter(self.headers.values()))

    def images(self, planes: Iterable[Plane] | None = None) -> list[pydicom.Dataset]:
        """References to all of its images, or to those of some planes."""
        frames: dict[Path, list[int]] = {}
        for plane in self.volume.planes if planes is None else planes:
            frames.setdefault(plane.path, []).append(plane.frame + 1)
        found = []
        for path, numbers in frames.items():
            item = reference(self.headers[path])
            if int(self.headers[path].get("NumberOfFrames") or 1) > 1:
                item.ReferencedFrameNumber = sorted(numbers)
            found.append(item)
        return found


def shown(inputs: tuple[Input, Input]) -> Input:
    """The source on whose grid a viewer shows the blend."""
    return next(one for one in inputs if one.displays)


def why_none(number: int, volume: Volume) -> str:
    """Why a source cannot be blended in place; empty if it can.

    Args:
        number: of the source, 1 or 2.
    """
    if volume.origin is None:
        return f"img{number} is no DICOM"
    if not volume.planes:
        return f"img{number} is not one of its points in time, but all of them together"
    if not volume.frame_of_reference:
        return f"img{number} has no frame of reference"
    headers = headers_of(volume).values()
    if not all(UID(str(ds.get(name) or "")).is_valid for ds in headers for name in UIDS):
        return f"the images of img{number} have no valid UIDs of image, series and study"
    if any(len({ds.get(name) for ds in headers}) > 1 for name in UIDS[2:]):
        return f"img{number} is of several series or studies"
    if any(ds.get("PhotometricInterpretation") != "MONOCHROME2" for ds in headers):
        return f"img{number} is stored inverted (MONOCHROME1)"
    return ""


@quiet()
def headers_of(volume: Volume) -> dict[Path, pydicom.Dataset]:
    """The UIDs of the files that a volume's planes are of."""
    paths = dict.fromkeys(plane.path for plane in volume.planes)
    return {path: read_dataset_of(path, FIELDS) for path in paths}


def blending(
    inputs: tuple[Input, Input], how: str, matrix: np.ndarray, who: dict
) -> dict[str, Callable[[], bytes]]:
    """By the name of each file, what makes its content.

    There is a presentation state. A spatial registration is there unless both sources are in one
    frame of reference and none was moved.

    Args:
        inputs: source 1 and source 2.
        how: how they were registered: off, check, rigid or file.
        matrix: as applied.
        who: patient and study, as of `derived.patient_fields`.
    """
    registration = None
    frames = {one.volume.frame_of_reference for one in inputs}
    if len(frames) > 1 or not np.array_equal(matrix, np.eye(4)):
        registration = spatial_registration(inputs, how, matrix, who)
    made = {"presentation.dcm": presentation_state(inputs, registration, who)}
    made |= {"registration.dcm": registration} if registration is not None else {}
    return {name: partial(encoded, ds) for name, ds in made.items()}


# --- the registration ------------------------------------------------------------------------


@quiet()
def spatial_registration(
    inputs: tuple[Input, Input], how: str, matrix: np.ndarray, who: dict
) -> pydicom.Dataset:
    """A spatial registration of both sources to the frame of reference of the one with the grid.

    Each of its items names a frame of reference and the images, because both sources may be in one
    frame although one was moved.
    """
    ds = SOPClass(
        series_instance_uid=generate_uid(prefix=None),
        series_number=9002,
        sop_instance_uid=generate_uid(prefix=None),
        sop_class_uid=SpatialRegistrationStorage,
        instance_number=1,
        modality="REG",
        series_description=NOTE,
        **made_by(),
        **who,
    )
    ds.FrameOfReferenceUID = shown(inputs).volume.frame_of_reference
    ds.PositionReferenceIndicator = ""
    ds.ContentDate, ds.ContentTime = ds.InstanceCreationDate, ds.InstanceCreationTime
    ds.ContentLabel, ds.ContentDescription = "REGISTRATION", NOTE
    ds.BodyPartExamined = "HEAD"  # not one of a pair, so no laterality is needed
    to_source2 = RAS_LPS @ matrix @ RAS_LPS
    moves = (None, np.linalg.inv(to_source2)) if inputs[0].displays else (to_source2, None)
    ds.RegistrationSequence = [
        registered(one, move, how) for one, move in zip(inputs, moves, strict=True)
    ]
    refer(ds, [(one.first.StudyInstanceUID, series_reference(one)) for one in inputs])
    return ds


def registered(source: Input, matrix: np.ndarray | None, how: str) -> pydicom.Dataset:
    """The item of a source in a registration; None for a matrix is the identity.

    Args:
        matrix: (4, 4), LPS, from the source to the frame of reference of the registration.
    """
    step, group, item = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    values = np.eye(4) if matrix is None else np.where(np.abs(matrix) < 1e-12, 0.0, matrix)
    step.FrameOfReferenceTransformationMatrix = [f"{v:.10g}" for v in values.ravel()]
    step.FrameOfReferenceTransformationMatrixType = matrix_type(values)
    group.MatrixSequence = [step]
    group.RegistrationTypeCodeSequence = []
    kind = TYPES["off"] if matrix is None else TYPES.get(how)
    if kind:
        code = pydicom.Dataset()
        code.CodeValue, code.CodeMeaning = kind
        code.CodingSchemeDesignator = "DCM"
        group.RegistrationTypeCodeSequence = [code]
    item.FrameOfReferenceUID = source.volume.frame_of_reference
    item.ReferencedImageSequence = source.images()
    item.MatrixRegistrationSequence = [group]
    return item


def matrix_type(matrix: np.ndarray) -> str:
    """DICOM's type of a matrix: RIGID, RIGID_SCALE (along the axes), or AFFINE."""
    square = matrix[:3, :3].T @ matrix[:3, :3]
    if np.allclose(square, np.eye(3), atol=ORTHOGONAL):
        return "RIGID"
    if np.allclose(square, np.diag(np.diag(square)), atol=ORTHOGONAL):
        return "RIGID_SCALE"
    return "AFFINE"


# --- the presentation state ------------------------------------------------------------------


@quiet()
def presentation_state(
    inputs: tuple[Input, Input], registration: pydicom.Dataset | None, who: dict
) -> pydicom.Dataset:
    """A presentation state that blends both sources, half of each."""
    study, frame = who["study_instance_uid"], shown(inputs).volume.frame_of_reference
    stand_ins = [stand_in(one.first, frame, who) for one in inputs]
    items = [
        AdvancedBlending([image], number, palette_color_lut_transformation=palette(one.palette))
        for number, (one, image) in enumerate(zip(inputs, stand_ins, strict=True), 1)
    ]
    display = BlendingDisplay("EQUAL", [BlendingDisplayInput(number) for number in (1, 2)])
    ds = AdvancedBlendingPresentationState(
        stand_ins,
        items,
        [display],
        series_instance_uid=generate_uid(prefix=None),
        series_number=9003,
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        content_label="BLENDING",
        content_description=NOTE,
        series_description=NOTE,
        **made_by(),
    )
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = frame, ""
    ds.BodyPartExamined = "HEAD"
    del ds.DisplayedAreaSelectionSequence  # all of it; highdicom took the area of source 1
    for one, item in zip(inputs, ds.AdvancedBlendingSequence, strict=True):
        item.StudyInstanceUID = one.first.StudyInstanceUID
        item.ReferencedImageSequence = one.images()
        item.SoftcopyVOILUTSequence = windows(one)
        item.GeometryForDisplay = "TRUE" if one.displays else "FALSE"
    # once more where dciodvfy looks for them: else it takes the lists of references for wrong
    ds.ReferencedImageSequence = [image for one in inputs for image in one.images()]
    references = [(one.first.StudyInstanceUID, series_reference(one)) for one in inputs]
    if registration is not None:
        moved = next(n for n, one in enumerate(inputs) if not one.displays)
        item = ds.AdvancedBlendingSequence[moved]
        item.ReferencedSpatialRegistrationSequence = [registration_reference(registration)]
        references.append((study, series_of(registration, [reference(registration)])))
    refer(ds, references)
    return ds


def stand_in(ds: pydicom.Dataset, frame: str, who: dict) -> pydicom.Dataset:
    """For a series, an image's header as highdicom wants it: of patient and study of the result.

    It is a plain image, whose values highdicom does not look into.
    """
    image = pydicom.Dataset()
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, ds.SOPInstanceUID
    for argument, field in PATIENT.items():
        setattr(image, field, who.get(argument))
    image.FrameOfReferenceUID, image.SeriesInstanceUID = frame, ds.SeriesInstanceUID
    image.SpecificCharacterSet = UTF8
    image.Rows, image.Columns, image.SamplesPerPixel = ds.Rows, ds.Columns, 1
    return image


def palette(colours: np.ndarray) -> PaletteColorLUTTransformation:
    """A table (256, 3) in [0, 1] as DICOM stores it."""
    values = np.rint(colours * 65535).astype(np.uint16)
    names = ("red", "green", "blue")
    luts = [PaletteColorLUT(0, values[:, i], name) for i, name in enumerate(names)]
    return PaletteColorLUTTransformation(*luts)


def windows(source: Input) -> list[pydicom.Dataset]:
    """The windows of a source's images: one item, or one for each group of images with its own.

    A viewer windows the values that it has after the image's rescale slope and intercept. Ours may
    be others, by a real world value mapping. Windows are exact: black is at their lower end, white
    at their upper one.
    """

    def window(plane: Plane) -> tuple[str, str]:
        slope, intercept = plane.rescale
        ends = np.array([source.scaling.low, source.scaling.high])
        low, high = slope * (ends - plane.intercept) / plane.slope + intercept
        return f"{(low + high) / 2:.8g}", f"{high - low:.8g}"

    groups = [(key, list(group)) for key, group in groupby(sorted_by(window, source), window)]
    found = []
    for (centre, width), planes in groups:
        item = pydicom.Dataset()
        item.WindowCenter, item.WindowWidth, item.VOILUTFunction = centre, width, "LINEAR_EXACT"
        if len(groups) > 1:
            item.ReferencedImageSequence = source.images(planes)
        found.append(item)
    return found


def sorted_by(key: Callable[[Plane], tuple], source: Input) -> list[Plane]:
    """The planes of a source, those with equal keys next to each other."""
    return sorted(source.volume.planes, key=key)


# --- references ------------------------------------------------------------------------------


def made_by() -> dict:
    """Arguments for highdicom: what made a file, and how its text is stored."""
    return {
        "manufacturer": SOFTWARE,
        "manufacturer_model_name": SOFTWARE,
        "software_versions": VERSION,
        "device_serial_number": "0",
        "transfer_syntax_uid": ExplicitVRLittleEndian,
        "specific_character_set": UTF8,
    }


def reference(ds: pydicom.Dataset) -> pydicom.Dataset:
    """A reference to a file: its class and instance."""
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return item


def series_of(ds: pydicom.Dataset, instances: Sequence[pydicom.Dataset]) -> pydicom.Dataset:
    """A reference to files of the series of `ds`."""
    item = pydicom.Dataset()
    item.SeriesInstanceUID, item.ReferencedInstanceSequence = ds.SeriesInstanceUID, list(instances)
    return item


def series_reference(source: Input) -> pydicom.Dataset:
    """A reference to all files of a source."""
    return series_of(source.first, [reference(ds) for ds in source.headers.values()])


def registration_reference(ds: pydicom.Dataset) -> pydicom.Dataset:
    """A reference to a registration by its study, series and instance."""
    series, study = pydicom.Dataset(), pydicom.Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = ds.SeriesInstanceUID, [reference(ds)]
    study.StudyInstanceUID, study.ReferencedSeriesSequence = ds.StudyInstanceUID, [series]
    return study


def refer(ds: pydicom.Dataset, references: Sequence[tuple[str, pydicom.Dataset]]) -> None:
    """List all files that a file refers to: those of its study, and those of others.

    Args:
        references: a study's UID, and a series of it.
    """
    studies: dict[str, list[pydicom.Dataset]] = {}
    for study, series in references:
        studies.setdefault(str(study), []).append(series)
    own = studies.pop(str(ds.StudyInstanceUID), [])
    if "ReferencedSeriesSequence" in ds:
        del ds.ReferencedSeriesSequence
    if own:
        ds.ReferencedSeriesSequence = own
    others = []
    for study, series in studies.items():
        item = pydicom.Dataset()
        item.StudyInstanceUID, item.ReferencedSeriesSequence = study, series
        others.append(item)
    if others:
        ds.StudiesContainingOtherReferencedInstancesSequence = others
