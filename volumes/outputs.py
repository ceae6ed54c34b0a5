"""The files of a run on volumes: written together or not at all.

A fused volume has a sidecar, a JSON file of the same folder and stem that says what was done and
lists what was written. Which files a run may write is planned in requests.py.

Legend: I J K voxels as stored; N slices of (H, W) pixels, see volumes/grid.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np

from args_setting import VERSION
from cli import UserError
from fusing import SOFTWARE, Plan, listed_as
from images import png_bytes, write_together
from volumes.exports import MovedSource, moved_source
from volumes.grid import pixel_sides, slice_positions, slices
from volumes.intensity import STORED_ONE, Scaling
from volumes.io import Header, stream_nifti
from volumes.pair import Registered, Together
from volumes.pictures import (
    colour_slice,
    colour_table,
    colours,
    eight_bit,
    mosaic,
    squared,
    with_bar,
)
from volumes.requests import VolumeRequest, Writing
from volumes.transforms import transform_text

BIDS_UNITS = {"SUV": "g/mL", "Bq/ml": "Bq/mL", "HU": "HU"}  # as BIDS writes ours
Writers = dict[Path, Callable[[BinaryIO], None]]


@dataclass(frozen=True)
class Fused:
    """A fused volume, and how it came about."""

    request: VolumeRequest
    luma: np.ndarray  # (I, J, K) int16, as stored: times `scale` it is the luma, 0 to 1
    axis: str  # of the slices that went through the network
    scalings: tuple[Scaling, Scaling]  # of source 1 and source 2
    together: Together  # the sources on its grid
    registered: Registered
    weights_sha256: str | None  # of the file of the network's values; None: of no file
    blends: bool  # whether --dicom has a presentation state, which blends the untouched sources

    scale = 1 / STORED_ONE

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), from a voxel's index to RAS in mm."""
        return self.together.source1.affine

    @property
    def moved(self) -> MovedSource:
        """The source that does not have the grid, on it, and the unit of its values."""
        return moved_source(self.together, self.scalings, self.request.modality)

    @property
    def stack(self) -> np.ndarray:
        """The luma as (N, H, W) slices, a view."""
        return slices(self.luma, self.affine, self.axis)

    @property
    def code(self) -> int:
        """NIfTI's code of its space."""
        return self.together.source1.code


@dataclass(frozen=True)
class FusedVolume(Fused):
    """The result of a run, with what it found and what it wrote."""

    report: tuple[str, ...]  # lines for the user, without paths and without anything of the patient
    doubts: tuple[str, ...]  # those lines that are doubts
    notes: tuple[str, ...]  # those on what was done in another way, for lack of memory
    files: dict[str, tuple[Path, ...]]  # what was written, by what it is
    read: tuple[Path, ...]  # files that the readers opened

    @property
    def coverage(self) -> tuple[float, float]:
        """The share, 0 to 1, of the grid's field that each source covers."""
        return self.together.coverage

    @property
    def moved_mm(self) -> float:
        """The mean way, over the head, by which source 2 was moved; 0 if it was not."""
        return self.apart_mm if self.registered.applied else 0.0

    @property
    def apart_mm(self) -> float | None:
        """How far apart the sources were measured to be, moved or not; None: not measured."""
        return None if self.registered.found is None else self.registered.found.moved_mm


def check_dicom(writing: Writing) -> None:
    """UserError if `--dicom` needs a package that is not installed."""
    if writing.dicom and find_spec("highdicom") is None:
        raise UserError("--dicom needs highdicom: pip install -r requirements-volumes.txt")


def write_outputs(
    plan: Plan, fused: Fused, extras: dict[str, Callable[[], bytes]], report: list[str]
) -> dict[str, tuple[Path, ...]]:
    """Write what a plan names; returns the files by what they are.

    All of them are complete on the disk before the first gets its name, and the sidecar gets its
    name last. What an earlier run listed and this one lacks is removed.

    Args:
        plan: without outputs that have no content.
        extras: content of outputs that is not made of `fused`, by what they are.
        report: lines for the sidecar.
    """
    parts = contents(plan, fused)
    for what, content in extras.items():
        parts[what] = {plan.path(what): partial(_bytes, content)}
    files = {what: tuple(writers) for what, writers in parts.items()}
    aside = plan.path("sidecar")
    files["sidecar"] = (aside,)
    paths = [path for group in files.values() for path in group]
    names = sorted(listed_as(path, plan.sidecar) for path in paths)
    content = sidecar(fused, report, names).encode()
    writers = {path: write for group in parts.values() for path, write in group.items()}
    writers[aside] = partial(_bytes, lambda: content)
    write_together(writers, plan.stale(paths))
    return {output.what: files[output.what] for output in plan.outputs}


