"""Files of volumes: NIfTI, Analyze, FreeSurfer, MetaImage, NRRD and DICOM in; NIfTI out.

Sources: the NIfTI-1 header (nifti1.h: sform, qform, codes), Analyze 7.5 and FreeSurfer's MGH
through nibabel; MetaImage and NRRD through SimpleITK; DICOM in volumes/dicom.py.

Legend: I J K voxels as stored; affines are RAS in mm, see volumes/grid.py.
"""

import gzip
import zlib
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from cli import UserError, stem_of
from volumes.claims import check_claim
from volumes.dicom import read_dicom
from volumes.durations import beside, mean_weights, sum_words
from volumes.grid import RAS_LPS, SCANNER, SHEAR, Volume, displacement
from volumes.varying import ALL, Choice, number_of

MAX_FIELD, MAX_HEADER = 512, 2**24  # bytes of a field, and of a line, in a header of text
NIFTI = (".nii", ".nii.gz")
PAIRS = (".hdr", ".img", ".img.gz")  # NIfTI or Analyze in two files
MGH = (".mgz", ".mgh")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
DAMAGED = (  # what nibabel raises for a file that it cannot read
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.ImageDataError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
    zlib.error,
)


def read_volume(
    path: Path, series: str | None = None, flag: str = "--series1", choice: Choice = ALL
) -> Volume:
    """A volume of any kind that we read.

    Args:
        path: a NIfTI, Analyze, MGH, MetaImage, NRRD or DICOM file, or a folder of DICOM files.
        series: which series of a DICOM folder, see `read_dicom`.
        flag: the name of that argument, for messages.
        choice: what to take of a source that holds several volumes, or says two places.

    Raises:
        UserError: no such file, a series of a file that has none, and what its reader raises.
    """
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    nibabel = name.endswith((*NIFTI, *PAIRS, *MGH))
    if path.is_file() and (nibabel or name.endswith(ITK)):
        if series is not None:
            raise UserError(f"{flag} is for DICOM, but {path} is none")
        return read_nifti(path, choice) if nibabel else read_itk(path)
    return read_dicom(path, series, flag, choice)


def read_nifti(path: Path, choice: Choice = ALL) -> Volume:
    """A grey volume of a NIfTI-1 or -2 file, or another that nibabel reads: Analyze, MGH.

    Args:
        choice: its `time` of a 4-D file; its `affine` where sform and qform differ.

    Raises:
        UserError: damaged, not 3-D and no time chosen, colour or complex voxels, not in
            millimetres.
    """
    try:
        image = nib.load(path)
        data, note = _nifti_values(path, image, choice.time)
        if isinstance(image.header, nib.Nifti1Header):
            volume = _nifti_volume(path, image, data, choice.affine)
        else:
            volume = Volume(data, _checked(image.affine, path))
            volume.placed = isinstance(image, nib.MGHImage) and image.header["goodRASFlag"] == 1
        volume.notes += [note] if note else []
        volume.chosen_by |= {"frame"} if note else set()
        volume.summed = bool(note) and choice.time == "sum"
        named = [Path(part.filename) for part in image.file_map.values()]
        named += [bids_sidecar(path)] if note and choice.time == "mean" else []
        volume.files = [file for file in named if file.is_file()]  # of a .hdr, the .img beside it
        return volume
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or not NIfTI ({_first_line(error)})") from None


def _nifti_values(path: Path, image: nib.Nifti1Image, time: str) -> tuple[np.ndarray, str]:
    """The values of nibabel's image, (I, J, K) float32, and a note on the time taken of it."""
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are RGB or complex, expected one grey value each")
    stored = Path(image.file_map["image"].filename)  # of a .hdr, the .img beside it
    packed = stored.name.lower().endswith((".gz", ".mgz"))
    check_claim(stored, image.shape, dtype.itemsize, packed)
    if len(shape) == 4:
        return _nifti_time(path, image.dataobj, shape, time)
    if len(shape) != 3:
        raise UserError(f"{path}: is {len(shape)}-D, expected one 3-D volume")
    data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    return data.reshape(shape, order="A"), ""


