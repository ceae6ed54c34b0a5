"""A page in the browser on which to try the fusion: two images or volumes in, the fused one out.

    python app.py                 then open http://127.0.0.1:7860

It runs on this machine and asks nothing of another one. Uploads and results lie in a temporary
folder. A file is removed at the age of --keep_minutes, and the folder when the program ends. If the
program was killed, the next one removes it. Between clicks the program keeps only the paths of each
visitor's last pair, so nobody sees another's images.

Legend: H W pixels. Images are uint8, (H, W) or (H, W, 3) RGB; `file` is the path of an upload.
"""

import html
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from args_setting import TASKS, AppArgs
from cli import UserError, command_line, run_script, setup_runtime, temporary_folder

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(AppArgs, __doc__)

import numpy as np
from PIL import Image

from dataset import Pair, decode_pair
from evaluation.tables import table
from evaluation.trivial import TRIVIAL
from fusing import ImageRequest, fuse_images
from images import (
    EXTENSIONS,
    FORMATS,
    header_size,
    luma_and_chroma,
    read_uint8,
    to_uint8,
    write_png,
)
from inference import optimise
from metrics import compare
from network import MIN_SIDE, ASFEFusion
from phantom import phantom_pair
from weights import load_weights

MISSING = "app.py needs gradio: pip install -r requirements-app.txt"
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
# Messages about earlier images, such as "two images are needed", close when others are chosen.
CLOSE_MESSAGES = "() => document.querySelectorAll('.toast-close').forEach(b => b.click())"


def sentence(error: Exception, *files: str) -> str:
    """An error's message with the names of uploads in place of their paths, safe as HTML."""
    text = str(error)
    for file in files:
        text = text.replace(file, Path(file).name)
    return html.escape(text, quote=False)


def check_image(file: str, args: AppArgs) -> None:
    """Refuse an image by its length, or the size in its header, before its pixels take memory."""
    megabytes = Path(file).stat().st_size / 2**20
    if megabytes > args.max_mb:
        raise UserError(f"{file} has {megabytes:.4g} MB, expected at most {args.max_mb:g} MB")
    try:
        height, width = header_size(Path(file))
    except (UserError, OSError):  # whatever stumbles here is described by `read_image`
        return
    got = f"{file} is {height}x{width} pixels, expected"
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{got} sides of {MIN_SIDE} or more")
    if max(width, height) > args.max_side:
        raise UserError(f"{got} sides of at most {args.max_side} (test_asfe.py takes larger ones)")


def uploaded_pair(file1: str | None, file2: str | None, args: AppArgs) -> Pair:
    """The uploads as a pair; UserError if one is absent, swept away or too large."""
    if not (file1 and file2):
        raise UserError("two images are needed: drop one into each box, or take an example")
    for file in (file1, file2):
        if not Path(file).is_file():
            kept = f"{args.keep_minutes:g} minutes"
            raise UserError(f"{file} is gone, as files are kept for {kept}; choose it again")
        check_image(file, args)
    return Pair("image", Path(file1), Path(file2))