def _bytes(content: Callable[[], bytes], file: BinaryIO) -> None:
    """Write bytes that are made only now."""
    file.write(content())


def is_packed(path: Path) -> bool:
    """Whether a file is compressed by gzip, by its name."""
    return path.name.lower().endswith(".gz")


def contents(plan: Plan, fused: Fused) -> dict[str, Writers]:
    """How to write each file of a plan but the sidecar and the overlay, by what it is.

    Nothing is made before it is written, so that only one picture is in memory.
    """
    colour = fused.request.writing.colour
    rgb = colour_volume(fused, colour) if colour else None
    pictures = fused.stack if rgb is None else slices(rgb, fused.affine, fused.axis)
    grey = plan.path("grey")
    text = "; ".join([f"ASFE {fused.request.task}", *(s.text for s in fused.scalings)])
    header = Header(fused.affine, fused.code, text)
    volume = partial(stream_nifti, packed=is_packed(grey))
    found: dict[str, Writers] = {}
    if path := plan.path("colour"):
        as_axis = fused.request.writing.rgb == "axis"
        own = header._replace(rgb_axis=as_axis, unit="RGB" if as_axis else "")
        found["colour"] = {path: partial(volume, data=rgb, header=own)}
    if folder := plan.path("png"):
        found["png"] = {
            folder / f"{fused.axis}_{n:04d}.png": partial(
                _bytes, partial(_slice_png, fused, image, colour)
            )
            for n, image in enumerate(pictures)
        }
    if path := plan.path("mosaic"):
        found["mosaic"] = {path: partial(_bytes, partial(_mosaic_png, fused, pictures, colour))}
    if path := plan.path("transform"):
        registration = fused.registered.found
        text = partial(transform_text, registration.matrix, registration.centre)
        found["transform"] = {path: partial(_bytes, text)}
    found |= _moved_writers(plan, fused)
    if folder := plan.path("dicom"):
        found["dicom"] = _dicom_writers(folder, fused, pictures)
    scaled = header._replace(slope=fused.scale)
    found["grey"] = {grey: partial(volume, data=fused.luma, header=scaled)}
    return found


def _moved_writers(plan: Plan, fused: Fused) -> dict[str, Writers]:
    """How to write the moved source, and what BIDS asks of its sidecar."""
    found: dict[str, Writers] = {}
    if path := plan.path("moved source"):
        moved = fused.moved
        found["moved source"] = {path: partial(moved.write, packed=is_packed(path))}
        if aside := plan.path("sidecar of the moved source"):
            content = as_json(of_bids(fused, moved.unit) | moved.described).encode()
            found["sidecar of the moved source"] = {aside: partial(_bytes, lambda: content)}
    return found


def _slice_png(fused: Fused, image: np.ndarray, colour: str | None) -> bytes:
    picture = squared(eight_bit(image), pixel_sides(fused.affine, fused.axis))
    return png_bytes(with_bar(picture, colour, fused.scalings[0]))


def _mosaic_png(fused: Fused, pictures: np.ndarray, colour: str | None) -> bytes:
    labels = slice_positions(fused.luma.shape, fused.affine, fused.axis)
    sheet = mosaic(pictures, labels, fused.axis, pixel_sides(fused.affine, fused.axis))
    return png_bytes(with_bar(sheet, colour, fused.scalings[0]))


def _dicom_writers(folder: Path, fused: Fused, pictures: np.ndarray) -> Writers:
    """How to write the slices as a DICOM series, and what blends the untouched sources."""
    from volumes.derived import patient_fields, series  # only --dicom needs highdicom

    giver = fused.together.giver
    place = fused.affine, fused.luma.shape, fused.axis
    who = patient_fields(giver.origin if fused.request.writing.keep_patient else None)
    made = series(pictures, *place, giver.frame_of_reference, who)
    made |= _blending(fused, who) if fused.blends else {}
    return {folder / name: partial(_bytes, content) for name, content in made.items()}


