"""DICOM: one series of a folder, or one file, as a volume with its place in the patient.

Sources: DICOM PS3.3 (C.7.6.2 image plane, C.7.6.3 MONOCHROME1, C.7.6.16 multi-frame functional
groups, C.11.1 modality LUT, C.8.9 PET) through pydicom; body-weight SUV as in the QIBA FDG-PET
profile.

Nothing that identifies a patient leaves this file: messages name files, numbers and geometry, never
a header's text or UID, and what pydicom has to say about odd values is not passed on.

Legend: P planes, each a (rows, columns) image; positions in mm, LPS+, see volumes_io.py.
"""

import warnings
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder, pixel_array

from volumes_io import RAS_LPS, Volume

# Only these are read from the headers at first; a patient's name is not among them.
TAGS = """
    SOPClassUID ImageType Modality SeriesInstanceUID SeriesNumber FrameOfReferenceUID Rows
    Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation
    ImagePositionPatient ImageOrientationPatient PixelSpacing
    SliceThickness SpacingBetweenSlices RescaleSlope RescaleIntercept
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    DetectorInformationSequence ModalityLUTSequence Units DecayCorrection PatientWeight
    RadiopharmaceuticalInformationSequence SeriesDate SeriesTime AcquisitionDate
    AcquisitionTime
""".split()
# Values that are a measure (HU, Bq/ml, counts) stay what they are in MONOCHROME1, which is about
# showing them; in other modalities, as MR, the picture that was meant is the inverted one.
MEASURED = ("CT", "PT", "NM")
PLUGINS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg",
    "RLE": "pylibjpeg pylibjpeg-rle",
}
SAME = 0.01  # mm between slices that lie at one position
UNEVEN = 0.1  # of the slice distance: how far a slice may lie from its place on an even grid


class Plane(NamedTuple):
    """One image of a series: a file, or a frame of one."""

    path: Path
    frame: int
    position: np.ndarray  # (3,), centre of the first pixel
    directions: np.ndarray  # (2, 3), unit vectors along a row and along a column
    spacing: np.ndarray  # (2,), between rows, between columns
    size: tuple[int, int]
    slope: float
    intercept: float


def read_dicom(path: Path, series: str | None = None, flag: str = "--series1") -> Volume:
    """The volume of a DICOM folder (searched with its subfolders) or file, in rescaled values.

    Args:
        series: which series of several: its number in the list that the error shows, or its UID.
        flag: the name of that argument, for the error.

    Raises:
        ValueError: no DICOM, several series and no choice, RGB, slices missing, doubled, uneven or
            in several orientations, no position, damaged or compressed pixels that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote the header's values
        headers, strays = _headers(path)
        headers = _choose(path, _by_series(headers), series, flag)
        planes = [plane for file, ds in headers for plane in _planes(file, ds)]
        planes, affine = _stack(path, planes)
        first = headers[0][1]
        volume = Volume(_pixels(planes), affine)
        volume.frame = str(first.get("FrameOfReferenceUID") or "") or None
        volume.modality = str(first.get("Modality") or "") or None
        try:
            volume.suv, volume.no_suv = suv_factor([ds for _, ds in headers])
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            volume.no_suv = "its fields for SUV cannot be read"
    if strays:
        volume.notes.append(f"{strays} files are not DICOM images, left out")
    _as_displayed(path, volume, {str(ds.PhotometricInterpretation) for _, ds in headers})
    if len(planes) == 1:
        volume.notes.append("a single slice")
    return volume


# --- headers ---------------------------------------------------------------------------------


def _headers(path: Path) -> tuple[list[tuple[Path, pydicom.Dataset]], int]:
    """Every image below `path` with the header fields of TAGS, and the count of other files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if not p.name.startswith(".") and p.name != "DICOMDIR"]
    found, strays = [], 0
    for file in files:
        try:
            ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            is_image = "Rows" in ds and "Columns" in ds
            kind = ds.file_meta.get("MediaStorageSOPClassUID")
            if not is_image and kind is not None and kind.name.endswith("Image Storage"):
                raise EOFError("an image without its size")
        except InvalidDicomError:
            is_image = False
        except OSError:
            raise
        except Exception:  # a parser of strange bytes may stumble in any way
            raise ValueError(f"{file}: damaged, its DICOM header cannot be read") from None
        if is_image:
            found.append((file, ds))
        else:
            strays += 1
    if not found:
        what = f"no DICOM image among its {strays} files" if path.is_dir() else "not a DICOM image"
        raise ValueError(f"{path}: {what}, expected DICOM, NIfTI, MetaImage or NRRD")
    return found, strays


