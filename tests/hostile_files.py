"""Files that someone could make to fill a machine or to stop it: each small, each once worked."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
from dicom_files import write_enhanced, write_series
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit
from volume_files import affine_of, numbered, write

SHAPE = (20, 18, 16)
EXPLICIT, DEFLATED = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"


# --- images ----------------------------------------------------------------------------------


def png(image: Image.Image, **how) -> bytes:
    return saved(image, "PNG", **how)


def saved(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def many_scans(count: int = 40_000, side: tuple[int, int] = (1024, 1024)) -> bytes:
    """A progressive JPEG whose last scan is there many times: 12 bytes each."""
    data = saved(Image.new("L", side, 90), "JPEG", progressive=True)
    header = data[: data.index(b"\xff\xda")]
    refine = b"\xff\xda\x00\x08\x01\x01\x00\x01\x05\x00"  # coefficients 1 to 5, all of them 0
    return header + data[data.index(b"\xff\xda") : -2] + (refine + b"\x00") * count + b"\xff\xd9"


def second_page(side: int = 6000) -> bytes:
    """A TIFF of two pages, of which the second one is large."""
    pages = [Image.new("L", (32, 32)), Image.new("RGB", (side, side))]
    return saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")


def heavy_tags(tags: int = 4000, length: int = 500_000) -> bytes:
    """EXIF, which is a TIFF, whose tags all have the same long value."""
    entries = b"".join(
        struct.pack("<HHII", 40_000 + n, 1, length, 8 + 2 + 12 * tags + 4) for n in range(tags)
    )
    return b"II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4 + length)


def png_with_exif() -> bytes:
    data, exif = png(Image.new("L", (32, 32))), heavy_tags()
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + zlib.crc32(b"eXIf" + exif).to_bytes(4)
    return data[:33] + chunk + data[33:]


def jpeg_with_exif() -> bytes:
    data = saved(Image.new("L", (32, 32)), "JPEG")
    exif = b"Exif\0\0" + heavy_tags(3000, 20_000)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


def many_pages(count: int = 100_000) -> bytes:
    """A TIFF of empty directories, one after the other."""
    page = saved(Image.new("L", (32, 32)), "TIFF")
    start = len(page)
    links = b"".join(struct.pack("<HI", 0, start + 6 * (n + 1)) for n in range(count))
    at = struct.unpack_from("<I", page, 4)[0]
    end = at + 2 + 12 * struct.unpack_from("<H", page, at)[0]
    return page[:end] + struct.pack("<I", start) + page[end + 4 :] + links + bytes(6)


def huge_tile() -> bytes:
    """A TIFF of 64 x 64 pixels in a tile of 60,000 x 60,000."""
    data = bytearray(saved(Image.new("L", (64, 64)), "TIFF", compression="tiff_deflate"))
    at = struct.unpack_from("<I", data, 4)[0]
    tags = {0x116: 0x142, 0x111: 0x144, 0x117: 0x145}  # strips become tiles
    count, more = struct.unpack_from("<H", data, at)[0], []
    for n in range(count):
        entry = bytes(data[at + 2 + 12 * n : at + 14 + 12 * n])
        tag = struct.unpack_from("<H", entry)[0]
        more.append(struct.pack("<H", tags.get(tag, tag)) + entry[2:])
        if tag == 0x116:
            more[-1] = struct.pack("<HHII", 0x142, 4, 1, 60_000)
            more.append(struct.pack("<HHII", 0x143, 4, 1, 60_000))
    place = len(data)
    data[4:8] = struct.pack("<I", place)
    more.sort(key=lambda entry: entry[:2][::-1])
    return bytes(data) + struct.pack("<H", len(more)) + b"".join(more) + bytes(4)


def animation(count: int = 4000, side: int = 2000) -> bytes:
    """A PNG that says it has many pictures."""
    frames = [Image.new("L", (side, side), k) for k in range(3)]
    data = png(frames[0], save_all=True, append_images=frames[1:])
    at = data.index(b"acTL")
    control = b"acTL" + struct.pack(">II", count, 0)
    return data[:at] + control + zlib.crc32(control).to_bytes(4) + data[at + 16 :]


# --- volumes ---------------------------------------------------------------------------------


def nifti(folder: Path, data: np.ndarray | None = None, affine: np.ndarray | None = None) -> bytes:
    """A file of NIfTI-1."""
    data = numbered(SHAPE) if data is None else data
    affine = affine_of("identity") if affine is None else affine
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    image.to_filename(folder / "good.nii")
    return (folder / "good.nii").read_bytes()


def extended(folder: Path, length: int = 1_500_000_000) -> bytes:
    """A packed NIfTI file with an extension so long, of zeros."""
    data = bytearray(nifti(folder))
    data[108:112] = struct.pack("<f", 352 + length)
    data[348:352] = b"\1\0\0\0"
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    out = packer.compress(bytes(data[:352]) + struct.pack("<ii", length, 0))
    for _ in range(length // 10**7):
        out += packer.compress(bytes(10**7))
    return out + packer.compress(bytes(data[352:])) + packer.flush()


def many_extensions(folder: Path, count: int = 2**20 - 64) -> bytes:
    """A packed NIfTI file with as many extensions of 16 bytes as fit."""
    data = bytearray(nifti(folder))
    data[108:112] = struct.pack("<f", 352 + 16 * count)
    data[348:352] = b"\1\0\0\0"
    extensions = struct.pack("<ii8x", 16, 4) * count
    return gzip.compress(bytes(data[:352]) + extensions + bytes(data[352:]))


def empty_volume(shape: tuple[int, int, int]) -> Callable[[Path], bytes]:
    """A packed NIfTI file of zeros."""

    def make(folder: Path) -> bytes:
        header = bytearray(nifti(folder)[:352])
        header[42:48] = struct.pack("<3h", *shape)
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        out = packer.compress(bytes(header))
        left = 2 * int(np.prod(shape, dtype=object))
        while left > 0:
            out += packer.compress(bytes(min(left, 10**7)))
            left -= 10**7
        return out + packer.flush()

    return make


def mgz(folder: Path) -> bytes:
    """A packed MGH file that claims 32767 x 32767 x 32767 voxels, and has 1 GB of zeros."""
    nib.MGHImage(numbered(SHAPE), affine_of("identity")).to_filename(folder / "good.mgh")
    header = bytearray((folder / "good.mgh").read_bytes()[:284])
    header[4:16] = struct.pack(">3i", 32767, 32767, 32767)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    out = packer.compress(bytes(header))
    for _ in range(100):
        out += packer.compress(bytes(10**7))
    return out + packer.flush()


def with_affine(change: Callable[[np.ndarray], np.ndarray], shape=(64, 64, 64)):
    """A NIfTI file whose affine (4, 4) was changed."""
    return lambda folder: nifti(folder, numbered(shape), change(np.eye(4)))


def sheared(affine: np.ndarray) -> np.ndarray:
    affine[0, 2], affine[1, 2] = 90.0, 90.0
    return affine


def meta(folder: Path, **fields: str) -> bytes:
    """A MetaImage file with other values of some fields of its header."""
    data = write(folder / "good", numbered(SHAPE), affine_of("identity"), "mha").read_bytes()
    head, _, voxels = data.partition(b"ElementDataFile = LOCAL\n")
    lines = [line.partition(" = ") for line in head.decode().splitlines()]
    lines = [(name, fields.pop(name, value)) for name, _, value in lines]
    lines += [*fields.items(), ("ElementDataFile", "LOCAL")]
    return "".join(f"{name} = {value}\n" for name, value in lines).encode() + voxels


def spline(side: int = 10**6) -> bytes:
    """ITK's transform of a B-spline on a grid of so many points a side."""
    fixed = f"{side} {side} {side} 0 0 0 1 1 1 1 0 0 0 1 0 0 0 1"
    return (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: BSplineTransform_double_3_3\n"
        f"Parameters: 0 0 0\nFixedParameters: {fixed}\n"
    ).encode()


