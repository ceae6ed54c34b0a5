"""A page in the browser on which to try the fusion: two images or volumes in, the fused one out.

    python app.py                 then open http://127.0.0.1:7860

It runs on this machine and asks nothing of another one. Uploads and results lie in a temporary
folder. A file is removed at the age of --keep_minutes, and the folder when the program ends. If the
program was killed, the next one removes it. Between clicks the program keeps only the paths of each
visitor's last pair, so nobody sees another's images.

This file is the layout of the page and its server. What opens an upload is in webpage/clicks.py,
for volumes in webpage/volume_clicks.py, and runs in child processes (studies/child.py). So this
process neither decodes an upload nor holds a network. webpage/turns.py has the queue.

`file` is the path of an upload.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import limits
from args_setting import TASKS, AppArgs
from cli import Runtime, UserError, command_line, run_script, temporary_folder

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(AppArgs, __doc__)

from studies.child import Bounds, Call, Child
from webpage.shared import ImageLimits, VolumeLimits, example_paths
from webpage.tab import CLOSE_MESSAGES, Place, Tab, sentence
from webpage.turns import Turns
from webpage.volume_tab import VolumePage, volume_tab

MISSING = "app.py needs gradio: pip install -r requirements-app.txt"
FOR_VOLUMES = ("SimpleITK", "nibabel", "pydicom")
FORMATS = ("PNG", "TIFF", "JPEG", "BMP")  # all that Gradio, too, may have Pillow open
THREADS = 2 * limits.WAITING + 16  # of Gradio: each job that waits has one
JOBS = "webpage.clicks:"  # what a child runs
INTRODUCTION = """# Two scans of one head, fused into one image
CT shows bone, MRI shows soft tissue, PET and SPECT show activity. This page joins two such images
of the **same slice**, lined up pixel for pixel, into one that shows what both show.

**1** Choose two images, or a drawn example. **2** Press *Fuse*. **3** Compare. Images stay on the
machine that runs this page. For research, not for diagnosis."""
FIGURES = """### What the figures say
Each row measures one thing; ↑ means that more is better, ↓ that less is. **Bold** is the best of
the row, underlined the second. The columns **max** and **mean** are the two simplest ways to fuse,
the brighter pixel and the average. **source 1** and **source 2** are copies that fuse nothing, and
still win some rows. **pyramid** takes the stronger detail of the two. A good fusion should beat
them all where it matters, and no single figure says that it does.

* EN, SD, SF, AG: information, contrast and sharpness of the fused image alone (noise raises them).
* MI, QMI, CC, SCD, PSNR, FMI, QNCIE: how much of the sources' values is in it.
* SSIM, MS-SSIM, VIF, VIFF, Qabf, QCB: how well it keeps their structure and edges.
* Nabf, QCV: false detail and visible distortion; less is better.
"""
STYLE = """footer {display: none !important}
#image1 img, #image2 img, #fused img, #blend img, .plane img {
    width: 100%; max-height: 400px; object-fit: contain}
#numbers {overflow-x: auto}
#numbers th, #numbers td {white-space: nowrap; padding: 4px 8px !important}
@media (max-width: 640px) {
    #examples > *, #image1, #image2 {min-width: 0 !important; flex: 1 1 0 !important}
    #examples > :first-child {flex-basis: 100% !important}
    #fused {flex-basis: 100% !important}
    #image1 img, #image2 img, #blend img {max-height: 200px}
    #numbers table {font-size: 10.5px}
    #numbers th, #numbers td {padding: 3px !important}
    #numbers th {white-space: normal}
}
"""


def weights_in(folder: Path) -> dict[str, Path]:
    """The files of weights in a folder, by their names; UserError if there are none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: no weights, expected *.safetensors")
    return {path.stem: path for path in paths}


def weights_for(task: str, names: list[str]) -> str:
    """The weights that the page picks for a task: its own, else those for all, else any."""
    wanted = (f"compact_{task}", f"paper_{task}", "compact_all", names[0])
    return next(name for name in wanted if name in names)


def worded(note: str) -> UserError:
    """A note on a source, with what the page has in place of flags."""
    note = note.replace("--task another", "the choice of the two images above another")
    return UserError(note.replace("--levels", "test_asfe.py --levels"))


class Made(NamedTuple):
    """What a visitor has made last, as paths."""

    files: tuple[Path, ...]  # the two uploads
    source: str  # picture of source 1
    fused: str


