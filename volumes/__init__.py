"""Fuse two volumes of one patient, slice by slice: DICOM, NIfTI, MetaImage or NRRD in, NIfTI out.

    python test_asfe.py --task CT-MRI --img1 ct.nii.gz --img2 dicom_folder/ --out fused.nii.gz

What a job needs is in requests.py. Both sources are registered where they need it, and the fused
volume lies on the grid of one of them. Files are in io.py (with headers.py and uploads.py) and
dicom.py (with series.py, planes.py, stored.py, varying.py, nuclear.py, durations.py, suv.py,
decay.py, tracers.py and quiet.py), geometry in grid.py, registration in pair.py (with register.py,
transforms.py, programs.py and overlay.py; flat.py for images), intensities in intensity.py, the
network in passes.py, and what is written in outputs.py, pictures.py, exports.py, labels.py,
derived.py and blending.py. report.py is what a run has to say. The packages for them are an extra,
requirements-volumes.txt.

Legend: I J K voxels as stored; N slices of (H, W) pixels, see grid.py.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813

from cli import UserError
from fusing import check_plans, sha256_of_weights
from images import png_bytes
from inference import Passes, check_tiles
from network import MIN_SIDE, ASFEFusion
from volumes.grid import Volume, pick_axis, pixel_sides, slices
from volumes.intensity import DICOM_MODALITY, Scaling, scaling_of, units_doubt
from volumes.io import read_volume
from volumes.labels import bring_labels, labels_nifti
from volumes.outputs import (
    Fused,
    FusedVolume,
    check_dicom,
    is_packed,
    why_no_blending,
    write_outputs,
)
from volumes.pair import Registered, Sources, Together, bring_together, picture_of, register
from volumes.passes import fuse_slices, passes_of
from volumes.pictures import WHOLE, fall_lines, square_size
from volumes.report import Report
from volumes.requests import Levels, Source, VolumeRequest, request_from
from volumes.series import check_patients
from volumes.tracers import Tracer, find_tracer, tracer_lines
from volumes.transforms import exported
from volumes.varying import Choice

__all__ = ["FusedVolume", "VolumeRequest", "fuse_volumes", "request_from", "use_threads"]


def fuse_volumes(
    request: VolumeRequest,
    model: ASFEFusion,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> FusedVolume:
    """Fuse two volumes, and write what the request asks for.

    Args:
        model: a network, as of `weights.load_weights`.
        say: gets each line of the report as soon as it is known.
        progress: gets how many slices are fused, and how many there are.

    Raises:
        UserError: input or a request that cannot be trusted; nothing is written then.
        OSError: a file that cannot be read or written.
    """
    report, plan = Report(say), request.plan()
    check_plans([plan])
    check_dicom(request.writing)
    check_tiles(request.slicing.tile, request.slicing.overlap, model.multiple)
    ready = prepare(request, report)
    together = ready.together
    if request.writing.keep_patient and together.giver.origin is None:
        raise UserError("--keep-patient needs a DICOM source that has the grid; leave it out")
    if not ready.registered.applied:
        plan = plan.without("transform")
    if "overlay" not in ready.extras:
        plan = plan.without("overlay")
    asked = request.writing.dicom is not None
    no_blending = why_no_blending(together) if asked else "--dicom is not given"
    report.tell(*([blending_line(no_blending)] if asked else []))
    scalings = ready.scalings
    report.tell(*scale_lines(scalings, request.modality))
    report.tell(*tracer_lines(ready.tracer, scalings[0]), *fall_lines(request.writing.colour))
    luma, axis = empty(together, request.slicing.axis)
    passes = passes_of(
        model, slices(luma, together.source1.affine, axis).shape[1:], request.slicing
    )
    report.tell(*filter(None, [passes.line]))
    request = as_done(request, passes)
    weights = sha256_of_weights(model)
    made = ready.registered, weights, not no_blending
    fused = Fused(request, luma, axis, scalings, together, *made)
    count, height, width = fused.stack.shape
    report.tell(f"{count} {fused.axis} slices of {height}x{width}")
    size = square_size((height, width), pixel_sides(fused.affine, axis))
    if request.writing.png and size != (height, width):
        report.tell(f"--png: slices as {size[0]}x{size[1]}, so that pixels are square")
    plan.make_folders()
    sources = (together.source1, together.source2)
    stacks = tuple(slices(volume.data, fused.affine, fused.axis) for volume in sources)
    for done in fuse_slices(model, stacks, scalings, fused.stack, passes):
        progress(done, count)
    files = write_outputs(plan, fused, ready.extras, report.lines)
    return FusedVolume(
        **vars(fused),
        report=tuple(report.lines),
        doubts=tuple(report.doubts),
        notes=tuple(filter(None, [passes.line])),
        files=files,
        read=ready.files,
    )


def as_done(request: VolumeRequest, passes: Passes) -> VolumeRequest:
    """The request with the tiles that were taken, which the sidecar tells."""
    slicing = replace(request.slicing, tile=passes.tile, overlap=passes.overlap)
    return replace(request, slicing=slicing)


def use_threads(count: int) -> None:
    """Have SimpleITK use so many threads in the whole process; 0 leaves the choice to it."""
    if count:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(count)


class Ready(NamedTuple):
    """Two sources that can be fused."""

    together: Together
    registered: Registered
    files: tuple[Path, ...]  # that were opened
    scalings: tuple[Scaling, Scaling]  # of the sources as they came, whatever the grid
    extras: dict[str, Callable[[], bytes]]  # content of files of the plan that needs the sources
    tracer: Tracer | None  # of a PET, where it is named and known


def prepare(request: VolumeRequest, report: Report) -> Ready:
    """Source 1 and source 2, registered and on one grid."""
    sources = read_sources(request, report)
    scalings = scale_pair(sources, request.levels)
    tracer = find_tracer(sources.source1) if request.modality == "PET" else None
    registered = register(sources, request.registering, request.forced, report)
    extras = extras_of(request, sources, registered, report)
    unmoved = request.registering.keep_unmoved and registered.applied
    together = bring_together(sources, registered.matrix, request.grid, report, unmoved)
    files_of_labels = []
    if request.labels:
        matrix = registered.matrix
        labels = bring_labels(request.labels, sources, matrix, together, report)
        packed = is_packed(request.plan().path("labels"))
        extras["labels"] = partial(labels_nifti, labels, packed)
        files_of_labels = labels.files
    volumes = (sources.source1, sources.source2, sources.via)
    files = [file for volume in volumes if volume is not None for file in volume.files]
    if request.registering.transform:
        files.append(request.registering.transform)
    files += files_of_labels
    return Ready(together, registered, tuple(files), scalings, extras, tracer)


def extras_of(
    request: VolumeRequest, sources: Sources, registered: Registered, report: Report
) -> dict[str, Callable[[], bytes]]:
    """The picture of a registration, and its transform for another program; by what they are."""
    extras = {}
    if (picture := picture_of(sources, registered)) is not None:
        extras["overlay"] = partial(png_bytes, picture)
    if path := request.writing.transform:
        if not registered.applied:
            report.tell("nothing was moved: the transform of --transform is the identity")
        both = sources.source1, sources.source2
        text = exported(path, registered.matrix, *both, request.modality)
        extras["transform for a program"] = lambda: text
    return extras


def read_sources(request: VolumeRequest, report: Report) -> Sources:
    """Both sources and the companion CT, if there is one; UserError for two patients."""
    source1, source2 = (
        read_source(source, number, request, report)
        for number, source in enumerate((request.source1, request.source2), 1)
    )
    report.doubt(*check_patients(source1.patient, source2.patient, request.forced))
    report.tell(*unused_choices(request.source1, source1.chosen_by | source2.chosen_by))
    via = None
    if companion := request.registering.via:
        via = read_via(companion, request.task, request.forced, report)
        report.doubt(*check_patients(source1.patient, via.patient, request.forced, "--via"))
    return Sources(source1, source2, via, request.modality)


UNUSED = {  # a field of Source -> its flag, and why it had no effect on two sources
    "where": ("where", "neither source has images that it tells apart"),
    "time": ("frame", "neither source has several points in time"),
    "affine": ("affine", "neither source is a NIfTI file with two places"),
}


def unused_choices(source: Source, chosen_by: Collection[str]) -> list[str]:
    """A line for each flag that was given and had no effect on either source."""
    plain = Source(source.path)
    return [
        f"--{flag} {getattr(source, name)} has no effect: {why}"
        for name, (flag, why) in UNUSED.items()
        if getattr(source, name) != getattr(plain, name) and flag not in chosen_by
    ]


def read_source(source: Source, number: int, request: VolumeRequest, report: Report) -> Volume:
    """Source 1 or 2, by its number, with finite values.

    Raises UserError for another modality than the task expects, unless it is forced.
    """
    name, kind = f"img{number}", request.modality if number == 1 else "MRI"
    choice = Choice(source.where, source.time, source.affine)
    volume = read_volume(source.path, source.series, f"--series{number}", choice)
    make_finite(volume, source)
    if volume.data.min() == volume.data.max():
        value = volume.data.flat[0]
        raise UserError(f"{source.path}: all voxels are {value:g}, there is nothing to fuse")
    doubts = kind_doubts(volume, kind, request.task)
    doubts += units_doubts(volume, request.levels.window) if kind == "CT" else []
    lines = check_source(source.path, doubts, request.forced, name)
    report.tell(f"{name}: {kind}, {volume.describe()}")
    report.tell(*(f"{name}: {note}" for note in volume.notes))
    report.doubt(*lines)
    return volume


def read_via(source: Source, task: str, forced: Collection[str], report: Report) -> Volume:
    """The CT that is registered in the place of source 1; UserError if it is none."""
    via = read_volume(source.path, None, "--via")
    make_finite(via, source)
    doubts = [*kind_doubts(via, "CT", task), *units_doubts(via, Levels().window)]
    report.doubt(*check_source(source.path, doubts, forced, "--via"))
    report.tell(*(f"--via: {note}" for note in via.notes))
    return via


def kind_doubts(volume: Volume, kind: str, task: str) -> list[tuple[str, str]]:
    """The doubt that a volume's DICOM modality is another than expected, as for `passed_over`."""
    expected = DICOM_MODALITY[kind]
    if volume.modality in (None, expected):
        return []
    return [("modality", f"its modality is {volume.modality}, {task} expects {expected}")]


