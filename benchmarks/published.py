"""What published fused images have to do with the plain mean, and what a grey veil does to metrics.

    python benchmarks/published.py --data_dir HMIFDatasets FOLDER …

Each FOLDER holds fused test images as FOLDER/<task>/<name>.png. For each task it prints the mean
correlation with the pixelwise mean of the sources, the mean level where both sources are black, and
metrics before and after these pixels are set to 0.
"""

import argparse
from pathlib import Path

import numpy as np
from machine import machine, make_parser

from args_setting import DATA_DIR, TASKS
from cli import run_script
from dataset import Pair, task_pairs
from evaluation.compare import read_samples
from metrics import evaluate

NAMES = ("EN", "SSIM", "FMI_pixel", "QCB")


def veil(folder: Path, pairs: list[Pair]) -> str:
    """One line about one method's images."""
    correlations, levels, before, after = [], [], [], []
    files = {pair.name: folder / f"{pair.name}.png" for pair in pairs}
    for source1, source2, images in read_samples(pairs, {"": files}):
        fused = images[""].copy()
        mean = source1 / 2 + source2 / 2
        correlations.append(np.corrcoef(fused.ravel(), mean.ravel())[0, 1])
        black = (source1 == 0) & (source2 == 0)
        levels.append(fused[black].mean())
        before.append(list(evaluate(fused, source1, source2, NAMES).values()))
        fused[black] = 0
        after.append(list(evaluate(fused, source1, source2, NAMES).values()))
    changes = (
        f"{name} {old:.4f} -> {new:.4f}"
        for name, old, new in zip(NAMES, np.mean(before, 0), np.mean(after, 0), strict=True)
    )
    return (
        f"correlation with the mean {np.mean(correlations):.4f}, level on black "
        f"{np.mean(levels):.1f}; without it {', '.join(changes)}"
    )


def main(args: argparse.Namespace) -> None:
    print(machine("numpy", "scipy"))
    for task in TASKS:
        pairs = task_pairs(args.data_dir, task, "test")
        for folder in args.folders:
            print(f"{task} {folder.name}: {veil(folder / task, pairs)}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