def _by_series(headers: list) -> dict[str, list]:
    """Headers by series UID, in the order of the series' numbers."""
    groups: dict[str, list] = {}
    for file, ds in headers:
        groups.setdefault(str(ds.get("SeriesInstanceUID", "")), []).append((file, ds))

    def number(uid: str) -> tuple[int, str]:
        return int(groups[uid][0][1].get("SeriesNumber") or 0), uid

    return {uid: groups[uid] for uid in sorted(groups, key=number)}


def _choose(path: Path, groups: dict[str, list], series: str | None, flag: str) -> list:
    if series in groups:
        return groups[series]
    if series is not None and series.isdecimal() and 1 <= int(series) <= len(groups):
        return list(groups.values())[int(series) - 1]
    if series is None and len(groups) == 1:
        return next(iter(groups.values()))
    lines = []
    for i, group in enumerate(groups.values(), 1):
        ds = group[0][1]
        images = sum(int(d.get("NumberOfFrames") or 1) for _, d in group)
        kind = ds.get("Modality") or "unknown modality"
        lines.append(f"{i}: {kind}, {images} images of {ds.Rows}x{ds.Columns}")
    wrong = "" if series is None else f"no series {series!r}; "
    listed = "; ".join(lines)
    raise ValueError(f"{path}: {wrong}choose by {flag} one of {len(groups)} series: {listed}")


