"""Image files: reading as luma and chroma, and writing whole or not at all.

Levels are the stored values that become 0 and 1. A file of 8 bits is read from 0 to 255. One of 16
bits is read from 0 to the white that it declares, else to 65535. A file's orientation is honoured.

Luma is BT.601, in [0, 1]. Chroma is what colour adds to it, RGB - luma, so exchanging the luma of a
colour image keeps its Cb and Cr.

Legend: H W pixels. Images are uint8, (H, W) grey or (H, W, 3) RGB, unless said otherwise.
"""

import ctypes
import hashlib
import io
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image

import limits
from args_setting import EXTENSIONS, TASKS
from cli import UserError

FORMATS = ("PNG", "TIFF", "JPEG", "BMP")  # Pillow would also take others, whatever the name says
NO_IMAGE = "damaged or not an image, expected PNG, TIFF, JPEG or BMP"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations in which rows become columns
BT601 = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # R, G, B
# tags of TIFF; Orientation is one of EXIF, too
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, MAX_SAMPLE_VALUE = 258, 262, 274, 281


class Reading(NamedTuple):
    """What the user says of how a file is to be read."""

    levels: str | tuple[int, int] = "auto"  # auto, full (0 to 255 or 65535), or black and white
    page: int | None = None  # from 1; None: the file's only page


class Pixels(NamedTuple):
    """The stored values of an image, upright, and its levels."""

    values: np.ndarray  # uint8 or uint16, (H, W) or (H, W, 3) in RGB order
    black: int  # the value that becomes 0
    white: int  # the value that becomes 1; less than `black` where the file counts from white


