"""Two volumes brought together: registered if they need it, and onto one grid.

The registration is a matrix (4, 4) from points of source 1 to points of source 2, RAS in mm. It
changes the affine of the source that does not give the grid, so each value is resampled once.

Legend: I J K voxels as stored; affines are RAS in mm, see volumes/grid.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from args_setting import TASKS, TestArgs
from cli import UserError
from volumes.grid import (
    GRIDS,
    STANDARD,
    Volume,
    check_place,
    check_space,
    forces,
    onto_grid,
    pick_grid,
    same_grid,
    same_voxels,
)
from volumes.overlay import moved, overlay
from volumes.register import Registration, check, measured, rigid
from volumes.transforms import matrix_from

WAYS = ("auto", "off", "check", "rigid")
TOLD = 2.0  # mm: what a check can tell, at best


class Together(NamedTuple):
    """Both sources on one grid, and how they got there."""

    fixed: Volume
    moving: Volume
    grid: str  # whose, for the sidecar
    method: dict | None  # of the registration, for the sidecar
    matrix: np.ndarray | None  # as applied
    centre: np.ndarray | None
    picture: np.ndarray | None  # uint8 RGB

    @property
    def giver(self) -> Volume:
        """The source that has the grid."""
        return self.fixed if self.grid.startswith("source 1") else self.moving


def limit(fixed: Volume, moving: Volume) -> float:
    """How far, in mm, two scans of one frame of reference may lie apart without a warning."""
    voxel = max(fixed.spacing.max(), moving.spacing.max())
    return float(max(TOLD, min(1.5 * voxel, 3.0)))


def bring_together(
    fixed: Volume, moving: Volume, via: Volume | None, settings: TestArgs, tell: Callable[..., None]
) -> Together:
    """Source 1 and source 2 on one grid, registered as `settings.register` says.

    Args:
        via: a CT in the space of source 1 that is registered in its place.
        tell: gets what was done.

    Raises:
        UserError: what must not be passed over without `--force`.
    """
    tell(*check_place(fixed, moving, settings.force))
    how, found = find(fixed, moving, via, settings, tell)
    applied = how not in ("off", "check")
    number, grid = pick_grid(fixed, moving, TASKS[settings.task], settings.grid)
    before, matrix = moving, found.matrix if applied else np.eye(4)
    at_source1 = moved(moving, np.linalg.inv(matrix))
    seen = how == "check" and not found.doubts and found.moved <= limit(fixed, moving)
    tell(*check_space(fixed, at_source1, settings.force, applied, seen))
    picture = None
    if applied or (found and found.moved > limit(fixed, moving)):
        there = moved(moving, np.linalg.inv(found.matrix))
        picture = overlay(fixed, before, there, tuple(map(shown, (fixed, moving))))
    giver = (fixed, moving)[number - 1]
    tell(*(f"img{number}: {note}" for note in grid.notes if note not in giver.notes))
    if settings.grid in GRIDS:
        giver = grid  # straightened, if its axes were sheared
    sources = (giver, at_source1) if number == 1 else (moved(fixed, matrix), giver)
    pair, lines = [], []
    for i, volume in enumerate(sources, 1):
        data, line = onto_grid(volume, grid)
        pair.append(replace(volume, data=data, affine=grid.affine, code=grid.code))
        lines.append(f"img{i} {line}")
    if all(line.endswith(" not resampled") for line in lines) and same_grid(*pair):
        tell(one_grid(lines))
    else:
        tell(f"grid of img{number}, {grid.describe()}: {'; '.join(lines)}")
    name = f"source {number}" + ("" if settings.grid in GRIDS else " in cubes")
    method = None if found is None else described(how, applied, found)
    centre = found.centre if applied else None
    return Together(*pair, name, method, found.matrix if applied else None, centre, picture)


def one_grid(lines: list[str]) -> str:
    """The line for two sources of which none was resampled."""
    turned = [line for line in lines if "reordered" in line]
    if not turned:
        return "img1 and img2 are on one grid, nothing was resampled"
    return f"img1 and img2 have their voxels in one place: {turned[0]}"


def shown(volume: Volume) -> tuple[float, float]:
    """The values of a volume that are black and white in the picture."""
    step = tuple(slice(None, None, max(1, n // 60)) for n in volume.data.shape)
    low, high = np.percentile(volume.data[step], (1, 99.5))
    return float(low), float(max(high, low + 1e-6))


# --- what to register, and how --------------------------------------------------------------


def find(
    fixed: Volume, moving: Volume, via: Volume | None, settings: TestArgs, tell: Callable[..., None]
) -> tuple[str, Registration | None]:
    """What was done, off, check, rigid or file, and the registration; None for off."""
    way, source, kind = settings.register, fixed, TASKS[settings.task]
    if via is not None:
        check_via(fixed, via, settings)
        source, kind = via, "CT"
    if way == "off":
        return "off", None
    if way not in WAYS:
        matrix = matrix_from(Path(way), fixed, moving)
        found = measured(source, moving, kind, matrix)
        tell(f"registered by a file: {line_of(found)}")
        return "file", found
    one_frame = shares_frame(source, moving)
    if way == "check" or (way == "auto" and (one_frame or same_voxels(source, moving))):
        found = check(source, moving, kind)
        good = bool(found.doubts) or found.moved <= limit(fixed, moving)
        if way == "check" or one_frame or good:
            tell(*check_lines(found, limit(fixed, moving)))
            return "check", found
    found = rigid(source, moving, kind)
    if found.doubts and not forces(settings.force, "registration"):
        raise UserError(
            f"the registration cannot be trusted: {'; '.join(found.doubts)}. Register the two with "
            "another program and give its transform as --register FILE, or give --register off if "
            "they lie on each other; --force registration takes this one all the same"
        )
    tell(*(f"forced (registration): {doubt}" for doubt in found.doubts))
    by = "through the CT of --via, " if via is not None else ""
    tell(f"registered (rigid): {by}{line_of(found)}; {found.seconds:.0f} s")
    return "rigid", found


def shares_frame(a: Volume, b: Volume) -> bool:
    """Whether both files say that they are in one space: DICOM's frame, or the same template's."""
    if a.frame and b.frame:
        return a.frame == b.frame
    return not a.frame and not b.frame and a.code == b.code and a.code in STANDARD


def check_via(fixed: Volume, via: Volume, settings: TestArgs) -> None:
    """UserError if a companion CT is of no use, or not of the same space as source 1."""
    if settings.register not in WAYS or settings.register == "off":
        raise UserError(f"--via is for a registration, but --register is {settings.register}")
    if fixed.frame and via.frame and fixed.frame != via.frame:
        if not forces(settings.force, "space"):
            raise UserError(
                f"{settings.via} has another DICOM frame of reference than img1, expected the CT "
                "of the same study; --force space takes it all the same"
            )


def line_of(found: Registration) -> str:
    return (
        f"img2 moves by {found.moved:.1f} mm over the head, mutual information "
        f"{found.before:.3f} before, {found.after:.3f} after"
    )


def check_lines(found: Registration, far: float) -> list[str]:
    """What a check has found, in lines for the user."""
    if found.doubts:
        return [f"whether img1 and img2 lie on each other could not be measured: {found.doubts[0]}"]
    if found.moved <= far:
        line = f"img1 and img2 lie on each other, measured to {found.moved:.1f} mm over the head"
        return [f"{line}; nothing was moved"]
    return [
        f"warning: img2 seems to lie {found.moved:.1f} mm off over the head, expected at most "
        f"{far:.1f} mm; look at it, --register rigid moves it"
    ]


def described(how: str, applied: bool, found: Registration) -> dict:
    """A registration for the sidecar."""
    return {
        "how": how,
        "applied": applied,
        "matrix_ras_mm": found.matrix.tolist(),
        "maps": "points of source 1 to points of source 2",
        "centre_ras_mm": found.centre.tolist(),
        "moved_mm": found.moved if applied else 0.0,
        "apart_mm": found.moved,  # as measured, whether it was applied or not
        "mutual_information": {"before": found.before, "after": found.after},
        "seconds": round(found.seconds, 2),
        "doubts": found.doubts,
    }
