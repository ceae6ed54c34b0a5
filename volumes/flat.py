"""Registration of two images: a shift, a turn and, if asked, a scale.

The search is that of register.py, in two dimensions. Lengths are in pixels of image 1. Unless a
scale is asked for, the pixels of both images are taken to be of one size.

Legend: images as in images.py; points are (n, 2), x and y in pixels, y down.
"""

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from cli import UserError
from volumes.overlay import compared
from volumes.register import (
    AGREE,
    LEAST,
    LEAST_SHARED,
    ROUNDS,
    SHARP,
    Level,
    apart,
    disagreement,
    information,
    moved_by,
    optima,
    ranked,
    shrunk,
)
from volumes.transforms import SCALES, matrix_of, read_transform, text_of

SIDE = 256.0  # mm that the longest side is taken to have in the search
TURNS = (0, -15, 15, -30, 30)  # degrees


class Moved(NamedTuple):
    """What became of image 2."""

    moved_pixels: float  # of image 1: the mean distance, over the image, by which image 2 moves
    doubts: list[str]  # why that cannot be trusted, if it cannot
    luma: np.ndarray | None = None  # (H, W) of image 1, float32; None: it was only measured
    chroma: np.ndarray | None = None
    text: bytes | None = None  # ITK's file of the transform
    picture: np.ndarray | None = None  # uint8 RGB


def register_image(
    luma1: np.ndarray,
    luma2: np.ndarray,
    chroma2: np.ndarray | None,
    way: str,
    transform: Path | None,
    forced: Collection[str],
) -> Moved:
    """Image 2 moved onto image 1, or only measured by "check".

    Args:
        luma1, luma2: (H, W) in [0, 1], of any two sizes; `chroma2` (H, W, 3) or None.
        way: check, rigid, similarity, or file.
        transform: for "file": of ITK, in pixels.
        forced: what is taken although it is in doubt.

    Raises:
        UserError: a registration that cannot be trusted, or a file that is none.
    """
    doubts, pixel = [], SIDE / max(luma1.shape)
    images = [flat_image(luma, pixel) for luma in (luma1, luma2)]
    if way == "file":
        matrix = read_transform(transform, 2)
        shift = (matrix[:2, 2] * pixel).tolist()
        found = sitk.AffineTransform(matrix[:2, :2].ravel().tolist(), shift)
    else:
        found, doubts = search(*images, way == "similarity")
    points = grid_points(images[0])
    far = apart(found, identity(False), points) / pixel
    if way == "check":
        return Moved(far, doubts)
    if doubts and "registration" not in forced:
        raise UserError(
            f"the registration cannot be trusted: {'; '.join(doubts)}; register the two by hand "
            "and give --register off, or --force registration takes this one"
        )
    before = resampled(images[0], luma2, identity(False), pixel)
    luma = resampled(images[0], luma2, found, pixel)
    chroma = None
    if chroma2 is not None:
        channels = np.moveaxis(chroma2, 2, 0)
        chroma = np.stack([resampled(images[0], c, found, pixel, 0.0) for c in channels], 2)
    picture = compared([("before", [(luma1, before)]), ("after", [(luma1, luma)])])
    return Moved(far, doubts, luma, chroma, in_pixels(found, pixel), picture)


def flat_image(luma: np.ndarray, pixel: float) -> sitk.Image:
    """An ITK image of a luma (H, W), with pixels of `pixel` mm of the search."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(luma, np.float32))
    image.SetSpacing((pixel, pixel))
    return image


def grid_points(image: sitk.Image) -> np.ndarray:
    """(n, 2) points all over an image, in the search's mm."""
    sides = zip(image.GetSize(), image.GetSpacing(), strict=True)
    counts = [np.linspace(0, n - 1, 16) * spacing for n, spacing in sides]
    return np.stack(np.meshgrid(*counts), -1).reshape(-1, 2)


