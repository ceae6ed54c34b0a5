"""DICOM: one series of a folder, or one file, as a volume with its position in the patient.

Sources: DICOM PS3.3 (C.7.6.2 image plane, C.7.6.3 MONOCHROME1, C.7.6.16 multi-frame functional
groups, C.11.1 modality LUT) through pydicom.

Nothing that identifies a patient leaves this room. Messages name files, numbers, codes and
geometry, never a header's free text or UID. What pydicom has to say about odd values is not passed
on.

Legend: P planes, each a (rows, columns) image; I J K voxels of a volume, see volumes/grid.py.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.pixels import get_decoder, iter_pixels
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

import limits
from cli import UserError
from volumes.decay import PRIVATE_TIMES
from volumes.durations import mean_weights, sum_words
from volumes.grid import Volume
from volumes.nuclear import check_nuclear, frames_of, place_of
from volumes.planes import Plane, Stack, evened, stack
from volumes.quiet import quiet
from volumes.series import (
    Headers,
    by_series,
    choose,
    choose_ct,
    frame_count,
    once,
    patient_of,
    refuse_mosaic,
)
from volumes.stored import UNITS, rescale_of
from volumes.suv import PHILIPS, suv_factor
from volumes.varying import (
    ALL,
    B_VALUE,
    CONTRASTS,
    TIME_FIELDS,
    Choice,
    by_time,
    chosen,
    durations_of,
    fields_of,
    frame_fields,
    largest,
)

# Only these are read from the headers at first. A patient's name is not among them; ID and date of
# birth are compared and go nowhere.
TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "PatientID", "PatientBirthDate", "ImageType", "Modality"),
    *("SeriesInstanceUID", "SeriesNumber", "FrameOfReferenceUID", "Rows", "Columns"),
    *("NumberOfFrames", "BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", "DetectorInformationSequence", "ModalityLUTSequence"),
    *("Units", "DecayCorrection", "PatientWeight", "RadiopharmaceuticalInformationSequence"),
    *("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "SUVType"),
    *("ContrastBolusAgent", "CorrectedImage", "DecayCorrectionDateTime", "TimezoneOffsetFromUTC"),
    *("Manufacturer", "PatientSex", "ActualFrameDuration", "RealWorldValueMappingSequence"),
    "SliceVector",
]
TAGS += [*CONTRASTS, *TIME_FIELDS, 0x00190010, B_VALUE, *PHILIPS]
TAGS += [tag for pair in PRIVATE_TIMES.values() for tag in pair]
SIZE = ["Rows", "Columns", "NumberOfFrames", "BitsAllocated"]
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # tags of pixel data
BARE = (b"\2\0", b"\x08\0", b"\0\x08")  # how DICOM without a preamble begins
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
MAPPING = "RealWorldValueMappingSequence"
PLUGINS = {
    "JPEG 2000": "pylibjpeg pylibjpeg-openjpeg",
    "JPEG": "pylibjpeg pylibjpeg-libjpeg",
    "High-Throughput": "pylibjpeg pylibjpeg-openjpeg",
    "RLE": "pylibjpeg pylibjpeg-rle",
}


@quiet()  # pydicom's warnings quote the header's values
def read_dicom(
    path: Path, series: str | None = None, flag: str = "--series1", choice: Choice = ALL
) -> Volume:
    """The volume of a DICOM folder (searched with its subfolders) or file, in rescaled values.

    Args:
        path: the folder or file.
        series: which series of several: its number in the list that the error shows, or its UID.
        flag: the name of that argument, for the error.
        choice: what to take of a series with several images at one place.

    Raises:
        UserError: no DICOM, several series or images at one place and no choice, two patients, RGB,
            a mosaic, slices missing or in several orientations, no position, damaged or compressed
            pixels that cannot be read.
    """
    headers, strays = _read_headers(path)
    groups = by_series(headers)
    is_via = flag == "--via"
    headers = choose_ct(path, groups) if is_via else choose(path, groups, series, flag)
    patient = patient_of(path, headers)
    headers, copies = once(headers)
    refuse_mosaic(path, headers[0][1])
    volume = _volume_of(path, headers, choice)
    volume.patient, volume.files = patient, files_below(path)
    if copies:
        volume.notes.append(f"{copies} files are copies of others, counted once")
    if strays:
        volume.notes.append(f"{strays} files are not DICOM images, left out")
    _as_displayed(path, volume, {str(ds.PhotometricInterpretation) for _, ds in headers})
    if volume.data.shape[2] == 1:
        volume.notes.append("a single slice")
    return volume


def _volume_of(path: Path, headers: Headers, choice: Choice) -> Volume:
    """The volume of one series' files, without what is known of them beside geometry and values."""
    planes = [plane for file, ds in headers for plane in _planes(file, ds)]
    planes, *notes = chosen(path, planes, choice.where)
    planes, note = largest(path, planes)
    taken = {plane.path for plane in planes}
    kept = [ds for file, ds in headers if file in taken]
    times, when = by_time(path, planes, choice.time)
    chosen_by = {flag for flag, line in (("where", notes[0]), ("frame", when)) if line}
    told = planes[0].thickness or float(kept[0].get("SpacingBetweenSlices") or 0)
    try:
        stacks = [stack(path, planes, told or 1.0) for planes in times]
    except UserError as error:
        raise UserError(f"{error} ({note})" if note else error) from None
    _check_series(path, stacks)
    if len(times[0]) == 1 and not told:
        notes.append("the thickness of its slice is not told, taken as 1 mm")
    unit = planes[0].kind[2] or str(kept[0].get("Modality"))
    counts = UNITS.get(unit) == "counts"
    weights, how = _weights(times, choice.time, counts)
    volume = Volume(_values(stacks, weights), stacks[0].affine)
    volume.chosen_by = chosen_by
    when = f"{when}: {how}" if how else when
    volume.notes = [text for text in (*notes, note, when, stacks[0].note) if text]
    volume.notes += dict.fromkeys(plane.note for plane in planes if plane.note)
    volume.origin, volume.placed = planes[0].path, all(plane.placed for plane in planes)
    volume.planes = times[0] if len(times) == 1 else []  # several are no longer what a file shows
    volume.frame_of_reference, volume.modality = (text or None for text in planes[0].kind[:2])
    volume.unit = UNITS.get(unit, "")
    _tell_suv(volume, kept)
    if len(stacks) > 1 and choice.time == "sum":
        volume.suv, volume.no_suv = None, "points in time were summed"
        volume.summed = not counts
    return volume


