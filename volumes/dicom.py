"""DICOM: one series of a folder, or one file, as a volume with its position in the patient.

Sources: DICOM PS3.3 (C.7.6.2 image plane, C.7.6.3 MONOCHROME1, C.7.6.16 multi-frame functional
groups, C.11.1 modality LUT) through pydicom.

Nothing that identifies a patient leaves this file. Messages name files, numbers and geometry, never
a header's text or UID. What pydicom has to say about odd values is not passed on.

Legend: P planes, each a (rows, columns) image; I J K voxels of a volume, see volumes/grid.py.
"""

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array

from cli import UserError
from volumes.claims import check_claim
from volumes.grid import Volume
from volumes.planes import Plane, stack
from volumes.suv import suv_factor

# Only these are read from the headers at first; a patient's name is not among them.
TAGS = """
    SOPClassUID ImageType Modality SeriesInstanceUID SeriesNumber FrameOfReferenceUID Rows
    Columns NumberOfFrames BitsAllocated SamplesPerPixel PhotometricInterpretation
    ImagePositionPatient ImageOrientationPatient PixelSpacing
    SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    DetectorInformationSequence ModalityLUTSequence Units DecayCorrection PatientWeight
    RadiopharmaceuticalInformationSequence SeriesDate SeriesTime AcquisitionDate
    AcquisitionTime
""".split()
NUMBERS = ("SeriesNumber", "SliceThickness", "SpacingBetweenSlices")  # a file may lack them
UNREADABLE = (  # what pydicom and numpy raise for fields that are missing or make no sense
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
)
# Values that are a measure (HU, Bq/ml, counts) stay what they are in MONOCHROME1, which is about
# showing them. In other modalities, as MR, the picture that was meant is the inverted one.
MEASURED = ("CT", "PT", "NM")
PLUGINS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg",
    "RLE": "pylibjpeg pylibjpeg-rle",
}

Headers = list[tuple[Path, pydicom.Dataset]]  # files, each with its header


def read_dicom(path: Path, series: str | None = None, flag: str = "--series1") -> Volume:
    """The volume of a DICOM folder (searched with its subfolders) or file, in rescaled values.

    Args:
        path: the folder or file.
        series: which series of several: its number in the list that the error shows, or its UID.
        flag: the name of that argument, for the error.

    Raises:
        UserError: no DICOM, several series and no choice, RGB, slices missing, doubled, uneven or
            in several orientations, no position, damaged or compressed pixels that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote the header's values
        headers, strays = _read_headers(path)
        headers = _choose(path, _by_series(headers), series, flag)
        first = headers[0][1]
        planes = [plane for file, ds in headers for plane in _planes(file, ds)]
        thickness = first.get("SliceThickness") or first.get("SpacingBetweenSlices") or 1
        planes, affine = stack(path, planes, float(thickness))
        volume = Volume(_pixels(planes), affine)
        volume.frame = str(first.get("FrameOfReferenceUID") or "") or None
        volume.modality = str(first.get("Modality") or "") or None
        try:
            volume.suv, volume.no_suv = suv_factor([ds for _, ds in headers])
        except UNREADABLE:
            volume.no_suv = "its fields for SUV cannot be read"
    if strays:
        volume.notes.append(f"{strays} files are not DICOM images, left out")
    _as_displayed(path, volume, {str(ds.PhotometricInterpretation) for _, ds in headers})
    if len(planes) == 1:
        volume.notes.append("a single slice")
    return volume


# --- headers ---------------------------------------------------------------------------------


def _read_headers(path: Path) -> tuple[Headers, int]:
    """Every image below `path` with the header fields of TAGS, and the count of other files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if not p.name.startswith(".") and p.name != "DICOMDIR"]
    headers = [(file, ds) for file in files if (ds := _image_header(file)) is not None]
    strays = len(files) - len(headers)
    if not headers:
        what = f"no DICOM image among its {strays} files" if path.is_dir() else "not a DICOM image"
        raise UserError(f"{path}: {what}, expected DICOM, NIfTI, MetaImage or NRRD")
    return headers, strays


def _image_header(file: Path) -> pydicom.Dataset | None:
    """The header of a DICOM image; None for any other file, UserError for a damaged one."""
    try:
        ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
        is_image = "Rows" in ds and "Columns" in ds
        kind = ds.file_meta.get("MediaStorageSOPClassUID")
        if not is_image and kind is not None and kind.name.endswith("Image Storage"):
            raise EOFError("an image without its size")
        if is_image:
            _check_fields(ds)
    except InvalidDicomError:
        return None
    except OSError:
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        raise UserError(f"{file}: damaged, its DICOM header cannot be read") from None
    return ds if is_image else None


