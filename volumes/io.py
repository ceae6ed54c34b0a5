"""Files of volumes: NIfTI, MetaImage, NRRD and, through volumes/dicom.py, DICOM in; NIfTI out.

Sources: the NIfTI-1 header (nifti1.h: sform, qform, codes) through nibabel; MetaImage and NRRD
through SimpleITK.

Legend: I J K voxels as stored; affines are RAS in mm, see volumes/grid.py.
"""

import gzip
import zlib
from functools import partial
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813

from cli import UserError
from volumes.claims import check_claim
from volumes.dicom import read_dicom
from volumes.grid import RAS_LPS, SCANNER, SHEAR, Volume, displacement

MAX_FIELD, MAX_HEADER = 512, 2**24  # bytes of a field, and of a line, in a header of text
NIFTI = (".nii", ".nii.gz")
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


def stem_of(path: Path) -> str:
    """A file's name without the ending of its format: "ct" of "ct.nii.gz"."""
    ends = [suffix for suffix in (*NIFTI, *ITK) if path.name.lower().endswith(suffix)]
    return path.name[: -len(max(ends, key=len))] if ends else path.stem


def read_volume(path: Path, series: str | None = None, flag: str = "--series1") -> Volume:
    """A volume of any kind that we read.

    Args:
        path: a NIfTI, MetaImage, NRRD or DICOM file, or a folder of DICOM files.
        series: which series of a DICOM folder, see `read_dicom`.
        flag: the name of that argument, for messages.

    Raises:
        UserError: no such file, a series of a file that has none, and what its reader raises.
    """
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file() and name.endswith((*NIFTI, *ITK)):
        if series is not None:
            raise UserError(f"{flag} is for DICOM, but {path} is none")
        return read_nifti(path) if name.endswith(NIFTI) else read_itk(path)
    return read_dicom(path, series, flag)


def read_nifti(path: Path) -> Volume:
    """A NIfTI-1 or -2 file (.nii, .nii.gz) of one grey volume; the sform wins over the qform.

    Raises:
        UserError: damaged, not one 3-D volume, colour or complex voxels, not in millimetres.
    """
    try:
        image = nib.load(path)
        data = _nifti_values(path, image)
        return _nifti_volume(path, image.header, image.affine, data)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(f"{path}: damaged or not NIfTI ({_first_line(error)})") from None


def _nifti_values(path: Path, image: nib.Nifti1Image) -> np.ndarray:
    """The values of nibabel's image, (I, J, K) float32."""
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        more = f" ({int(np.prod(shape[3:]))} volumes)" if len(shape) > 3 else ""
        raise UserError(f"{path}: is {len(shape)}-D{more}, expected one 3-D volume")
    dtype = image.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels are RGB or complex, expected one grey value each")
    check_claim(path, image.shape, dtype.itemsize, packed=path.name.lower().endswith(".gz"))
    data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    return data.reshape(shape, order="A")


def _nifti_volume(
    path: Path, header: nib.Nifti1Header, affine: np.ndarray, data: np.ndarray
) -> Volume:
    """Values (I, J, K) as a volume, with what its header says about its position."""
    unit = header.get_xyzt_units()[0]
    if unit in ("meter", "micron"):
        raise UserError(f"{path}: lengths in {unit}, expected mm")
    codes = int(header["sform_code"]), int(header["qform_code"])
    volume = Volume(data, _checked(affine, path), code=codes[0] or codes[1] or SCANNER)
    volume.placed = any(codes)
    if all(codes):
        apart = displacement(data.shape, header.get_sform(), header.get_qform())
        if apart > SHEAR * volume.spacing.min():
            volume.notes.append(f"sform and qform differ by up to {apart:.3g} mm; the sform counts")
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
    return Volume(data, _checked(RAS_LPS @ affine, path), placed=placed)


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


def stream_nifti(
    file: BinaryIO,
    data: np.ndarray,
    affine: np.ndarray,
    code: int,
    text: str,
    slope: float = 1.0,
    packed: bool = False,
) -> None:
    """Write a NIfTI-1 volume, sform and qform the same, to an open file.

    Args:
        data: (I, J, K), or (I, J, K, 3) uint8 RGB.
        affine: RAS, mm.
        code: NIfTI's of the space.
        text: the header's description, at most 79 characters of it.
        slope: what a reader multiplies the stored values with.
        packed: compressed by gzip. The same volume gives the same bytes.
    """
    if data.ndim == 4:
        data = data.view([(c, "u1") for c in "RGB"])[..., 0]
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = text.encode("ascii", "replace")[:79]
    if slope != 1:
        image.header.set_slope_inter(slope, 0)
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