class Page(Tab):
    """What happens on the tab for images. The child opens uploads, see webpage/clicks.py."""

    def __init__(self, gr, place: Place, most: ImageLimits, weights: dict[str, Path], child: Child):
        super().__init__(gr, place)
        self.most, self.weights, self.child, self.turns = most, weights, child, Turns()

    def job(self, name: str, *args):
        """What a function of webpage/clicks.py returns."""
        return self.ask(self.child, f"{JOBS}{name}", *args, seconds=limits.IMAGE_SECONDS)

    def show(self, file: str | None):
        """The image of an upload twice, and blanks for the results of earlier images."""
        image = None
        try:
            if file:
                [upload] = self.uploads(file, need="")
                out = self.new("shown.png")
                self.job("show", upload, self.most, out)
                image = str(out)
        except (UserError, OSError) as error:
            self.warn(error, file)
        return image, image, None, None, "", "image 1 | fused", "", None

    def task(self, task: str):
        """Labels and weights that go with a task."""
        label = f"Image 1: {TASKS[task]}"
        weights = weights_for(task, list(self.weights))
        return self.gr.update(label=label), self.gr.update(label=label), weights

    def fuse(self, file1: str | None, file2: str | None, task: str, weights: str):
        """The values of the results on the page; the last one is for `measure`."""
        need = "two images are needed: drop one into each box, or take an example"
        try:
            files = self.uploads(file1, file2, need=need)
            folder = self.new()
            how = self.most, task, self.weights[weights], folder
            done = self.job("fuse", files, *how)
        except (UserError, OSError) as error:
            raise self.error(error, file1, file2) from None
        source, fused = (str(folder / Path(done[name]).name) for name in ("source", "fused"))
        notes = "\n".join(f"* {sentence(worded(line), file1, file2)}" for line in done["notes"])
        made = Made(files, source, fused)
        return fused, (source, fused), "Measuring …", "image 1 | fused", notes, made

    def measure(self, made: Made | None) -> str:
        """The metrics of what `fuse` made; nothing if other images have been chosen since."""
        if made is None:
            return ""
        try:
            return self.job("measure", made.files, Path(made.fused))
        except (UserError, OSError) as error:
            return f"No figures: {sentence(error, made.fused, *map(str, made.files))}"

    def wipe(self, under: str, image1: str | None, image2: str | None, made: Made | None):
        """The two images of the wipe."""
        images = {"image 1": image1, "image 2": image2, "fused": made and made.fused}
        chosen = tuple(images[name] for name in under.split(" | "))
        return None if any(image is None for image in chosen) else chosen

    def blend(self, percent: float, file1: str | None, file2: str | None) -> str | None:
        """The sources laid over each other, `percent` of source 2; nothing if one is absent."""
        try:
            files = self.uploads(file1, file2, need="two")
            out = self.new("blend.png")
            self.job("blend", files, self.most, percent, out)
        except (UserError, OSError):
            return None  # `show` and `fuse` have said why
        return str(out)