def _weights(times: list[list[Plane]], frame: str, counts: bool) -> tuple[np.ndarray, str]:
    """What each point in time is multiplied with before they are added, and words on it."""
    count = len(times)
    if count == 1 or frame == "sum":
        return np.ones(count), sum_words(count) if count > 1 and not counts else ""
    if counts:
        return np.full(count, 1 / count), "unweighted, as they are counts"
    return mean_weights(durations_of(times), count)


def _tell_suv(volume: Volume, headers: list[pydicom.Dataset]) -> None:
    """Add to a volume what its headers tell of SUV."""
    try:
        volume.suv, line = suv_factor(headers)
    except UNREADABLE:
        volume.suv, line = None, "its fields for SUV cannot be read"
    if volume.suv is None:
        volume.no_suv = line
    elif line:
        volume.notes.append(line)


# --- headers ---------------------------------------------------------------------------------


def _read_headers(path: Path) -> tuple[Headers, int]:
    """Every image below `path` with the header fields of TAGS, and the count of other files."""
    files = [p for p in files_below(path) if not p.name.startswith(".") and p.name != "DICOMDIR"]
    elements = limits.Elements(path, sum(file.stat().st_size for file in files))
    headers = [(file, ds) for file in files if (ds := _image_header(file, elements)) is not None]
    strays = len(files) - len(headers)
    if not headers:
        what = f"no DICOM image among its {strays} files" if path.is_dir() else "not a DICOM image"
        raise UserError(f"{path}: {what}, expected DICOM, NIfTI, MetaImage or NRRD")
    return headers, strays


