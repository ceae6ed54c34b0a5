"""What each module of the network is worth: trained without it, from several seeds.

    python benchmarks/ablation.py --runs /tmp/ablation                     (hours; goes on if cut)
    python benchmarks/ablation.py --runs /tmp/ablation --variants whole casf --seeds 1 2

The compact size is trained on the three tasks for the same number of steps from the same seed, once
whole and once in each variant, by `train_asfe.py`. The people of LEFT_OUT take no part; slices of
theirs are measured as `train_asfe.py` validates. Each run stays in --runs with its measures and is
not made again. Without the blend the decoder makes the image itself, as in the paper; such variants
are compared with `blend`, where it runs too, the others with the whole network. A difference counts
(*) where the values of all seeds lie on one side of all of the other's; with three seeds each,
chance alone does that once in ten, with two once in three. A pass is timed at the end, the variants
taking turns, as a ratio to the whole network's.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from machine import ROOT, machine, make_parser, positive

from args_setting import SIZES, TASKS, TrainArgs
from cli import run_script
from dataset import TrainPairs, split_pairs
from evaluation.tables import aligned
from images import write_bytes
from network import MIN_SIDE, ASFEFusion
from train_asfe import Chosen, fuse_all, spread, validate
from weights import load_weights

LEFT_OUT = ("CT:2", "CT:16", "CT:37", "SPECT:3", "SPECT:4", "SPECT:9", "SPECT:10", "SPECT:11")
SLICES = 12  # of those people, for each task
VARIANTS = {  # name -> flags of train_asfe.py
    "whole": [],
    "casf": ["--without", "casf"],
    "aff": ["--without", "aff"],
    "sfef": ["--without", "sfef"],
    "all three": ["--without", "casf", "aff", "sfef"],
    "blend": ["--without", "blend"],
    "blend and casf": ["--without", "blend", "casf"],
    "blend and aff": ["--without", "blend", "aff"],
    "blend and sfef": ["--without", "blend", "sfef"],
    "aff as published": ["--aff", "published"],
    "paper loss": ["--recipe", "paper"],
}
NAMES = (
    "SSIM",
    "VIF",
    "Qabf",
    "kept",
    "conspicuous",
    "opposed",
    "foreign",
    "brighter",
    "shortfall",
)


def train(folder: Path, name: str, seed: int, args: argparse.Namespace) -> Path:
    """Train a variant, or go on with it; the weights' file."""
    stem = f"{name.replace(' ', '_')}_{seed}"
    flags = ["--task", "all", "--seed", seed, "--name", stem, "--save_dir", folder, "--val", 0]
    flags += ["--leave_out", *LEFT_OUT, "--stages", f"{args.patch}x{args.batch}x{args.epochs}"]
    flags += ["--val_every", args.epochs]
    flags += ["--threads", 1, "--DEVICE", "cpu", "--data_dir", args.data_dir, *VARIANTS[name]]
    if (folder / f"{stem}_last.pt").exists():
        flags.append("--resume")
    with (folder / f"{stem}.log").open("a") as log:
        command = [sys.executable, ROOT / "train_asfe.py", *flags]
        subprocess.run([str(word) for word in command], check=True, stdout=log, stderr=log)
    return folder / f"{stem}.safetensors"


def measure(path: Path, args: argparse.Namespace) -> dict[str, float]:
    """Values of whole slices of the people left out, as means over the tasks."""
    settings = TrainArgs(task="all", val_cases=LEFT_OUT, data_dir=args.data_dir)
    held = TrainPairs(split_pairs(settings).val, MIN_SIDE)
    chosen = []
    for task in TASKS:  # of PET-MRI there are none: it is one head, which all train on
        images = [i for i, t in zip(held.images, held.tasks, strict=True) if t == task]
        chosen += [(task, pair) for pair in spread(images, SLICES)]
    return values_on(path, chosen)


def values_on(path: Path, chosen: list[Chosen]) -> dict[str, float]:
    """What `train_asfe.py` would validate of weights on these pairs."""
    model, _ = load_weights(path)
    return validate(chosen, fuse_all(model, chosen))


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """The measures of a variant and a seed: from its file, or trained for."""
    file = args.runs / f"{name.replace(' ', '_')}_{seed}.json"
    if not file.exists():
        started = time.time()
        found = measure(train(args.runs, name, seed, args), args)
        found["minutes"] = (time.time() - started) / 60
        write_bytes(file, json.dumps(found).encode())
        print(f"{name}, seed {seed}: {found}", flush=True)
    return json.loads(file.read_text())


def network(name: str) -> ASFEFusion:
    """A variant with random weights."""
    flags = VARIANTS[name]
    parts = flags[1:] if "--without" in flags else []
    aff = "published" if "--aff" in flags else "full"
    return ASFEFusion(SIZES["compact"].without(parts), aff).eval()


def pass_seconds(names: list[str], repeats: int = 15) -> dict[str, float]:
    """Seconds of a pass of a pair of 256 x 256, the median of so many in turns."""
    models, times = {name: network(name) for name in names}, {name: [] for name in names}
    images = torch.rand(2, 1, 1, 256, 256)
    for _ in range(repeats):
        for name, model in models.items():
            started = time.perf_counter()
            model.fuse(*images)
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(t)) for name, t in times.items()}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means and largest distance from them over the seeds, a line for each variant."""
    seconds = pass_seconds(list(results))
    lines = [["variant", *NAMES, "M parameters", "pass", "minutes"]]
    for variant, rows in results.items():
        base = results["blend" if "blend and" in variant and "blend" in results else "whole"]
        cells = []
        for name in NAMES:
            values, others = [row[name] for row in rows], [row[name] for row in base]
            apart = max(values) < min(others) or min(values) > max(others)
            spread = max(abs(v - np.mean(values)) for v in values)
            cells.append(f"{np.mean(values):.3f} ±{spread:.3f}" + "*" * apart)
        count = sum(p.numel() for p in network(variant).parameters()) / 1e6
        ratio = seconds[variant] / seconds["whole"]
        minutes = np.mean([row["minutes"] for row in rows])
        lines.append([variant, *cells, f"{count:.2f}", f"{ratio:.2f}", f"{minutes:.0f}"])
    return aligned(lines)


def main(args: argparse.Namespace) -> None:
    print(machine("torch", "numpy"), flush=True)
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    for seed in args.seeds:  # a whole round first, so that a cut run has something to compare
        for name, found in results.items():
            found.append(run(name, seed, args))
    print(table(results))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=positive, default=[1, 2, 3])
    parser.add_argument("--epochs", type=positive, default=32)
    parser.add_argument("--batch", type=positive, default=8, help="pairs in a step")
    parser.add_argument("--patch", type=positive, default=64, help="side of a crop, in pixels")
    parser.add_argument("--data_dir", type=Path, default=TrainArgs().data_dir)
    args = parser.parse_args(argv)
    if "whole" not in args.variants:
        parser.error("--variants lacks whole, which the others are compared with")
    return args


if __name__ == "__main__":
    run_script(main, parse())
