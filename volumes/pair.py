"""Two volumes brought together: registered if they need it, and onto one grid.

The registration is a matrix (4, 4) from points of source 1 to points of source 2, RAS in mm. It
changes the affine of the source that does not give the grid. So each value is resampled once.

Source 1 moves if source 2 has the grid, and the other way round. So this file says source 1 and
source 2, not fixed and moving.

Legend: I J K voxels as stored; affines are RAS in mm, see volumes/grid.py.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError
from volumes.grid import (
    GRIDS,
    REGISTER,
    STANDARD,
    Gridded,
    Volume,
    field_doubts,
    onto_grid,
    passed_over,
    pick_grid,
    place_doubts,
    same_grid,
    same_voxels,
    space_doubts,
)
from volumes.overlay import moved, overlay
from volumes.register import Registration, assess, check, rigid
from volumes.report import Report
from volumes.requests import Registering
from volumes.transforms import matrix_from

BETTER = 1.2  # times the mutual information, at which an inverse transform is the likelier one
CHECKED_TO = 2.0  # mm: how precise a check is, at best


class Sources(NamedTuple):
    """The volumes of a run as they were read."""

    source1: Volume
    source2: Volume
    via: Volume | None  # a CT in the space of source 1 that is registered in its place
    modality: str  # CT, PET or SPECT, of source 1

    @property
    def registered(self) -> tuple[Volume, str]:
        """What is registered with source 2, and its modality."""
        return (self.source1, self.modality) if self.via is None else (self.via, "CT")


@dataclass(frozen=True)
class Registered:
    """What was done about where the sources lie."""

    how: str  # off, check, rigid or file
    found: Registration | None = None  # None for off

    @property
    def applied(self) -> bool:
        """Whether a source was moved."""
        return self.how not in ("off", "check")

    @property
    def matrix(self) -> np.ndarray:
        """(4, 4), from points of source 1 to points of source 2, as applied."""
        return self.found.matrix if self.applied else np.eye(4)


class Together(NamedTuple):
    """Both sources on one grid, and how they got there."""

    source1: Volume
    source2: Volume
    grid: str  # whose, as "source 1", or "source 2 in cubes"
    coverage: tuple[float, float]  # 0 to 1: the share of the grid's field that each source covers
    unmoved: Volume | None  # on the grid, the source that a registration has moved, as it was

    @property
    def giver(self) -> Volume:
        """The source that has the grid."""
        return self.source1 if self.grid.startswith("source 1") else self.source2

    @property
    def mover(self) -> int:
        """Which source moves if one does, 1 or 2: the one that does not have the grid."""
        return 2 if self.grid.startswith("source 1") else 1


def limit(source1: Volume, source2: Volume) -> float:
    """How far, in mm, two scans of one frame of reference may lie apart without a warning."""
    voxel = max(source1.spacing.max(), source2.spacing.max())
    return float(max(CHECKED_TO, min(1.5 * voxel, 3.0)))


# --- registration ----------------------------------------------------------------------------


def register(
    sources: Sources, how: Registering, forced: Collection[str], report: Report
) -> Registered:
    """Where source 1 and source 2 lie to each other, by a search, a check or a file.

    Raises UserError for what must not be passed over unless it is forced.
    """
    source1, source2 = sources.source1, sources.source2
    report.doubt(*passed_over(place_doubts(source1, source2), forced))
    if sources.via is not None:
        check_via(sources, how, forced)
    done = _register(sources, how, forced, report)
    there = moved(source2, np.linalg.inv(done.matrix))
    doubts = [] if done.applied else space_doubts(source1, there)
    if seen_together(done, limit(source1, source2)):  # whatever their frames and spaces say
        lines = (line.removesuffix(f", {REGISTER}") for _, line in doubts)
        report.tell(*(f"{line}, but they were measured to lie on each other" for line in lines))
        doubts = []
    doubts += field_doubts(source1, there, done.applied)
    report.doubt(*passed_over(doubts, forced))
    if not done.applied and not (source1.frame_of_reference and source2.frame_of_reference):
        report.tell(
            "not both files name a DICOM frame of reference: taken as one patient space, unchecked"
        )
    return done


def seen_together(done: Registered, far: float) -> bool:
    """Whether two sources were measured to lie on each other, up to `far` mm."""
    found = done.found
    return done.how == "check" and not found.doubts and found.moved_mm <= far


def _register(
    sources: Sources, how: Registering, forced: Collection[str], report: Report
) -> Registered:
    """`register`, without what is in doubt about the sources themselves."""
    if how.how == "off":
        return Registered("off")
    source1, source2 = sources.source1, sources.source2
    if how.how == "file":
        return _moved_by_file(sources, how.transform, report)
    registered, _ = sources.registered
    one_frame = shares_frame(registered, source2)
    if how.how == "check" or (
        how.how == "auto" and (one_frame or same_voxels(registered, source2))
    ):
        found, far = check(*_pair(sources)), limit(source1, source2)
        good = bool(found.doubts) or found.moved_mm <= far
        if how.how == "check" or one_frame or good:
            tell_check(found, far, report)
            return Registered("check", found)
    return _moved_rigidly(sources, forced, report)


def _moved_by_file(sources: Sources, path: Path, report: Report) -> Registered:
    """The result of a transform's file; a doubt if its inverse fits clearly better."""
    source1, source2, _, modality = sources
    taken = matrix_from(path, source1, source2, modality)
    found = assess(*_pair(sources), taken.matrix)
    report.tell(*filter(None, [taken.line]), f"registered by a file: {line_of(found)}")
    if not taken.checked and found.after < found.before:
        back = assess(*_pair(sources), np.linalg.inv(taken.matrix))
        if back.after > max(BETTER * found.after, found.before):
            report.doubt(
                f"warning: the inverse of the transform fits better, mutual information "
                f"{back.after:.3f}: the file should be for img1 as the fixed image; if it moves "
                "img1 onto img2, a name such as from-pet_to-T1w_mode-image_xfm.mat says so"
            )
    return Registered("file", found)


