"""The tab for volumes on the page of app.py: two scans in, registered and fused, in three planes.

Gradio comes as an argument, since this room is also there without it. Between clicks the program
knows of a visitor only the folder of the last result. What a run unpacks and writes lies beside
the folder that is swept, since a run may take longer than files are kept, and goes when it ends.

Legend: N slices of (H, W) pixels as a reader looks at them, see volumes/grid.py; `file` is the path
of an upload.
"""

import html
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from args_setting import TASKS
from cli import UserError
from fusing import FORCED
from images import to_uint8, write_png
from network import ASFEFusion
from volumes import FusedVolume, fuse_volumes, request_from
from volumes.grid import AXES, pixel_sides, slice_positions, slices
from volumes.outputs import colour_volume
from volumes.overlay import checkerboard, edges, fitted
from volumes.pictures import write_directions, write_text
from volumes.requests import WAYS_OF_VOLUMES, Levels
from volumes.uploads import check_upload, source_of

PLANES = AXES[::-1]  # axial first
SIDE = 360  # pixels of a plane on the page
QUICK, FULL = "quick look: voxels of 2 mm", "full: the voxels of the finer scan"
GRID = {QUICK: "2mm", FULL: "auto"}
SHOWN = ("fused", "scan 1", "scan 2")
SAVED = ("grey", "colour", "moved source", "transform")  # files that a visitor may save
BOTH = {"edges": edges, "checkerboard": checkerboard}  # of the registration, before and after
INTRODUCTION = """Two whole scans of **one patient**: CT, PET or SPECT, and an MRI. They need not
lie on each other, as they are registered first. A file is NIfTI (.nii, .nii.gz), .mgz, or a zip of
one DICOM series. A quick look at a head takes a minute or less on two cores, a full one several
minutes, and one visitor's scans are fused at a time. Nothing personal is read out of them, and they
are removed like images. For research, not for diagnosis."""
FIELDS = "what begins with -- is a field under More"


def sides(task: str) -> tuple[str, str]:
    """The labels of the two uploads."""
    return f"Scan 1 (img1): {TASKS[task]}", "Scan 2 (img2): MRI"


class Limits(NamedTuple):
    """What a visitor may send, and how long it is kept."""

    megabytes: float  # of 2^20 bytes: the largest upload
    voxels: float  # the most of a volume or series
    minutes: float  # the age at which files are removed


