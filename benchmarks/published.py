"""What published fused images have to do with the plain mean, and what a grey veil does to metrics.

    python benchmarks/published.py --data_dir HMIFDatasets FOLDER …

Each FOLDER holds fused test images as FOLDER/<task>/<name>.png. For each task it prints the mean
correlation with the pixelwise mean of the sources, the mean level where both sources are black, and
metrics before and after these pixels are set to 0. Last, how far the way through a stored colour
file moves the luma of the pixelwise maximum.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # the root first: its metrics.py is meant

import numpy as np  # noqa: E402
from machine import machine  # noqa: E402

import metrics  # noqa: E402
from args_setting import TASKS  # noqa: E402
from dataset import read_luma8, read_pair, task_pairs, to_uint8  # noqa: E402

NAMES = ("EN", "SSIM", "FMI_pixel", "QCB")


def veil(folder: Path, pairs: list) -> str:
    """One line about one method's images."""
    correlations, levels, before, after = [], [], [], []
    for pair in pairs:
        source1, source2 = read_luma8(pair.path1), read_luma8(pair.path2)
        fused = read_luma8(folder / f"{pair.name}.png").copy()
        mean = source1 / 2 + source2 / 2
        correlations.append(np.corrcoef(fused.ravel(), mean.ravel())[0, 1])
        black = (source1 == 0) & (source2 == 0)
        levels.append(fused[black].mean())
        before.append(list(metrics.evaluate(fused, source1, source2, NAMES).values()))
        fused[black] = 0
        after.append(list(metrics.evaluate(fused, source1, source2, NAMES).values()))
    changes = (
        f"{name} {old:.4f} -> {new:.4f}"
        for name, old, new in zip(NAMES, np.mean(before, 0), np.mean(after, 0), strict=True)
    )
    return (
        f"correlation with the mean {np.mean(correlations):.4f}, level on black "
        f"{np.mean(levels):.1f}; without it {', '.join(changes)}"
    )


def colour_shift(pairs: list) -> str:
    """How far storing the pixelwise maximum in colour moves its luma."""
    shifts = []
    for pair in pairs:
        luma1, luma2, chroma = read_pair(pair)
        wanted = np.maximum(luma1, luma2)
        stored = to_uint8(wanted, chroma) @ np.array([0.299, 0.587, 0.114])
        shifts.append(np.abs(stored - to_uint8(wanted)))
    share = np.mean(np.array(shifts) > 2)
    return f"luma moved by up to {np.max(shifts):.0f} levels, by over 2 in {share:.1%} of pixels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=HERE.parent / "HMIFDatasets")
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    print(machine("numpy", "scipy"))
    for task in TASKS:
        pairs = task_pairs(args.data_dir, task, "test")
        for folder in args.folders:
            print(f"{task} {folder.name}: {veil(folder / task, pairs)}", flush=True)
        if task != "CT-MRI":
            print(f"{task} maximum in colour: {colour_shift(pairs)}")


if __name__ == "__main__":
    main()
