"""Pictures of fused slices: eight bits, colour of the uptake, and a mosaic.

Sources: colour tables of matplotlib, and of DICOM (PS3.6, annex B) through pydicom; CIE L* (CIE 15)
through scikit-image.

Legend: N slices of (H, W) pixels as a reader looks at them, see volumes/grid.py. Stored luma is
int16, a luma of 1 being STORED_ONE; RGB is uint8.
"""

import cv2
import matplotlib
import numpy as np
from pydicom.pixels.processing import apply_color_lut
from skimage.color import rgb2lab

from images import BT601, to_uint8
from volumes.intensity import STORED_ONE, Scaling

CELL, COLUMNS, ROWS = 180, 6, 4  # of the mosaic: longest side of a cell in pixels, cells
GAP = 2  # pixels between cells
UNEVEN = 1.01  # how many times one side of a pixel may be the other, and still be drawn as square
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom
# Name -> matplotlib's table, and the share of it that is used. "warm" is "hot" up to yellow: white
# would mean both the highest uptake and a bright MRI.
COLOURS = {
    "warm": ("hot", 0.746),
    "hot": ("hot", 1.0),
    "rainbow": ("nipy_spectral", 1.0),
    "jet": ("jet", 1.0),
    "inferno": ("inferno", 1.0),
}
PALETTES = {  # DICOM's own tables, by their UIDs
    "hot-iron": "1.2.840.10008.1.5.1",
    "pet": "1.2.840.10008.1.5.2",
    "hot-metal-blue": "1.2.840.10008.1.5.3",
    "pet-20-step": "1.2.840.10008.1.5.4",
}
TABLES = (*COLOURS, *PALETTES)
EVEN = 0.01  # L*, for rounding
WHOLE = 0.995  # of a bar's range: data that reach so far use all of it
BAR, MARGIN = 10, 5  # pixels: width of the colour bar, and around it
FADE = 16  # of 256 steps: below it one of COLOURS fades to black, so no uptake is black


def colours(name: str) -> np.ndarray:
    """RGB (256, 3) in [0, 1] of 256 steps of uptake."""
    if name in PALETTES:
        steps = np.arange(256, dtype=np.uint8)
        return apply_color_lut(steps, palette=PALETTES[name]) / 255
    table, end = COLOURS[name]
    rgb = matplotlib.colormaps[table](np.linspace(0, end, 256))[:, :3]
    return rgb * np.minimum(np.arange(256) / FADE, 1)[:, None]


def lightness(name: str) -> np.ndarray:
    """CIE L* (256,), 0 to 100, of a table."""
    return rgb2lab(colours(name))[:, 0]


def fall(name: str) -> float:
    """By how much, in CIE L* (0 to 100), a table falls in all its steps; 0 if it only rises."""
    steps = np.diff(lightness(name))
    return float(np.abs(steps[steps < -EVEN]).sum())


def fall_lines(name: str | None) -> list[str]:
    """A line for a table in which more uptake may look darker."""
    if not name or not (down := fall(name)):
        return []
    rising = ", ".join(other for other in TABLES if not fall(other))
    return [
        f"--colour {name}: its lightness falls by {down:.0f} of 100 on the way up, so more uptake "
        f"may look like less; these only rise: {rising}"
    ]


def colour_table(name: str) -> np.ndarray:
    """Chroma (256, 3) of 256 steps of uptake: what the table's colour adds to its luma."""
    rgb = colours(name)
    return (rgb - (rgb @ BT601)[:, None]).astype(np.float32)


def colour_slice(luma: np.ndarray, uptake: np.ndarray, table: np.ndarray) -> np.ndarray:
    """RGB (H, W, 3): the fused luma with the chroma that the table (256, 3) has for the uptake.

    Luma and uptake are (H, W) in [0, 1].
    """
    return to_uint8(luma, table[np.rint(uptake * 255).astype(np.uint8)])


def eight_bit(image: np.ndarray) -> np.ndarray:
    """A slice of stored luma (H, W) as 8-bit grey; RGB as it is."""
    grey = image.dtype != np.uint8
    return to_uint8(image / np.float32(STORED_ONE)) if grey else np.ascontiguousarray(image)


def square_size(shape: tuple[int, int], pixel: tuple[float, float]) -> tuple[int, int]:
    """Height and width in square pixels, as fine as the finer side of `pixel` (height, width)."""
    if max(pixel) <= UNEVEN * min(pixel):
        return shape[0], shape[1]
    height, width = (round(n * side / min(pixel)) for n, side in zip(shape, pixel, strict=True))
    return height, width