def sweep(folder: Path, age: float, turns: Sequence[Turns] = ()) -> None:
    """Remove what lies below `folder` and was not written or moved for `age` seconds.

    What jobs need that wait or run in `turns` stays.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after its files
        with contextlib.suppress(OSError):  # moved meanwhile, or a folder that is not empty
            if time.time() - path.stat().st_ctime > age and not is_in_use(path, turns):
                path.rmdir() if path.is_dir() else path.unlink()


def is_in_use(path: Path, turns: Sequence[Turns]) -> bool:
    """Whether a job that waits or runs needs a path, or a folder that it lies in."""
    needed = set().union(*(each.in_use() for each in turns))
    return not needed.isdisjoint(map(str, (path, *path.parents)))


def keep_swept(folder: Path, age: float, turns: Sequence[Turns]) -> None:
    """`sweep` as long as the program runs, in a thread of its own."""

    def work() -> None:
        while folder.is_dir():
            time.sleep(min(30, max(age / 4, 0.1)))
            sweep(folder, age, turns)

    threading.Thread(target=work, daemon=True).start()


def quiet_blocks(gr) -> type:
    """gradio.Blocks that logs a request it cannot take as one line.

    Gradio itself would print a traceback, as for an error of ours.
    """

    class QuietBlocks(gr.Blocks):
        async def preprocess_data(self, *args, **kwargs):
            try:
                return await super().preprocess_data(*args, **kwargs)
            except Exception as error:  # of whatever a stranger has sent
                reason = f"{type(error).__name__}: {error}".encode("ascii", "replace").decode()
                print(f"refused a request: {' '.join(reason.split())[:200]}", file=sys.stderr)
                raise gr.Error("this request was refused", print_exception=False) from None

    return QuietBlocks


def image_tab(page: Page, examples: dict[str, tuple[Path, Path]]) -> None:
    """The tab for images: what is on it, and which click does what."""
    gr, first = page.gr, next(iter(TASKS))
    picture = {"format": "png", "image_mode": None, "type": "filepath", "interactive": False}
    picture |= {"buttons": ["fullscreen"]}
    gr.Markdown(INTRODUCTION)
    with gr.Row(elem_id="examples"):
        gr.Markdown("No images at hand? Take a drawn head (no patient):")
        buttons = {t: gr.Button(t, elem_id=f"example-{t}", size="sm") for t in TASKS}
    names = [f"Image 1: {TASKS[first]}", "Image 2: MRI"]
    with gr.Row():
        # of any kind: so that a volume gets a better answer than gradio's
        files = [gr.File(label=n, elem_id=f"file{k}", height=150) for k, n in enumerate(names, 1)]
        with gr.Column():
            task = gr.Radio(list(TASKS), value=first, label="What are the two images?")
            weights = gr.Dropdown(
                list(page.weights),
                value=weights_for(first, list(page.weights)),
                label="Weights: what the network has learned (picked for you)",
            )
    go = gr.Button("Fuse", variant="primary", elem_id="fuse")
    notes = gr.Markdown(elem_id="notes")
    with gr.Row():
        shown = [gr.Image(label=n, elem_id=f"image{k}", **picture) for k, n in enumerate(names, 1)]
        fused = gr.Image(
            label="Fused (the arrow saves it as PNG)",
            elem_id="fused",
            **picture | {"buttons": ["download", "fullscreen"]},
        )
    wipe, under, blend, share = comparison(gr, picture)
    with gr.Row():
        with gr.Column():
            numbers = gr.Markdown(elem_id="numbers")
        with gr.Column():
            gr.Markdown(FIGURES)
    results = Results(fused, wipe, numbers, under, notes, gr.State())
    for name, button in buttons.items():
        chosen = (*map(str, examples[name]), name)
        button.click(lambda chosen=chosen: chosen, None, [*files, task], **AT_ONCE)
    task.change(page.task, task, [files[0], shown[0], weights], **AT_ONCE)
    connect(page, Given(files, shown, [task, weights], go), results, (blend, share))


# Each handler waits for its turn by itself, see webpage/turns.py.
AT_ONCE = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}


class Given(NamedTuple):
    """The components that a visitor fills or clicks; all are gradio's."""

    files: list  # the two uploads
    shown: list  # their pictures
    how: list  # task, weights
    go: object  # the button


class Results(NamedTuple):
    """The components of a result, in the order of what `Page.fuse` returns."""

    fused: object
    wipe: object
    numbers: object
    under: object  # what the wipe shows
    notes: object
    made: object  # state of this visitor, see `Made`


def connect(page: Page, given: Given, results: Results, blending: tuple) -> None:
    """Which change or click of the components does what; `blending` is a picture and its share."""
    images = [page.gr.State(), page.gr.State()]  # paths of what `given.shown` shows
    blend, share = blending
    turns, sources = page.turns, [share, *given.files]
    blended = page.queued(turns, page.blend)
    for file, shown, image in zip(given.files, given.shown, images, strict=True):
        file.change(None, js=CLOSE_MESSAGES)
        handler = page.queued(turns, page.show)
        file.change(handler, file, [shown, image, *results], **AT_ONCE).then(
            blended, sources, blend, **AT_ONCE
        )
    given.go.click(None, js=CLOSE_MESSAGES)
    click = AT_ONCE | {"show_progress": "full"}
    # the figures in a turn of their own: another's picture comes before them
    given.go.click(
        page.queued(turns, page.fuse, only="fuse"), [*given.files, *given.how], results, **click
    ).success(page.queued(turns, page.measure), results.made, results.numbers, **AT_ONCE)
    places = [results.under, *images, results.made]
    results.under.input(page.wipe, places, results.wipe, **AT_ONCE)
    share.release(blended, sources, blend, **AT_ONCE)


def comparison(gr, picture: dict) -> tuple:
    """Two ways to compare images, as components: a wipe and what it shows, a blend and its share.

    `picture` has what all pictures of the page have in common.
    """
    with gr.Row():
        with gr.Column():
            wipe = gr.ImageSlider(
                label="Wipe: drag the line", elem_id="wipe", **picture, max_height=400
            )
            under = gr.Radio(
                ["image 1 | fused", "image 2 | fused", "image 1 | image 2"],
                value="image 1 | fused",
                label="Left and right of the line",
            )
        with gr.Column():
            blend = gr.Image(
                label="Blend: the sources laid over each other; do they line up?",
                elem_id="blend",
                **picture,
            )
            share = gr.Slider(0, 100, 50, step=1, label="Percent of image 2", elem_id="share")
    return wipe, under, blend, share