def affine_text(parameters: str, fixed: str = "0 0 0", kind: str = "AffineTransform") -> bytes:
    return (
        f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}_double_3_3\n"
        f"Parameters: {parameters}\nFixedParameters: {fixed}\n"
    ).encode()


def mat(folder: Path) -> bytes:
    sitk.WriteTransform(sitk.AffineTransform(3), str(folder / "good.mat"))
    return (folder / "good.mat").read_bytes()


# --- DICOM -----------------------------------------------------------------------------------


def one_slice(folder: Path) -> bytes:
    return write_series(folder / "series", numbered(SHAPE), affine_of("identity"))[0].read_bytes()


def enhanced(folder: Path) -> bytes:
    path = write_enhanced(folder / "v.dcm", numbered(SHAPE), affine_of("identity"))
    return path.read_bytes()


def deflated(plain: bytes, more: bytes = b"") -> bytes:
    """A DICOM file of explicit fields, with more of them at its end, compressed as a whole."""
    meta_length = struct.unpack_from("<I", plain, 140)[0]
    head, rest = plain[: 144 + meta_length], plain[144 + meta_length :]
    at = head.index(b"1.2.840.10008.1.2.1\0")
    length = len(DEFLATED)
    head = head[: at - 2] + struct.pack("<H", length) + DEFLATED + head[at + len(EXPLICIT) :]
    head = head[:140] + struct.pack("<I", meta_length + length - len(EXPLICIT)) + head[144:]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return head + packer.compress(rest) + packer.compress(more) + packer.flush()