def _nifti_time(
    path: Path, stored: nib.arrayproxy.ArrayProxy, shape: tuple[int, ...], time: str
) -> tuple[np.ndarray, str]:
    """A point in time (I, J, K) float32 of 4-D values, or the mean or sum of all, one by one."""
    count = shape[3]
    number = number_of(time, count, f"{path}: is 4-D ({count} volumes)")
    one = [slice(None)] * 3 + [number] + [0] * (len(stored.shape) - 4)
    if number is not None:
        data = np.asarray(stored[tuple(one)], np.float32)
        return data, f"volume {number + 1} of {count}"
    weights, how = np.ones(count), sum_words(count)
    if time == "mean":
        weights, how = mean_weights(beside(bids_sidecar(path)), count)
    data = np.zeros(shape[:3], np.float32, order="F")
    for one[3], weight in enumerate(weights):
        data += np.float32(weight) * np.asarray(stored[tuple(one)], np.float32)
    return data, f"{time} of {count} volumes: {how}"


def bids_sidecar(path: Path) -> Path:
    """Where BIDS has the JSON file that describes a NIfTI file."""
    return path.with_name(f"{stem_of(path)}.json")


def _nifti_volume(path: Path, image: nib.Nifti1Image, data: np.ndarray, place: str) -> Volume:
    """Values (I, J, K) as a volume, with what its header says about its position.

    `place` is which counts where both are told, sform or qform.
    """
    header, affine = image.header, image.affine
    unit = header.get_xyzt_units()[0]
    if unit in ("meter", "micron"):
        raise UserError(f"{path}: lengths in {unit}, expected mm")
    codes = int(header["sform_code"]), int(header["qform_code"])
    code = codes[0] or codes[1] or SCANNER
    if all(codes) and place == "qform":
        affine, code = header.get_qform(), codes[1]
    volume = Volume(data, _checked(affine, path), code=code)
    volume.placed = any(codes)
    if all(codes):
        both = header.get_sform(), header.get_qform()
        apart = displacement(data.shape, *both)
        if apart > SHEAR * volume.spacing.min():
            middle = [(a @ np.append((np.array(data.shape) - 1) / 2, 1))[:3] for a in both]
            at = [f"({', '.join(f'{v:.1f}' for v in xyz)})" for xyz in middle]
            other = "qform" if place == "sform" else "sform"
            volume.chosen_by.add("affine")
            volume.notes.append(
                f"sform and qform differ by up to {apart:.3g} mm: the middle is at {at[0]} mm by "
                f"the sform, {at[1]} by the qform; the {place} counts, --affine {other} takes the "
                "other"
            )
    return volume


def read_itk(path: Path) -> Volume:
    """A MetaImage (.mha, .mhd) or NRRD (.nrrd, .nhdr) file of one grey volume.

    Raises:
        UserError: damaged, not one 3-D volume, or several values for each voxel.
    """
    _check_lines(path)
    sitk.ProcessObject.GlobalWarningDisplayOff()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        # what is packed does not say so here; the file of a header alone holds no voxels
        size = 0 if path.suffix.lower() in (".mhd", ".nhdr") else 1
        check_claim(path, reader.GetSize(), size, packed=True)
        image = reader.Execute()
    except RuntimeError as error:
        reason = _first_line(str(error).rsplit("ERROR:", 1)[-1])
        raise UserError(f"{path}: damaged or not {path.suffix} ({reason})") from None
    if image.GetDimension() != 3:
        raise UserError(f"{path}: is {image.GetDimension()}-D, expected one 3-D volume")
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: voxels are RGB or vectors, expected one grey value each")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    placed = path.suffix.lower() in (".mha", ".mhd") or "NRRD_space" in image.GetMetaDataKeys()
    data = sitk.GetArrayFromImage(image).astype(np.float32, copy=False).T
    files = [path, *_data_files(path)]
    return Volume(data, _checked(RAS_LPS @ affine, path), placed=placed, files=files)