def _blending(fused: Fused, who: dict) -> dict[str, Callable[[], bytes]]:
    """The presentation state and its spatial registration, where it needs one; by their names."""
    from volumes.blending import Input, blending, headers_of

    together, grey = fused.together, np.linspace(0, 1, 256)[:, None].repeat(3, 1)
    colour = fused.request.writing.colour
    palettes = (colours(colour) if colour else grey), grey
    volumes = together.source1, together.source2
    inputs = tuple(
        Input(volume, scaling, palette, headers_of(volume), volume is together.giver)
        for volume, scaling, palette in zip(volumes, fused.scalings, palettes, strict=True)
    )
    return blending(inputs, fused.registered.how, fused.registered.matrix, who)


def why_no_blending(together: Together) -> str:
    """Why `--dicom` cannot write a presentation state of the two sources; empty if it can."""
    from volumes.blending import why_none

    reasons = (why_none(i, v) for i, v in enumerate((together.source1, together.source2), 1))
    return next(filter(None, reasons), "")


def colour_volume(fused: Fused, colour: str) -> np.ndarray:
    """(I, J, K, 3) uint8 RGB: the fused luma in the colours that a table has for the uptake."""
    rgb = np.empty((*fused.luma.shape[::-1], 3), np.uint8).transpose(2, 1, 0, 3)  # as NIfTI stores
    uptake = slices(fused.together.source1.data, fused.affine, fused.axis)
    table = colour_table(colour)
    stacks = slices(rgb, fused.affine, fused.axis), fused.stack, uptake
    for picture, luma, values in zip(*stacks, strict=True):
        luma = luma / np.float32(STORED_ONE)
        picture[:] = colour_slice(luma, fused.scalings[0].apply(values), table)
    return rgb


def sidecar(fused: Fused, report: list[str], files: list[str]) -> str:
    """What was done, as JSON: no UIDs, nothing of a patient, and no paths but those of `files`."""
    request, slicing = fused.request, fused.request.slicing
    content = {
        **of_bids(fused, "fused luma, 0 to 1"),
        "software": SOFTWARE,
        "version": VERSION,
        "task": request.task,
        "network": request.network,
        "weights_sha256": fused.weights_sha256,
        "values": "fused luma, 0 to 1",
        "levels": {f"source{i}": s.method for i, s in enumerate(fused.scalings, 1)},
        "grid": {"of": fused.together.grid, "affine_ras_mm": fused.affine.tolist()},
        "coverage": dict(zip(("source1", "source2"), fused.together.coverage, strict=True)),
        "registration": described(fused.registered),
        "moved_source": fused.moved.described if request.writing.moved else None,
        "slices": fused.axis,
        "tile": slicing.tile or None,
        "overlap": slicing.overlap if slicing.tile else None,
        "colour": request.writing.colour,
        "report": report,
        "files": files,
    }
    return as_json(content)


def as_json(content: dict) -> str:
    """The text of a sidecar."""
    return json.dumps(content, indent=1) + "\n"


def of_bids(fused: Fused, unit: str) -> dict:
    """What BIDS asks of the sidecar of a derivative; empty for any other result.

    Args:
        unit: of the values.
    """
    told = fused.request.writing.derivative
    if not told:
        return {}
    return {**told, "Units": BIDS_UNITS.get(unit, "arbitrary"), "SkullStripped": False}


def described(registered: Registered) -> dict | None:
    """A registration for the sidecar."""
    found = registered.found
    if found is None:
        return None
    return {
        "how": registered.how,
        "applied": registered.applied,
        "matrix_ras_mm": found.matrix.tolist(),
        "maps": "points of source 1 to points of source 2",
        "centre_ras_mm": found.centre.tolist(),
        "moved_mm": found.moved_mm if registered.applied else 0.0,
        "apart_mm": found.moved_mm,  # as measured, whether it was applied or not
        "mutual_information": {"before": found.before, "after": found.after},
        "seconds": round(found.seconds, 2),
        "doubts": found.doubts,
    }