def _pair(sources: Sources) -> tuple[Volume, Volume, str]:
    """What the functions of register.py take: two volumes, and the modality of the first."""
    registered, modality = sources.registered
    return registered, sources.source2, modality


def _moved_rigidly(sources: Sources, forced: Collection[str], report: Report) -> Registered:
    """The result of a search; UserError if it cannot be trusted and that is not forced."""
    found = rigid(*_pair(sources))
    if found.doubts and "registration" not in forced:
        raise UserError(
            f"the registration cannot be trusted: {'; '.join(found.doubts)}. Register the two with "
            "another program and give its transform as --register FILE, or give --register off if "
            "they lie on each other; --force registration takes this one all the same"
        )
    report.doubt(*(f"forced (registration): {doubt}" for doubt in found.doubts))
    by = "through the CT of --via, " if sources.via is not None else ""
    report.tell(f"registered (rigid): {by}{line_of(found)}; {found.seconds:.0f} s")
    return Registered("rigid", found)


def shares_frame(a: Volume, b: Volume) -> bool:
    """Whether both files say that they are in one space: DICOM's frame, or the same template's."""
    frames = a.frame_of_reference, b.frame_of_reference
    if all(frames):
        return frames[0] == frames[1]
    return not any(frames) and a.code == b.code and a.code in STANDARD


def check_via(sources: Sources, how: Registering, forced: Collection[str]) -> None:
    """UserError if a companion CT is not of the same space as source 1."""
    frames = sources.source1.frame_of_reference, sources.via.frame_of_reference
    if all(frames) and frames[0] != frames[1] and "space" not in forced:
        raise UserError(
            f"{how.via.path} has another DICOM frame of reference than img1, expected the CT "
            "of the same study; --force space takes it all the same"
        )