def files_below(path: Path) -> list[Path]:
    """The files of a folder and its subfolders, or the file itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _image_header(file: Path, elements: limits.Elements) -> pydicom.Dataset | None:
    """The header of a DICOM image; None for any other file, UserError for a damaged one."""
    try:
        ds = read_dataset_of(file, TAGS, elements)
        is_image = "Rows" in ds and "Columns" in ds
        kind = ds.file_meta.get("MediaStorageSOPClassUID")
        if not is_image and kind is not None and kind.name.endswith("Image Storage"):
            raise EOFError("an image without its size")
        if is_image:
            _check_fields(ds)
    except InvalidDicomError:
        return None
    except (OSError, UserError):
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        raise UserError(f"{file}: damaged, its DICOM header cannot be read") from None
    return ds if is_image else None


def read_dataset_of(
    file: Path, tags: list[str | int] | None = None, elements: limits.Elements | None = None
) -> pydicom.FileDataset:
    """A file's data set, also of DICOM without its preamble and meta information.

    Such a file begins with a field of the first groups. It is not compressed.

    Args:
        tags: only these fields, and no pixels; None for all.
        elements: how many may still be read in all of a folder; None: a file by itself.

    Raises UserError for more than limits.py allows, InvalidDicomError for no DICOM, and anything
    for a damaged file.
    """
    elements = elements or limits.Elements(file, file.stat().st_size)
    how = {"stop_before_pixels": tags is not None, "specific_tags": tags}
    with file.open("rb") as content:
        start = content.read(132)
        bare = start[128:] != b"DICM"
        if bare and (start[:2] not in BARE or len(start) < 4):
            raise InvalidDicomError
        content.seek(0)
        try:
            ds = pydicom.dcmread(elements.counted(content), force=bare, **how)
        except limits.WholeError:  # what is left is one piece, compressed
            return _inflated(file, content, tags, elements)
    ds.filename = str(file)
    if bare and "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = syntax if little else ExplicitVRBigEndian
    return ds


def _inflated(
    file: Path, content: BinaryIO, tags: list[str | int] | None, elements: limits.Elements
) -> pydicom.FileDataset:
    """The data set of an open file that is compressed as a whole, but for its meta information.

    It is unpacked as far as it is read: up to its pixels where `tags` are named, else as far as
    its pixels may reach.
    """
    start, most = content.tell(), 4 * limits.HEADER_BYTES
    if tags is None:
        head = _inflated(file, content, SIZE, elements)
        shape = frame_count(head), int(head.Rows), int(head.Columns)
        pixels = limits.product(shape) * max(int(head.get("BitsAllocated") or 8) // 8, 1)
        most += min(pixels, limits.PACKED * file.stat().st_size)
        content.seek(start)
    unpacked = limits.Inflated(content, file, most)
    before_pixels = None if tags is None else lambda tag, *_: tag in PIXELS
    named = tags and [pydicom.tag.Tag(tag) for tag in tags]
    fields = read_dataset(
        elements.counted(unpacked), False, True, stop_when=before_pixels, specific_tags=named
    )
    meta = read_file_meta_info(file)
    ds = pydicom.FileDataset(str(file), fields, b"\0" * 128, meta, False, True)
    ds.set_original_encoding(False, True, fields.original_character_set)
    return ds


def _check_fields(ds: pydicom.Dataset) -> None:
    """Any exception if a field that sorts images into series, or a number, makes no sense.

    pydicom reads a field when it is asked for it.
    """
    for name in ("SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "Rows", "Columns"):
        ds.get(name)
    ds.get("PhotometricInterpretation")
    int(ds.Rows), int(ds.Columns), int(ds.get("BitsAllocated") or 8)
    if frame_count(ds) < 1 or not all(np.isfinite(float(ds.get(n) or 0)) for n in NUMBERS):
        raise ValueError("not a number that makes sense")


def _check_size(file: Path, ds: pydicom.Dataset) -> None:
    """UserError if the file is too short for the image that its header claims.

    A compressed frame takes 8 bytes or more. One that is black takes little else, so the ratio is
    only bounded well above what such a frame of a usual size has.
    """
    syntax = ds.file_meta.get("TransferSyntaxUID")
    shape = frame_count(ds), int(ds.Rows), int(ds.Columns)
    if syntax is not None and not syntax.is_transfer_syntax:
        raise UserError(f"{file}: its transfer syntax {syntax!r} is none of DICOM; damaged")
    if syntax is not None and syntax.is_compressed:
        limits.check_claim(file, shape[:1], 8, packed=False)
        limits.check_claim(file, shape, 1 / 2**14, packed=False)
    else:
        size = int(ds.get("BitsAllocated") or 8) / 8
        limits.check_claim(file, shape, size, packed=syntax is not None and syntax.is_deflated)


def _check_series(path: Path, stacks: list[Stack]) -> None:
    """UserError for planes that are too many together, or that lie implausibly far apart."""
    planes, affine, at, _ = stacks[0]
    length = sum(file.stat().st_size for file in {p.path for s in stacks for p in s.planes})
    shape = len(planes) if at is None else len(at), *planes[0].size
    limits.check_claim(path, shape, 0, packed=True, length=length)
    limits.check_spacing(path, np.linalg.norm(affine[:3, :3], axis=0))


# --- planes ----------------------------------------------------------------------------------


def _planes(file: Path, ds: pydicom.Dataset) -> list[Plane]:
    """The planes of one file: itself, or its frames."""
    _check_size(file, ds)
    colours = ds.get("PhotometricInterpretation", "unknown")
    if colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{file}: colours are {colours}, expected grey values (MONOCHROME)")
    if "ModalityLUTSequence" in ds:
        raise UserError(f"{file}: has a table of values, expected a rescale slope and intercept")
    count = frame_count(ds)
    if count > 1:
        check_nuclear(file, ds)
    try:
        if "PerFrameFunctionalGroupsSequence" in ds:
            return [_enhanced_plane(file, ds, i) for i in range(count)]
        place, placed = place_of(ds)
        first = _plane(file, 0, place, place, ds)
        first = _rescaled(first, ds, ds.get("RealWorldValueMappingSequence"), ds)
        first = first._replace(fields=fields_of(ds), placed=placed)
        return [first] if count == 1 else frames_of(first, ds)
    except UserError:
        raise
    except UNREADABLE:
        raise UserError(
            f"{file}: does not say where its image lies (position, orientation, pixel spacing); "
            "give the original slices of the scan"
        ) from None


def _enhanced_plane(file: Path, ds: pydicom.Dataset, i: int) -> Plane:
    """Frame `i` of an enhanced multi-frame file; each group is per frame, or shared by all."""
    groups = [ds.PerFrameFunctionalGroupsSequence[i]]
    groups += list(ds.get("SharedFunctionalGroupsSequence") or [])

    def group(name: str) -> pydicom.Dataset:
        return next((g[name].value[0] for g in groups if name in g), pydicom.Dataset())

    measures = group("PixelMeasuresSequence")
    measures.Rows, measures.Columns = ds.Rows, ds.Columns
    position, orientation = group("PlanePositionSequence"), group("PlaneOrientationSequence")
    plane = _plane(file, i, position, orientation, measures)
    mappings = next((g.RealWorldValueMappingSequence for g in groups if MAPPING in g), None)
    plane = _rescaled(plane, group("PixelValueTransformationSequence"), mappings, ds)
    return plane._replace(fields=frame_fields(groups))


def _rescaled(plane: Plane, rescale: pydicom.Dataset, mappings, ds: pydicom.Dataset) -> Plane:
    """The plane with what its stored values stand for, see stored.py; `ds` is its file's header."""
    slope, intercept, unit, note = rescale_of(plane.path, rescale, list(mappings or ()), ds)
    if not np.isfinite([slope, intercept]).all():
        raise ValueError("not finite")
    kind = tuple(str(ds.get(name) or "") for name in ("FrameOfReferenceUID", "Modality"))
    if unit and not ds.get("Units"):
        ds.Units = unit  # for SUV
    shown = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    seen = float(1 if shown[0] is None else shown[0]) or 1.0, float(shown[1] or 0)
    plane = plane._replace(slope=slope, intercept=intercept, rescale=seen)
    return plane._replace(note=note, kind=(*kind, unit))


