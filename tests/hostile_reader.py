"""Reads files that others made, in a process of its own, and tells what that took.

A line of JSON comes in, [reader, path], and one goes out: the outcome ("read", "refused" or
"fault"), what was said, seconds of CPU, MB of memory at the peak beyond what was in use before, and
whether it got as far as pixels. A reader that dies takes only this process with it.
"""

import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import SimpleITK as sitk  # noqa: N813
import torch

import images
import volumes.dicom
import volumes.io
import volumes.transforms
import weights
from args_setting import StudyArgs
from checkpoints import parts_of_checkpoint
from cli import UserError, columns_of
from dataset import people
from studies.cases import Listing, of_table
from volumes.uploads import source_of

MOST = 3 * 2**30  # bytes of address space beyond what is in use at the start
seen = {"pixels": False}


def picture(path: Path) -> None:
    """Its size, then its pixels; of several pages the second one's."""
    reading = images.AS_STORED
    try:
        images.header_size(path)
    except UserError as error:
        if "--page" not in str(error):
            raise
        reading = images.Reading(page=2)
        images.header_size(path, reading)
    images.read_image(path, reading)


def upload(path: Path) -> None:
    """As the page reads it, with its limits."""
    with tempfile.TemporaryDirectory() as folder:
        volumes.io.read_volume(source_of(path, Path(folder, "unpacked"), 256, 64e6))


def table(path: Path) -> None:
    list(
        of_table(Listing(path.parent, table=path), columns_of(StudyArgs, ("img1", "img2", "name")))
    )


READERS: dict[str, Callable[[Path], object]] = {
    "picture": picture,
    "volume": volumes.io.read_volume,
    "upload": upload,
    "transform": volumes.transforms.read_transform,
    "registration": lambda path: volumes.transforms.read_registration(path, NOBODY, NOBODY),
    "weights": weights.load_weights,
    "checkpoint": parts_of_checkpoint,
    "table": table,
    "people": lambda path: people(path.parent),
}
NOBODY = volumes.io.Volume(None, None, frame_of_reference="1.2.3")


def watch(module, name: str) -> None:
    """Note when a function is entered: then a file got as far as its pixels, or values."""
    function = getattr(module, name)

    def watched(*args, **kwargs):
        seen["pixels"] = True
        return function(*args, **kwargs)

    setattr(module, name, watched)


def in_use(name: str) -> int:
    """kB of memory of this process: VmRSS now, VmHWM at the peak, VmSize of addresses."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def attempt(reader: str, path: Path) -> dict:
    seen["pixels"] = False
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = in_use("VmRSS"), time.process_time()
    outcome, said = "read", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader](path)
    except UserError as error:
        outcome, said = "refused", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome, said = "fault", f"{type(error).__name__} in {where.name}: {error}"[:500]
    return {
        "outcome": outcome,
        "said": said,
        "seconds": time.process_time() - began,
        "megabytes": (in_use("VmHWM") - before) / 1024,
        "pixels": seen["pixels"],
    }


def main() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for module, name in (
        (images, "values_of"),
        (volumes.io, "_nifti_values"),
        (volumes.io, "values_of_itk"),
        (volumes.dicom, "_decoded"),
        (volumes.transforms, "regular"),
        (weights, "check_state"),
    ):
        watch(module, name)
    most = in_use("VmSize") * 1024 + MOST
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        reader, path = json.loads(line)
        print(json.dumps(attempt(reader, Path(path))), flush=True)


if __name__ == "__main__":
    main()
