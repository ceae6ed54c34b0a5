"""The files of a run on volumes: planning them, keeping sources safe, and writing.

A fused volume has a sidecar, a JSON file of the same folder and stem that says what was done. The
two, and the colour volume, are written together or not at all.

Legend: I J K voxels as stored; N slices of (H, W) pixels, see volumes/grid.py.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from args_setting import TASKS, TestArgs
from cli import UserError
from images import whole_file, writable_folder, write_png
from volumes.grid import pixel_sides, slice_positions, slices
from volumes.intensity import STORED_ONE, Scaling
from volumes.io import NIFTI, stem_of, stream_nifti
from volumes.pair import WAYS, Together
from volumes.pictures import colour_slice, colour_table, eight_bit, mosaic, squared, with_bar
from volumes.transforms import transform_text


class Outputs(NamedTuple):
    """The files of a run; None where not asked for."""

    grey: Path
    sidecar: Path
    colour: Path | None
    png: Path | None  # a folder
    mosaic: Path | None
    transform: Path | None = None
    overlay: Path | None = None  # a picture of the registration
    dicom: Path | None = None  # a folder

    def without(self, transform: bool, overlay: bool) -> "Outputs":
        """These but for the files of a registration that there is no use for."""
        return self._replace(
            transform=None if transform else self.transform,
            overlay=None if overlay else self.overlay,
        )


# what names each
FLAGS = Outputs("--out", "--out", "--out", "--png", "--mosaic", "--out", "--out", "--dicom")


class FusedVolume(NamedTuple):
    """A fused volume on the grid of source 1, what was done, and the files it was written to."""

    luma: np.ndarray  # (I, J, K) int16, as stored: times `scale` it is the luma, 0 to 1
    scale: float
    affine: np.ndarray  # (4, 4), RAS mm
    code: int  # NIfTI code of its space
    axis: str  # of the slices that went through the network
    scalings: tuple[Scaling, Scaling]  # of source 1 and source 2
    report: list[str]  # lines for the user, without paths and without anything of the patient
    outputs: Outputs
    together: Together | None = None  # how the sources came onto one grid

    @property
    def stack(self) -> np.ndarray:
        """The luma as (N, H, W) slices, a view."""
        return slices(self.luma, self.affine, self.axis)


# --- before a run ----------------------------------------------------------------------------


def plan_outputs(settings: TestArgs) -> Outputs:
    """Every file that the settings ask for; UserError if one may not be written."""
    out = settings.out
    suffix = next((s for s in reversed(NIFTI) if out.name.lower().endswith(s)), None)
    if suffix is None or out.is_dir():
        raise UserError(
            f"--out is {out}, expected a file name that ends in .nii.gz or .nii for volumes"
        )
    if settings.task == "all":
        raise UserError(f"task is all, but volumes need to know what img1 is: {', '.join(TASKS)}")
    colour = colour_of(settings)
    if colour and settings.task == "CT-MRI":
        raise UserError("--colour is for PET and SPECT, CT and MRI are grey")
    if settings.mosaic and settings.mosaic.suffix.lower() != ".png":
        raise UserError(f"--mosaic is {settings.mosaic}, expected a file name that ends in .png")
    if settings.stretch or settings.metrics:
        raise UserError("--stretch and --metrics are for images, not for volumes")
    stem = stem_of(out)
    outputs = Outputs(
        out,
        out.with_name(f"{stem}.json"),
        out.with_name(f"{stem}_colour{suffix}") if colour else None,
        settings.png,
        settings.mosaic,
        dicom=check_dicom(settings),
    )
    sources = [settings.img1, settings.img2, *([settings.via] if settings.via else [])]
    if settings.register != "off":
        pair = (out.with_name(f"{stem}{end}") for end in (".tfm", "_registration.png"))
        outputs = outputs._replace(**dict(zip(("transform", "overlay"), pair, strict=True)))
        if settings.register not in WAYS:
            sources.append(Path(settings.register))
    for flag, path in zip(FLAGS, outputs, strict=True):
        if path and path not in (settings.png, settings.dicom) and path.is_dir():
            raise UserError(f"{path} is a folder, choose another {flag}")
        if path:
            check_no_source(path, flag, sources)
    return outputs


def check_dicom(settings: TestArgs) -> Path | None:
    """The folder of `--dicom`; UserError if it has files, or highdicom is not installed."""
    if settings.dicom is None:
        if settings.keep_patient:
            raise UserError("--keep-patient is for --dicom, no other output names a patient")
        return None
    if find_spec("highdicom") is None:
        raise UserError("--dicom needs highdicom: pip install -r requirements-volumes.txt")
    if settings.dicom.exists() and not (
        settings.dicom.is_dir() and not any(settings.dicom.iterdir())
    ):
        raise UserError(f"{settings.dicom} is not an empty folder, choose another --dicom")
    return settings.dicom


def colour_of(settings: TestArgs) -> str | None:
    """The colour table of a run; None for a grey one."""
    default = None if settings.task == "CT-MRI" else "warm"
    return {"auto": default, "none": None}.get(settings.colour, settings.colour)


def check_no_source(path: Path, flag: str, sources: Sequence[Path]) -> None:
    """UserError if writing `path`, which `flag` named, would hit a source or a source's sidecar."""
    target = path.resolve()
    for source in sources:
        original = source.resolve()
        if _same(target, original) or (source.is_dir() and original in target.parents):
            raise UserError(f"{target} is a source or inside of one, choose another {flag}")
        if any(_same(target, sidecar) for sidecar in sidecars_of(source)):
            raise UserError(f"{target} is the sidecar of {source}, choose another {flag}")


