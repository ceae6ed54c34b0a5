"""Files of volumes: NIfTI, Analyze, FreeSurfer, MetaImage, NRRD and DICOM in; NIfTI out.

Sources: the NIfTI-1 header (nifti1.h: sform, qform, codes), Analyze 7.5 and FreeSurfer's MGH
through nibabel; MetaImage and NRRD through SimpleITK, after volumes/headers.py; DICOM in
volumes/dicom.py.

Legend: I J K voxels as stored; affines are RAS in mm, see volumes/grid.py.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

import limits
from cli import UserError, stem_of
from volumes.dicom import files_below, read_dicom
from volumes.durations import beside, mean_weights, sum_words
from volumes.grid import RAS_LPS, SCANNER, SHEAR, Volume, displacement
from volumes.headers import META, check_header, claim_of, data_files, quiet_itk
from volumes.varying import ALL, Choice, number_of

NIFTI = (".nii", ".nii.gz")
PAIRS = (".hdr", ".img", ".img.gz")  # NIfTI or Analyze in two files
# of what may be read beside a NIfTI or Analyze file: the other half, SPM's affine, BIDS's sidecar
BESIDE = (".hdr", ".img", ".hdr.gz", ".img.gz", ".hdr.bz2", ".img.bz2", ".mat", ".json")
MGH = (".mgz", ".mgh")
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
KINDS = (  # of nibabel's images, in its own order
    nib.Nifti1Pair,
    nib.Nifti1Image,
    nib.Nifti2Pair,
    nib.Nifti2Image,
    nib.Spm2AnalyzeImage,
    nib.Spm99AnalyzeImage,
    nib.AnalyzeImage,
    nib.MGHImage,
)
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


def files_of(path: Path) -> list[Path]:
    """Every file that `read_volume` may open for a file or folder; some need not be there.

    Only names are looked at, and of MetaImage and NRRD the header.
    """
    name = path.name.lower()
    if path.is_dir():
        return files_below(path)
    found = [path]
    if name.endswith(ITK):
        with suppress(ValueError, OSError):  # else it is refused when it is read
            found += data_files(path)
    if name.endswith((*NIFTI, *PAIRS)):
        stem = stem_of(path).lower()
        names = [stem + end for end in BESIDE]
        found += [file for file in path.parent.iterdir() if file.name.lower() in names]
    return found


def shape_of(path: Path) -> tuple[int, ...]:
    """The voxels of a volume along its axes, as far as its header tells.

    Of DICOM it is their number only, by the bytes of the files, two for each voxel. Raises
    UserError for a damaged file.
    """
    name = path.name.lower()
    try:
        if path.is_file() and name.endswith(ITK):
            return tuple(claim_of(path).shape)
        if path.is_file() and name.endswith((*NIFTI, *PAIRS, *MGH)):
            with opened_nifti(path) as image:
                return tuple(image.shape[:3])
    except DAMAGED as error:
        raise UserError(f"{path}: damaged ({_first_line(error)})") from None
    return (sum(file.stat().st_size for file in files_below(path)) // 2,)


def read_nifti(path: Path, choice: Choice = ALL) -> Volume:
    """A grey volume of a NIfTI-1 or -2 file, or another that nibabel reads: Analyze, MGH.

    Args:
        choice: its `time` of a 4-D file; its `affine` where sform and qform differ.

    Raises:
        UserError: damaged, not 3-D and no time chosen, colour or complex voxels, not in
            millimetres.
    """
    try:
        with opened_nifti(path) as image:
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


@contextmanager
def opened_nifti(path: Path) -> Iterator[nib.spatialimages.SpatialImage]:
    """nibabel's image of a NIfTI, Analyze or MGH file, whose values are not yet read.

    What its header claims has been compared with the file. What is packed is unpacked only as far
    as the header, and then the voxels, go.

    Raises UserError, or one of DAMAGED.
    """
    kind = _kind_of(path)
    with ExitStack() as stack:
        files = kind.filespec_to_file_map(str(path))
        for holder in files.values():
            name = Path(holder.filename)
            if name.name.lower().endswith((".gz", ".mgz")) and name.exists():
                holder.fileobj = stack.enter_context(limits.Unpacked(name, limits.HEADER_BYTES))
        if "mat" in files and Path(files["mat"].filename).exists():  # of SPM: one affine
            limits.check_bytes(Path(files["mat"].filename), limits.TRANSFORM_BYTES >> 4)
            image = kind.from_file_map(files)
        else:
            image = _image_of(kind, files)
        _check_values(path, image, files["image"])
        yield image


def _kind_of(path: Path) -> type:
    """The class of nibabel for a file, by its name and first bytes."""
    if not path.stat().st_size:
        raise EOFError("empty")
    sniff = None
    for kind in KINDS:
        fits, sniff = kind.path_maybe_image(str(path), sniff)
        if fits:
            return kind
    raise nib.filebasedimages.ImageFileError("not NIfTI, Analyze or MGH")


def _image_of(kind: type, files: dict) -> nib.spatialimages.SpatialImage:
    """nibabel's image from the fixed part of its header, which is all that we use.

    nibabel itself would also read what extends a header of NIfTI, of any length, and seek what
    stands behind the voxels of MGH.
    """
    header_class = kind.header_class
    footer = header_class._ftrdtype.itemsize if kind is nib.MGHImage else 0
    size = header_class.template_dtype.itemsize - footer
    with files.get("header", files["image"]).get_prepare_fileobj("rb") as file:
        start = file.read(size)
    if len(start) < size:
        raise EOFError("its header is cut")
    header = header_class(start + bytes(footer))
    proxy = kind.ImageArrayProxy(files["image"].file_like, header.copy())
    return kind(proxy, header.get_best_affine(), header, file_map=files)


def _check_values(
    path: Path, image: nib.spatialimages.SpatialImage, holder: nib.FileHolder
) -> None:
    """UserError if the file of the values is too short for those that the header claims."""
    dtype, offset = image.get_data_dtype(), int(image.dataobj.offset)
    if not 0 <= offset <= limits.HEADER_BYTES:
        raise UserError(
            f"{path}: its header would end after {offset} bytes, expected at most "
            f"{limits.HEADER_BYTES >> 20} MB; truncated or damaged"
        )
    packed = holder.fileobj is not None
    limits.check_claim(Path(holder.filename), image.shape, dtype.itemsize, packed)
    if packed:  # from here on it may be unpacked up to the last voxel
        holder.fileobj.most = offset + limits.product(image.shape) * dtype.itemsize


def _nifti_values(path: Path, image: nib.Nifti1Image, time: str) -> tuple[np.ndarray, str]:
    """The values of nibabel's image, (I, J, K) float32, and a note on the time taken of it."""
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are RGB or complex, expected one grey value each")
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
    check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if path.suffix.lower() in META else "NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        with quiet_itk:
            reader.ReadImageInformation()
            limits.check_claim(path, reader.GetSize(), 0, packed=True, length=limits.VOXELS)
            image = reader.Execute()
            data = values_of_itk(image)
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
    files = [path, *data_files(path)]
    return Volume(data, _checked(RAS_LPS @ affine, path), placed=placed, files=files)


