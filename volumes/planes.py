"""The planes of a DICOM series, and the one stack that they must be.

Slices at uneven distances are interpolated to even ones, in the line that their positions form.
Source: DICOM PS3.3 (C.7.6.2 image plane).

Legend: P planes, each a (rows, columns) image. Positions are in mm, LPS+, see volumes/grid.py.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

import limits
from cli import UserError
from volumes.grid import RAS_LPS

FRAME = "number of the frame"  # of a plane's fields, where a file has several images
SAME = 0.01  # mm between slices that lie at one position
UNEVEN = 0.1  # of the slice distance: how far a slice may lie from its position on an even grid
ROUNDED = 0.1  # mm that it may always be off, since some scanners round positions to this
WAY = "--where chooses a part of the series"
BLOCK = 3  # slice distances of one length in a row: so many are no gap, but meant


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
    thickness: float = 0.0  # of the slice in mm; 0: the file does not say
    fields: Mapping[str, str] = MappingProxyType({})  # may tell it from others here, see varying.py
    kind: tuple[str, str, str] = ("", "", "")  # frame of reference, modality, unit of the values
    placed: bool = True  # False: the file does not say where it is
    rescale: tuple[float, float] = (1.0, 0.0)  # slope and intercept that a viewer applies
    note: str = ""  # on its values, for the user

    @property
    def name(self) -> str:
        """The plane's name in messages."""
        return f"{self.path.name} frame {self.frame + 1}" if self.frame else self.path.name


class Stack(NamedTuple):
    """Planes in order, the affine of their volume, and how to interpolate them where uneven."""

    planes: list[Plane]
    affine: np.ndarray  # (4, 4), RAS mm
    at: np.ndarray | None  # (K,), where slice k lies among the planes, 1.5: between 1 and 2
    note: str  # for the user, or empty


def stack(path: Path, planes: list[Plane], thickness: float) -> Stack:
    """Planes ordered along their normal, and their volume.

    Args:
        path: the file or folder that messages name.
        planes: of one orientation, size and spacing, in any order, one at each position.
        thickness: of a slice in mm, for a stack of one.

    Raises:
        UserError: doubled or missing slices, or slices that are not in one line.
    """
    first = planes[0]
    normal = np.cross(*first.directions)
    planes = sorted(planes, key=lambda p: float(p.position @ normal))
    depth = np.array([p.position @ normal for p in planes])  # (P,), mm
    step, start, at, note = normal * thickness, planes[0].position, None, ""
    if len(planes) > 1:
        _check_gaps(path, planes, np.diff(depth))
        positions = np.array([p.position for p in planes])
        along = (positions[-1] - positions[0]) / (depth[-1] - depth[0])  # mm for a mm of depth
        step = along * (depth[-1] - depth[0]) / (len(planes) - 1)
        _check_line(path, planes, positions - positions[0] - np.outer(depth - depth[0], along))
        if not _even(depth):
            slices, note = _even_depths(path, depth, first.size)
            at = np.interp(slices, depth, np.arange(len(depth)))
            step, start = along * (slices[1] - slices[0]), start + along * (slices[0] - depth[0])
    affine = np.eye(4)  # LPS
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, start
    return Stack(planes, RAS_LPS @ affine, at, note)