def _plane(
    file: Path,
    i: int,
    position: pydicom.Dataset,
    orientation: pydicom.Dataset,
    measures: pydicom.Dataset,
) -> Plane:
    """Frame `i` of a file, from the data sets that hold its fields.

    Raises one of UNREADABLE for fields that are missing or make no sense.
    """
    directions = np.array(orientation.ImageOrientationPatient, dtype=float).reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2) or abs(directions[0] @ directions[1]) > 1e-2:
        raise ValueError("not an orientation")
    plane = Plane(
        file,
        i,
        np.array(position.ImagePositionPatient, dtype=float).reshape(3),
        directions / lengths[:, None],
        np.array(measures.PixelSpacing, dtype=float).reshape(2),
        (int(measures.Rows), int(measures.Columns)),
        1.0,
        0.0,
        float(measures.get("SliceThickness") or 0),
    )
    if not all(np.isfinite(v).all() for v in plane[2:9]) or plane.spacing.min() <= 0:
        raise ValueError("not finite")
    return plane


# --- pixels ----------------------------------------------------------------------------------


def _values(stacks: list[Stack], weights: np.ndarray) -> np.ndarray:
    """Rescaled values (I, J, K) float32 of a stack, or several times their weights, added."""
    data = _pixels([stack.planes for stack in stacks], weights)
    return data if stacks[0].at is None else evened(data, stacks[0].at)