def _check_fields(ds: pydicom.Dataset) -> None:
    """Any exception if a field that sorts images into series, or a number, makes no sense.

    pydicom reads a field when it is asked for it.
    """
    for name in ("SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows", "Columns"):
        ds.get(name)
    ds.get("PhotometricInterpretation")
    int(ds.Rows), int(ds.Columns), int(ds.get("BitsAllocated") or 8)
    if _frame_count(ds) < 1 or not all(np.isfinite(float(ds.get(n) or 0)) for n in NUMBERS):
        raise ValueError("not a number that makes sense")


def _check_size(file: Path, ds: pydicom.Dataset) -> None:
    """UserError if the file is too short for the image that its header claims.

    A compressed frame takes 8 bytes or more. One that is black takes little else, so the ratio is
    only bounded well above what such a frame of a usual size has.
    """
    syntax = ds.file_meta.get("TransferSyntaxUID")
    shape = _frame_count(ds), int(ds.Rows), int(ds.Columns)
    if syntax is not None and syntax.is_compressed:
        check_claim(file, shape[:1], 8, packed=False)
        check_claim(file, shape, 1 / 2**14, packed=False)
    else:
        size = int(ds.get("BitsAllocated") or 8) / 8
        check_claim(file, shape, size, packed=syntax is not None and syntax.is_deflated)


def _frame_count(ds: pydicom.Dataset) -> int:
    return int(ds.get("NumberOfFrames") or 1)


def _by_series(headers: Headers) -> dict[str, Headers]:
    """Headers by series UID, in the order of the series' numbers."""
    groups: dict[str, Headers] = {}
    for file, ds in headers:
        groups.setdefault(str(ds.get("SeriesInstanceUID", "")), []).append((file, ds))

    def number(uid: str) -> tuple[int, str]:
        return int(groups[uid][0][1].get("SeriesNumber") or 0), uid

    return {uid: groups[uid] for uid in sorted(groups, key=number)}


def _choose(path: Path, groups: dict[str, Headers], series: str | None, flag: str) -> Headers:
    """The series that `series` names, or the only one; else a UserError that lists them."""
    if series in groups:
        return groups[series]
    if series is not None and series.isdecimal() and 1 <= int(series) <= len(groups):
        return list(groups.values())[int(series) - 1]
    if series is None and len(groups) == 1:
        return next(iter(groups.values()))
    lines = []
    for i, group in enumerate(groups.values(), 1):
        ds = group[0][1]
        images = sum(_frame_count(header) for _, header in group)
        modality = ds.get("Modality") or "unknown modality"
        lines.append(f"{i}: {modality}, {images} images of {ds.Rows}x{ds.Columns}")
    wrong = "" if series is None else f"no series {series!r}; "
    listed = "; ".join(lines)
    raise UserError(f"{path}: {wrong}choose by {flag} one of {len(groups)} series: {listed}")


# --- planes ----------------------------------------------------------------------------------


def _planes(file: Path, ds: pydicom.Dataset) -> list[Plane]:
    """The planes of one file: itself, or its frames."""
    _check_size(file, ds)
    colours = ds.get("PhotometricInterpretation", "unknown")
    if colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{file}: colours are {colours}, expected grey values (MONOCHROME)")
    if "ModalityLUTSequence" in ds:
        raise UserError(f"{file}: has a table of values, expected a rescale slope and intercept")
    try:
        if "PerFrameFunctionalGroupsSequence" in ds:
            return [_enhanced_plane(file, ds, i) for i in range(_frame_count(ds))]
        geometry = ds
        if "ImagePositionPatient" not in ds and "DetectorInformationSequence" in ds:  # NM
            geometry = ds.DetectorInformationSequence[0]
        first = _plane(file, 0, geometry, geometry, ds, ds)
        frames = _frame_count(ds)
        if frames == 1:
            return [first]
        if "RECON TOMO" not in ds.ImageType:  # else the frames are times or gates, not slices
            raise ValueError("frames without a position")
        gap = float(ds.get("SpacingBetweenSlices") or ds.SliceThickness)
        step = np.cross(*first.directions) * gap
        return [first._replace(frame=i, position=first.position + i * step) for i in range(frames)]
    except UNREADABLE:
        raise UserError(
            f"{file}: does not say where its image lies (position, orientation, pixel spacing)"
        ) from None


