"""Image files: reading as luma and chroma, writing whole or not at all, and contact sheets.

Luma is BT.601, in [0, 1]. Chroma is what colour adds to it, RGB - luma, so exchanging the luma of a
colour image keeps its Cb and Cr.

Legend: H W pixels. Images are uint8, (H, W) grey or (H, W, 3) RGB, unless said otherwise.
"""

import ctypes
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from cli import UserError

EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
FORMATS = ("PNG", "TIFF", "JPEG", "BMP")  # Pillow would also take others, whatever the name says
MAX_PIXELS = 2**25  # of an image: a small file may claim, and unpack to, any number
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits
BT601 = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # R, G, B
CELL, GAP, HEADER = 256, 6, 26  # pixels of a contact sheet


def silence_decoders() -> None:
    """Have Pillow, its libtiff and OpenCV not comment on odd files; our error says enough.

    Once for the process, and never around a single reading: all threads share what this changes.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with suppress(AttributeError, OSError):  # where libtiff is no library of its own
        libtiff = ctypes.CDLL(Image.core.__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)


silence_decoders()


# --- reading ---------------------------------------------------------------------------------


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Luma (H, W) float32 in [0, 1], and chroma (H, W, 3), None for grey.

    8 or 16 bits, PNG, TIFF, JPEG or BMP. Grey stored as three equal channels is grey.

    Raises:
        UserError: no image, a damaged one, or another kind of pixel.
    """
    return luma_and_chroma(decode(path))


def read_luma8(path: Path) -> np.ndarray:
    """Luma (H, W) of an image file in 8 bits, as the metrics take it; exact, halves round up."""
    pixels = decode(path)
    if pixels.dtype == np.uint16:
        return to_uint8(luma_and_chroma(pixels)[0])
    if pixels.ndim == 2:
        return pixels
    return ((pixels.astype(np.int32) @ [299, 587, 114] + 500) // 1000).astype(np.uint8)


def read_uint8(path: Path) -> np.ndarray:
    """An image file as 8-bit grey or RGB, to look at."""
    return to_uint8(*read_image(path))


def luma_and_chroma(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The two of uint8 or uint16 pixels, as `read_image` returns them."""
    scaled = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if pixels.ndim == 2:
        return scaled, None
    if np.ptp(pixels, axis=2).max() == 0:
        return np.ascontiguousarray(scaled[..., 0]), None
    luma = scaled @ BT601
    return luma, scaled - luma[..., None]


def decode(path: Path) -> np.ndarray:
    """The pixels of an image file: uint8 or uint16, (H, W) or (H, W, 3) in RGB order."""
    if Path(path).stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: too large, expected at most {MAX_BYTES >> 20} MB")
    data = Path(path).read_bytes()
    try:
        check_pixels(path, data)
        Image.open(io.BytesIO(data), formats=FORMATS).verify()
        pixels = pixels_of(Image.open(io.BytesIO(data), formats=FORMATS), data)
    except UserError:
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        pixels = None
    if pixels is None:
        raise UserError(f"{path}: damaged or not an image, expected PNG, TIFF, JPEG or BMP")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: pixels are {pixels.dtype}, expected 8 or 16 bits")
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 4 and pixels[..., 3].min() < np.iinfo(pixels.dtype).max:
        raise UserError(f"{path}: has transparent pixels, expected an opaque image")
    return pixels[..., :3]


def check_pixels(path: Path, data: bytes) -> None:
    """Refuse an image by the size in its header, before its pixels take up time and memory."""
    most = f"expected at most {MAX_PIXELS / 1e6:.0f} million"
    try:
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has far too many pixels, {most}") from None
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: has {height}x{width} pixels, {most}")


def pixels_of(image: Image.Image, data: bytes) -> np.ndarray | None:
    """(H, W), or (H, W, 3 or 4) with alpha last, of an image that Pillow has opened from `data`."""
    modes = " ".join(str(tile[3]) for tile in image.tile)  # as Pillow calls them, "RGB;16B" or so
    deep, signed = ";16" in modes, ";16S" in modes or ";16BS" in modes
    image.load()  # Pillow refuses a truncated file, which OpenCV may fill up
    if image.mode in ("I", "F", "I;16", "I;16B"):
        pixels = np.asarray(image)
        return pixels.astype(np.int16 if signed else np.uint16) if deep else pixels
    if deep:  # Pillow would cut colour to 8 bits
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        return None if pixels is None else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


# --- writing ---------------------------------------------------------------------------------


def to_uint8(luma: np.ndarray, chroma: np.ndarray | None = None) -> np.ndarray:
    """Luma (H, W) in [0, 1], with chroma also RGB: added, rounded and clipped once, here.

    Adding a source's chroma to a new luma is the YCbCr exchange of the luma. Where the sum leaves
    the range of 8 bits, the clip changes the stored luma.
    """
    image = luma if chroma is None else luma[..., None] + chroma
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image as PNG, whole or not at all."""
    image = image if image.ndim == 2 else image[..., ::-1]
    write_bytes(path, cv2.imencode(".png", image)[1].tobytes())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once all of it is on the disk.

    A run that is killed leaves the old file or the new one. An error, also that of a full disk,
    leaves the old file alone.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def writable_folder(path: Path) -> Path:
    """Make the folder and prove that a file can be written there; OSError if not.

    Processes that try the same folder at once, as torchrun's do, get a file each.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(prefix=".probe", suffix=".part", dir=path):
        return path


# --- contact sheet ---------------------------------------------------------------------------


def contact_sheet(rows: list[tuple[str, list[np.ndarray]]], titles: list[str]) -> np.ndarray:
    """Rows of (name, images) under column titles, as one RGB image."""
    height = HEADER + len(rows) * (CELL + GAP)
    sheet = np.full((height, len(titles) * (CELL + GAP) + GAP, 3), 24, np.uint8)
    for column, title in enumerate(titles):
        left = GAP + column * (CELL + GAP)
        write_text(sheet, title, (left + 4, HEADER - 8))
        for row, (name, images) in enumerate(rows):
            top = HEADER + row * (CELL + GAP)
            sheet[top : top + CELL, left : left + CELL] = fitted(images[column])
            if column == 0:
                write_text(sheet, name, (left + 4, top + CELL - 6))
    return sheet


def fitted(image: np.ndarray) -> np.ndarray:
    """The image, fitted into a square RGB cell of a contact sheet."""
    scale = CELL / max(image.shape[:2])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    image = cv2.resize(np.ascontiguousarray(image), size, interpolation=how)
    image = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    cell = np.zeros((CELL, CELL, 3), np.uint8)
    top, left = (CELL - image.shape[0]) // 2, (CELL - image.shape[1]) // 2
    cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cell


def write_text(sheet: np.ndarray, text: str, origin: tuple[int, int]) -> None:
    """Draw a line of text, its lower left corner at `origin` (x, y)."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(sheet, text, origin, font, 0.45, (220, 220, 220), 1, cv2.LINE_AA)