def build(page: Page, examples: dict[str, tuple[Path, Path]], volumes: VolumePage | None):
    """The page as gradio.Blocks; without `volumes` the second tab says what to install."""
    gr = page.gr
    with quiet_blocks(gr)(title="ASFE-Fusion", analytics_enabled=False) as blocks:
        with gr.Tab("Images"):
            image_tab(page, examples)
        with gr.Tab("Volumes", elem_id="volumes"):
            if volumes is None:
                absent = ", ".join(name for name in FOR_VOLUMES if not find_spec(name))
                gr.Markdown(f"Volumes need {absent}: `pip install -r requirements-volumes.txt`")
            else:
                volume_tab(volumes)
    return blocks


def log(text: str) -> None:
    """Print what went wrong in this program."""
    print(text, file=sys.stderr, flush=True)


def free_port(host: str, port: int) -> int:
    """The port if it can be listened on, any free one for 0; UserError if it cannot."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}, port {port}: {error}") from None
        return probe.getsockname()[1]


def start_children(
    runtime: Runtime, weights: dict[str, Path], folder: Path, stack: contextlib.ExitStack
) -> list[Child]:
    """The children for images, for volumes, and to look at volumes; the first gets ready at once.

    They end with `stack`. Those for volumes are started by the first visitor who needs them.
    """
    of_tasks = {task: weights[weights_for(task, list(weights))] for task in TASKS}
    prepared = [
        Call("webpage.clicks:prepare", (list(weights.values()), runtime, folder)),
        Call("webpage.volume_clicks:prepare", (of_tasks, runtime)),
        Call("webpage.volume_clicks:prepare", ({}, runtime)),
    ]
    memory = limits.granted_memory() // 2  # so that one cannot take what the others have
    children = [Child(call, Bounds(memory)) for call in prepared]
    for child in children:
        stack.callback(child.close)
    children[0].begin()
    return children


def pages(
    gr, args: AppArgs, weights: dict[str, Path], uploads: Path, children: list[Child]
) -> list[Tab | None]:
    """What happens on the tab for images, and on the one for volumes, if it can be."""
    place = Place(uploads, args.keep_minutes, log)
    most = ImageLimits(args.max_mb, args.max_side)
    page, volumes = Page(gr, place, most, weights, children[0]), None
    if all(map(find_spec, FOR_VOLUMES)):
        most = VolumeLimits(args.volume_mb, 1e6 * args.volume_voxels)
        volumes = VolumePage(gr, place, most, children[1:])
    return [page, volumes]


def import_gradio(folder: Path):
    """Gradio, with its files below a folder; UserError if it is not installed."""
    # Gradio reads these when it is imported or builds a page.
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",  # it would keep images in the browser
    }
    try:
        import gradio
        from PIL import Image
    except ImportError:
        raise UserError(MISSING) from None
    Image.init()
    Image.ID[:] = FORMATS
    return gradio


def serve(args: AppArgs, folder: Path, stack: contextlib.ExitStack) -> None:
    """Serve the page, with its files below `folder`, until it is interrupted."""
    weights = weights_in(args.weights_dir)
    runtime = Runtime(args.DEVICE, args.threads)
    children = start_children(runtime, weights, folder, stack)
    gr = import_gradio(folder)
    port = free_port(args.host, args.port)
    if lacks := children[0].start():
        log(f"no limit of {', '.join(lacks)} for what opens uploads here: only its time is bounded")
    (uploads := folder / "uploads").mkdir()
    page, volumes = pages(gr, args, weights, uploads, children)
    turns = [page.turns, *((volumes.turns, volumes.looks) if volumes else ())]
    keep_swept(uploads, 60 * args.keep_minutes, turns)
    blocks = build(page, {task: example_paths(folder, task) for task in TASKS}, volumes)
    _, address, _ = blocks.launch(
        server_name=args.host,
        server_port=port,
        max_file_size=round(max(args.max_mb, args.volume_mb) * 2**20),
        max_threads=THREADS,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        css=STYLE,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    blocks.block_thread()


def main(args: AppArgs) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed
    with temporary_folder("asfe-") as folder, contextlib.ExitStack() as stack:
        serve(args, folder, stack)


if __name__ == "__main__":
    run_script(main, ARGS)