def units_doubts(volume: Volume, window: str) -> list[tuple[str, str]]:
    """The doubt that a CT is not in HU, or not in its window's unit, as for `passed_over`."""
    doubt = units_doubt(volume.data, window)
    return [("units", doubt)] if doubt else []


def check_source(
    path: Path, doubts: list[tuple[str, str]], forced: Collection[str], name: str
) -> list[str]:
    """Lines on doubts about one source; UserError for the first that is not forced."""
    for what, doubt in doubts:
        if what not in forced:
            how = f" as {name}; --force modality fuses all the same" if what == "modality" else ""
            raise UserError(f"{path}: {doubt}{how}")
    return [f"{name}: forced ({what}): {doubt}" for what, doubt in doubts]


def make_finite(volume: Volume, source: Source) -> None:
    """Name voxels that are not finite in a UserError, or make them 0 where that was asked for."""
    wrong = ~np.isfinite(volume.data)
    count = int(wrong.sum())
    if not count:
        return
    first = np.unravel_index(int(wrong.argmax()), wrong.shape)
    where = ", ".join(str(int(i)) for i in first)
    line = f"{count} voxels are NaN or infinite, the first at ({where})"
    if not source.nan_to_zero:
        raise UserError(f"{source.path}: {line}; --nan-to-zero takes them as 0")
    volume.data[wrong] = 0
    volume.notes.append(f"{line}: taken as 0")


