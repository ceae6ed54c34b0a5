"""Peak memory of fusing two volumes of 512 x 512 x 300 voxels on the CPU, compact size.

    python benchmarks/volume_memory.py                          (a few minutes)
    python benchmarks/volume_memory.py --slices 40 --network 40

Source 1 is a CT as int16 NIfTI, source 2 an MRI on a shifted grid, so that it is resampled. The
network runs on the first `--network` slices; after them the mean of the sources takes its place,
as each slice needs the same memory. Everything else is as in test_asfe.py, in a process of its own
whose largest resident set is printed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from machine import machine, make_parser, peak_gb, positive

from args_setting import WeightsArgs
from cli import run_script, setup_runtime
from inference import optimise
from network import ASFEFusion
from volumes import fuse_volumes, request_from, use_threads
from weights import load_model

SIDE = 512


def draw(folder: Path, slices: int) -> None:
    """A rod of tissue in bone as CT and as MRI, (SIDE, SIDE, slices) int16."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE * 2 - 1
    radius = np.hypot(x, y)
    ct = np.select([radius < 0.7, radius < 0.8], [30, 900], -1000)
    mri = np.clip(0.8 - radius, 0, 1) * 1000
    affine = np.diag([0.5, 0.5, 0.7, 1.0])
    for name, data, shift in (("ct", ct, 0), ("mri", mri, 3.3)):
        affine[:3, 3] = shift
        data = np.repeat(data.astype(np.int16)[..., None], slices, axis=2)
        nib.Nifti1Image(data, affine).to_filename(folder / f"{name}.nii")


class FirstSlices:
    """A network that gives way to the mean of the sources after a number of slices."""

    def __init__(self, model: ASFEFusion, slices: int):
        self.model, self.left, self.multiple = model, slices, model.multiple

    def fuse(self, img1: np.ndarray, img2: np.ndarray) -> torch.Tensor:
        """Fuse (B, 1, H, W) images in [0, 1]."""
        self.left -= len(img1)
        return self.model.fuse(img1, img2) if self.left >= 0 else torch.tensor((img1 + img2) / 2)


def fuse(folder: Path, slices: int) -> None:
    """Fuse the volumes in the folder as test_asfe.py does; prints the peak memory."""
    paths = {"img1": folder / "ct.nii", "img2": folder / "mri.nii", "out": folder / "fused.nii"}
    request = request_from(paths | {"task": "CT-MRI", "register": "off"})
    settings = WeightsArgs(threads=1, DEVICE="cpu")
    model = optimise(load_model(settings, request.task, setup_runtime(settings)))
    use_threads(1)
    fuse_volumes(request, FirstSlices(model, slices), print)
    print(f"peak {peak_gb():.2f} GB")


def main(args: argparse.Namespace) -> None:
    if args.folder:
        return fuse(args.folder, args.network)
    print(machine("torch", "SimpleITK", "nibabel"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.slices)
        command = [sys.executable, __file__, "--folder", folder, "--network", str(args.network)]
        sys.exit(subprocess.run(command).returncode)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--slices", type=positive, default=300)
    parser.add_argument("--network", type=positive, default=4, help="slices that the network fuses")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measured process
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
