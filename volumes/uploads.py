"""What a stranger may upload as a volume: a NIfTI or MGH file, a DICOM file, or a zip of DICOM.

Each limit is checked before what it limits takes up memory or disk. MetaImage and NRRD are not
taken: their headers may name any other file of this machine as the place of their voxels.
Source: the end of a zip's central directory as in PKWARE's APPNOTE.TXT, 4.3.
"""

import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import limits
from cli import UserError, has_dicom_mark
from images import EXTENSIONS
from volumes.dicom import SIZE, read_dataset_of
from volumes.io import DAMAGED, MGH, NIFTI, opened_nifti
from volumes.series import frame_count

END, END64 = b"PK\5\6", b"PK\6\7"  # a zip's last record, and what comes before it in Zip64
BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
)
EXPECTED = "expected .nii, .nii.gz, .mgz, or a zip of DICOM"


def check_upload(file: Path, megabytes: float) -> None:
    """UserError for a file that is too long, or of a kind that is not taken."""
    length = file.stat().st_size / 2**20
    name = file.name.lower()
    if length > megabytes:
        raise UserError(f"{file} has {length:.4g} MB, expected at most {megabytes:g} MB")
    if not length:
        raise UserError(f"{file} is empty, {EXPECTED}")
    if name.endswith(tuple(EXTENSIONS)):
        raise UserError(f"{file} is an image, {EXPECTED}; the tab Images takes it")
    if name.endswith((*NIFTI, *MGH, ".zip")):
        return
    if not has_dicom_mark(file):
        raise UserError(f"{file}: {EXPECTED}")


def source_of(file: Path, folder: Path, megabytes: float, voxels: float) -> Path:
    """What `read_volume` takes for an upload: the file, or a new folder below `folder`.

    Args:
        megabytes: the largest upload, in 2^20 bytes.
        voxels: the most that a volume, or a series with its copies, may have.

    Raises:
        UserError: as `check_upload`, or more voxels, or a zip that is damaged, encrypted, too
            large when unpacked, or without DICOM.
    """
    check_upload(file, megabytes)
    name = file.name.lower()
    if name.endswith((*NIFTI, *MGH)):
        check_voxels(file, nifti_voxels(file), voxels)
        return file
    source = file
    if name.endswith(".zip"):
        source = folder / file.name  # messages name it as they would the zip
        source.mkdir(parents=True)
        unpack(file, source, limits.UNPACKED_TIMES * megabytes * 2**20)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    elements = limits.Elements(file, file.stat().st_size)
    check_voxels(file, sum(dicom_voxels(path, elements) for path in files), voxels)
    return source


def check_voxels(file: Path, count: int, most: float) -> None:
    """UserError for more voxels than the page takes, or than are taken anywhere."""
    most = min(most, limits.VOXELS)
    if count > most:
        raise UserError(
            f"{file} has {count / 1e6:.4g} million voxels, expected at most {most / 1e6:g}; "
            "crop it, or use test_asfe.py"
        )


def nifti_voxels(file: Path) -> int:
    """Voxels that the header of a NIfTI or MGH file claims; UserError if it cannot hold them."""
    try:
        with opened_nifti(file) as image:
            return limits.product(image.shape)
    except UserError:
        raise
    except DAMAGED:
        return 0  # `read_volume` says what is wrong


def dicom_voxels(file: Path, elements: limits.Elements) -> int:
    """Voxels that the header of a DICOM file claims; 0 for any other file.

    `elements` is what may still be read of the whole upload; UserError if that is too much.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote values
            ds = read_dataset_of(file, SIZE, elements)
            return limits.product((ds.Rows, ds.Columns, frame_count(ds)))
    except UserError:
        raise
    except Exception:  # a parser of strange bytes may stumble in any way; `read_volume` tells
        return 0


# --- zips ------------------------------------------------------------------------------------


def unpack(file: Path, folder: Path, most: float) -> None:
    """The files of a zip as `folder`/00001, 00002 and so on, at most `most` bytes in all.

    Its own names are not used: they may lead out of the folder, or name a patient. Lengths are
    counted as they come, whatever the zip says of them.
    """
    check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            check_entries(file, entries)
            for number, entry in enumerate(entries, 1):
                with (folder / f"{number:05}").open("wb") as out:
                    for part in parts_of(archive, entry):
                        most -= len(part)
                        if most < 0:
                            raise UserError(f"{file} is too large when unpacked; send one series")
                        out.write(part)
    except UserError:
        raise
    except BAD_ZIP:
        raise UserError(f"{file}: damaged or not a zip; pack the DICOM files again") from None


def parts_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """The content of a file of a zip, part by part; raises one of BAD_ZIP if it is damaged."""
    try:
        with archive.open(entry) as packed:
            while part := packed.read(2**20):
                yield part
    except OSError as error:  # a place in the file that cannot be
        raise zipfile.BadZipFile from error


def check_directory(file: Path) -> None:
    """UserError for a list of entries that would fill the memory, before it is read."""
    with file.open("rb") as content:
        length = content.seek(0, 2)
        content.seek(max(0, length - 2**16 - 22 - 20))
        tail = content.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) < at + 22:
        raise UserError(f"{file}: damaged or not a zip; pack the DICOM files again")
    size = struct.unpack("<L", tail[at + 12 : at + 16])[0]
    if size > limits.DIRECTORY_BYTES or END64 in tail[max(0, at - 20) : at]:
        raise UserError(f"{file} has too many files; pack only one series")


def check_entries(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    """UserError for entries that are too many, encrypted, oddly packed, or no DICOM."""
    if not entries or len(entries) > limits.ENTRIES:
        raise UserError(
            f"{file} has {len(entries)} files, expected 1 to {limits.ENTRIES}: one series"
        )
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{file} is encrypted; pack the DICOM files again without a password")
    if any(e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for e in entries):
        raise UserError(f"{file} is packed in an unusual way; pack it again as a plain zip")
    if any(entry.filename.lower().endswith((*NIFTI, *MGH)) for entry in entries):
        raise UserError(f"{file} holds a NIfTI or MGH file; give that file itself, without the zip")
