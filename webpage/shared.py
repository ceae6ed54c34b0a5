"""What the page and the child processes behind it both name; this file loads nothing.

The page offers the choices of `test_asfe.py`. They are listed here once more, since their own files
load PyTorch; a test holds both equal.

Legend: sizes in 2^20 bytes, sides in pixels.
"""

from pathlib import Path
from typing import NamedTuple

from args_setting import TASKS

PLANES = ("axial", "coronal", "sagittal")
SHOWN = ("fused", "scan 1", "scan 2")  # in a plane, one volume
COMPARED = ("edges", "checkerboard")  # in a plane, scan 2 on scan 1
WAYS = ("auto", "off", "check", "rigid")  # of --register
FORCED = ("modality", "space", "place", "overlap", "registration", "units", "patient")
WINDOW = "wide"  # of --window


class ImageLimits(NamedTuple):
    """How large an uploaded image may be."""

    megabytes: float
    side: int  # the longer one


class VolumeLimits(NamedTuple):
    """How large an uploaded volume, or zip of one, may be."""

    megabytes: float
    voxels: float  # of a volume, or of a series with its copies


def example_paths(folder: Path, task: str) -> tuple[Path, Path]:
    """Where the drawn example of a task lies: source 1 and the MRI."""
    return folder / task / f"example_{TASKS[task]}.png", folder / task / "example_MRI.png"