def _pixels(times: list[list[Plane]], weights: np.ndarray) -> np.ndarray:
    """The weighted sum of the rescaled values (I, J, P) float32 of ordered planes.

    Each file is opened once.
    """
    planes = times[0]
    volume = np.zeros((len(planes), *planes[0].size), np.float32)
    scaled = np.empty(planes[0].size, np.float32)
    # file -> frame -> index of the plane, the plane, and its weight
    wanted: dict[Path, dict[int, tuple[int, Plane, float]]] = {}
    for planes, weight in zip(times, weights, strict=True):
        for k, plane in enumerate(planes):
            wanted.setdefault(plane.path, {})[plane.frame] = k, plane, float(weight)
    for path, here in wanted.items():
        for i, pixels in enumerate(_decoded(path)):
            if i in here:
                k, plane, weight = here[i]
                np.multiply(pixels, plane.slope * weight, out=scaled, casting="unsafe")
                scaled += plane.intercept * weight
                volume[k] += scaled
    return volume.T


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """The stored values of a file's frames, one (rows, columns) after the other."""
    try:
        ds = read_dataset_of(path)
        syntax = ds.file_meta.get("TransferSyntaxUID")
        compressed = syntax is not None and syntax.is_compressed
    except UserError:
        raise
    except Exception:  # as in a header
        raise UserError(f"{path}: damaged, its DICOM fields cannot be read") from None
    if syntax is None:
        raise UserError(f"{path}: no transfer syntax, its pixels cannot be read")
    if compressed:
        _check_decoder(path, syntax)
    try:
        if compressed:
            _check_frames(path, ds)
        yield from iter_pixels(ds)
    except UserError:
        raise
    except Exception as error:  # decoders of strange bytes may stumble in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: truncated, damaged, or compressed in a way that needs another plugin "
            f"({syntax.name}; {reason})"
        ) from None


def _check_frames(path: Path, ds: pydicom.Dataset) -> None:
    """UserError for compressed frames that are of another size than the header's, or cost more.

    A decoder takes the memory that a frame asks for, whatever the header says.
    """
    size = int(ds.Rows), int(ds.Columns)
    for frame in generate_frames(ds.PixelData, number_of_frames=frame_count(ds)):
        limits.check_jpeg(path, frame, size)
        limits.check_jpeg2000(path, frame, size)


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