AS_STORED = Reading()


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name; what macOS keeps of one, `._x.png`, is none."""
    return (
        path.suffix.lower() in EXTENSIONS and not path.name.startswith("._") and not path.is_dir()
    )


class Quiet:
    """Keeps libraries from printing while a file is read; our own error says what is wrong.

    The switch counts for the whole process, and several threads may read at once. So the first
    reader switches, and the last one switches back.
    """

    def __init__(self, switch: Callable[[ExitStack], None]):
        """`switch` makes them quiet, and registers with a stack how that is undone."""
        self.switch, self.undo = switch, ExitStack()
        self.lock, self.readers = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.readers += 1
            if self.readers == 1:
                self.switch(self.undo)

    def __exit__(self, *error) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                self.undo.close()


def decoders_without_words(undo: ExitStack) -> None:
    """Pillow, its libtiff and OpenCV print nothing until `undo` is closed."""
    undo.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", module=r"PIL\.")
    opencv = cv2.utils.logging
    undo.callback(opencv.setLogLevel, opencv.getLogLevel())
    opencv.setLogLevel(opencv.LOG_LEVEL_SILENT)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with suppress(AttributeError, OSError):  # where libtiff is no library of its own
            setter = getattr(ctypes.CDLL(Image.core.__file__), name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            undo.callback(setter, setter(None))


quiet_decoders = Quiet(decoders_without_words)


# --- reading ---------------------------------------------------------------------------------


def read_image(path: Path, reading: Reading = AS_STORED) -> tuple[np.ndarray, np.ndarray | None]:
    """Luma (H, W) float32 in [0, 1], and chroma (H, W, 3), None for grey.

    8 or 16 bits, PNG, TIFF, JPEG or BMP. Grey stored as three equal channels is grey.

    Raises:
        UserError: no image, a damaged one, one of several pages where `reading` names none, or
            another kind of pixel.
    """
    return luma_and_chroma(decode(path, reading))


def read_luma8(path: Path, reading: Reading = AS_STORED) -> np.ndarray:
    """Luma (H, W) of an image file in 8 bits, as the metrics take it; exact, halves round up."""
    return luma8(decode(path, reading))


def luma8(pixels: Pixels) -> np.ndarray:
    """Luma (H, W) of decoded pixels in 8 bits; exact, halves round up."""
    if pixels.values.dtype == np.uint16 or pixels[1:] != (0, 255):
        return to_uint8(luma_and_chroma(pixels)[0])
    return luma8_of(pixels.values)


def luma8_of(values: np.ndarray) -> np.ndarray:
    """Luma (H, W) of an image in 8 bits; exact, halves round up."""
    if values.ndim == 2:
        return values
    return ((values.astype(np.int32) @ [299, 587, 114] + 500) // 1000).astype(np.uint8)


def read_uint8(path: Path, reading: Reading = AS_STORED) -> np.ndarray:
    """An image file as 8-bit grey or RGB, to look at."""
    return to_uint8(*read_image(path, reading))


def luma_and_chroma(pixels: Pixels) -> tuple[np.ndarray, np.ndarray | None]:
    """Luma and chroma of decoded pixels, as `read_image` returns them."""
    values, black, white = pixels
    if values.ndim == 3 and is_grey(values):
        values = values[..., 0]
    scaled = values.astype(np.float32, order="C")
    if black:
        scaled -= black
    scaled /= white - black
    np.clip(scaled, 0, 1, out=scaled)
    if values.ndim == 2:
        return scaled, None
    luma = scaled @ BT601
    scaled -= luma[..., None]
    return luma, scaled


def is_grey(values: np.ndarray) -> bool:
    """Whether (H, W, 3) has three equal channels."""
    return all(np.array_equal(values[..., 0], values[..., k]) for k in (1, 2))


def decode(path: Path, reading: Reading = AS_STORED) -> Pixels:
    """The pixels of an image file; UserError as `read_image`."""
    data = limits.read_bytes(path, limits.IMAGE_BYTES)
    with quiet_decoders:
        try:
            opened(path, data, reading.page).verify()
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            turn_to_page(image, path, reading.page)
            values = values_of(image, data)
        except UserError:
            raise
        except Exception:  # a parser of strange bytes may stumble in any way
            values = None
        if values is None:
            raise UserError(f"{path}: {NO_IMAGE}")
        return pixels_of(path, values, image, data, reading)


def pixels_of(
    path: Path, values: np.ndarray, image: Image.Image, data: bytes, reading: Reading
) -> Pixels:
    """Decoded values as `Pixels`; UserError for a kind of pixel that we do not take."""
    if values.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: pixels are {values.dtype}, expected 8 or 16 bits")
    if values.ndim == 3:
        if values.shape[2] == 4 and values[..., 3].min() < np.iinfo(values.dtype).max:
            raise UserError(f"{path}: has transparent pixels, expected an opaque image")
        values = values[..., :3]
    return Pixels(upright(values, image), *levels_of(values, image, data, reading.levels))


def opened(path: Path, data: bytes, page: int | None = None) -> Image.Image:
    """An image as Pillow opens it, its pixels not yet decoded.

    Before anything is decoded, the headers are checked against limits.py. `page`, from 1, is the
    page whose pixels count. Raises UserError for too much, and any other error for what is no
    image.
    """
    limits.check_jpeg(path, data)
    limits.check_png(path, data)
    limits.check_tags(path, data, page)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        most = f"expected at most {limits.PIXELS / 1e6:.0f} million"
        raise UserError(f"{path}: has far too many pixels, {most}") from None
    limits.check_pixels(path, *image.size[::-1])
    return image


def header_size(path: Path, reading: Reading = AS_STORED) -> tuple[int, int]:
    """Height and width of an image as its header tells them, upright; no pixel is decoded.

    Raises UserError for a file that is no image, has too many pixels, or several pages of which
    `reading` names none.
    """
    data = limits.read_bytes(path, limits.IMAGE_BYTES)
    with quiet_decoders:
        try:
            image = opened(path, data, reading.page)
            turn_to_page(image, path, reading.page)
            width, height = image.size
            # In a PNG without EXIF before its pixels, Pillow would decode all to look behind them.
            has_exif = image.format != "PNG" or "exif" in image.info
            turn = image.getexif().get(ORIENTATION, 1) if has_exif else 1
        except UserError:
            raise
        except Exception:  # a parser of strange bytes may stumble in any way
            raise UserError(f"{path}: {NO_IMAGE}") from None
    return (width, height) if turn in SIDEWAYS else (height, width)


def values_of(image: Image.Image, data: bytes) -> np.ndarray | None:
    """(H, W), or (H, W, 3 or 4) with alpha last, of an image that Pillow has opened from `data`."""
    modes = " ".join(str(tile[3]) for tile in image.tile)  # as Pillow calls them, "RGB;16B" or so
    deep, signed = ";16" in modes or ";12" in modes, ";16S" in modes or ";16BS" in modes
    image.load()  # Pillow refuses a truncated file, which OpenCV may fill up
    if image.mode in ("I", "F", "I;16", "I;16B"):
        values = np.asarray(image)
        return values.astype(np.int16 if signed else np.uint16) if deep else values
    if deep:  # Pillow would cut colour to 8 bits
        file, page = np.frombuffer(data, np.uint8), image.tell()
        if page:
            this = (page, page + 1)  # and no other is decoded
            _, pages = cv2.imdecodemulti(file, cv2.IMREAD_UNCHANGED, range=this)
            values = pages[0] if len(pages) == 1 else None
        else:
            values = cv2.imdecode(file, cv2.IMREAD_UNCHANGED)
        return None if values is None else values[..., [2, 1, 0, 3][: values.shape[2]]]
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def turn_to_page(image: Image.Image, path: Path, page: int | None) -> None:
    """Turn to a page of a TIFF, or to a picture of an animation; UserError if it is in doubt."""
    try:
        pages = getattr(image, "n_frames", 1)
        if page is not None and 1 <= page <= pages:
            limits.check_animation(path, image, page)
            image.seek(page - 1)
    except UserError:
        raise
    except Exception as error:  # a parser of strange bytes may stumble in any way
        raise ValueError("damaged pages") from error
    if page is None and pages > 1:
        raise UserError(
            f"{path}: has {pages} pages, expected one; --page N reads page N (or --page N M, one "
            "number for each source)"
        )
    if page is not None and not 1 <= page <= pages:
        count = "1 page" if pages == 1 else f"{pages} pages"
        raise UserError(
            f"{path}: has {count}, so --page cannot be {page}; two numbers, one for "
            "each source, may differ"
        )


def upright(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """The values of a loaded image as its EXIF orientation wants them shown.

    A TIFF's own orientation was honoured by Pillow and OpenCV, which decoded it.
    """
    turn = 1
    with suppress(Exception):  # EXIF that nobody can read says nothing
        profile = "".join(image.info.get("Raw profile type exif", "").split("\n")[3:])
        limits.check_tags(Path(), bytes.fromhex(profile).removeprefix(b"Exif\0\0"))
        turn = image.getexif().get(ORIENTATION, 1)
    if turn in SIDEWAYS:
        values = values.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        values = values[::-1]
    if turn in (2, 3, 6, 7):
        values = values[:, ::-1]
    return np.ascontiguousarray(values)


# --- levels ----------------------------------------------------------------------------------


def levels_of(
    values: np.ndarray, image: Image.Image, data: bytes, levels: str | tuple[int, int]
) -> tuple[int, int]:
    """The values that become 0 and 1, by the user's word, else by the file's."""
    low, high = 0, int(np.iinfo(values.dtype).max)
    if not isinstance(levels, str):
        low, high = levels
    elif levels == "auto" and values.dtype == np.uint16:
        high = declared_white(values, image, data)
    # Pillow turns 8 bits that count from white, but not 16
    tags = getattr(image, "tag_v2", {})
    turned = values.dtype == np.uint16 and values.ndim == 2 and tags.get(PHOTOMETRIC) == 0
    return (high, low) if turned else (low, high)


def declared_white(values: np.ndarray, image: Image.Image, data: bytes) -> int:
    """The white that a file of 16 bits declares; 65535 if it declares none, or a wrong one.

    TIFF: by BitsPerSample; also by MaxSampleValue if it is the largest value of some number of
    bits, as 4095. Any other MaxSampleValue is a statistic of the image (TIFF 6.0, page 37). PNG: by
    sBIT, unless the values were scaled to 16 bits, as the specification asks for (PNG, 11.3.2.7 and
    13.12).
    """
    if image.format == "TIFF":
        bits, white = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0], 0
        with suppress(Exception):  # a tag that nobody can read says nothing
            white = int(np.max(image.tag_v2.get(MAX_SAMPLE_VALUE, 0)))
        if bits == 16 and white in [2**n - 1 for n in range(8, 16)] and values.max() <= white:
            return white
        return 2 ** min(bits, 16) - 1
    bits = max(png_chunk(data, b"sBIT")[: 3 if values.ndim == 3 else 1], default=16)
    if image.format != "PNG" or not 1 <= bits < 16 or values.max() >= 2**bits:
        return 65535
    scaled = np.rint(np.rint(values * ((2**bits - 1) / 65535)) * (65535 / (2**bits - 1)))
    was_scaled = (np.abs(values - scaled) <= 1).all() or not (values % 2 ** (16 - bits)).any()
    return 65535 if was_scaled else 2**bits - 1


def png_chunk(data: bytes, name: bytes) -> bytes:
    """What stands in a chunk of a PNG before its pixels; empty if it is not there."""
    place = 8
    while place + 8 <= len(data) and data[place + 4 : place + 8] != b"IDAT":
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] == name:
            return data[place + 8 : end]
        place = end + 4  # after the checksum
    return b""


def parse_levels(text: str) -> str | tuple[int, int]:
    """`--levels` of one source: auto, full, or LOW,HIGH; UserError for anything else."""
    if text in ("auto", "full"):
        return text
    low, _, high = text.partition(",")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) <= 65535):
        raise UserError(
            f"levels is {text!r}, expected auto, full, or LOW,HIGH from 0 to 65535, as 0,4095"
        )
    return int(low), int(high)


def readings(levels: Sequence[str], page: Sequence[int] = ()) -> tuple[Reading, Reading]:
    """How to read source 1 and 2, by `--levels` and `--page`; UserError for wrong values."""
    for name, values in (("levels", levels), ("page", page)):
        if len(values) > 2:
            raise UserError(f"{name} has {len(values)} values, expected one, or one a source")
    black_white = [parse_levels(text) for text in levels or ("auto",)]
    pages = page or (None,)
    return Reading(black_white[0], pages[0]), Reading(black_white[-1], pages[-1])


class Doubts:
    """What is odd about the sources of many pairs for a task: a line for each kind of doubt."""

    def __init__(self, task: str):
        self.modalities = (TASKS[task], "MRI") if task in TASKS else ("", "")
        self.lines: dict[str, list[str]] = {}

    def add(self, path: Path, pixels: Pixels, source: int, reading: Reading = AS_STORED) -> None:
        """Look at source 1 or 2 of a pair."""
        values, black, white = pixels
        most, modality = int(values.max()), self.modalities[source - 1]
        if reading.levels == "auto" and max(black, white) == 65535 and 0 < most < 2**14:
            likely = next(2**bits - 1 for bits in (8, 12, 14) if most < 2**bits)
            flag = f"0,{likely} auto" if source == 1 else f"auto 0,{likely}"
            self._note(
                f"dark {source}",
                f"{path}: 16 bits, but no value above {most}, and white is 65535; if {likely} is "
                f"white, give --levels {flag}",
            )
        brightest = max(black, white)
        if not isinstance(reading.levels, str) and 0 < most < brightest / 8:
            bits = 8 * values.dtype.itemsize
            self._note(
                f"levels {source}",
                f"{path}: {bits} bits, no value above {most}, but --levels says that {brightest} "
                "is white, so it is nearly black; --levels auto takes the file's own",
            )
        colour = values.ndim == 3 and np.ptp(values, axis=2).max() > 0.1 * abs(white - black)
        if colour and modality in ("CT", "MRI"):
            ask = "--task another" if source == 1 else "are the sources swapped"
            ask = f"is it PET or SPECT, and {ask}?"
            self._note(f"colour {source}", f"{path}: is in colour, which no {modality} is; {ask}")
        if modality in ("PET", "SPECT") and not colour and values.any():
            ask = f"the weights learned {modality} in colours; is it {modality}?"
            self._note("grey", f"{path}: is grey, but {ask}")

    def _note(self, kind: str, line: str) -> None:
        self.lines.setdefault(kind, []).append(line)

    def add_all(self, others: dict[str, list[str]]) -> None:
        """Add the lines of other doubts, by their kind."""
        for kind, lines in others.items():
            self.lines.setdefault(kind, []).extend(lines)

    def notes(self) -> list[str]:
        """The first line of each kind, and of how many other files it holds."""
        return [
            f"note: {line}" + (f" (and {len(others)} other files)" if others else "")
            for line, *others in self.lines.values()
        ]


# --- writing ---------------------------------------------------------------------------------


def to_uint8(luma: np.ndarray, chroma: np.ndarray | None = None) -> np.ndarray:
    """Luma (H, W) in [0, 1], with chroma also RGB: clipped and rounded once, here.

    With a source's chroma this is the YCbCr exchange of the luma, see `coloured`.
    """
    image = luma if chroma is None else coloured(luma, chroma)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def coloured(luma: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3) in [0, 1] of a luma (H, W) and a chroma that broadcasts to (H, W, 3).

    A very bright or dark luma leaves less room for colour than the chroma may ask for. There the
    whole chroma is scaled down, to what just fits. So the luma stays as it is, clipped to [0, 1],
    and so does the hue, the angle of Cb and Cr. Clipping each channel would move both.
    """
    luma = np.clip(luma, 0, 1)[..., None]
    room = np.where(chroma > 0, 1 - luma, luma)  # of each channel, up to white or down to black
    needed = np.abs(chroma)
    share = np.divide(room, needed, out=np.ones_like(room), where=needed > room)
    return luma + share.min(axis=-1, keepdims=True) * chroma


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image as PNG, whole or not at all."""
    write_bytes(path, png_bytes(image))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it gets the name `path` once all of it is on the disk.

    A run that is killed leaves the old file or the new one. After an error, such as a full disk,
    the old file is as it was.
    """
    part = part_of(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        # The error names no file or the temporary one, so it is raised anew. torch.save raises a
        # RuntimeError in its place, and has the OSError as context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from None
    finally:
        part.unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """The file beside `path` that holds its content until all of it is on the disk."""
    name = path.name
    if len(os.fsencode(name)) > 250:  # of the 255 bytes that file systems allow
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + ".part")


def write_together(
    writers: dict[Path, Callable[[BinaryIO], None]], remove: Iterable[Path] = ()
) -> None:
    """Write files that belong together: all of them or, after an error, none.

    All are complete on the disk, under temporary names, before the first gets its own name. Then
    the files of `remove`, which do not belong to the new ones, are removed. Then the new files get
    their names, in the dictionary's order. An OSError names the file that could not be written.
    """
    parts = {path: part_of(path) for path in writers}
    path = None
    try:
        for path, write in writers.items():
            with parts[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path in remove:
            path.unlink(missing_ok=True)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def png_bytes(image: np.ndarray) -> bytes:
    """The file of an image as PNG: (H, W) grey or (H, W, 3) RGB, uint8 or uint16."""
    image = image if image.ndim == 2 else image[..., ::-1]
    return cv2.imencode(".png", image)[1].tobytes()


def writable_folder(path: Path) -> Path:
    """Make the folder and prove that a file can be written there; OSError that names it if not.

    Processes that try the same folder at once, as torchrun's do, get a file each.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(prefix=".probe", suffix=".part", dir=path):
            return path
    except OSError as error:
        reason = f"cannot write into this folder: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from None
