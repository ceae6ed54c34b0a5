"""The tab for volumes on the page of app.py: two scans in, registered and fused, in three planes.

What opens a scan, or a result, is in volume_clicks.py and runs in a child process. Between clicks
the program knows of a visitor only the folder of the last result. What a run unpacks and writes
lies beside the folder that is swept, since a run may take longer than files are kept, and goes when
it ends.

`file` is the path of an upload.
"""

import html
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import limits
from args_setting import TASKS
from cli import UserError
from studies.child import Child
from webpage.shared import COMPARED, FORCED, PLANES, SHOWN, WAYS, WINDOW, VolumeLimits
from webpage.tab import CLOSE_MESSAGES, Place, Tab
from webpage.turns import Turns

QUICK, FULL = "quick look: voxels of 2 mm", "full: the voxels of the finer scan"
GRID = {QUICK: "2mm", FULL: "auto"}
JOBS = "webpage.volume_clicks:"  # what a child runs
INTRODUCTION = """Two whole scans of **one patient**: CT, PET or SPECT, and an MRI. They need not
lie on each other, as they are registered first. A file is NIfTI (.nii, .nii.gz), .mgz, or a zip of
one DICOM series. A quick look at a head takes a minute or less on two cores, a full one several
minutes, and one visitor's scans are fused at a time. Nothing personal is read out of them, and they
are removed like images. For research, not for diagnosis."""
FIELDS = "what begins with -- is a field under More"


def sides(task: str) -> tuple[str, str]:
    """The labels of the two uploads."""
    return f"Scan 1 (img1): {TASKS[task]}", "Scan 2 (img2): MRI"


class Fused(NamedTuple):
    """The result of a click, as the page shows it."""

    views: str  # the folder for `look`
    status: str  # a line
    report: str
    files: list[str]  # to save
    overlay: str | None  # picture of the registration
    counts: list[int]  # slices of each plane


class VolumePage(Tab):
    """What happens on the tab."""

    def __init__(self, gr, place: Place, most: VolumeLimits, children: tuple[Child, Child]):
        """`children`: one fuses, and one looks at uploads and results meanwhile."""
        super().__init__(gr, place)
        self.most, (self.fuser, self.looker) = most, children
        self.turns, self.looks = Turns(), Turns()

    def check(self, file: str | None) -> None:
        """Say at once what is wrong with an upload, as far as its name and length tell."""
        self.fuser.begin()  # the next click will need it
        try:
            if file:
                how = {"seconds": limits.LOOK_SECONDS}
                self.ask(self.looker, f"{JOBS}check", Path(file), self.most, **how)
        except UserError as error:
            self.warn(error, file)

    def fuse(self, file1: str | None, file2: str | None, words: dict, progress: Callable) -> Fused:
        """What `words` of a request make of the uploads, see `words_of`.

        Args:
            progress: gets a share of the work, and `desc`, a line.

        Raises:
            gr.Error: a sentence on what is wrong.
        """
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.place.folder.parent) as work:

            def tell(share: list | None, line: str) -> None:
                progress(tuple(share) if share else 0, desc=line)  # without it there is no text

            try:
                files = self.uploads(
                    file1, file2, need="two scans are needed: drop one into each box"
                )
                how = {"seconds": limits.VOLUME_SECONDS, "tell": tell}
                asked = files, words, self.most, Path(work)
                done = self.ask(self.fuser, f"{JOBS}fuse", *asked, **how)
            except (UserError, OSError) as error:
                raise self.error(worded(error, work), file1, file2) from None
            kept = self.new("result")
            shutil.move(Path(work, "result"), kept)
        names = " with ".join(html.escape(path.name, quote=False) for path in files)
        return Fused(
            str(kept / "views"),
            f"**{names}**, {time.perf_counter() - began:.0f} s",
            "\n".join(f"* {html.escape(line, quote=False)}" for line in done["report"]),
            [str(kept / Path(name).name) for name in done["files"]],
            done["overlay"] and str(kept / Path(done["overlay"]).name),
            done["counts"],
        )

    def look(self, views: str | None, shown: str, axis: str, number: float) -> str | None:
        """A slice of a result as a PNG: `number`, from 1, along an axis; None if there is none."""
        if views is None:
            return None
        try:
            if not Path(views).is_dir():
                raise UserError(f"the result is gone, as {self.kept()}; fuse again")
            out = self.new(f"{axis}.png")
            at = Path(views), shown, axis, int(number), out
            self.ask(self.looker, f"{JOBS}look", *at, seconds=limits.LOOK_SECONDS)
        except UserError as error:
            self.warn(error)
            return None
        return str(out)