def _planes(file: Path, ds: pydicom.Dataset) -> list[Plane]:
    """The planes of one file: itself, or its frames."""
    colours = ds.get("PhotometricInterpretation", "unknown")
    if colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"{file}: colours are {colours}, expected grey values (MONOCHROME)")
    if "ModalityLUTSequence" in ds:
        raise ValueError(f"{file}: has a table of values, expected a rescale slope and intercept")
    try:
        if "PerFrameFunctionalGroupsSequence" in ds:
            return [_enhanced_plane(file, ds, i) for i in range(int(ds.NumberOfFrames))]
        frames = int(ds.get("NumberOfFrames") or 1)
        place = ds
        if "ImagePositionPatient" not in ds and "DetectorInformationSequence" in ds:  # NM
            place = ds.DetectorInformationSequence[0]
        first = _plane(file, 0, place, place, ds, ds)
        if frames == 1:
            return [first]
        if "RECON TOMO" not in ds.ImageType:  # else the frames are times or gates, not slices
            raise ValueError("frames without a place")
        gap = float(ds.get("SpacingBetweenSlices") or ds.SliceThickness)
        step = np.cross(*first.directions) * gap
        return [first._replace(frame=i, position=first.position + i * step) for i in range(frames)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
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
    place, turn = group("PlanePositionSequence"), group("PlaneOrientationSequence")
    return _plane(file, i, place, turn, measures, rescale)


def _plane(file: Path, i: int, place, turn, measures, rescale) -> Plane:
    directions = np.array(turn.ImageOrientationPatient, dtype=float).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(directions[0] @ directions[1]) > 1e-2:
        raise ValueError("not an orientation")
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    plane = Plane(
        file,
        i,
        np.array(place.ImagePositionPatient, dtype=float).reshape(3),
        directions / lengths[:, None],
        np.array(measures.PixelSpacing, dtype=float).reshape(2),
        (int(measures.Rows), int(measures.Columns)),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )
    if not all(np.isfinite(v).all() for v in plane[2:]) or plane.spacing.min() <= 0:
        raise ValueError("not finite")
    return plane


# --- geometry --------------------------------------------------------------------------------


def _stack(path: Path, planes: list[Plane]) -> tuple[list[Plane], np.ndarray]:
    """Planes ordered along their normal, and the affine (RAS) of their stack.

    Raises ValueError where they are not one even stack.
    """
    first = planes[0]
    for what, same in (
        ("orientations", lambda p: np.allclose(p.directions, first.directions, atol=1e-3)),
        ("sizes", lambda p: p.size == first.size),
        ("pixel spacings", lambda p: np.allclose(p.spacing, first.spacing, rtol=1e-3)),
    ):
        others = [p for p in planes if not same(p)]
        if others:
            raise ValueError(
                f"{path}: mixed {what} in one series: {len(planes) - len(others)} images as "
                f"{_name(first)}, {len(others)} otherwise ({_name(others[0])}, …)"
            )
    normal = np.cross(*first.directions)
    planes = sorted(planes, key=lambda p: float(p.position @ normal))
    depth = np.array([p.position @ normal for p in planes])
    steps = np.diff(depth)
    if (steps < SAME).any():
        i = int(np.argmax(steps < SAME))
        raise ValueError(
            f"{path}: duplicate slices, {int((steps < SAME).sum())} positions occur twice or more: "
            f"{_name(planes[i])} and {_name(planes[i + 1])} lie both at {depth[i]:.2f} mm"
        )
    thick = 1.0
    if len(planes) > 1:
        _check_even(path, planes, depth)
        column = (planes[-1].position - planes[0].position) / (len(planes) - 1)
    else:
        ds = pydicom.dcmread(first.path, stop_before_pixels=True, specific_tags=TAGS)
        thick = float(ds.get("SliceThickness") or ds.get("SpacingBetweenSlices") or 1)
        column = normal * thick
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = column, planes[0].position
    return planes, RAS_LPS @ affine


def _check_even(path: Path, planes: list[Plane], depth: np.ndarray) -> None:
    """ValueError if slices are missing, unevenly spaced, or not in one line."""
    steps = np.diff(depth)
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    gaps = [(a, b, s) for (a, b), s in zip(pairwise(planes), steps, strict=True) if s > 1.5 * usual]
    if gaps and (np.abs(steps / usual - np.rint(steps / usual)) < UNEVEN).all():
        a, b, step = gaps[0]
        missing = sum(round(s / usual) - 1 for *_, s in gaps)
        raise ValueError(
            f"{path}: {missing} slices missing in {len(gaps)} gaps: {step:.2f} mm from {_name(a)} "
            f"to {_name(b)}, expected {usual:.2f} mm"
        )
    even = np.linspace(planes[0].position, planes[-1].position, len(planes))
    off = np.linalg.norm([p.position for p in planes] - even, axis=1)
    if off.max() > UNEVEN * usual:
        raise ValueError(
            f"{path}: slices are unevenly spaced ({steps.min():.2f} to {steps.max():.2f} mm) or "
            f"not in one line: {_name(planes[int(off.argmax())])} is {off.max():.2f} mm off"
        )


def _name(plane: Plane) -> str:
    return f"{plane.path.name} frame {plane.frame + 1}" if plane.frame else plane.path.name


# --- pixels ----------------------------------------------------------------------------------


def _pixels(planes: list[Plane]) -> np.ndarray:
    """Rescaled values (I, J, K) float32 of ordered planes; each file is opened once."""
    rows, columns = planes[0].size
    volume = np.empty((len(planes), rows, columns), np.float32)
    wanted: dict[Path, dict[int, int]] = {}
    for k, plane in enumerate(planes):
        wanted.setdefault(plane.path, {})[plane.frame] = k
    for path, frames in wanted.items():
        for i, pixels in enumerate(_decoded(path)):
            if i in frames:
                k = frames[i]
                np.multiply(pixels, planes[k].slope, out=volume[k], casting="unsafe")
                volume[k] += planes[k].intercept
    return volume.T


def _decoded(path: Path):
    """The stored values of a file's frames, one (rows, columns) after the other."""
    ds = pydicom.dcmread(path)
    syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    if syntax is None:
        raise ValueError(f"{path}: no transfer syntax, its pixels cannot be read")
    if syntax.is_compressed:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            raise ValueError(f"{path}: {syntax.name} is not an image compression we read") from None
        if not available:
            raise ValueError(f"{path}: compressed as {syntax.name}, {_plugin(syntax.name)}")
    try:
        for i in range(int(ds.get("NumberOfFrames") or 1)):
            yield pixel_array(ds, index=i)
    except Exception as error:  # decoders of strange bytes may stumble in any way
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: truncated, damaged, or compressed in a way that needs another plugin "
            f"({syntax.name}; {reason})"
        ) from None