def _data_files(path: Path) -> list[Path]:
    """The files that a header of MetaImage or NRRD names as the place of its voxels.

    Either names one file, or lists several in the lines after it, or has a pattern with a number,
    its first and last value and its step. Sources: ITK's MetaIO documentation (ElementDataFile);
    the definition of NRRD, section "Detached headers" (data file).
    """
    lines = []
    with path.open("rb") as file:
        for line in iter(partial(file.readline, MAX_HEADER), b""):
            if not line.strip() and path.suffix.lower() in (".nrrd", ".nhdr"):
                break  # the voxels follow
            lines.append(line.decode("utf-8", "replace").strip())
            if line.startswith(b"ElementDataFile") and not line.rstrip().endswith(b"LIST"):
                break
    named = []
    for number, line in enumerate(lines):
        key, sign, value = line.partition("=" if line.startswith("Element") else ":")
        if not sign or key.strip().lower() not in ("elementdatafile", "data file", "datafile"):
            continue
        words = value.split()
        if words[:1] == ["LIST"]:
            named += lines[number + 1 :]
        elif "%" in value and len(words) >= 3:
            first, last, step = (int(n) for n in [*words[1:4], "1"][:3])
            named += [words[0] % n for n in range(first, last + 1, step)]
        else:
            named.append(value.strip())
    return [file for name in named if name and (file := path.parent / name).is_file()]


def _check_lines(path: Path) -> None:
    """UserError for an overlong field in the header of a MetaImage or NRRD file.

    ITK's reader of NRRD copies a field into memory of a fixed size, and overruns it. Comments and
    the pairs of `key:=value` may be long.
    """
    with path.open("rb") as file:
        for line in iter(partial(file.readline, MAX_HEADER), b""):
            if not line.strip() or line.startswith(b"ElementDataFile"):
                return
            if len(line) > MAX_FIELD and not line.startswith(b"#") and b":=" not in line:
                raise UserError(
                    f"{path}: damaged or not {path.suffix} (a field of over {MAX_FIELD} bytes)"
                )


class Header(NamedTuple):
    """What the header of a NIfTI file says of its voxels."""

    affine: np.ndarray  # (4, 4), RAS mm; sform and qform are the same
    code: int  # NIfTI's of the space
    text: str  # description; at most 79 characters of it are kept
    slope: float = 1.0  # what a reader multiplies the stored values with


def stream_nifti(file: BinaryIO, data: np.ndarray, header: Header, packed: bool = False) -> None:
    """Write a NIfTI-1 volume to an open file.

    Args:
        data: (I, J, K), or (I, J, K, 3) uint8 RGB.
        packed: compressed by gzip. The same volume gives the same bytes.
    """
    if data.ndim == 4:
        data = data.view([(c, "u1") for c in "RGB"])[..., 0]
    image = nib.Nifti1Image(data, header.affine)
    image.set_sform(header.affine, header.code)
    image.set_qform(header.affine, header.code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = header.text.encode("ascii", "replace")[:79]
    if header.slope != 1:
        image.header.set_slope_inter(header.slope, 0)
    if packed:
        with gzip.GzipFile("", "wb", 6, file, mtime=0) as gz:  # neither name nor time in it
            image.to_stream(gz)
    else:
        image.to_stream(file)


def _checked(affine: np.ndarray, path: Path) -> np.ndarray:
    """The affine as (4, 4) float64; UserError if it is no way from voxels to millimetres."""
    affine = np.asarray(affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{path}: its affine is singular or not finite, its place is unknown")
    return affine


def _first_line(error: Exception | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