def evened(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(I, J, P) planes, interpolated linearly to (I, J, K) at the fractional places `at`, (K,)."""
    low = np.minimum(at.astype(int), data.shape[2] - 2)
    out = np.empty((len(at), *data.shape[1::-1]), np.float32)  # as a series is stored
    for k, (n, weight) in enumerate(zip(low, (at - low).astype(np.float32), strict=True)):
        out[k] = (data[..., n] * (1 - weight) + data[..., n + 1] * weight).T
    return out.T


def _usual(steps: np.ndarray) -> float:
    """The usual slice distance, the lower median of (P - 1,) steps."""
    return float(np.sort(steps)[(len(steps) - 1) // 2])


def _tolerance(usual: float) -> float:
    """How far a slice may be off, in mm, at a usual distance."""
    return max(UNEVEN * usual, min(ROUNDED, usual / 3))


def _even(depth: np.ndarray) -> bool:
    """Whether depths (P,) are those of even slices."""
    even = np.linspace(depth[0], depth[-1], len(depth))
    return bool(np.abs(depth - even).max() <= _tolerance(_usual(np.diff(depth))))


def _runs(steps: np.ndarray) -> list[tuple[int, int]]:
    """Runs of steps (P - 1,) of nearly one length: of each its first index, and one after its last.

    So the steps of a run are `steps[first:end]`.
    """
    labels = np.concatenate([[0], np.cumsum(np.abs(np.diff(steps)) > _tolerance(_usual(steps)))])
    found = [list(group) for _, group in groupby(range(len(steps)), key=lambda i: labels[i])]
    return [(group[0], group[-1] + 1) for group in found]


def _check_gaps(path: Path, planes: list[Plane], steps: np.ndarray) -> None:
    """UserError if slices are missing: if steps (P - 1,) are longer than usual without a reason.

    There are two reasons for a longer step: thicker slices, or a block of slices at that distance.
    """
    usual, thin = _usual(steps), min(p.thickness for p in planes)
    gaps = []
    for first, end in _runs(steps):
        for i in range(first, end):
            a, b = planes[i], planes[i + 1]
            thicker = thin and max(a.thickness, b.thickness) / thin >= 0.8 * steps[i] / usual
            if steps[i] > 1.5 * usual and end - first < BLOCK and not thicker:
                gaps.append((a, b, steps[i]))
    if not gaps:
        return
    a, b, step = gaps[0]
    where = f"{step:.2f} mm from {a.name} to {b.name}, expected {usual:.2f} mm"
    if (np.abs(steps / usual - np.rint(steps / usual)) < UNEVEN).all():
        missing = sum(round(s / usual) - 1 for *_, s in gaps)
        what = f"{missing} slices missing in {len(gaps)} gaps: {where}"
    else:
        what = f"slices are unevenly spaced, or some are missing: {where}"
    raise UserError(f"{path}: {what}; export the whole series again")


def _check_line(path: Path, planes: list[Plane], off: np.ndarray) -> None:
    """UserError if slices lie off the line of the first and last; `off` is (P, 3), in mm."""
    steps = np.diff([p.position @ np.cross(*planes[0].directions) for p in planes])
    distance = np.linalg.norm(off, axis=1)
    if distance.max() > 2 * _tolerance(_usual(steps)):
        raise UserError(
            f"{path}: slices are not in one line: {planes[int(distance.argmax())].name} is "
            f"{distance.max():.2f} mm off; --series1 or --where chooses a part of the series"
        )


def _even_depths(path: Path, depth: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Even depths (K,) over the range of uneven ones (P,), and a line that says so.

    Their distance is that of the block with the closest slices. They pass through the first slice
    of that block. Raises UserError if there would be too many, of `size` pixels.
    """
    steps = np.diff(depth)
    blocks = [run for run in _runs(steps) if run[1] - run[0] >= BLOCK]
    first, end = min(blocks, key=lambda run: steps[slice(*run)].mean(), default=(0, len(steps)))
    step = float((depth[end] - depth[first]) / (end - first))
    count = int(min((depth[-1] - depth[0]) / step, 2**31)) + 1
    limits.check_grid(f"{path}: interpolated to even slices, it would have", (count, *size), WAY)
    before = int((depth[first] - depth[0]) / step + 1e-6)
    after = round((depth[-1] - depth[first]) / step)
    note = (
        f"slices {steps.min():.2f} to {steps.max():.2f} mm apart, interpolated to {step:.2f} mm "
        f"({len(depth)} slices became {before + after + 1})"
    )
    return depth[first] + step * np.arange(-before, after + 1), note
