"""Fuse two volumes of one patient, slice by slice: DICOM, NIfTI, MetaImage or NRRD in, NIfTI out.

    python test_asfe.py --task CT-MRI --img1 ct.nii.gz --img2 dicom_folder/ --out fused.nii.gz

Both are registered where they need it, and the fused volume lies on the grid of one of them.
Files are in io.py and dicom.py (with planes.py and suv.py), geometry in grid.py, registration in
pair.py (with register.py, transforms.py and overlay.py; flat.py for images), intensities in
intensity.py, the network in tiles.py, and what is written in outputs.py and pictures.py. The
packages for them are an extra, requirements-volumes.txt.

Legend: I J K voxels as stored; N slices of (H, W) pixels, see grid.py.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from args_setting import TASKS, TestArgs
from cli import UserError
from network import MIN_SIDE, ASFEFusion
from volumes.grid import Volume, forces, pick_axis, pixel_sides, slices
from volumes.intensity import DICOM_MODALITY, STORED_ONE, Scaling, scaling_of, units_doubt
from volumes.io import read_volume
from volumes.outputs import FusedVolume, make_folders, plan_outputs, write_outputs
from volumes.pair import Together, bring_together
from volumes.pictures import square_size
from volumes.series import check_patients
from volumes.tiles import check_tiles, fuse_slices
from volumes.varying import Choice

__all__ = ["FusedVolume", "fuse_volumes"]


def fuse_volumes(
    settings: TestArgs, model: ASFEFusion, say: Callable[[str], None] = print
) -> FusedVolume:
    """Fuse the volumes `img1` and `img2` into `out` and what else the settings ask for.

    Args:
        say: gets each line of the report as soon as it is known, and at the end the files.

    Raises:
        UserError: input or settings that cannot be trusted; nothing is written then.
        OSError: a file that cannot be read or written.
    """
    if not (settings.img1 and settings.img2 and settings.out):
        raise UserError("volumes need img1, img2 and out")
    report: list[str] = []

    def tell(*lines: str) -> None:
        for line in lines:
            report.append(line)
            say(line)

    outputs = plan_outputs(settings)
    check_tiles(settings.tile, settings.overlap, model.multiple)
    if settings.threads:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(settings.threads)
    together, scalings = read_pair(settings, tell)
    fixed, moved = together.fixed, together.moving
    if settings.keep_patient and together.giver.origin is None:
        raise UserError("--keep-patient needs a DICOM source that has the grid; leave it out")
    outputs = outputs.without(together.matrix is None, together.picture is None)
    axis = pick_axis(fixed.affine, settings.axis)
    luma = np.empty(fixed.data.shape, np.int16, order="F")  # as NIfTI stores it
    scale = 1 / STORED_ONE
    fused = FusedVolume(
        luma, scale, fixed.affine, fixed.code, axis, scalings, report, outputs, together
    )
    check_sides(fused.stack, axis)
    count, height, width = fused.stack.shape
    tell(f"{count} {axis} slices of {height}x{width}")
    size = square_size((height, width), pixel_sides(fixed.affine, axis))
    if outputs.png and size != (height, width):
        tell(f"--png: slices as {size[0]}x{size[1]}, so that pixels are square")
    make_folders(outputs)
    stacks = tuple(slices(data, fixed.affine, axis) for data in (fixed.data, moved.data))
    fuse_slices(model, stacks, scalings, fused.stack, settings)
    write_outputs(settings, fused, fixed.data)
    for what, path in outputs._asdict().items():
        if path:
            say(f"{what}: {path}")
    return fused


def read_pair(
    settings: TestArgs, tell: Callable[..., None]
) -> tuple[Together, tuple[Scaling, Scaling]]:
    """Source 1 and source 2, registered and on one grid, and the scalings of both.

    Scalings are those of the sources as they came, so that they do not depend on the grid. `tell`
    gets what was done.
    """
    forces(settings.force, "all")  # before anything is read, whether it can be
    if settings.via and settings.task == "CT-MRI":
        raise UserError("--via is for PET and SPECT, a CT is registered itself")
    fixed = read_source(settings, 1, tell)
    moving = read_source(settings, 2, tell)
    tell(*check_patients(fixed.patient, moving.patient, settings.force))
    via = read_via(settings, fixed, tell) if settings.via else None
    lines: list[str] = []
    scalings = scale_pair(fixed, moving, settings, lines.append)
    together = bring_together(fixed, moving, via, settings, tell)
    tell(*lines)
    return together, scalings


def read_via(settings: TestArgs, fixed: Volume, tell: Callable[..., None]) -> Volume:
    """The CT that is registered in place of source 1; UserError if it is none, or of another."""
    via = read_volume(settings.via, None, "--via")
    make_finite(via, settings.via, settings.nan_to_zero)
    tell(*check_patients(fixed.patient, via.patient, settings.force, "--via"))
    check_kind(via, settings.via, "CT", f"--via of {settings.task}", settings.force)
    check_units(via, settings.via, "wide", settings.force)
    tell(*(f"--via: {note}" for note in via.notes))
    return via


def read_source(settings: TestArgs, i: int, tell: Callable[..., None]) -> Volume:
    """Source `i`, 1 or 2, with finite values.

    Raises UserError for a modality that the task does not expect, unless it is forced.
    """
    kind = TASKS[settings.task] if i == 1 else "MRI"
    path, series = (getattr(settings, f"{name}{i}") for name in ("img", "series"))
    choice = Choice(settings.where, settings.frame, settings.affine)
    volume = read_volume(path, series, f"--series{i}", choice)
    make_finite(volume, path, settings.nan_to_zero)
    if volume.data.min() == volume.data.max():
        raise UserError(f"{path}: all voxels are {volume.data.flat[0]:g}, there is nothing to fuse")
    check_kind(volume, path, kind, f"img{i} of {settings.task}", settings.force)
    if kind == "CT":
        check_units(volume, path, settings.window, settings.force)
    tell(f"img{i}: {kind}, {volume.describe()}", *(f"img{i}: {note}" for note in volume.notes))
    return volume


def check_kind(volume: Volume, path: Path, kind: str, of: str, force: str) -> None:
    """UserError for a DICOM modality that is not that of `kind`, or a note if it is forced.

    `of` is the name of the source for the line, as "img1 of CT-MRI".
    """
    expected = DICOM_MODALITY[kind]
    if volume.modality in (None, expected):
        return
    name, _, task = of.partition(" of ")
    doubt = f"its modality is {volume.modality}, {task} expects {expected}"
    if not forces(force, "modality"):
        raise UserError(f"{path}: {doubt} as {name}; --force modality fuses all the same")
    volume.notes.append(f"forced (modality): {doubt}")


def check_units(volume: Volume, path: Path, window: str, force: str) -> None:
    """UserError for a CT that does not look as if it was in HU, or a note if it is forced."""
    doubt = units_doubt(volume.data, window)
    if doubt and not forces(force, "units"):
        raise UserError(f"{path}: {doubt}")
    volume.notes += [f"forced (units): {doubt}"] if doubt else []


def make_finite(volume: Volume, path: Path, nan_to_zero: bool) -> None:
    """Name voxels that are not finite in a UserError, or make them 0 where that was asked for."""
    wrong = ~np.isfinite(volume.data)
    count = int(wrong.sum())
    if not count:
        return
    first = np.unravel_index(int(wrong.argmax()), wrong.shape)
    where = ", ".join(str(int(i)) for i in first)
    line = f"{count} voxels are NaN or infinite, the first at ({where})"
    if not nan_to_zero:
        raise UserError(f"{path}: {line}; --nan-to-zero takes them as 0")
    volume.data[wrong] = 0
    volume.notes.append(f"{line}: taken as 0")


def scale_pair(
    fixed: Volume, moved: Volume, settings: TestArgs, tell: Callable[[str], None]
) -> tuple[Scaling, Scaling]:
    """The scalings of source 1 and source 2; `tell` gets them and, for PET, why SUV is missing."""
    kind = TASKS[settings.task]
    scaling1 = scaling_of(fixed, kind, settings.window, settings.suv)
    scaling2 = scaling_of(moved, "MRI", settings.window, settings.suv)
    tell(scaling1.text)
    tell(scaling2.text)
    if reason := scaling1.method.get("no_suv"):
        tell(f"no SUV ({reason}): {kind} scaled to its maximum")
    return scaling1, scaling2


def check_sides(stack: np.ndarray, axis: str) -> None:
    """UserError if (N, H, W) slices are smaller than the network takes."""
    height, width = stack.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{axis} slices are {height}x{width} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}; "
            "--axis chooses others"
        )