def squared(image: np.ndarray, pixel: tuple[float, float]) -> np.ndarray:
    """An 8-bit picture (H, W) or (H, W, 3) in true proportion, see `square_size`."""
    height, width = square_size(image.shape[:2], pixel)
    if (height, width) == image.shape[:2]:
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def with_bar(image: np.ndarray, colour: str | None, uptake: Scaling) -> np.ndarray:
    """RGB (H, W', 3): an image with a bar at its right of what the colours stand for.

    Where the data use only a part of its range, a mark shows their highest value, and its share is
    told. A grey image, without `colour`, stays as it is.
    """
    if not colour:
        return image
    suv = uptake.method["method"].startswith("SUV")
    high, unit = uptake.method["high"], "SUV" if suv else uptake.method["unit"]
    height = image.shape[0]
    lines = {10: f"{high:.3g}", 22: unit, height // 2 + 4: f"{high / 2:.3g}", height - 4: "0"}
    share = uptake.method["share_used"]
    if height < 64:  # no room for the one in the middle
        del lines[height // 2 + 4]
    elif share < WHOLE:
        lines[34] = f"used {share:.0%}"
    font = cv2.FONT_HERSHEY_SIMPLEX
    widest = max(cv2.getTextSize(text, font, 0.38, 1)[0][0] for text in lines.values())
    strip = np.zeros((height, BAR + 3 * MARGIN + widest, 3), np.uint8)
    steps = np.linspace(255, 0, height).round().astype(int)
    strip[:, MARGIN : MARGIN + BAR] = np.rint(colours(colour)[steps] * 255)[:, None]
    if share < WHOLE:
        row = round((1 - share) * (height - 1))
        strip[row, : MARGIN + BAR + MARGIN - 1] = 255
    for row, text in lines.items():
        write_text(strip, text, (BAR + 2 * MARGIN, row))
    return np.hstack([image, strip])


def mosaic(
    stack: np.ndarray, labels: list[str], axis: str, pixel: tuple[float, float]
) -> np.ndarray:
    """A lightbox (RGB) of up to 24 slices that show something, in true proportion.

    Each has its label; the first has the patient's directions at its edges.

    Args:
        stack: (N, H, W) stored luma, or (N, H, W, 3) RGB.
        labels: one for each slice.
        axis: axial, coronal or sagittal.
        pixel: height and width of a pixel in mm.
    """
    size = np.array(stack.shape[1:3]) * pixel  # mm
    height, width = (max(1, round(n)) for n in size * (CELL / max(size)))
    shown = mosaic_choice(stack)
    rows = -(-len(shown) // COLUMNS)
    sheet = np.zeros((rows * (height + GAP) - GAP, COLUMNS * (width + GAP) - GAP, 3), np.uint8)
    for i, n in enumerate(shown):
        cell = _cell(stack[n], height, width)
        write_text(cell, labels[n], (3, height - 5))
        if i == 0:
            write_directions(cell, axis)
        top, left = i // COLUMNS * (height + GAP), i % COLUMNS * (width + GAP)
        sheet[top : top + height, left : left + width] = cell
    return sheet


def mosaic_choice(stack: np.ndarray) -> np.ndarray:
    """The indices of the slices in a mosaic: evenly between the first and last bright ones."""
    bright = np.array([float(image.mean()) for image in stack])
    shown = np.flatnonzero(bright > 0.1 * bright.max()) if bright.max() else np.array([0])
    first, last = shown[0], shown[-1]
    count = min(COLUMNS * ROWS, last - first + 1)
    return np.unique(np.linspace(first, last, count).round().astype(int))


def _cell(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A slice as (height, width, 3) RGB."""
    how = cv2.INTER_AREA if image.shape[0] > height else cv2.INTER_LINEAR
    cell = cv2.resize(eight_bit(image), (width, height), interpolation=how)
    return cell if cell.ndim == 3 else cv2.cvtColor(cell, cv2.COLOR_GRAY2RGB)


def write_directions(cell: np.ndarray, axis: str) -> None:
    """The patient's directions at the four edges of a cell."""
    height, width = cell.shape[:2]
    row, column = height // 2 + 4, width // 2 - 4
    origins = (2, row), (width - 11, row), (column, 12), (column, height - 4)
    for letter, origin in zip(LETTERS[axis], origins, strict=True):
        write_text(cell, letter, origin)


def write_text(image: np.ndarray, text: str, origin: tuple[int, int]) -> None:
    """Draw a line of text, its lower left corner at `origin` (x, y), legible on any grey."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    for colour, thick in (((0, 0, 0), 3), ((235, 235, 120), 1)):
        cv2.putText(image, text, origin, font, 0.38, colour, thick, cv2.LINE_AA)
