"""What one file from outside may cost: one table, and the questions that every reader asks of it.

A size is taken from a header, as a Python integer, and checked before memory is asked for. What is
packed is counted while it is unpacked. A reader that goes past a limit ends in a UserError, with
the number, the limit and a way out. docs/limits.md says the same for the owner of a server.

The last part tells what the system grants this process: cores and memory, of the machine or less.

Sources: ITU-T T.81 (JPEG: markers and scans) and T.800 (JPEG 2000: the SIZ marker), TIFF 6.0 and
BigTIFF (directories of tags), zlib's "Maximum compression factor" (1032:1), Linux's cgroups v1 and
v2 (the files that are read).
"""

import contextlib
import gzip
import io
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from args_setting import SIZES, ModelSize
from cli import UserError, return_freed_memory

# --- the table -------------------------------------------------------------------------------

# images
PIXELS = 2**25  # of the page that is read, 5792 x 5792: a mammogram has 16 million
IMAGE_BYTES = 8 * PIXELS  # of a file: four channels of 16 bits
PAGES = 1000  # of a TIFF, or pictures of an animation: each is looked at before one is read
SCANS = 64  # of a JPEG: programs write up to 20, and each one goes over all pixels
TILES = 1024  # of a JPEG 2000: each takes memory of its own
TAGS = 4096  # of a TIFF's page, or of EXIF: about 100 are in use
# volumes
VOXELS = 2**30  # of a volume as stored: 4 GiB as float32
GRID_VOXELS = 2**28  # of a grid that is made: 512 x 512 slices, 1024 of them
DENSE_VOXELS = 2**25  # from here on a file must have a byte for every VOXELS_PER_BYTE
VOXELS_PER_BYTE = 64  # a scan, also with its skull removed, has a byte for fewer than 10
SPACING = (0.01, 100.0)  # mm between voxels: microscopes and satellites are beyond
COARSER = 64  # times that one scan's voxels may be as long as the other's: the low-pass grows so
HEADER_BYTES = 2**24  # of a header, with what extends it
FIELD_BYTES = 512  # of a field in a header of text: ITK's readers have buffers of a fixed length
# DICOM
ELEMENTS = 2**19  # of a file or folder, and one more for every ELEMENT_BYTES: each takes 5 to 10 us
ELEMENT_BYTES = 16  # a real one has 40 and more
PACKED = 1032  # bytes that deflate makes of one, at most
# zips of uploads
ENTRIES = 20_000  # files
DIRECTORY_BYTES = 2**24  # of the list of files
UNPACKED_TIMES = 4  # times the largest upload
# the rest
TRANSFORM_BYTES = 2**20  # of a file with a linear transform: it holds 12 numbers
TABLE_BYTES = 2**24  # of a CSV: 100,000 rows
WEIGHTS_BYTES = 2**31  # of a file of weights: the published ones have 50 MB
CHECKPOINT_BYTES = 2**33  # of a training to resume: one of the paper size has 2.7 GB
# a child process that works on files from outside, see studies/child.py
CHILD_FILE_BYTES = 2**32  # of a file that it writes: a volume of VOXELS as float32
CHILD_OPEN_FILES = 256  # at a time: a series is read file by file
# one turn on the page; then its child process is killed
IMAGE_SECONDS = 60
VOLUME_SECONDS = 300
LOOK_SECONDS = 30  # a look at an upload or a slice
# turns on the page
WAITING = 32  # jobs that may wait for a turn
WAITING_OF_ONE = 8  # of them of one visitor
# what is promised of any file of 1 MB until it is accepted or refused; tests hold it
SECONDS = 10
MEGABYTES = 500


class TooMuchError(UserError):
    """A file went past a limit while it was unpacked or read."""


class WholeError(Exception):
    """All of a file, of any length, was asked for at once."""


# --- files -----------------------------------------------------------------------------------


