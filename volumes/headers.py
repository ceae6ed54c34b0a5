"""Headers of MetaImage and NRRD, checked before ITK reads them.

ITK's readers of both trust the header. With a dimension of -1 or 1000, or fields of the wrong
length, they write where they must not, and the whole program crashes. So every length and number is
checked here. What a field means is left to ITK.

Sources: MetaImage's reference (itk.org/Wiki/MetaIO/Documentation), the definition of NRRD
(teem.sourceforge.net/nrrd/format.html).
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import SimpleITK as sitk  # noqa: N813

import limits
from cli import UserError
from images import Quiet

META = (".mha", ".mhd")
META_TYPES = {
    "CHAR": 1, "UCHAR": 1, "SHORT": 2, "USHORT": 2, "INT": 4, "UINT": 4, "LONG": 4, "ULONG": 4,
    "LONG_LONG": 8, "ULONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
# How many numbers a field of MetaImage has, for d dimensions; other fields are words.
META_NUMBERS: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize"), lambda d: d),
    **dict.fromkeys(("Offset", "Position", "Origin", "CenterOfRotation"), lambda d: d),
    **dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), lambda d: d * d),
    **dict.fromkeys(("NDims", "HeaderSize", "CompressedDataSize"), lambda d: 1),
    **dict.fromkeys(("ElementNumberOfChannels", "ElementMin", "ElementMax"), lambda d: 1),
    **dict.fromkeys(("ElementToIntensityFunctionSlope", "SequenceID"), lambda d: 1),
    **dict.fromkeys(("ElementToIntensityFunctionOffset", "ID", "ParentID"), lambda d: 1),
    "Color": lambda d: 4,
}
NRRD_TYPES = {
    1: "signed char, int8, int8_t, uchar, unsigned char, uint8, uint8_t",
    2: "short, short int, signed short, signed short int, int16, int16_t, ushort, unsigned short, "
    "unsigned short int, uint16, uint16_t",
    4: "int, signed int, int32, int32_t, uint, unsigned int, uint32, uint32_t, float",
    8: "longlong, long long, long long int, signed long long, signed long long int, int64, "
    "int64_t, ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t, double",
}
NRRD_SIZES = {name: size for size, names in NRRD_TYPES.items() for name in names.split(", ")}
NRRD_ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
LOCAL = ("LOCAL", "Local", "local")  # the voxels of a MetaImage follow its header
OF_NO_FIELD = re.compile(r"#|[^:]*:=")  # in NRRD: a comment, or a key and its value, of any length
DETACHED_META = re.compile(r"\s*ElementDataFile\b")
RAW, TEXT, HEX = ("raw",), ("text", "txt", "ascii"), ("hex",)
PACKED = ("gzip", "gz", "bzip2", "bz2")


class Claim(NamedTuple):
    """What a header says of the voxels."""

    shape: list[int]
    itemsize: float  # bytes of a voxel in the file, at least
    packed: bool
    detached: bool  # in other files


def itk_without_warnings(undo: ExitStack) -> None:
    """ITK prints no warnings until `undo` is closed."""
    undo.callback(
        sitk.ProcessObject.SetGlobalWarningDisplay, sitk.ProcessObject.GetGlobalWarningDisplay()
    )
    sitk.ProcessObject.GlobalWarningDisplayOff()


quiet_itk = Quiet(itk_without_warnings)


def check_header(path: Path) -> None:
    """UserError for a MetaImage or NRRD file that ITK must not see, or that is not one volume."""
    try:
        claim = claim_of(path)
        files = data_files(path) if claim.detached else []
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged or not {path.suffix} ({error})") from None
    length = path.stat().st_size
    if claim.detached:
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"{path}: the file that should have its voxels is not there")
        length = sum(file.stat().st_size for file in files)
    limits.check_claim(path, claim.shape, claim.itemsize, claim.packed, length)


def claim_of(path: Path) -> Claim:
    """What a MetaImage or NRRD file says of its voxels; ValueError if it is damaged."""
    return (meta_claim if path.suffix.lower() in META else nrrd_claim)(path)


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a header of text, up to an empty one.

    Raises ValueError for a header that is too long, and for a line that has the end of a line
    within: some readers see two lines there, and some see one.
    """
    left = limits.HEADER_BYTES
    with path.open("rb") as file:
        for line in iter(partial(file.readline, left), b""):
            left -= len(line)
            if not line.strip():
                return
            if left <= 0:
                raise ValueError(f"a header of over {limits.HEADER_BYTES >> 20} MB")
            if b"\r" in line.rstrip(b"\r\n"):
                raise ValueError("a line ends within a line")
            yield line.decode("utf-8", "surrogateescape")


def fields_of(path: Path, sign: str, last: str) -> dict[str, str]:
    """The fields of a header of text, up to an empty line or the one that is called `last`.

    `sign` stands between a name and its value: "=" in MetaImage, ":" in NRRD. Raises ValueError for
    a field that is too long, or there twice, or no text. In MetaImage every line is a field, and
    its readers take a colon for a sign, too. So other lines are refused there.
    """
    fields: dict[str, str] = {}
    for line in lines_of(path):
        if sign == ":" and OF_NO_FIELD.match(line):
            continue
        if len(line) > limits.FIELD_BYTES or "\0" in line:
            raise ValueError(f"a field of over {limits.FIELD_BYTES} bytes")
        name, found, value = line.partition(sign)
        name = name.strip()
        if sign == "=" and (not found or ":" in name):
            raise ValueError("a line that is no field")
        if not found:
            continue
        if name in fields:
            raise ValueError("a field is there twice")
        fields[name] = value.strip()
        if name == last:
            break
    return fields


