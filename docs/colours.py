"""Draw colours.png: the colour tables and their lightness; and print them for docs/outputs.md.

    python docs/colours.py

Lightness is CIE L*, 0 to 100. A table falls by the sum of all its steps that get darker.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from images import png_bytes, write_bytes  # noqa: E402
from volumes.pictures import COLOURS, TABLES, colours, fall, lightness, write_text  # noqa: E402

WIDTH, HEIGHT, CURVE, TEXT = 512, 18, 50, 130  # pixels of a table, and of its name's column


def rows() -> list[str]:
    """A row of Markdown for each table."""
    found = ["| table | from | lightness |", "|---|---|---|"]
    for name in TABLES:
        source = "matplotlib" if name in COLOURS else "DICOM"
        down = fall(name)
        found.append(
            f"| `{name}` | {source} | {f'falls by {down:.1f}' if down else 'only rises'} |"
        )
    return found


def picture() -> np.ndarray:
    """Each table as a strip, its lightness as a curve below it, RGB."""
    steps = np.linspace(0, 255, WIDTH).round().astype(int)
    cells = []
    for name in TABLES:
        cell = np.full((HEIGHT + CURVE, TEXT + WIDTH, 3), 32, np.uint8)
        write_text(cell, name, (6, 14))
        cell[:HEIGHT, TEXT:] = np.rint(colours(name)[steps] * 255)
        heights = HEIGHT + CURVE - 4 - lightness(name)[steps] / 100 * (CURVE - 8)
        points = np.stack([TEXT + np.arange(WIDTH), heights.round()], 1).astype(np.int32)
        cv2.polylines(cell, [points], False, (235, 235, 120), 1, cv2.LINE_AA)
        cells.append(cell)
    return np.vstack(cells)


def main() -> None:
    print(*rows(), sep="\n")
    write_bytes(ROOT / "docs" / "colours.png", png_bytes(picture()))


if __name__ == "__main__":
    main()
