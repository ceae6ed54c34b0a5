"""Time from the prompt to the fused file of one 256x256 pair, and of --help.

    python benchmarks/startup.py
    python benchmarks/startup.py --against ../before      beside another commit, which
                                                          `git worktree add ../before COMMIT` makes

Each command has a process of its own, and they take turns; every second round goes backwards. All
fuse with the weights of this checkout. The parts are taken by the clock in one more process, which
does what test_asfe.py does.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import ROOT, machine, make_parser, positive

# isort: split
from cli import UserError, run_script
from images import read_uint8, write_png
from phantom import phantom_pair
from weights import shipped_path

TASK = "CT-MRI"
PARTS = """
import sys, time
marks, (root, started), sys.argv = {}, sys.argv[-2:], ["test_asfe.py", *sys.argv[1:-2]]
def mark(name, since):
    now = time.time()
    marks[name] = marks.get(name, 0) + now - since
    return now
now = mark("Python", float(started))
sys.path.insert(0, root)
from args_setting import TestArgs
from cli import command_line, run_script
args = command_line(TestArgs, "")
now = mark("flags", now)
import fusing
import network
import test_asfe
now = mark("imports", now)
def timed(owner, attribute, name):
    function = getattr(owner, attribute)
    def wrapper(*args, **kwargs):
        start = time.time()
        result = function(*args, **kwargs)
        mark(name, start)
        return result
    setattr(owner, attribute, wrapper)
timed(fusing, "decode", "reading")
timed(test_asfe, "load_model", "weights")
timed(test_asfe, "optimise", "weights")
timed(network.ASFEFusion, "fuse", "first pass")
timed(fusing, "write_together", "writing")
run_script(test_asfe.main, args)
import json
print(json.dumps(marks), time.time())
"""


def seconds_of(command: list) -> tuple[float, str]:
    """How long a process took, and the last line that it printed; UserError if it failed."""
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        raise UserError(f"{command[1]}: {done.stderr.strip().splitlines()[-1]}")
    return taken, done.stdout.splitlines()[-1]


def parts_of(flags: list) -> dict[str, float]:
    """Seconds of each part of a run of ours; they add up to the whole."""
    started = time.time()
    taken, line = seconds_of([sys.executable, "-c", PARTS, *flags, ROOT, started])
    marks, _, ended = line.rpartition(" ")
    parts = json.loads(marks)
    parts["exit"] = started + taken - float(ended)
    return parts | {"other": taken - sum(parts.values())}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(args: argparse.Namespace) -> None:
    print(machine("torch"), flush=True)
    trees = {"here": ROOT} | ({"there": args.against} if args.against else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, image in zip(("1.png", "2.png"), phantom_pair(TASK), strict=True):
            write_png(folder / path, image)
        flags = ["--task", TASK, "--weights", shipped_path("compact", TASK)]
        flags += ["--img1", folder / "1.png", "--img2", folder / "2.png", "--out"]
        runs = {("one pair", tree): [*flags, folder / f"{tree}.png"] for tree in trees}
        runs |= {("--help", tree): ["--help"] for tree in trees}
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        parts = []
        for k in range(args.repeats):
            for what, tree in list(runs)[:: -1 if k % 2 else 1]:
                command = [sys.executable, trees[tree] / "test_asfe.py", *runs[what, tree]]
                taken[what, tree].append(seconds_of(command)[0])
            parts.append(parts_of([*flags, folder / "here.png"]))
        fused = [read_uint8(folder / f"{tree}.png").astype(int) for tree in trees]
    print(f"{args.repeats} rounds; median (least to most)")
    for (what, tree), seconds in taken.items():
        print(f"{what}, {tree}: {spread(seconds)} s")
    if args.against:
        for what in ("one pair", "--help"):
            rounds = zip(taken[what, "there"], taken[what, "here"], strict=True)
            print(f"{what}: {spread([there / here for there, here in rounds])} times faster here")
        print(f"the fused images differ by {np.abs(fused[0] - fused[1]).max()} of 255 at most")
    medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    print("parts: " + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()) + " s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--against", type=Path, help="folder of another checkout")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
