"""Does bone stay white, and what is bright in the MRI bright? Of fused CT-MRI test images.

    python benchmarks/brightness.py ours=result/CT-MRI other=FOLDER

Bone is where the CT has at least level 250, bright is where the MRI has at least 230, of 255.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import machine, make_parser

from args_setting import DATA_DIR
from cli import run_script
from dataset import task_pairs
from evaluation.compare import Sample, name_folders, read_samples


class Brightness(NamedTuple):
    """Of one method's images, in levels of 255."""

    bone: float  # the mean where CT >= 250, over the slices
    darkest: float  # the same in the slice where it is lowest
    grey: float  # the share of bone under 200
    change: float  # fused image less MRI, where MRI >= 230


def brightness(samples: list[Sample], method: str) -> Brightness:
    """How bright one method shows what is bright in a source."""
    bone, grey, change = [], [], []  # of each pair
    for ct, mri, images in samples:
        fused = images[method].astype(float)  # (H, W)
        bone.append(fused[ct >= 250].mean())
        grey.append((fused[ct >= 250] < 200).mean())
        change.append((fused - mri)[mri >= 230].mean())
    return Brightness(np.mean(bone), min(bone), np.mean(grey), np.mean(change))


def main(args: argparse.Namespace) -> None:
    pairs = task_pairs(args.data_dir, "CT-MRI", "test")
    files = {
        method: {pair.name: folder / f"{pair.name}.png" for pair in pairs}
        for method, folder in name_folders(args.fused).items()
    }
    samples = read_samples(pairs, files)
    print(machine("numpy"))
    for method in files:
        found = brightness(samples, method)
        print(
            f"{method}: bone {found.bone:.0f}, in the darkest slice {found.darkest:.0f}, under 200 "
            f"in {found.grey:.1%} of its pixels; bright MRI {found.change:+.1f}"
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("fused", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