def load_all(args: AppArgs) -> dict[str, ASFEFusion]:
    """Every network of the weights folder by the name of its file, ready for the first click."""
    device = setup_runtime(args)
    paths = sorted(args.weights_dir.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{args.weights_dir}: no weights, expected *.safetensors")
    models = {path.stem: optimise(load_weights(path, device)[0]) for path in paths}
    black = np.zeros((256, 256), np.uint8)
    next(iter(models.values())).fuse(black, black)  # the first pass prepares the library
    return models


def weights_for(task: str, names: list[str]) -> str:
    """The weights that the page picks for a task: its own, else those for all, else any."""
    wanted = (f"compact_{task}", f"paper_{task}", "compact_all", names[0])
    return next(name for name in wanted if name in names)


def draw_examples(folder: Path) -> dict[str, tuple[str, str]]:
    """A drawn pair for each task, as files: (source 1, MRI)."""
    examples = {}
    for task, source in TASKS.items():
        (folder / task).mkdir()
        paths = [folder / task / f"example_{name}.png" for name in (source, "MRI")]
        for path, image in zip(paths, phantom_pair(task), strict=True):
            write_png(path, image)
        examples[task] = tuple(map(str, paths))
    return examples


class Page:
    """What happens on the page. It holds networks and settings, never an image.

    Pictures that it makes are files in `folder`.
    """

    def __init__(self, args: AppArgs, models: dict[str, ASFEFusion], folder: Path):
        import gradio

        self.gr, self.args, self.models, self.folder = gradio, args, models, folder

    def error(self, error: Exception, *files: str):
        """The error as a sentence on the page; it stays until it is closed."""
        return self.gr.Error(sentence(error, *files), duration=None, print_exception=False)

    def show(self, file: str | None):
        """The image of an upload, and blanks for the results of earlier images."""
        blank = (None, None, "", "image 1 | fused", None)
        if not file:
            return None, *blank
        try:
            check_image(file, self.args)
            return read_uint8(Path(file)), *blank
        except (UserError, OSError) as error:
            self.gr.Warning(sentence(error, file), duration=None)
            return None, *blank

    def task(self, task: str):
        """Labels and weights that go with a task."""
        label = f"Image 1: {TASKS[task]}"
        weights = weights_for(task, list(self.models))
        return self.gr.update(label=label), self.gr.update(label=label), weights

    def picture(self, name: str, image: np.ndarray) -> str:
        """The image as a new file. Gradio would encode it again for each place on the page."""
        path = Path(tempfile.mkdtemp(dir=self.folder), f"{name}.png")
        write_png(path, image)
        return str(path)

    def fuse(self, file1: str | None, file2: str | None, weights: str):
        """The values of the results on the page; the last one is for `measure`."""
        try:
            pair = uploaded_pair(file1, file2, self.args)
            stems = "_".join(path.stem[:60] for path in (pair.path1, pair.path2))
            out = Path(tempfile.mkdtemp(dir=self.folder), f"{stems}_fused.png")
            [fused] = fuse_images([ImageRequest(pair, out)], self.models[weights])
            source = self.picture("source", to_uint8(*luma_and_chroma(fused.sources[0])))
        except (UserError, OSError) as error:
            raise self.error(error, *filter(None, (file1, file2))) from None
        return str(out), (source, str(out)), "Measuring …", "image 1 | fused", (pair, str(out))

    def measure(self, made: tuple[Pair, str] | None) -> str:
        """The metrics of what `fuse` made; nothing if other images have been chosen since."""
        if made is None:
            return ""
        pair, fused = made
        try:
            result = compare({"fused": {pair.name: Path(fused)}}, [pair], jobs=1)
        except (UserError, OSError) as error:
            files = (fused, str(pair.path1), str(pair.path2))
            return f"No figures: {sentence(error, *files)}"
        return table(result, "markdown", methods=("fused", *TRIVIAL))

    def wipe(self, under: str, image1, image2, fused):
        """The two images of the wipe."""
        images = {"image 1": image1, "image 2": image2, "fused": fused}
        chosen = tuple(images[name] for name in under.split(" | "))
        return None if any(image is None for image in chosen) else chosen

    def blend(self, percent: float, file1: str | None, file2: str | None):
        """The sources laid over each other, `percent` of source 2; nothing if one is absent."""
        try:
            pair = uploaded_pair(file1, file2, self.args)
            pixels = decode_pair(pair)  # of equal sizes
        except (UserError, OSError):
            return None  # `show` and `fuse` have said why
        images = [to_uint8(*luma_and_chroma(source)) for source in pixels]
        images = [i if i.ndim == 3 else np.repeat(i[..., None], 3, 2) for i in images]
        share = percent / 100
        return to_uint8((images[0] * (1 - share) + images[1] * share) / 255)


def sweep(folder: Path, age: float) -> None:
    """Remove what lies below `folder` and was not written or moved for `age` seconds."""
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder after its files
        with suppress(OSError):  # moved meanwhile, or a folder that is not empty
            if time.time() - path.stat().st_ctime > age:
                path.rmdir() if path.is_dir() else path.unlink()


def keep_swept(folder: Path, age: float) -> None:
    """`sweep` as long as the program runs, in a thread of its own."""

    def work() -> None:
        while folder.is_dir():
            time.sleep(min(30, max(age / 4, 0.1)))
            sweep(folder, age)

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


def image_tab(page: Page, examples: dict[str, tuple[str, str]]) -> None:
    """The tab for images: what is on it, and which click does what."""
    gr, models = page.gr, page.models
    first = next(iter(TASKS))
    picture = {"format": "png", "image_mode": None, "type": "filepath", "interactive": False}
    picture |= {"buttons": ["fullscreen"]}
    gr.Markdown(INTRODUCTION)
    with gr.Row(elem_id="examples"):
        gr.Markdown("No images at hand? Take a drawn head (no patient):")
        buttons = {t: gr.Button(t, elem_id=f"example-{t}", size="sm") for t in TASKS}
    names = [f"Image 1: {TASKS[first]}", "Image 2: MRI"]
    kinds = {"file_types": list(EXTENSIONS), "height": 150}
    with gr.Row():
        files = [gr.File(label=n, elem_id=f"file{k}", **kinds) for k, n in enumerate(names, 1)]
        with gr.Column():
            task = gr.Radio(list(TASKS), value=first, label="What are the two images?")
            weights = gr.Dropdown(
                list(models),
                value=weights_for(first, list(models)),
                label="Weights: what the network has learned (picked for you)",
            )
    go = gr.Button("Fuse", variant="primary", elem_id="fuse")
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

    made = gr.State()  # of this visitor: the last pair and its fused image, as paths
    results = [fused, wipe, numbers, under, made]
    # One at a time: the network uses every core.
    turn = {"concurrency_id": "turn", "concurrency_limit": 1, "api_visibility": "private"}
    quiet = turn | {"show_progress": "hidden"}
    for file, image in zip(files, shown, strict=True):
        file.change(None, js=CLOSE_MESSAGES)
        file.change(page.show, file, [image, *results], **quiet).then(
            page.blend, [share, *files], blend, **quiet
        )
    for name, button in buttons.items():
        chosen = (*examples[name], name)
        button.click(lambda chosen=chosen: chosen, None, [*files, task], **quiet)
    task.change(page.task, task, [files[0], shown[0], weights], **quiet)
    # the figures in a turn of their own: another's picture comes before them
    go.click(page.fuse, [*files, weights], results, **turn).success(
        page.measure, made, numbers, **quiet
    )
    under.input(page.wipe, [under, *shown, fused], wipe, **quiet)
    share.release(page.blend, [share, *files], blend, **quiet)


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


def volume_tab(page: Page) -> None:
    """The tab for volumes, or what to install for it."""
    try:
        from volumes.page import Limits, VolumePage, volume_tab  # its packages are an extra
    except ModuleNotFoundError as error:
        command = "pip install -r requirements-volumes.txt"
        page.gr.Markdown(f"Volumes need {error.name}: `{command}`")
        return
    models = {task: page.models[weights_for(task, list(page.models))] for task in TASKS}
    args = page.args
    limits = Limits(args.volume_mb, 1e6 * args.volume_voxels, args.keep_minutes)
    volume_tab(VolumePage(page.gr, limits, models, page.folder, sentence))


def build(page: Page, examples: dict[str, tuple[str, str]]):
    """The page as gradio.Blocks."""
    gr = page.gr
    with quiet_blocks(gr)(title="ASFE-Fusion", analytics_enabled=False) as blocks:
        with gr.Tab("Images"):
            image_tab(page, examples)
        with gr.Tab("Volumes", elem_id="volumes"):
            volume_tab(page)
    return blocks


def free_port(host: str, port: int) -> int:
    """The port if it can be listened on, any free one for 0; UserError if it cannot."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}, port {port}: {error}") from None
        return probe.getsockname()[1]


def serve(args: AppArgs, folder: Path) -> None:
    """Serve the page, with its files below `folder`, until it is interrupted."""
    # Gradio reads these when it is imported or builds a page.
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",  # it would keep images in the browser
    }
    try:
        import gradio  # noqa: F401

        Image.init()
        Image.ID[:] = FORMATS  # all that Gradio, too, may have Pillow open
    except ImportError:
        raise UserError(MISSING) from None
    port = free_port(args.host, args.port)
    models = load_all(args)
    (uploads := folder / "uploads").mkdir()
    keep_swept(uploads, 60 * args.keep_minutes)
    blocks = build(Page(args, models, uploads), draw_examples(folder))
    _, address, _ = blocks.launch(
        server_name=args.host,
        server_port=port,
        max_file_size=round(max(args.max_mb, args.volume_mb) * 2**20),
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
    with temporary_folder("asfe-") as folder:
        serve(args, folder)


if __name__ == "__main__":
    run_script(main, ARGS)
