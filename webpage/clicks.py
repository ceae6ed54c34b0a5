"""What the tab for images does with uploads, in the child process behind the page.

Each function takes paths, writes pictures as PNG where it is told, and returns what JSON has.
`prepare` comes first. Errors name an upload by its path; the page shows its name.

Legend: H W pixels; `file` is the path of an upload.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from args_setting import EXTENSIONS, TASKS
from cli import VOLUMES, Runtime, UserError, has_dicom_mark, setup_runtime
from dataset import Pair, decode_pair
from evaluation.tables import table
from evaluation.trivial import TRIVIAL
from fusing import ImageRequest, fuse_images
from images import header_size, luma_and_chroma, read_uint8, to_uint8, write_png
from inference import optimise
from metrics import compare
from network import MIN_SIDE, ASFEFusion
from phantom import phantom_pair
from webpage.shared import ImageLimits, example_paths
from weights import load_weights

NETWORKS: dict[Path, ASFEFusion] = {}  # by their files, ready for a click


def prepare(weights: Sequence[Path], runtime: Runtime, examples: Path) -> None:
    """Load the networks, make the first pass, and draw the examples into a folder.

    Raises UserError for weights that cannot be loaded.
    """
    device = setup_runtime(runtime)
    for path in weights:
        NETWORKS[path] = optimise(load_weights(path, device)[0])
    black = np.zeros((256, 256), np.uint8)
    next(iter(NETWORKS.values())).fuse(black, black)  # the first pass prepares the library
    for task in TASKS:
        for path, image in zip(example_paths(examples, task), phantom_pair(task), strict=True):
            path.parent.mkdir(exist_ok=True)
            write_png(path, image)


def check_image(file: Path, limits: ImageLimits) -> None:
    """Refuse an upload by its name, its length, or the size in its header.

    So it is refused before its pixels take memory.
    """
    name = file.name.lower()
    volume = name.endswith((*VOLUMES, ".zip")) or has_dicom_mark(file)
    if volume and not name.endswith(EXTENSIONS):
        raise UserError(f"{file} is a volume: use the tab Volumes")
    megabytes = file.stat().st_size / 2**20
    if megabytes > limits.megabytes:
        raise UserError(f"{file} has {megabytes:.4g} MB, expected at most {limits.megabytes:g} MB")
    height, width = header_size(file)
    got = f"{file} is {height}x{width} pixels, expected"
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{got} sides of {MIN_SIDE} or more")
    if max(width, height) > limits.side:
        raise UserError(f"{got} sides of at most {limits.side} (test_asfe.py takes larger ones)")


def checked(file1: Path, file2: Path, limits: ImageLimits) -> Pair:
    """Two uploads as a pair; UserError if one is none that is taken."""
    check_image(file1, limits)
    check_image(file2, limits)
    return Pair("image", file1, file2)


def show(file: Path, limits: ImageLimits, out: Path) -> None:
    """Write an upload as the page shows it."""
    check_image(file, limits)
    write_png(out, read_uint8(file))


def fuse(
    files: tuple[Path, Path], limits: ImageLimits, task: str, weights: Path, folder: Path
) -> dict:
    """Fuse two uploads.

    Returns: `fused` and `source`, the names of pictures in `folder`, the fused image and source 1;
    and `notes`, lines on what is odd about the sources for the task.
    """
    pair = checked(*files, limits)
    stems = "_".join(path.stem[:60] for path in files)
    out = folder / f"{stems}_fused.png"
    [fused] = fuse_images([ImageRequest(pair, out, task)], NETWORKS[weights])
    write_png(folder / "source.png", to_uint8(*luma_and_chroma(fused.sources[0])))
    notes = [*fused.notes, *(line for lines in fused.odd.values() for line in lines)]
    return {"fused": out.name, "source": "source.png", "notes": notes}


def measure(files: tuple[Path, Path], fused: Path) -> str:
    """The metrics of a fused pair, as a table in Markdown."""
    pair = Pair("image", *files)
    result = compare({"fused": {pair.name: fused}}, [pair], jobs=1)
    return table(result, "markdown", methods=("fused", *TRIVIAL))


def blend(files: tuple[Path, Path], limits: ImageLimits, percent: float, out: Path) -> None:
    """Write two uploads laid over each other, `percent` of the second one."""
    pixels = decode_pair(checked(*files, limits))  # of equal sizes
    images = [to_uint8(*luma_and_chroma(source)) for source in pixels]
    images = [i if i.ndim == 3 else np.repeat(i[..., None], 3, 2) for i in images]
    share = percent / 100
    write_png(out, to_uint8((images[0] * (1 - share) + images[1] * share) / 255))