def numbers_of(text: str, count: int, name: str) -> list[float]:
    """So many finite numbers; ValueError for anything else."""
    found = [float(word) for word in text.split()]
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} has {len(found)} numbers, expected {count}")
    return found


def integers_of(text: str, count: int, name: str, low: int = 1) -> list[int]:
    """So many integers from `low`; ValueError for anything else."""
    words = text.split()
    if len(words) != count or not all(word.lstrip("-").isdecimal() for word in words):
        raise ValueError(f"{name} has {len(words)} values, expected {count} integers")
    found = [int(word) for word in words]
    if min(found) < low:
        raise ValueError(f"{name} is {min(found)}, expected at least {low}")
    return found


PATTERN = re.compile(r"[^%]*%0?\d{0,2}d[^%]*")  # of many names: nothing else that printf knows


def data_files(path: Path) -> list[Path]:
    """The files that a header of MetaImage or NRRD names as the place of its voxels.

    Either names one file, or lists several in the lines after it, or has a pattern with a number,
    its first and last value and its step. They need not be there. Without any the voxels are in the
    file itself. ValueError for a pattern or a list of another kind.
    """
    is_meta = path.suffix.lower() in META
    lines = []
    for line in lines_of(path):
        lines.append(line.strip())
        if is_meta and DETACHED_META.match(line) and not line.rstrip().endswith("LIST"):
            break  # the voxels follow
    names = []
    for number, line in enumerate(lines):
        key, sign, value = line.partition("=" if is_meta else ":")
        if sign and key.strip().lower() in ("elementdatafile", "data file", "datafile"):
            names += names_of(value, lines[number + 1 :])
    return [path.parent / name for name in names if name and not (is_meta and name in LOCAL)]


def names_of(value: str, following: list[str]) -> list[str]:
    """The names of the files of voxels, by a field and the lines that follow it."""
    words = value.split()
    if words[:1] == ["LIST"]:
        names = following
    elif "%" in value:
        if len(words) < 3 or not PATTERN.fullmatch(words[0]):
            raise ValueError("a pattern of names that is none")
        first, last, step = integers_of(" ".join([*words[1:4], "1"][:3]), 3, "a pattern", low=0)
        numbers = range(first, last + 1, max(step, 1))[: limits.ENTRIES + 1]
        names = [words[0] % n for n in numbers]
    else:
        names = [value.strip()]
    if len(names) > limits.ENTRIES:
        raise ValueError(f"its voxels are in over {limits.ENTRIES} files")
    return names


# --- MetaImage -------------------------------------------------------------------------------


def meta_claim(path: Path) -> Claim:
    """What the header of a MetaImage claims; ValueError if it is damaged."""
    fields = fields_of(path, "=", "ElementDataFile")
    if not {"NDims", "DimSize", "ElementType", "ElementDataFile"} <= fields.keys():
        raise ValueError("NDims, DimSize, ElementType or ElementDataFile is missing")
    dimensions = integers_of(fields["NDims"], 1, "NDims")[0]
    if dimensions > 10:
        raise ValueError(f"NDims is {dimensions}")
    if dimensions != 3:
        raise UserError(f"{path}: is {dimensions}-D, expected one 3-D volume")
    for name, count in META_NUMBERS.items():
        if name in fields:
            numbers_of(fields[name], count(dimensions), name)
    check_skips(path, fields, ("HeaderSize", "CompressedDataSize"))
    if float(fields.get("ElementNumberOfChannels", 1)) != 1:
        raise UserError(f"{path}: voxels are RGB or vectors, expected one grey value each")
    kind = fields["ElementType"].removeprefix("MET_")
    if kind not in META_TYPES:
        raise ValueError("its ElementType is none of one grey value")
    detached = fields["ElementDataFile"] not in LOCAL
    shape = integers_of(fields["DimSize"], dimensions, "DimSize")
    packed = fields.get("CompressedData", "").lower() in ("true", "1")
    return Claim(shape, META_TYPES[kind], packed, detached)


def check_skips(path: Path, fields: dict[str, str], names: tuple[str, ...]) -> None:
    """ValueError for bytes or lines to skip, or to unpack, that no file of that length has."""
    for name in names:
        if name in fields:
            number = integers_of(fields[name], 1, name, low=-1)[0]
            if number > max(path.stat().st_size, limits.HEADER_BYTES):
                raise ValueError(f"{name} is {number}")


# --- NRRD ------------------------------------------------------------------------------------


def nrrd_claim(path: Path) -> Claim:
    """What the header of a NRRD file claims; ValueError if it is damaged."""
    with path.open("rb") as file:
        if file.read(7) != b"NRRD000":
            raise ValueError("it does not begin with NRRD")
    fields = {
        NRRD_ALIASES.get(name.lower(), name.lower()): value
        for name, value in fields_of(path, ":", "").items()
    }
    if not {"dimension", "sizes", "type", "encoding"} <= fields.keys():
        raise ValueError("dimension, sizes, type or encoding is missing")
    dimensions = integers_of(fields["dimension"], 1, "dimension")[0]
    if dimensions > 16:
        raise ValueError(f"dimension is {dimensions}")
    shape = integers_of(fields["sizes"], dimensions, "sizes")
    if "spacings" in fields and len(fields["spacings"].split()) != dimensions:
        raise ValueError("spacings are not one for each dimension")
    check_skips(path, fields, ("line skip", "byte skip"))
    size = NRRD_SIZES.get(fields["type"].lower())
    if size is None:
        raise ValueError("its type is none of one grey value")
    encoding = fields["encoding"].lower()
    if encoding not in (*RAW, *TEXT, *HEX, *PACKED):
        raise ValueError("its encoding is none of NRRD's")
    size = 1 if encoding in TEXT else 2 * size if encoding in HEX else size
    return Claim(shape, size, encoding in PACKED, "data file" in fields)
