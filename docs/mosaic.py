"""Draw docs/mosaic.png: the MNI152 template in nilearn, fused with a PET drawn from its tissues.

    python docs/mosaic.py                   (with the compact PET-MRI weights of model_pre)
    python docs/mosaic.py --out /tmp/m.png

What follows --out goes to test_asfe.py, such as --weights.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
MM = 3  # side of a voxel
UPTAKE = {"grey": 1.0, "white": 0.3}  # of FDG, the cortex about three times the white matter
BLUR = 6 / 2.355 / MM  # sigma in voxels of a scanner's 6 mm full width at half maximum
COLOURS = 128  # a smaller file


def draw(folder: Path) -> tuple[Path, Path]:
    """The PET and the MRI as NIfTI files."""
    t1 = load_mni152_template(resolution=MM)
    grey = load_mni152_gm_template(resolution=MM).get_fdata()
    white = load_mni152_wm_template(resolution=MM).get_fdata()
    pet = ndimage.gaussian_filter(UPTAKE["grey"] * grey + UPTAKE["white"] * white, BLUR)
    paths = folder / "pet.nii.gz", folder / "mri.nii.gz"
    for path, data in zip(paths, (pet, t1.get_fdata()), strict=True):
        nib.Nifti1Image(data.astype(np.float32), t1.affine).to_filename(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mosaic.png")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        pet, mri = draw(Path(folder))
        sheet = Path(folder) / "m.png"
        argv = ["--task", "PET-MRI", "--img1", pet, "--img2", mri]
        argv += ["--out", sheet.with_suffix(".nii"), "--mosaic", sheet, *more]
        subprocess.run([sys.executable, ROOT / "test_asfe.py", *map(str, argv)], check=True)
        with Image.open(sheet) as image:
            image.quantize(COLOURS, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