def check_bytes(path: Path, most: int, what: str = "") -> int:
    """The length of a file; UserError if it is more than `most`."""
    length = Path(path).stat().st_size
    if length > most:
        size = f"{most >> 20} MB" if most >= 2**20 else f"{most} bytes"
        raise UserError(f"{path}: too large{what}, expected at most {size}")
    return length


def read_bytes(path: Path, most: int, what: str = "") -> bytes:
    """A file's content; UserError if it is longer than `most`."""
    check_bytes(path, most, what)
    with Path(path).open("rb") as file:
        return file.read(most + 1)[:most]  # it may be a pipe, whose length is not told


def read_table(path: Path) -> str:
    """The text of a CSV; UserError if it is too long, or not in UTF-8."""
    try:
        text = read_bytes(path, TABLE_BYTES, " for a table").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a CSV file in UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: not a CSV, it holds bytes that are no text")
    return text


class Unpacked(gzip.GzipFile):
    """A file of gzip, unpacked as it is read; TooMuchError for more than `most` bytes."""

    def __init__(self, path: Path, most: int):
        super().__init__(path, "rb")
        self.path, self.most = path, most

    def _check(self, end: int) -> None:
        if end > self.most:
            raise TooMuchError(
                f"{self.path}: unpacks to more than the {self.most} bytes that its header tells "
                "of; truncated or damaged"
            )

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` unpacked bytes; all that is left without it."""
        left = max(self.most - self.tell(), 0) + 1
        data = super().read(left if size is None or size < 0 else min(size, left))
        self._check(self.tell())
        return data

    def readinto(self, buffer) -> int:
        """Fill the buffer part by part, without a second copy of all of it."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (part := self.read(min(2**20, len(view) - filled))):
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place among the unpacked bytes."""
        if whence == io.SEEK_SET:
            self._check(offset)
        return super().seek(offset, whence)


class Inflated(io.RawIOBase):
    """The rest of an open file, unpacked by deflate as far as it is read, and at most `most` bytes.

    What was unpacked is kept, as a reader goes back and forth in it.
    """

    def __init__(self, file: io.BufferedIOBase, path: Path, most: int):
        self.file, self.path, self.most = file, path, most
        self.name = str(path)
        self.known, self.at = bytearray(), 0
        self.inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def _unpack_to(self, end: int) -> None:
        while len(self.known) < end and not self.inflater.eof:
            packed = self.inflater.unconsumed_tail or self.file.read(2**16)
            part = self.inflater.decompress(packed, 2**16)
            if not packed and not part:
                return
            self.known += part
            if len(self.known) > self.most:
                raise TooMuchError(
                    f"{self.path}: unpacks to more than the {self.most >> 20} MB that its header "
                    "accounts for; damaged, or not an image"
                )

    def read(self, size: int = -1) -> bytes:
        """At most `size` unpacked bytes; all that is left without it."""
        end = self.most + 1 if size is None or size < 0 else self.at + size
        self._unpack_to(end)
        data = bytes(memoryview(self.known)[self.at : end])
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place among the unpacked bytes."""
        self.at = offset if whence == io.SEEK_SET else self.at + offset
        return self.at

    def tell(self) -> int:
        """The place among the unpacked bytes."""
        return self.at


class Elements:
    """How many elements of DICOM may still be read, in one file or in all of a folder."""

    def __init__(self, path: Path, length: int):
        self.path, self.most = path, ELEMENTS + length // ELEMENT_BYTES
        self.left = self.most

    def counted(self, file: io.BufferedIOBase) -> "CountedFile":
        """The file, with its elements counted as it is read."""
        return CountedFile(file, self)


class CountedFile:
    """An open file that counts how often something is read of it: once or twice for an element.

    Raises WholeError when all that is left is asked for. pydicom does so to unpack it.
    """

    def __init__(self, file: io.BufferedIOBase, elements: Elements):
        self.file, self.elements = file, elements
        self.seek, self.tell = file.seek, file.tell
        self.name = getattr(file, "name", None)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; WholeError without a size, TooMuchError for too many elements."""
        if size is None or size < 0:
            raise WholeError
        self.elements.left -= 1
        if self.elements.left < 0:
            raise TooMuchError(
                f"{self.elements.path}: over {self.elements.most} fields in its headers; no scan "
                "has so many, leave out what is none"
            )
        return self.file.read(size)


# --- images ----------------------------------------------------------------------------------

SCAN, END_OF_IMAGE = 0xDA, 0xD9  # markers of JPEG
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}  # those that tell a size; F7: JPEG-LS
ALONE = {0x01, *range(0xD0, 0xD9)}  # those without a length
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte nor a restart
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
TIFF |= {b"II\0*": "<", b"MM*\0": ">"}  # wrong, but Pillow takes them
WIDTH, LENGTH, TILE_WIDTH, TILE_LENGTH = 256, 257, 322, 323  # tags of a TIFF
SIZES_OF_TYPES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes of a TIFF's


def check_pixels(path: Path, height: int, width: int) -> None:
    """UserError for an image with more than PIXELS."""
    if height * width > PIXELS:
        most = f"expected at most {PIXELS / 1e6:.0f} million"
        raise UserError(f"{path}: has {height}x{width} pixels, {most}")


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment of a JPEG, of which several follow each other."""
    at = 2
    while match := MARKER.search(data, at):
        marker, at = data[match.start() + 1], match.end()
        if marker == END_OF_IMAGE:  # another image may follow, as in a file of several pictures
            at = data.find(b"\xff\xd8\xff", at)
            if at < 0:
                return
        elif marker not in ALONE:
            end = at + max(int.from_bytes(data[at : at + 2], "big"), 2)
            yield marker, at + 2, end
            at = end


def check_jpeg(path: Path, data: bytes, size: tuple[int, int] | None = None) -> None:
    """UserError for a JPEG, or JPEG-LS, that costs more than its size tells.

    Args:
        data: all of it; another kind of data passes.
        size: rows and columns that it must have, as a DICOM header says; None for any up to PIXELS.
    """
    if data[:2] != b"\xff\xd8":
        return
    scans, exif = 0, []
    for marker, begin, end in segments(data):
        scans += marker == SCAN
        if scans > SCANS:
            raise UserError(f"{path}: a JPEG of over {SCANS} scans; save it again as plain JPEG")
        if marker in FRAMES:
            found = struct.unpack(">HH", data[begin + 1 : begin + 5].ljust(4, b"\0"))
            check_pixels(path, *found)
            if size and found != size:
                raise UserError(f"{path}: damaged, its image and its header differ in size")
        if marker in (0xE1, 0xE2) and data[begin : begin + 4] in (b"Exif", b"MPF\0"):
            exif.append(data[begin + (6 if marker == 0xE1 else 4) : end])
    for block in {b"".join(exif), *exif}:  # a long one comes in parts
        check_tags(path, block)


def check_jpeg2000(path: Path, data: bytes, size: tuple[int, int]) -> None:
    """UserError for a codestream of JPEG 2000 that is not of so many rows and columns, or costs
    more than they tell; other data pass."""
    at = data.find(b"\xff\x4f\xff\x51")  # SOC and SIZ
    if at < 0 or len(data) < at + 42:
        return
    right, low, left, top, tile_width, tile_height = struct.unpack_from(">6I", data, at + 8)
    components = struct.unpack_from(">H", data, at + 40)[0]
    if (low - top, right - left) != size or components > 4:
        raise UserError(f"{path}: damaged, its image and its header differ in size")
    tiles = -(-right // max(tile_width, 1)) * -(-low // max(tile_height, 1))
    if tiles > TILES:
        raise UserError(f"{path}: a JPEG 2000 of over {TILES} tiles; compress it otherwise")


def check_png(path: Path, data: bytes) -> None:
    """UserError for a PNG whose EXIF costs more than its length tells; other data pass."""
    at = len(PNG)
    while data.startswith(PNG) and at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            check_tags(path, data[at + 8 : end].removeprefix(b"Exif\0\0"))
        at = end + 4


class Directory(NamedTuple):
    """One directory of a TIFF, a page: where it is, its first values by tag, where the next is."""

    values: dict[int, int]
    cost: int  # bytes of its tags and all their values
    following: int


def directory(data: bytes, at: int, order: str, big: bool) -> Directory:
    """The directory of a TIFF at a place; struct.error if it is not all there."""
    count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
    if count > TAGS:
        raise TooMuchError(f"{count} tags")
    form = order + ("HHQ8s" if big else "HHI4s")
    at += 8 if big else 2
    values, cost = {}, count * (20 if big else 12)
    for _ in range(count):
        tag, kind, number, raw = struct.unpack_from(form, data, at)
        size = SIZES_OF_TYPES[kind] if kind < len(SIZES_OF_TYPES) else 0
        cost += size * number
        if kind in (3, 4, 16) and number == 1:
            values[tag] = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[kind], raw)[0]
        at += 20 if big else 12
    following = struct.unpack_from(order + ("Q" if big else "I"), data, at)[0]
    return Directory(values, cost, following)


def directories(data: bytes) -> Iterator[Directory]:
    """The directories of a TIFF, or of EXIF, one after the other, as far as they can be read."""
    order, big = TIFF.get(data[:4]), data[2:3] == b"+" or data[3:4] == b"+"
    with contextlib.suppress(struct.error):
        at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        seen = set()
        while at and at not in seen:
            seen.add(at)
            found = directory(data, at, order, big)
            yield found
            at = found.following


def check_tags(path: Path, data: bytes, page: int | None = None) -> None:
    """UserError for a TIFF, or EXIF, that costs more than its length tells; other data pass.

    Args:
        page: which page is read, from 1, whose pixels count then; None for the first.
    """
    if data[:4] not in TIFF:
        return
    cost, number = 0, 0
    try:
        for number, found in enumerate(directories(data), 1):
            cost += found.cost
            if number > PAGES:
                raise TooMuchError(f"over {PAGES} pages")
            if cost > 2 * len(data) + 2**16:  # several tags may share their values
                raise TooMuchError("tags that are longer than the file")
            if number == (page or 1):
                values = found.values
                check_pixels(path, values.get(LENGTH, 0), values.get(WIDTH, 0))
                check_pixels(path, values.get(TILE_LENGTH, 0), values.get(TILE_WIDTH, 0))
    except TooMuchError as error:
        raise UserError(f"{path}: damaged, it has {error}; save it again as PNG") from None


def check_animation(path: Path, image, page: int) -> None:
    """UserError for a picture of a PNG's animation that is too far on: those before are decoded.

    `image` is Pillow's.
    """
    height, width = image.size[::-1]
    if image.format == "PNG" and page * height * width > 8 * PIXELS:
        raise UserError(f"{path}: picture {page} is too far on; save that picture by itself")


# --- volumes ---------------------------------------------------------------------------------


def product(shape: Sequence[int]) -> int:
    """How many voxels a shape has, exactly, however large."""
    return math.prod(int(n) for n in shape)


def sides(shape: Sequence[int]) -> str:
    """A shape for a message, as "256x192x40"."""
    return "x".join(map(str, shape))


def check_claim(
    path: Path, shape: Sequence[int], itemsize: float, packed: bool, length: int | None = None
) -> None:
    """Compare the size in a header with the file's length, before memory is asked for.

    Args:
        path: the file.
        shape: what its header claims, of any length.
        itemsize: bytes of a voxel, at least; 0 if that is not known.
        packed: compressed by deflate, or perhaps.
        length: of the file that holds the voxels, in bytes; None: of `path`.

    Raises:
        UserError: an axis without voxels, more voxels than VOXELS or than the file can hold.
    """
    voxels = product(shape)
    claim = f"{path}: its header claims {sides(shape)} voxels"
    if min(shape, default=0) < 1:
        raise UserError(f"{claim}, expected at least one along each axis")
    length = path.stat().st_size if length is None else length
    if voxels * itemsize > length * (PACKED if packed else 1):
        raise UserError(f"{claim}, more than its {length} bytes can hold; truncated or damaged")
    if voxels > VOXELS:
        raise UserError(f"{claim}, expected at most {VOXELS}; crop or resample it")
    if voxels > max(DENSE_VOXELS, VOXELS_PER_BYTE * length):
        raise UserError(f"{claim} in {length} bytes: hardly any is not empty; crop it")
    check_memory(f"{claim}, which", voxels * BYTES_OF_VOXEL, "crop or resample it")


def check_spacing(path: Path, spacing: Sequence[float]) -> None:
    """UserError for distances of voxels, in mm, that no scan of a head has."""
    low, high = SPACING
    if not all(low <= side <= high for side in map(float, spacing)):
        found = " x ".join(f"{float(side):.3g}" for side in spacing)
        raise UserError(
            f"{path}: its voxels are {found} mm apart, expected {low:g} to {high:g} mm; export it "
            "again, or mend its header"
        )


def check_grid(what: str, shape: Sequence[int], way_out: str, most: int = GRID_VOXELS) -> None:
    """UserError, which begins with `what`, for a grid to be made with too many voxels."""
    if product(shape) > most:
        raise UserError(
            f"{what} {sides(int(n) for n in shape)} voxels, expected at most {most / 1e6:.0f} "
            f"million; {way_out}"
        )
    needed = product(shape) * BYTES_ON_GRID
    check_memory(f"{what} {sides(int(n) for n in shape)} voxels, which", needed, way_out)


def check_coarser(fine: Sequence[float], times: float) -> None:
    """UserError for voxels, in mm, that are to become so many times as long in one step."""
    if times > COARSER:
        found = " x ".join(f"{float(side):.3g}" for side in fine)
        raise UserError(
            f"voxels of {found} mm would become {times:.0f} times as long, expected at most "
            f"{COARSER} times; are both of one head? Resample one of them first"
        )


# --- what the system grants ------------------------------------------------------------------

# Bytes of memory for each pixel of a pair that is fused whole. Measured as the growth of a child
# process's largest resident set (VmHWM) by one pass, after a small one had loaded everything:
# compact 1105 to 1308 (256 x 256 to 1024 x 1024, one to four pairs, one or two threads), paper 6623
# to 7098 (256 x 256 and 512 x 512). A part of it does not grow with the image.
BYTES_OF_PIXEL = {"compact": 1200, "paper": 6500}
# The same of a pair that is fused in tiles, beside what a tile takes: a PET in colour and an MRI of
# 1536 x 1536, in tiles of 256.
BYTES_IN_TILES = 110
BYTES_OF_VOXEL = 4  # to read a volume, beside the bytes of its file: float32
# To bring two volumes onto one grid and fuse them, for each voxel of it. A process of 0.6 GB came
# to 2.5 GB with 79 million voxels (benchmarks/volume_memory.py): 24 bytes, 8 of them the sources.
BYTES_ON_GRID = 16
# What a process holds before it fuses: the libraries and a network. Measured: 0.6 and 1.4 GB.
BYTES_OF_PROCESS = {"compact": 700_000_000, "paper": 1_500_000_000}
SMALL = 2**26  # bytes: what needs less is not compared with what is free
UNLIMITED = 2**60  # what some systems write for "no limit" is above


def needed_bytes(pixels: int, size: ModelSize, batch: int = 1) -> int:
    """About how many bytes of memory the network takes for `batch` pairs of so many pixels."""
    for name, known in SIZES.items():
        if size.channels == known.channels:
            return pixels * batch * BYTES_OF_PIXEL[name]
    per_channel = BYTES_OF_PIXEL["paper"] / SIZES["paper"].channels[0]
    return int(pixels * batch * per_channel * max(size.channels[0], size.tail // 2))


def check_memory(what: str, needed: int, way_out: str) -> None:
    """UserError, which begins with `what`, for what needs more bytes of memory than are free."""
    if needed > SMALL and needed > free_bytes():
        return_freed_memory()
        free = free_bytes()
        if needed > free:
            raise UserError(
                f"{what} need about {amount(needed)} of memory, but {amount(free)} are free; "
                f"{way_out}, or take a larger machine"
            )


def amount(count: int) -> str:
    """A number of bytes for messages, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


def granted_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: by its affinity, and by the quota of its cgroups.

    `root` is the file system, for tests.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for folder in cgroups("cpu", root):
        quota, period = (*words(folder / "cpu.max"), "", "")[:2]
        if not quota:
            quota, period = (text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if number(quota) and number(period):
            cores = min(cores, number(quota) // number(period))
    return max(cores, 1)


def granted_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may ever use: of the machine, its cgroups and its limits.

    sys.maxsize where the system tells none.
    """
    bounds = [meminfo("MemTotal", root), address_space()]
    for folder in cgroups("memory", root):
        bounds += [number(text(folder / name)) for name in MEMORY_LIMITS]
    return min(filter(None, bounds), default=sys.maxsize)


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could take now, without what the system gives back.

    sys.maxsize where the system tells none.
    """
    bounds = [meminfo("MemAvailable", root)]
    if Share.most:
        bounds.append(max(Share.most - resident(root), 1))
    if address_space():
        in_use = [number(word) for word in words(root / "proc/self/statm")[:1]]
        page = os.sysconf("SC_PAGE_SIZE")
        bounds.append(max(address_space() - sum(in_use) * page, 1))
    for folder in cgroups("memory", root):
        for limit, usage in zip(MEMORY_LIMITS, MEMORY_USAGES, strict=True):
            most = number(text(folder / limit))
            if most:
                used = number(text(folder / usage)) - reclaimable(folder)
                bounds.append(max(most - used, 1))
    return min(filter(None, bounds), default=sys.maxsize)


class Share:
    """The memory that whoever started this process has granted it, as a study does for a worker."""

    most = 0  # bytes of its resident set; 0: no share was named


def resident(root: Path) -> int:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    pages = [number(word) for word in words(root / "proc/self/statm")[1:2]]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") if pages else 0


MEMORY_LIMITS = "memory.max", "memory.high", "memory.limit_in_bytes"  # v2, v2, v1
MEMORY_USAGES = "memory.current", "memory.current", "memory.usage_in_bytes"


def text(path: Path) -> str:
    """A small file of the system; empty where it is not there."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""


def words(path: Path) -> list[str]:
    """The words of a small file of the system."""
    return text(path).split()


def number(word: str) -> int:
    """A limit; 0 where there is none, as for "max" and -1."""
    return int(word) if word.isdecimal() and int(word) < UNLIMITED else 0


def reclaimable(folder: Path) -> int:
    """Bytes of a cgroup that are only copies of files, and go when memory is needed."""
    rows = (line.split() for line in text(folder / "memory.stat").splitlines())
    found = {row[0]: number(row[1]) for row in rows if len(row) == 2}
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def meminfo(name: str, root: Path) -> int:
    """A line of /proc/meminfo in bytes; 0 where the system has none."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def address_space() -> int:
    """The limit of this process's address space in bytes; 0 for none."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 0 if soft == resource.RLIM_INFINITY else soft


def cgroups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups of v2 and v1, each with those around it.

    Inside of a container a path may be the host's: then only those around it are there.
    """
    mounts = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        bases = (mounts / names, mounts / controller) if names else (mounts, mounts / "unified")
        for base in bases:
            if base.is_dir():
                parts = [part for part in Path(path).parts if part not in ("/", "..")]
                yield from (base.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))
                break