def sidecars_of(source: Path) -> list[Path]:
    """The JSON files of a source's folder and stem, where BIDS and dcm2niix describe it.

    Whether they exist makes no difference: one of ours would seem to describe the source. A link
    has one beside it, and its target another. A folder has none.
    """
    if source.is_dir():
        return []
    files = source.absolute(), source.resolve()
    return [file.with_name(f"{stem_of(file)}.json").resolve() for file in files]


def _same(path1: Path, path2: Path) -> bool:
    """Whether two resolved paths are one file, also in spellings that the file system equates."""
    return path1 == path2 or (path1.exists() and path2.exists() and path1.samefile(path2))


def make_folders(outputs: Outputs) -> None:
    """Make the folders of all outputs; OSError if one cannot be written to."""
    folders = {path.resolve().parent for path in outputs if path}
    for folder in folders | {outputs.png, outputs.dicom} - {None}:
        writable_folder(folder)


# --- after a run -----------------------------------------------------------------------------


def write_outputs(settings: TestArgs, fused: FusedVolume, source1: np.ndarray) -> None:
    """Write what `fused.outputs` names; `source1` (I, J, K) has the uptake for colour.

    The volumes and the sidecar come last, so that with them everything is there.
    """
    outputs = fused.outputs
    colour = colour_of(settings)
    rgb = colour_volume(fused, source1, colour) if colour else None
    pictures = fused.stack if rgb is None else slices(rgb, fused.affine, fused.axis)
    pixel = pixel_sides(fused.affine, fused.axis)
    if outputs.png:
        for n, image in enumerate(pictures):
            picture = with_bar(squared(eight_bit(image), pixel), colour, fused.scalings[0])
            write_png(outputs.png / f"{fused.axis}_{n:04d}.png", picture)
    if outputs.dicom:
        from volumes.derived import write_series  # only --dicom needs highdicom

        place = fused.affine, fused.luma.shape, fused.axis
        giver = fused.together.giver
        patient = giver.origin if settings.keep_patient else None
        write_series(outputs.dicom, pictures, *place, giver.frame, patient)
    if outputs.mosaic:
        labels = slice_positions(fused.luma.shape, fused.affine, fused.axis)
        sheet = mosaic(pictures, labels, fused.axis, pixel)
        write_png(outputs.mosaic, with_bar(sheet, colour, fused.scalings[0]))
    text = f"ASFE {settings.task}; {'; '.join(scaling.text for scaling in fused.scalings)}"
    volume = partial(
        stream_nifti,
        affine=fused.affine,
        code=fused.code,
        text=text,
        packed=outputs.grey.name.lower().endswith(".gz"),
    )
    content = sidecar(settings, fused).encode()
    writers = {
        outputs.grey: partial(volume, data=fused.luma, slope=fused.scale),
        outputs.sidecar: lambda file: file.write(content),
    }
    if outputs.colour:
        writers[outputs.colour] = partial(volume, data=rgb)
    if outputs.transform:
        text = transform_text(fused.together.matrix, fused.together.centre)
        writers[outputs.transform] = lambda file: file.write(text)
    if outputs.overlay:
        write_png(outputs.overlay, fused.together.picture)
    write_together(writers)


def colour_volume(fused: FusedVolume, source1: np.ndarray, colour: str) -> np.ndarray:
    """(I, J, K, 3) uint8 RGB: the fused luma in the colours that a table has for the uptake."""
    rgb = np.empty((*fused.luma.shape[::-1], 3), np.uint8).transpose(2, 1, 0, 3)  # as NIfTI stores
    uptake, table = slices(source1, fused.affine, fused.axis), colour_table(colour)
    stacks = slices(rgb, fused.affine, fused.axis), fused.stack, uptake
    for picture, luma, values in zip(*stacks, strict=True):
        luma = luma / np.float32(STORED_ONE)
        picture[:] = colour_slice(luma, fused.scalings[0].apply(values), table)
    return rgb


def write_together(writers: dict[Path, Callable[[BinaryIO], None]]) -> None:
    """Write files that belong together: all of them or, after an error, none.

    Each is complete on the disk before the first gets its name. The names come in the reverse of
    the dictionary's order, one right after the other.
    """
    with ExitStack() as files:
        for path, write in writers.items():
            file = files.enter_context(whole_file(path))
            write(file)
            file.flush()
            os.fsync(file.fileno())


def sidecar(settings: TestArgs, fused: FusedVolume) -> str:
    """What was done, as JSON: settings and geometry; no paths, no UIDs, nothing of a patient."""
    content = {
        "software": "ASFE-Fusion",
        "task": settings.task,
        "network": settings.size,
        "values": "fused luma, 0 to 1",
        "levels": {f"source{i}": s.method for i, s in enumerate(fused.scalings, 1)},
        "grid": {
            "of": fused.together.grid if fused.together else "source 1",
            "affine_ras_mm": fused.affine.tolist(),
        },
        "registration": fused.together.method if fused.together else None,
        "slices": fused.axis,
        "tile": settings.tile or None,
        "overlap": settings.overlap if settings.tile else None,
        "colour": colour_of(settings),
        "report": fused.report,
    }
    return json.dumps(content, indent=1) + "\n"
