"""Studies for the tests: phantom volumes, of which some are broken, and what a study wrote."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
from task_files import files

from phantom import phantom_pair
from studies.cases import RECORDS

AFFINE = np.diag([4.0, 4.0, 5.0, 1.0])


def write_volume(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(data, AFFINE).to_filename(path)
    return path


def draw_pair(seed: int, slices: int = 2, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """CT and MRI (I, J, K) int16 of one phantom."""
    ct, mri = (image.astype(np.int16) for image in phantom_pair("CT-MRI", side, seed))
    return tuple(np.repeat(image[..., None], slices, 2) for image in (ct * 8 - 1000, mri))


def write_table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_study(folder: Path, count: int, slices: int = 2, side: int = 32) -> tuple[Path, set[str]]:
    """A table of `count` pairs of volumes, and the names of the three that are broken.

    One is rubbish, one is cut off, and one has a voxel that is not a number.
    """
    rows = []
    for i in range(count):
        for kind, data in zip(("ct", "mri"), draw_pair(i, slices, side), strict=True):
            write_volume(folder / f"{kind}{i:02d}.nii.gz", data)
        files = {"img1": f"ct{i:02d}.nii.gz", "img2": f"mri{i:02d}.nii.gz"}
        # a registration notes its seconds, so that no two runs write the same bytes
        rows.append({**files, "name": f"c{i:02d}", "register": "off"})
    (folder / "mri01.nii.gz").write_bytes(b"no volume")
    whole = (folder / "ct02.nii.gz").read_bytes()
    (folder / "ct02.nii.gz").write_bytes(whole[: len(whole) // 2])
    data = draw_pair(3, slices, side)[1].astype(np.float32)
    data[5, 5, 0] = np.nan
    write_volume(folder / "mri03.nii.gz", data)
    return write_table(folder / "pairs.csv", rows), {"c01", "c02", "c03"}


def written(out: Path) -> dict[str, bytes]:
    """Content of every file of a study but its reports and records, which have times in them."""
    ours = {"report.csv", "report.html"}
    names = {name for name in files(out) if not name.startswith(RECORDS)} - ours
    return {name: (out / name).read_bytes() for name in names}


def rows_of(out: Path) -> dict[str, dict]:
    with (out / "report.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}