class VolumePage:
    """What happens on the tab. It holds networks and limits, never a volume."""

    def __init__(
        self,
        gr,
        limits: Limits,
        models: dict[str, ASFEFusion],
        folder: Path,
        sentence: Callable[..., str],
    ):
        """`models` by task; `folder` is that of results; `sentence` words an error for the page."""
        self.gr, self.limits, self.models, self.folder = gr, limits, models, folder
        self.sentence = sentence

    def error(self, error: Exception, *files: str | None) -> Exception:
        """The error as a sentence on the page; it stays until it is closed."""
        text = self.sentence(error, *filter(None, files))
        return self.gr.Error(text, duration=None, print_exception=False)

    def check(self, file: str | None) -> None:
        """Say at once what is wrong with an upload, as far as its name and length tell."""
        try:
            if file:
                check_upload(Path(file), self.limits.megabytes)
        except (UserError, OSError) as error:
            self.gr.Warning(self.sentence(error, file), duration=None)

    def fuse(self, file1: str | None, file2: str | None, words: dict, progress: Callable):
        """What `words` of a request make of the uploads, see `words_of`.

        Returns: a folder for `look`, a line, a report, files to save, and a picture of the
        registration or None.

        Args:
            progress: gets a share of the work, or None, and `desc`, a line.

        Raises:
            gr.Error: a sentence on what is wrong.
        """
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as work:
            sources = {}
            try:
                progress(None, desc="reading")
                for number, file in enumerate((file1, file2), 1):
                    sources[f"img{number}"] = self.source(file, Path(work, str(number)))
                out = Path(work, "result")
                outputs = {"out": out / "fused.nii.gz", "moved": out / "moved.nii.gz"}
                request = request_from(words | sources | outputs)
                how = replace(request.registering, keep_unmoved=True)
                request = replace(request, registering=how)
                model, count = self.models[request.task], partial(fusing, progress)
                done = fuse_volumes(request, model, partial(tell, progress), count)
                views = write_views(done, out / "views")
            except MemoryError:
                few = UserError("the scans are too large for this machine; take the quick look")
                raise self.error(few) from None
            except (UserError, OSError) as error:
                raise self.error(worded(error, work), file1, file2) from None
            kept = Path(tempfile.mkdtemp(dir=self.folder), "result")
            shutil.move(out, kept)
        files = [kept / path.name for what in SAVED for path in done.files.get(what, ())]
        picture = next((kept / path.name for path in done.files.get("overlay", ())), None)
        names = " with ".join(html.escape(Path(f).name, quote=False) for f in (file1, file2))
        status = f"**{names}**, {time.perf_counter() - began:.0f} s"
        report = "\n".join(f"* {html.escape(line, quote=False)}" for line in done.report)
        return kept / views.name, status, report, [*map(str, files)], picture and str(picture)

    def source(self, file: str | None, folder: Path) -> Path:
        """What to read for an upload: a copy of it below `folder`, or a folder of its files."""
        if not file:
            raise UserError("two scans are needed: drop one into each box")
        if not Path(file).is_file():
            kept = f"{self.limits.minutes:g} minutes"
            raise UserError(f"{file} is gone, as files are kept for {kept}; choose it again")
        folder.mkdir()
        check_upload(Path(file), self.limits.megabytes)
        copy = Path(shutil.copyfile(file, folder / Path(file).name))
        return source_of(copy, folder / "unpacked", self.limits.megabytes, self.limits.voxels)

    def look(self, made: Path | None, shown: str, axis: str, number: float) -> str | None:
        """A slice of a result as a PNG: `number`, from 1, along an axis; None if there is none."""
        if made is None:
            return None
        try:
            image = view(made, shown, axis, int(number) - 1)
        except OSError:
            kept = f"{self.limits.minutes:g} minutes"
            self.gr.Warning(f"the result is gone, as files are kept for {kept}; fuse again")
            return None
        path = Path(tempfile.mkdtemp(dir=self.folder), f"{axis}.png")
        write_png(path, image)
        return str(path)


def worded(error: Exception, work: str) -> UserError:
    """An error without the places of a run's files, and with the way to the settings it names."""
    text = str(error)
    for folder in (Path(work, k, inside) for k in "12" for inside in ("unpacked", "")):
        text = text.replace(f"{folder}{os.sep}", "")
    return UserError(f"{text} ({FIELDS})" if "--" in text else text)


def tell(progress: Callable, line: str) -> None:
    """A line of the report as progress."""
    if line.startswith("img2: MRI"):
        line = "registering, up to a minute"
    progress(None, desc=line)


def fusing(progress: Callable, done: int, count: int) -> None:
    """How many slices of how many are done, as progress."""
    progress((done, count), desc="fusing slices")


# --- views -----------------------------------------------------------------------------------


def write_views(done: FusedVolume, folder: Path) -> Path:
    """What `view` shows of a run, as files (I, J, K) uint8, or RGB, and their affine."""
    folder.mkdir()
    together, colour = done.together, done.request.writing.colour
    fused = colour_volume(done, colour) if colour else to_uint8(done.luma * done.scale)
    volumes = {"fused": fused}
    for number, volume in enumerate((together.source1, together.source2), 1):
        volumes[f"scan {number}"] = to_uint8(done.scalings[number - 1].apply(volume.data))
    if together.unmoved is not None:
        scaling = done.scalings[together.mover - 1]
        volumes[f"before {together.mover}"] = to_uint8(scaling.apply(together.unmoved.data))
    for name, data in volumes.items():
        np.save(folder / f"{name}.npy", data)
    np.save(folder / "affine.npy", done.affine)
    return folder