def _as_displayed(path: Path, volume: Volume, kinds: set[str]) -> None:
    """Invert MONOCHROME1, whose smallest value is displayed white, unless values are a measure.

    The standard inverts after rescale and window, so slices of different slopes stay comparable.
    """
    if "MONOCHROME1" not in kinds:
        return
    if volume.modality in MEASURED:
        volume.notes.append("MONOCHROME1, values kept")
        return
    if len(kinds) > 1:
        raise ValueError(f"{path}: mixed MONOCHROME1 and MONOCHROME2 in one series")
    np.subtract(volume.data.min() + volume.data.max(), volume.data, out=volume.data)
    volume.notes.append("MONOCHROME1, inverted")


def _plugin(syntax: str) -> str:
    packages = next((p for start, p in PLUGINS.items() if syntax.startswith(start)), "python-gdcm")
    return f"which needs a plugin of pydicom: pip install {packages}"


# --- SUV -------------------------------------------------------------------------------------


def suv_factor(headers: list[pydicom.Dataset]) -> tuple[float | None, str]:
    """What turns a PET series' values into body-weight SUV (g/ml), or None and the reason why not.

    SUV = activity concentration (Bq/ml) x weight (g) / dose (Bq), the dose decayed from injection
    to the time that the scanner corrected the values to.
    """
    ds = headers[0]
    if ds.get("Modality") != "PT":
        return None, "not a PET series"
    if ds.get("Units") == "GML":
        return 1.0, ""
    if ds.get("Units") != "BQML":
        return None, "its units are not Bq/ml"
    drug = (ds.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()])[0]
    weight = float(ds.get("PatientWeight") or 0)  # kg
    dose = float(drug.get("RadionuclideTotalDose") or 0)  # Bq
    half_life = float(drug.get("RadionuclideHalfLife") or 0)  # s
    for name, value in (("weight", weight), ("injected dose", dose), ("half-life", half_life)):
        if not (np.isfinite(value) and value > 0):
            return None, f"no {name} in its header"
    if ds.get("DecayCorrection") == "ADMIN":
        return weight * 1000 / dose, ""
    if ds.get("DecayCorrection") != "START":
        return None, "its decay correction is neither START nor ADMIN"
    scan = _scan_start(headers)
    injection = _injection(drug, scan)
    if scan is None or injection is None:
        return None, "no time of injection or scan in its header"
    elapsed = (scan - injection).total_seconds()
    if not 0 <= elapsed <= 10 * half_life:
        return None, "its times of injection and scan do not fit"
    return weight * 1000 / (dose * 2 ** (-elapsed / half_life)), ""


def _scan_start(headers: list[pydicom.Dataset]) -> datetime | None:
    """The time START refers to: the series', or the first acquisition's if that was before.

    A series made later from the images carries the time when it was made.
    """
    series = _moment(headers[0].get("SeriesDate"), headers[0].get("SeriesTime"))
    acquired = [_moment(ds.get("AcquisitionDate"), ds.get("AcquisitionTime")) for ds in headers]
    return min((t for t in (series, *acquired) if t), default=None)


def _injection(drug: pydicom.Dataset, scan: datetime | None) -> datetime | None:
    stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
    if stamp:
        return _moment(stamp[:8], stamp[8:].split("+")[0].split("-")[0])
    day = scan.strftime("%Y%m%d") if scan else None
    injection = _moment(day, drug.get("RadiopharmaceuticalStartTime"))
    if injection and injection > scan:  # only the clock is known: it was the day before
        injection -= timedelta(days=1)
    return injection


def _moment(date, time) -> datetime | None:
    """A DICOM date YYYYMMDD and time HHMM[SS[.ffffff]]."""
    date, time = str(date or ""), str(time or "")
    if len(date) < 8 or len(time) < 4:
        return None
    whole, _, fraction = time.partition(".")
    moment = datetime.strptime(date[:8] + whole.ljust(6, "0")[:6], "%Y%m%d%H%M%S")
    return moment + timedelta(seconds=float(f"0.{fraction or 0}"))
