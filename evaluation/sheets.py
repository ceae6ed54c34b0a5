"""Contact sheets: sources and fused images side by side, to look at.

Legend: images are (H, W) or RGB (H, W, 3), uint8.
"""

import cv2
import numpy as np

CELL, GAP, HEADER = 256, 6, 26  # pixels


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
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    image = cv2.resize(np.ascontiguousarray(image), size, interpolation=interpolation)
    image = image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    cell = np.zeros((CELL, CELL, 3), np.uint8)
    top, left = (CELL - image.shape[0]) // 2, (CELL - image.shape[1]) // 2
    cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cell


def write_text(sheet: np.ndarray, text: str, origin: tuple[int, int]) -> None:
    """Draw a line of text, its lower left corner at `origin` (x, y)."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(sheet, text, origin, font, 0.45, (220, 220, 220), 1, cv2.LINE_AA)