def _enhanced_plane(file: Path, ds: pydicom.Dataset, i: int) -> Plane:
    """Frame `i` of an enhanced multi-frame file; each group is per frame, or shared by all."""
    groups = [ds.PerFrameFunctionalGroupsSequence[i]]
    groups += list(ds.get("SharedFunctionalGroupsSequence") or [])

    def group(name: str) -> pydicom.Dataset:
        return next((g[name].value[0] for g in groups if name in g), pydicom.Dataset())

    measures = group("PixelMeasuresSequence")
    measures.Rows, measures.Columns = ds.Rows, ds.Columns
    rescale = group("PixelValueTransformationSequence")
    position, orientation = group("PlanePositionSequence"), group("PlaneOrientationSequence")
    return _plane(file, i, position, orientation, measures, rescale)


def _plane(
    file: Path,
    i: int,
    position: pydicom.Dataset,
    orientation: pydicom.Dataset,
    measures: pydicom.Dataset,
    rescale: pydicom.Dataset,
) -> Plane:
    """Frame `i` of a file, from the data sets that hold its fields.

    Raises one of UNREADABLE for fields that are missing or make no sense.
    """
    directions = np.array(orientation.ImageOrientationPatient, dtype=float).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(directions[0] @ directions[1]) > 1e-2:
        raise ValueError("not an orientation")
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    plane = Plane(
        file,
        i,
        np.array(position.ImagePositionPatient, dtype=float).reshape(3),
        directions / lengths[:, None],
        np.array(measures.PixelSpacing, dtype=float).reshape(2),
        (int(measures.Rows), int(measures.Columns)),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )
    if not all(np.isfinite(v).all() for v in plane[2:]) or plane.spacing.min() <= 0:
        raise ValueError("not finite")
    return plane


# --- pixels ----------------------------------------------------------------------------------


def _pixels(planes: list[Plane]) -> np.ndarray:
    """Rescaled values (I, J, K) float32 of ordered planes; each file is opened once."""
    rows, columns = planes[0].size
    volume = np.empty((len(planes), rows, columns), np.float32)
    wanted: dict[Path, dict[int, int]] = {}  # file -> frame -> index of the plane
    for k, plane in enumerate(planes):
        wanted.setdefault(plane.path, {})[plane.frame] = k
    for path, frames in wanted.items():
        for i, pixels in enumerate(_decoded(path)):
            if i in frames:
                k = frames[i]
                np.multiply(pixels, planes[k].slope, out=volume[k], casting="unsafe")
                volume[k] += planes[k].intercept
    return volume.T


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """The stored values of a file's frames, one (rows, columns) after the other."""
    try:
        ds = pydicom.dcmread(path)
        syntax = ds.file_meta.get("TransferSyntaxUID")
        compressed = syntax is not None and syntax.is_compressed
    except Exception:  # as in a header
        raise UserError(f"{path}: damaged, its DICOM fields cannot be read") from None
    if syntax is None:
        raise UserError(f"{path}: no transfer syntax, its pixels cannot be read")
    if compressed:
        _check_decoder(path, syntax)
    try:
        for i in range(_frame_count(ds)):
            yield pixel_array(ds, index=i)
    except Exception as error:  # decoders of strange bytes may stumble in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: truncated, damaged, or compressed in a way that needs another plugin "
            f"({syntax.name}; {reason})"
        ) from None


def _check_decoder(path: Path, syntax: pydicom.uid.UID) -> None:
    """UserError if nothing here can decompress a transfer syntax; it says what to install."""
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise UserError(f"{path}: {syntax.name} is not an image compression we read") from None
    if not available:
        packages = (names for start, names in PLUGINS.items() if syntax.name.startswith(start))
        plugins = next(packages, "python-gdcm")
        raise UserError(
            f"{path}: compressed as {syntax.name}, which needs a plugin of pydicom: "
            f"pip install {plugins}"
        )


def _as_displayed(path: Path, volume: Volume, photometric: set[str]) -> None:
    """Invert MONOCHROME1, whose smallest value is displayed white, unless values are a measure.

    The standard inverts after rescale and window, so slices of different slopes stay comparable.
    """
    if "MONOCHROME1" not in photometric:
        return
    if volume.modality in MEASURED:
        volume.notes.append("MONOCHROME1, values kept")
        return
    if len(photometric) > 1:
        raise UserError(f"{path}: mixed MONOCHROME1 and MONOCHROME2 in one series")
    np.subtract(volume.data.min() + volume.data.max(), volume.data, out=volume.data)
    volume.notes.append("MONOCHROME1, inverted")
