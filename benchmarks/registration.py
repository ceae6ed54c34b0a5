"""How accurate `--register rigid` is on templates whose true place is known, and how long it takes.

    python benchmarks/registration.py                    (20 starts for each, tens of minutes)
    python benchmarks/registration.py --starts 2 --kinds CT --side 0

Each template of ../shared/clinical/nifti lies on the T1 by nature. The T1 is moved by its affine,
by up to 25 mm and 15 degrees at random, and registered. The error is the mean distance, over the
head, between where the found and the true transform put a voxel. Last, one pair is resampled to
a cube of `--side` voxels of 1 mm, and timed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import ROOT, machine, make_parser, positive
from scipy.spatial.transform import Rotation

from cli import UserError, run_script
from volumes.grid import Volume, resample
from volumes.intensity import head
from volumes.io import read_nifti
from volumes.register import moved_by, rigid

FILES = {"T2": "T2", "CT": "CT_approximate_HU", "PET": "PET", "SPECT": "SPECT"}
MM, DEGREES = 25, 15


def random_move(rng: np.random.Generator, centre: np.ndarray) -> np.ndarray:
    """A turn about a centre and a shift, (4, 4), both of random direction and size."""
    axis, shift = rng.normal(size=(2, 3))
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.radians(rng.uniform(0, DEGREES)))
    move = np.eye(4)
    move[:3, :3] = turn.as_matrix()
    shift *= rng.uniform(0, MM) / np.linalg.norm(shift)
    move[:3, 3] = centre - move[:3, :3] @ centre + shift
    return move


def head_points(volume: Volume) -> np.ndarray:
    """(n, 3) points of the head, RAS mm."""
    index = np.argwhere(head(volume.data))[::20]
    return moved_by(index, volume.affine)


def cube(volume: Volume, side: int) -> Volume:
    """The middle of a volume in a cube of `side` voxels of 1 mm."""
    affine = np.eye(4)
    middle = moved_by((np.array(volume.data.shape)[None] - 1) / 2, volume.affine)[0]
    affine[:3, 3] = middle - (side - 1) / 2
    return replace(volume, data=resample(volume, (side,) * 3, affine), affine=affine)


def measure(source: Volume, t1: Volume, kind: str, starts: int) -> str:
    """A row of the table: errors, refusals and seconds of so many random starts."""
    points, rng = head_points(t1), np.random.default_rng(0)
    errors, seconds, refused, wrong = [], [], 0, 0
    for _ in range(starts):
        move = random_move(rng, points.mean(0))
        found = rigid(source, replace(t1, affine=move @ t1.affine), kind)
        ends = moved_by(points, found.matrix) - moved_by(points, move)
        error = float(np.linalg.norm(ends, axis=1).mean())
        seconds.append(found.seconds)
        refused += bool(found.doubts)
        wrong += error > 5 and not found.doubts
        errors.append(error)
    times = f"{np.median(seconds):.1f}"
    return f"| {np.mean(errors):.2f} | {max(errors):.2f} | {refused} | {wrong} | {times} |"


def main(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder, --folder names that of the templates")
    print(machine("SimpleITK", "numpy"), flush=True)
    t1 = read_nifti(args.folder / "T1.nii.gz")
    sources = {k: read_nifti(args.folder / f"{FILES[k]}.nii.gz") for k in args.kinds}
    print("| | mean error, mm | largest | refused | over 5 mm, not refused | seconds |")
    print("|---|---|---|---|---|---|")
    for kind, source in sources.items():
        print(f"| {kind}", measure(source, t1, kind, args.starts), flush=True)
    if args.side:
        kind, source = next(iter(sources.items()))
        move = random_move(np.random.default_rng(1), head_points(t1).mean(0))
        pair = [cube(v, args.side) for v in (source, t1)]
        found = rigid(pair[0], replace(pair[1], affine=move @ pair[1].affine), kind)
        print(f"{args.side}^3 voxels of 1 mm, {kind}: {found.seconds:.1f} s")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT.parent / "shared/clinical/nifti")
    parser.add_argument("--kinds", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--starts", type=positive, default=20)
    parser.add_argument("--side", type=int, default=256, help="0 leaves the timing out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
