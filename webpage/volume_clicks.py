"""What the tab for volumes does with uploads, in a child process behind the page.

`prepare` comes before `fuse`. Errors name an upload by its path; the page shows its name.

Legend: N slices of (H, W) pixels as a reader looks at them, see volumes/grid.py; `file` is the path
of an upload.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cli import Runtime, UserError, setup_runtime
from images import to_uint8, write_png
from inference import optimise
from network import ASFEFusion
from studies.child import is_lack_of_memory
from volumes import FusedVolume, fuse_volumes, request_from, use_threads
from volumes.grid import pixel_sides, slice_positions, slices
from volumes.outputs import colour_volume
from volumes.overlay import checkerboard, edges, fitted
from volumes.pictures import with_bar, write_directions, write_text
from volumes.uploads import check_upload, source_of
from webpage.shared import PLANES, SHOWN, VolumeLimits
from weights import load_weights

SIDE = 360  # pixels of a plane on the page
SAVED = ("grey", "colour", "moved source", "transform", "sidecar")  # that a visitor may save
BOTH = {"edges": edges, "checkerboard": checkerboard}  # of the registration, before and after
NETWORKS: dict[str, ASFEFusion] = {}  # by task


def prepare(weights: Mapping[str, Path], runtime: Runtime) -> None:
    """Load the network of each task."""
    device = setup_runtime(runtime)
    use_threads(runtime.threads)
    loaded = {path: optimise(load_weights(path, device)[0]) for path in set(weights.values())}
    NETWORKS.update({task: loaded[path] for task, path in weights.items()})


def check(file: Path, limits: VolumeLimits) -> None:
    """UserError for an upload that its name or length shows to be wrong."""
    check_upload(file, limits.megabytes)


def fuse(
    files: tuple[Path, Path],
    words: dict[str, Any],
    limits: VolumeLimits,
    work: Path,
    tell: Callable[[Any, str], None],
) -> dict:
    """Register and fuse two uploads.

    Args:
        words: of a request, but for its files.
        work: an empty folder. Files are unpacked below it, and results lie in its folder `result`,
            with what `look` reads in `result/views`.
        tell: gets how many slices of how many are done, or None, and what is done now.

    Returns: `files`, the names of those that a visitor may save; `overlay`, that of the picture of
        the registration or None; `report`, lines; and `counts`, the slices of each plane.
    """
    try:
        tell(None, "reading")
        sources = {}
        for number, file in enumerate(files, 1):
            sources[f"img{number}"] = source(file, work / str(number), limits)
        out = work / "result"
        outputs = {"out": out / "fused.nii.gz", "moved": out / "moved.nii.gz"}
        request = request_from(words | sources | outputs)
        request = replace(request, registering=replace(request.registering, keep_unmoved=True))
        told = partial(tell_line, tell), lambda done, count: tell((done, count), "fusing slices")
        done = fuse_volumes(request, NETWORKS[request.task], *told)
        write_views(done, out / "views")
    except Exception as error:
        if is_lack_of_memory(error):
            text = "the scans are too large for this machine; take the quick look"
            raise UserError(text) from None
        raise
    overlay = next((path.name for path in done.files.get("overlay", ())), None)
    shape, affine = done.luma.shape, done.affine
    return {
        "files": [path.name for what in SAVED for path in done.files.get(what, ())],
        "overlay": overlay,
        "report": list(done.report),
        "counts": [len(slice_positions(shape, affine, axis)) for axis in PLANES],
    }


def source(file: Path, folder: Path, limits: VolumeLimits) -> Path:
    """What to read for an upload: a copy of it below `folder`, or a folder of its files."""
    folder.mkdir()
    check(file, limits)
    copy = Path(shutil.copyfile(file, folder / file.name))
    return source_of(copy, folder / "unpacked", limits.megabytes, limits.voxels)


def tell_line(tell: Callable[[Any, str], None], line: str) -> None:
    """A line of the report as progress."""
    tell(None, "registering, up to a minute" if line.startswith("img2: MRI") else line)


def look(folder: Path, shown: str, axis: str, number: int, out: Path) -> None:
    """Write a slice of a result as PNG: `number`, from 1, along an axis; see `view`."""
    write_png(out, view(folder, shown, axis, number - 1))


# --- views -----------------------------------------------------------------------------------


def write_views(done: FusedVolume, folder: Path) -> None:
    """What `view` shows of a run: files (I, J, K) uint8, or RGB, their affine, a colour bar."""
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
    if colour:
        nothing = np.zeros((SIDE, 0, 3), np.uint8)
        np.save(folder / "bar.npy", with_bar(nothing, colour, done.scalings[0]))
    np.save(folder / "affine.npy", done.affine)


def view(folder: Path, shown: str, axis: str, n: int) -> np.ndarray:
    """Slice `n` of what `write_views` wrote, with the patient's directions.

    Returns: RGB (SIDE, SIDE, 3); a fused slice in colour is wider by its bar.

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
    if shown == "fused" and (folder / "bar.npy").is_file():
        return np.hstack([image, np.load(folder / "bar.npy")])
    return image