def view(folder: Path, shown: str, axis: str, n: int) -> np.ndarray:
    """Slice `n` of what `write_views` wrote, with the patient's directions: RGB (SIDE, SIDE, 3).

    Args:
        shown: one of SHOWN, or of BOTH with " before" or " after".
    """
    affine = np.load(folder / "affine.npy")
    shape = np.load(folder / "scan 1.npy", mmap_mode="r").shape
    labels = slice_positions(shape, affine, axis)
    n = min(max(n, 0), len(labels) - 1)

    def plane(name: str) -> np.ndarray:
        data = np.load(folder / f"{name}.npy", mmap_mode="r")
        return np.asarray(slices(data, affine, axis)[n], np.float32) / 255

    cell = pixel_sides(affine, axis), SIDE
    if shown in SHOWN:
        image = fitted(plane(shown), *cell)
    else:
        how, when = shown.split()
        names = ["scan 1", "scan 2"]
        for i in (1, 2):  # of the two only one was moved, or none
            if when == "before" and (folder / f"before {i}.npy").is_file():
                names[i - 1] = f"before {i}"
        image = BOTH[how](*map(plane, names), *cell)
    image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
    write_directions(image, axis)
    write_text(image, labels[n], (3, SIDE - 5))
    return image


# --- layout ----------------------------------------------------------------------------------


def more_fields(gr) -> dict:
    """The settings that errors ask for, as components by their names, folded away."""
    text = {"series1": "", "series2": "", "where": "EchoTime=80", "frame": "3, mean or sum"}
    with gr.Accordion("More: for scans that an error asks about", open=False):
        gr.Markdown("Leave these as they are unless a message names one of them.")
        with gr.Row():
            fields = {n: gr.Textbox(label=f"--{n}", placeholder=p) for n, p in text.items()}
        with gr.Row():
            window = Levels.window
            fields["window"] = gr.Textbox(window, label="--window of CT: wide, brain, LEVEL,WIDTH")
            choices = ("sform", "qform")
            fields["affine"] = gr.Radio(choices, value="sform", label="--affine of NIfTI")
            fields["nan_to_zero"] = gr.Checkbox(label="--nan-to-zero")
        label = "--force: fuse although this is in doubt"
        fields["force"] = gr.CheckboxGroup(list(FORCED), label=label)
    return fields


def words_of(task: str, size: str, register: str, more: dict) -> dict:
    """The words of a request but for its files; UserError if one is none of the page."""
    if task not in TASKS or register not in WAYS_OF_VOLUMES or size not in GRID:
        raise UserError("a setting is none of those on the page; load it again")
    more = more | {"force": ",".join(more["force"] or ())}
    given = {name: value for name, value in more.items() if value}  # what is folded away is None
    return {"task": task, "grid": GRID[size], "register": register, **given}


def volume_tab(page: VolumePage) -> None:
    """The tab's components, and which click does what."""
    gr, first = page.gr, next(iter(TASKS))
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        files = [gr.File(label=label, elem_id=f"scan{k}", height=150)
                 for k, label in enumerate(sides(first), 1)]  # fmt: skip
        with gr.Column():
            task = gr.Radio(list(TASKS), value=first, label="What are the two scans?")
            size = gr.Radio(list(GRID), value=QUICK, label="Size", elem_id="size")
            register = gr.Radio(
                list(WAYS_OF_VOLUMES),
                value="auto",
                label="Registration (--register); auto: where they are not known to lie together",
            )
    more = more_fields(gr)
    go = gr.Button("Register and fuse", variant="primary", elem_id="fuse-volumes")
    status = gr.Markdown(elem_id="status", min_height=130)
    moments = [f"{how} {when}" for how in BOTH for when in ("before", "after")]
    shown = gr.Radio(
        [*SHOWN, *moments],
        value="fused",
        label="Shown below (edges and checkerboard: of scan 2 on scan 1, registered or not)",
        elem_id="shown",
    )
    picture = {"format": "png", "type": "filepath", "interactive": False}
    picture |= {"buttons": ["fullscreen"], "elem_classes": "plane"}
    planes, sliders = [], []
    with gr.Row():
        for axis in PLANES:
            with gr.Column(min_width=240):
                planes.append(gr.Image(label=axis, elem_id=axis, **picture))
                slider = gr.Slider(1, 2, 1, step=1, label=f"{axis} slice", elem_id=f"{axis}-slice")
                sliders.append(slider)
    saved = gr.File(
        label="To save: the fused volume, and the moved scan in its own unit",
        interactive=False,
        elem_id="saved",
    )
    report = gr.Markdown(elem_id="report")
    overview = gr.Image(label="Registration, before and after", elem_id="overview", **picture)
    results = [status, report, saved, overview]
    connect(page, Parts(files, [task, size, register], more, go, shown, sliders, planes, results))


