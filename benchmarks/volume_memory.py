"""Peak memory of fusing two volumes of 512 x 512 x 300 voxels on the CPU, compact size.

    python benchmarks/volume_memory.py                          (a few minutes)
    python benchmarks/volume_memory.py --slices 40 --network 40

Source 1 is a CT as int16 NIfTI, source 2 an MRI on a shifted grid, so that it is resampled. The
network runs on the first `--network` slices; after them the mean of the sources takes its place,
as each slice needs the same memory. Everything else is the real run of test_asfe.py, in a process
of its own whose largest resident set is printed.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
from machine import machine  # noqa: E402

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


def fuse(folder: Path, network: int) -> None:
    """One run of test_asfe.py, whose network gives way after `network` slices."""
    import torch

    import test_asfe
    from args_setting import TestArgs, parse_args

    load, left = test_asfe.load_model, network

    def limited(*args):
        model = load(*args)
        whole = model.fuse

        def step(img1, img2):
            nonlocal left
            left -= len(img1)
            return whole(img1, img2) if left >= 0 else torch.from_numpy((img1 + img2) / 2)

        model.fuse = step
        return model

    test_asfe.load_model = limited
    argv = ["--img1", folder / "ct.nii", "--img2", folder / "mri.nii", "--out", folder / "f.nii"]
    test_asfe.main(parse_args(TestArgs, [*map(str, argv), "--threads", "1", "--DEVICE", "cpu"]))
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--network", type=int, default=4, help="slices that the network fuses")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.folder:
        return fuse(args.folder, args.network)
    print(machine("torch", "SimpleITK", "nibabel"))
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), args.slices)
        command = [sys.executable, __file__, "--folder", folder, "--network", str(args.network)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