def deflated_bomb(folder: Path, length: int = 400_000_000, before: bool = False) -> bytes:
    """A deflated slice with a private field of so many zeros, before or after its pixels."""
    plain = one_slice(folder)
    group = 0x6FFF if before else 0x7FE1
    field = struct.pack("<HH2sHI", group, 0x1000, b"OB", 0, length) + bytes(length)
    if not before:
        return deflated(plain, field)
    at = plain.index(b"\xe0\x7f\x10\x00OW")
    return deflated(plain[:at] + field + plain[at:])


def deflated_pixels(folder: Path, side: int = 14_000) -> bytes:
    """A deflated slice of so many black pixels a side."""

    def change(ds, k):
        ds.Rows = ds.Columns = side
        ds.PixelData = bytes(2 * side * side)

    plain = write_series(folder / "s", numbered(SHAPE)[..., :1], np.eye(4), change=change)[0]
    return deflated(plain.read_bytes())


def many_items(folder: Path, count: int = 125_000) -> bytes:
    """A slice with a sequence of so many empty items, of those that are read."""
    plain = one_slice(folder)
    at = plain.index(b"\xe0\x7f\x10\x00OW")
    items = struct.pack("<HHI", 0xFFFE, 0xE000, 0) * count
    field = struct.pack("<HH2sHI", 0x5200, 0x9230, b"SQ", 0, len(items)) + items
    return plain[:at] + field + plain[at:]


def many_fields(count: int = 125_000) -> bytes:
    """Empty fields, that of a preamble first."""
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 8, 8, b"CS", 0) * count


def zip_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def jpeg_in_dicom(folder: Path, jpeg: bytes) -> bytes:
    """A DICOM slice of SHAPE whose compressed pixels are this JPEG."""

    def change(ds, k):
        ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = encapsulate([jpeg])

    place = write_series(folder / "jpeg", numbered(SHAPE)[..., :1], np.eye(4), change=change)[0]
    return place.read_bytes()


assert DeflatedExplicitVRLittleEndian == DEFLATED.decode()