def values_of_itk(image: sitk.Image) -> np.ndarray:
    """The values of an image of ITK, (I, J, K) float32."""
    return np.array(sitk.GetArrayViewFromImage(image), np.float32).T


class Header(NamedTuple):
    """What the header of a NIfTI file says of its voxels."""

    affine: np.ndarray  # (4, 4), RAS mm; sform and qform are the same
    code: int  # NIfTI's of the space
    text: str  # description; at most 79 characters of it are kept
    slope: float = 1.0  # what a reader multiplies the stored values with
    unit: str = ""  # of the values, at most 15 characters, where they are a measure
    rgb_axis: bool = False  # RGB on a fourth axis, not in NIfTI's own type


def stream_nifti(file: BinaryIO, data: np.ndarray, header: Header, packed: bool = False) -> None:
    """Write a NIfTI-1 volume to an open file.

    Args:
        data: (I, J, K), or (I, J, K, 3) uint8 RGB, which `header.rgb_axis` keeps as four axes.
        packed: compressed by gzip. The same volume gives the same bytes.
    """
    if data.ndim == 4 and not header.rgb_axis:
        data = data.view([(c, "u1") for c in "RGB"])[..., 0]
    image = nib.Nifti1Image(data, header.affine)
    image.set_sform(header.affine, header.code)
    image.set_qform(header.affine, header.code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = header.text.encode("ascii", "replace")[:79]
    image.header["intent_name"] = header.unit.encode("ascii", "replace")[:15]
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
    limits.check_spacing(path, np.linalg.norm(affine[:3, :3], axis=0))
    return affine


def _first_line(error: Exception | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