def worded(error: Exception, work: str) -> UserError:
    """An error without the places of a run's files, and with the way to the settings it names."""
    text = str(error)
    for folder in (Path(work, k, inside) for k in "12" for inside in ("unpacked", "")):
        text = text.replace(f"{folder}{os.sep}", "")
    return UserError(f"{text} ({FIELDS})" if "--" in text else text)


# --- layout ----------------------------------------------------------------------------------


def more_fields(gr) -> dict:
    """The settings that errors ask for, as components by their names, folded away."""
    text = {"series1": "", "series2": "", "where": "EchoTime=80", "frame": "3, mean or sum"}
    with gr.Accordion("More: for scans that an error asks about", open=False):
        gr.Markdown("Leave these as they are unless a message names one of them.")
        with gr.Row():
            fields = {n: gr.Textbox(label=f"--{n}", placeholder=p) for n, p in text.items()}
        with gr.Row():
            fields["window"] = gr.Textbox(WINDOW, label="--window of CT: wide, brain, LEVEL,WIDTH")
            choices = ("sform", "qform")
            fields["affine"] = gr.Radio(choices, value="sform", label="--affine of NIfTI")
            fields["nan_to_zero"] = gr.Checkbox(label="--nan-to-zero")
        label = "--force: fuse although this is in doubt"
        fields["force"] = gr.CheckboxGroup(list(FORCED), label=label)
    return fields


def words_of(task: str, size: str, register: str, more: dict) -> dict:
    """The words of a request but for its files; UserError if one is none of the page."""
    if task not in TASKS or register not in WAYS or size not in GRID:
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
                list(WAYS),
                value="auto",
                label="Registration (--register); auto: where they are not known to lie together",
            )
    more = more_fields(gr)
    go = gr.Button("Register and fuse", variant="primary", elem_id="fuse-volumes")
    status = gr.Markdown(elem_id="status", min_height=130)
    moments = [f"{how} {when}" for how in COMPARED for when in ("before", "after")]
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
        label="To save: the fused volume, the moved scan in its own unit, what was done (JSON)",
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
    # Each handler waits for its turn by itself, see webpage/turns.py. A handler outside of gradio's
    # queue would have gradio write a warning, with its file, into the log.
    at_once = {"concurrency_limit": None, "api_visibility": "private"}
    quick = at_once | {"show_progress": "hidden"}
    nothing = gr.update(value=1, maximum=2, interactive=True)
    blank = (None, "", "", None, None, *[nothing] * 3, *[None] * 3)
    outputs = [made, *parts.results, *parts.sliders, *parts.planes]

    def fuse(progress, *values):
        file1, file2, task, size, register, kind, *values = values
        try:
            fields = dict(zip(parts.more, values, strict=True))
            words = words_of(task, size, register, fields)
        except UserError as error:
            raise page.error(error) from None
        done = page.fuse(file1, file2, words, progress)
        middles = [count // 2 + 1 for count in done.counts]
        cells = [page.look(done.views, kind, *at) for at in zip(PLANES, middles, strict=True)]
        moved = [
            # gradio has no slider with one place
            gr.update(value=middle, maximum=max(count, 2), interactive=count > 1)
            for middle, count in zip(middles, done.counts, strict=True)
        ]
        return *done[:-1], *moved, *cells

    def look(views, kind, *numbers):
        return [page.look(views, kind, *at) for at in zip(PLANES, numbers, strict=True)]

    def look_at(axis: str) -> Callable:
        return lambda views, kind, number: page.look(views, kind, axis, number)

    for file in parts.files:
        file.change(None, js=CLOSE_MESSAGES)
        file.change(page.queued(page.looks, page.check), file, None, **quick)
        file.change(lambda: blank, None, outputs, **quick)
    task = parts.choices[0]
    task.change(lambda task: gr.update(label=sides(task)[0]), task, parts.files[0], **quick)
    parts.go.click(None, js=CLOSE_MESSAGES)
    parts.go.click(
        page.queued(page.turns, fuse, only="fuse", progress=True),
        [*parts.files, *parts.choices, parts.shown, *parts.more.values()],
        outputs,
        show_progress_on=parts.results[0],
        **at_once,
    )
    shown = [made, parts.shown, *parts.sliders]
    parts.shown.input(page.queued(page.looks, look), shown, parts.planes, **quick)
    for axis, slider, plane in zip(PLANES, parts.sliders, parts.planes, strict=True):
        handler = page.queued(page.looks, look_at(axis))
        at = [made, parts.shown, slider]
        slider.input(handler, at, plane, trigger_mode="always_last", **quick)
