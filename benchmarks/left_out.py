"""How well weights do on some people of the training split, and on the others.

    python benchmarks/left_out.py fold.safetensors model_pre/compact_CT-MRI.safetensors \\
        --task CT-MRI --cases CT:2 CT:16 CT:37

Give the people that a training has left out (`train_asfe.py --leave_out`), and beside its weights
others that saw them. Slices of different people are not equally hard. So compare two weights on the
same people, and look at how the difference changes between those left out and the others. Whole
slices, evenly spread, are measured as `train_asfe.py` validates.
"""

import argparse
from pathlib import Path

import torch
from machine import machine, make_parser, positive

# isort: split
from ablation import NAMES, values_on

from args_setting import DATA_DIR, TASKS, TrainArgs
from cli import run_script
from dataset import TrainPairs, split_pairs
from evaluation.tables import aligned
from network import MIN_SIDE
from train_asfe import spread


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(machine("torch", "numpy"), flush=True)
    cases = tuple(args.cases)
    split = split_pairs(TrainArgs(task=args.task, val_cases=cases, data_dir=args.data_dir))
    lines = [["weights", "people", "slices", *NAMES]]
    for people, pairs in (("named", split.val), ("others", split.train)):
        images = spread(TrainPairs(pairs, MIN_SIDE).images, args.slices)
        chosen = [(args.task, image) for image in images]
        for path in args.weights:
            found = values_on(path, chosen)
            values = [f"{found[name]:.3f}" for name in NAMES]
            lines.append([path.stem, people, str(len(chosen)), *values])
    print(aligned(lines))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--cases", nargs="+", required=True, help="of the named people: CT:2")
    parser.add_argument("--slices", type=positive, default=24, help="of each group")
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