class Parts(NamedTuple):
    """The components of the tab; all but `more` are gradio's."""

    files: list  # the two uploads
    choices: list  # task, size, registration
    more: dict  # the fields under More, by their names
    go: Any  # the button
    shown: Any  # what the planes show
    sliders: list  # a plane's slice, each
    planes: list
    results: list  # status, report, files to save, picture of the registration


def connect(page: VolumePage, parts: Parts) -> None:
    """Which change or click of the components does what."""
    gr, made = page.gr, page.gr.State()
    # A volume at a time. Images have a turn of their own: a click there need not wait for minutes.
    turn = {"concurrency_id": "volumes", "concurrency_limit": 1, "api_visibility": "private"}
    # Not outside of the queue: there gradio would write a warning, with its file, into the log.
    quick = {"concurrency_id": "look", "concurrency_limit": 4, "api_visibility": "private"}
    quick |= {"show_progress": "hidden"}
    blank = (None, "", "", None, None, *[gr.update(value=1, maximum=2)] * 3, *[None] * 3)
    outputs = [made, *parts.results, *parts.sliders, *parts.planes]

    progress = gr.Progress()

    def fuse(progress=progress, *values):
        file1, file2, task, size, register, kind, *values = values
        try:
            fields = dict(zip(parts.more, values, strict=True))
            words = words_of(task, size, register, fields)
        except UserError as error:
            raise page.error(error) from None
        folder, *rest = page.fuse(file1, file2, words, progress)
        affine = np.load(folder / "affine.npy")
        shape = np.load(folder / "scan 1.npy", mmap_mode="r").shape
        counts = [len(slice_positions(shape, affine, axis)) for axis in PLANES]
        middles = [count // 2 + 1 for count in counts]
        cells = [page.look(folder, kind, *at) for at in zip(PLANES, middles, strict=True)]
        moved = [gr.update(value=m, maximum=c) for m, c in zip(middles, counts, strict=True)]
        return folder, *rest, *moved, *cells

    def look(folder, kind, *numbers):
        return [page.look(folder, kind, *at) for at in zip(PLANES, numbers, strict=True)]

    for file in parts.files:
        file.change(page.check, file, None, **quick)
        file.change(lambda: blank, None, outputs, **quick)
    task = parts.choices[0]
    task.change(lambda task: gr.update(label=sides(task)[0]), task, parts.files[0], **quick)
    parts.go.click(
        fuse,
        [*parts.files, *parts.choices, parts.shown, *parts.more.values()],
        outputs,
        show_progress_on=parts.results[0],
        **turn,
    )
    parts.shown.input(look, [made, parts.shown, *parts.sliders], parts.planes, **quick)
    for axis, slider, plane in zip(PLANES, parts.sliders, parts.planes, strict=True):
        at = [made, parts.shown, slider]
        slider.input(
            lambda m, s, n, axis=axis: page.look(m, s, axis, n), at, plane,
            trigger_mode="always_last", **quick,
        )  # fmt: skip