def search(image1: sitk.Image, image2: sitk.Image, scaled: bool) -> tuple[sitk.Transform, list]:
    """The best transform from points of image 1 to those of image 2, and the doubts about it."""
    # Image 2 gets a margin of black. Without it, a scale could gain by moving what does not fit out
    # of the image.
    margin = [n // 2 for n in image2.GetSize()]
    darkest = float(sitk.GetArrayViewFromImage(image2).min())
    padded, levels = sitk.ConstantPad(image2, margin, margin, darkest), []
    for mm in (8.0, 4.0, 2.0):
        pair = [shrunk(i, mm) if mm > 2 else i for i in (image1, padded)]
        mask = sitk.Cast(pair[0] * 0 + 1, sitk.sitkUInt8)
        levels.append(Level(*pair, mask, mm))
    points = grid_points(image1)
    found = optima(levels[0], starts(levels[0], scaled))
    found = [c for c in found if inside(c.transform, image1, image2) >= 0.3]
    if not found:
        return identity(scaled), ["no start brought one image over the other"]
    best, *rest = ranked(found)
    others = [c for c in rest if apart(c.transform, best.transform, points) > AGREE]
    finer = optima(levels[1], [c.transform for c in (best, *others[:2])])
    if not finer:
        return identity(scaled), ["the finer search failed"]
    best = ranked(finer)[0]
    doubts = disagreement(best, finer, points, (image1.GetSpacing()[0], "pixels"))
    last = optima(levels[2], [best.transform])
    best = last[0] if last else best
    if best.rounds >= ROUNDS:
        doubts.append("the optimiser did not come to rest")
    return best.transform, doubts + judgement(best.transform, levels[1], image1, image2)


def identity(scaled: bool) -> sitk.Transform:
    """A transform that moves nothing; one with a scale if `scaled`."""
    return sitk.Similarity2DTransform() if scaled else sitk.Euler2DTransform()


def starts(level: Level, scaled: bool) -> list[sitk.Transform]:
    """From the corner, the middles and the centres of mass, each also turned."""
    middles, centres = [], []
    for image in (level.sampled, level.interpolated):
        array = sitk.GetArrayViewFromImage(image)
        middles.append((np.array(image.GetSize()) - 1) / 2 * image.GetSpacing())
        y, x = np.indices(array.shape).reshape(2, -1) @ array.ravel() / max(array.sum(), 1e-6)
        origin = np.array(image.GetOrigin())
        middles[-1] = middles[-1] + origin
        centres.append(np.array([x, y]) * image.GetSpacing() + origin)
    shifts = [np.zeros(2), middles[1] - middles[0], centres[1] - centres[0]]
    made = []
    for shift, turn in product(shifts, TURNS):
        transform = identity(scaled)
        transform.SetCenter(centres[0].tolist())
        transform.SetAngle(float(np.radians(turn)))
        transform.SetTranslation(shift.tolist())
        made.append(transform)
    return made


def inside(transform: sitk.Transform, image1: sitk.Image, image2: sitk.Image) -> float:
    """The share of image 1 that lies in image 2."""
    there = moved_by(grid_points(image1), matrix_of(transform))
    end = np.array(image2.GetSize()) * image2.GetSpacing()
    return float(((there >= 0) & (there <= end)).all(1).mean())


def judgement(
    transform: sitk.Transform, level: Level, image1: sitk.Image, image2: sitk.Image
) -> list[str]:
    """Why a transform cannot be trusted, but for what its search has shown."""
    doubts = []
    areas = [np.prod(i.GetSize()) for i in (image1, image2)]
    share = inside(transform, image1, image2) * max(1, areas[0] / areas[1])
    if share < LEAST_SHARED:
        doubts.append(f"only {share:.0%} of the smaller image would be in both, expected half")
    after, off = information(level, transform), []
    for shift in ((15, 0), (-15, 0), (0, 15), (0, -15)):
        other = type(transform)(transform)
        other.SetTranslation(np.add(transform.GetTranslation(), shift).tolist())
        off.append(information(level, other))
    if after < max(SHARP * max(off), LEAST):
        doubts.append("its mutual information is hardly better a little way off")
    scale = float(np.sqrt(np.linalg.det(matrix_of(transform)[:2, :2])))
    if not SCALES[0] <= scale <= SCALES[1]:
        doubts.append(f"it scales by {scale:.2f}, expected {SCALES[0]:g} to {SCALES[1]:g}")
    return doubts


def resampled(
    grid: sitk.Image, values: np.ndarray, transform: sitk.Transform, pixel: float, fill=None
) -> np.ndarray:
    """Values (H, W) of image 2 on the pixels of image 1; `fill`, else the least, beyond it."""
    fill = float(values.min()) if fill is None else fill
    image = flat_image(values, pixel)
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, sitk.sitkLinear, fill))


def in_pixels(transform: sitk.Transform, pixel: float) -> bytes:
    """ITK's file of a transform, in pixels instead of the search's mm."""
    matrix = matrix_of(transform)
    shift = (matrix[:2, 2] / pixel).tolist()
    return text_of(sitk.AffineTransform(matrix[:2, :2].ravel().tolist(), shift))
