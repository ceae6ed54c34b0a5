"""Does bone stay white, and what is bright in the MRI bright? Of fused CT-MRI test images.

    python benchmarks/brightness.py ours=result/CT-MRI other=FOLDER

Bone is where the CT has at least level 250, bright is where the MRI has at least 230, of 255.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from args_setting import OneLineParser, run_script  # noqa: E402
from dataset import read_luma8, task_pairs  # noqa: E402
from metrics_report import name_folders  # noqa: E402


def main(args: argparse.Namespace) -> None:
    pairs = task_pairs(args.data_dir, "CT-MRI", "test")
    for name, folder in name_folders(args.fused).items():
        bone, grey, change = [], [], []  # of each pair
        for pair in pairs:
            paths = pair.path1, pair.path2, folder / f"{pair.name}.png"
            ct, mri, fused = (read_luma8(path).astype(float) for path in paths)  # (H, W)
            bone.append(fused[ct >= 250].mean())
            grey.append((fused[ct >= 250] < 200).mean())
            change.append((fused - mri)[mri >= 230].mean())
        print(
            f"{name}: bone {np.mean(bone):.0f}, in the darkest slice {min(bone):.0f}, under 200 in "
            f"{np.mean(grey):.1%} of its pixels; bright MRI {np.mean(change):+.1f}"
        )


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("fused", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "HMIFDatasets")
    run_script(main, parser.parse_args())