def line_of(found: Registration) -> str:
    """A registration in a line."""
    return (
        f"img2 moves by {found.moved_mm:.1f} mm over the head, mutual information "
        f"{found.before:.3f} before, {found.after:.3f} after"
    )


def tell_check(found: Registration, far: float, report: Report) -> None:
    """What a check has found; more than `far` mm off is in doubt."""
    if found.doubts:
        why = found.doubts[0]
        report.doubt(f"whether img1 and img2 lie on each other could not be measured: {why}")
    elif found.moved_mm <= far:
        line = f"img1 and img2 lie on each other, measured to {found.moved_mm:.1f} mm over the head"
        report.tell(f"{line}; nothing was moved")
    else:
        report.doubt(
            f"warning: img2 seems to lie {found.moved_mm:.1f} mm off over the head, expected at "
            f"most {far:.1f} mm; look at it, --register rigid moves it"
        )


def picture_of(sources: Sources, done: Registered) -> np.ndarray | None:
    """A picture (uint8 RGB) of a registration, before and after; None where nothing is to see."""
    source1, source2 = sources.source1, sources.source2
    if done.found is None:
        return None
    if not done.applied and done.found.moved_mm <= limit(source1, source2):
        return None
    there = moved(source2, np.linalg.inv(done.found.matrix))
    return overlay(source1, source2, there, (shown(source1), shown(source2)))


def shown(volume: Volume) -> tuple[float, float]:
    """The values of a volume that are black and white in the picture."""
    step = tuple(slice(None, None, max(1, n // 60)) for n in volume.data.shape)
    low, high = np.percentile(volume.data[step], (1, 99.5))
    return float(low), float(max(high, low + 1e-6))


# --- one grid --------------------------------------------------------------------------------


def bring_together(
    sources: Sources, matrix: np.ndarray, grid: str, report: Report, unmoved: bool = False
) -> Together:
    """Source 1 and source 2 on one grid.

    Args:
        matrix: (4, 4), of the registration.
        grid: which, see `pick_grid`.
        unmoved: keep the source that the matrix moves also as it was.
    """
    source1, source2 = sources.source1, sources.source2
    number, target = pick_grid(source1, source2, sources.modality, grid)
    giver = (source1, source2)[number - 1]
    report.tell(*(f"img{number}: {note}" for note in target.notes if note not in giver.notes))
    if grid in GRIDS:
        giver = target  # straightened, if its axes were sheared
    if number == 1:
        placed, mover = (giver, moved(source2, np.linalg.inv(matrix))), source2
    else:
        placed, mover = (moved(source1, matrix), giver), source1
    both = [onto_grid(volume, target) for volume in placed]
    on_grid = [_with(volume, done, target) for volume, done in zip(placed, both, strict=True)]
    tell_grid(number, target, both, on_grid, report)
    kept = _with(mover, onto_grid(mover, target), target) if unmoved else None
    name = f"source {number}" + ("" if grid in GRIDS else " in cubes")
    return Together(*on_grid, name, tuple(done.coverage for done in both), kept)


def _with(volume: Volume, done: Gridded, grid: Volume) -> Volume:
    """A volume with its values on a grid."""
    return replace(volume, data=done.data, affine=grid.affine, code=grid.code)


def tell_grid(
    number: int, grid: Volume, both: list[Gridded], on_grid: list[Volume], report: Report
) -> None:
    """Whose grid it is, and what was done to each source."""
    lines = [f"img{i} {done.line}" for i, done in enumerate(both, 1)]
    if any(done.resampled for done in both) or not same_grid(*on_grid):
        report.tell(f"grid of img{number}, {grid.describe()}: {'; '.join(lines)}")
        return
    turned = [line for line, done in zip(lines, both, strict=True) if done.reordered]
    if turned:
        report.tell(f"img1 and img2 have their voxels in one place: {turned[0]}")
    else:
        report.tell("img1 and img2 are on one grid, nothing was resampled")
