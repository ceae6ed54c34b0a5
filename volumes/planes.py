"""The planes of a DICOM series, and the one even stack that they must be.

Source: DICOM PS3.3 (C.7.6.2 image plane).

Legend: P planes, each a (rows, columns) image. Positions are in mm, LPS+, see volumes/grid.py.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from volumes.grid import RAS_LPS

SAME = 0.01  # mm between slices that lie at one position
UNEVEN = 0.1  # of the slice distance: how far a slice may lie from its position on an even grid


class Plane(NamedTuple):
    """One image of a series: a file, or a frame of one."""

    path: Path
    frame: int
    position: np.ndarray  # (3,), centre of the first pixel
    directions: np.ndarray  # (2, 3), unit vectors along a row and along a column
    spacing: np.ndarray  # (2,), between rows, between columns, in mm
    size: tuple[int, int]  # rows, columns
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        """The plane's name in messages."""
        return f"{self.path.name} frame {self.frame + 1}" if self.frame else self.path.name


def stack(path: Path, planes: list[Plane], thickness: float) -> tuple[list[Plane], np.ndarray]:
    """Planes ordered along their normal, and the affine (4, 4, RAS) of their stack.

    Args:
        path: the file or folder that messages name.
        planes: in any order.
        thickness: of a slice in mm, for a stack of one.

    Raises:
        UserError: mixed orientations, sizes or spacings; doubled, missing or uneven slices.
    """
    first = planes[0]
    _check_alike(path, planes)
    normal = np.cross(*first.directions)
    planes = sorted(planes, key=lambda p: float(p.position @ normal))
    depth = np.array([p.position @ normal for p in planes])  # (P,), mm
    double = np.diff(depth) < SAME
    if double.any():
        i = int(np.argmax(double))
        raise UserError(
            f"{path}: duplicate slices, {int(double.sum())} positions occur twice or more: "
            f"{planes[i].name} and {planes[i + 1].name} lie both at {depth[i]:.2f} mm"
        )
    step = normal * thickness
    if len(planes) > 1:
        _check_even(path, planes, depth)
        step = (planes[-1].position - planes[0].position) / (len(planes) - 1)
    affine = np.eye(4)  # LPS
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, planes[0].position
    return planes, RAS_LPS @ affine


def _check_alike(path: Path, planes: list[Plane]) -> None:
    """UserError if orientations, sizes or pixel spacings are not those of the first plane."""
    first = planes[0]
    for what, same in (
        ("orientations", lambda p: np.allclose(p.directions, first.directions, atol=1e-3)),
        ("sizes", lambda p: p.size == first.size),
        ("pixel spacings", lambda p: np.allclose(p.spacing, first.spacing, rtol=1e-3)),
    ):
        others = [p for p in planes if not same(p)]
        if others:
            raise UserError(
                f"{path}: mixed {what} in one series: {len(planes) - len(others)} images as "
                f"{first.name}, {len(others)} otherwise ({others[0].name}, …)"
            )


def _check_even(path: Path, planes: list[Plane], depth: np.ndarray) -> None:
    """UserError if slices are missing, unevenly spaced, or not in one line; `depth` is (P,)."""
    steps = np.diff(depth)
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    gaps = [(a, b, s) for (a, b), s in zip(pairwise(planes), steps, strict=True) if s > 1.5 * usual]
    if gaps and (np.abs(steps / usual - np.rint(steps / usual)) < UNEVEN).all():
        a, b, step = gaps[0]
        missing = sum(round(s / usual) - 1 for *_, s in gaps)
        raise UserError(
            f"{path}: {missing} slices missing in {len(gaps)} gaps: {step:.2f} mm from {a.name} "
            f"to {b.name}, expected {usual:.2f} mm"
        )
    even = np.linspace(planes[0].position, planes[-1].position, len(planes))
    off = np.linalg.norm([p.position for p in planes] - even, axis=1)
    if off.max() > UNEVEN * usual:
        raise UserError(
            f"{path}: slices are unevenly spaced ({steps.min():.2f} to {steps.max():.2f} mm) or "
            f"not in one line: {planes[int(off.argmax())].name} is {off.max():.2f} mm off"
        )