def scale_pair(sources: Sources, levels: Levels) -> tuple[Scaling, Scaling]:
    """The scalings of source 1 and source 2, as they came."""
    return (
        scaling_of(sources.source1, sources.modality, levels.window, levels.suv),
        scaling_of(sources.source2, "MRI", levels.window, levels.suv),
    )


def scale_lines(scalings: tuple[Scaling, Scaling], kind: str) -> list[str]:
    """The scalings in lines, for PET also why SUV is missing and how far its values reach."""
    lines, method = [scaling.text for scaling in scalings], scalings[0].method
    if reason := method.get("no_suv"):
        lines.append(f"no SUV ({reason}): {kind} scaled to its maximum")
    if (share := method.get("share_used", 1.0)) < WHOLE:
        reach = f"up to {share * method['high']:.3g} SUV"
        lines.append(f"{kind}: its values use {share:.0%} of that range, {reach}")
    return lines


def blending_line(why_not: str) -> str:
    """Whether `--dicom` lets a viewer blend the untouched sources; an empty reason: it does."""
    if why_not:
        return f"--dicom: no presentation state that blends the sources, as {why_not}"
    return "--dicom: presentation.dcm blends the untouched sources in a viewer"


def empty(together: Together, axis: str) -> tuple[np.ndarray, str]:
    """A fused volume without values yet, (I, J, K) int16, and the axis of its slices.

    Raises UserError if the slices are too small for the network.

    Args:
        axis: axial, coronal, sagittal, or auto.
    """
    grid = together.source1
    axis = pick_axis(grid.affine, axis)
    luma = np.empty(grid.data.shape, np.int16, order="F")  # as NIfTI stores it
    height, width = slices(luma, grid.affine, axis).shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{axis} slices are {height}x{width} pixels, expected at least {MIN_SIDE}x{MIN_SIDE}; "
            "--axis chooses others"
        )
    return luma, axis
