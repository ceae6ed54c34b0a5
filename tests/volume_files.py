"""Volumes for the tests: grids of every kind, files of every format, and a stand-in network."""

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch
from dicom_files import write_series
from scipy import ndimage
from scipy.spatial.transform import Rotation

from volumes.grid import RAS_LPS

SHAPE = (24, 28, 20)
SPACING = np.array([1.5, 1.25, 3.0])


def affine_of(kind: str) -> np.ndarray:
    """A RAS affine of SHAPE whose middle voxel lies near (0, 30, -10), by its kind."""
    axes = {
        "identity": np.eye(3),
        "flipped": np.diag([-1.0, -1.0, 1.0]),
        "mirrored": np.diag([-1.0, 1.0, 1.0]),
        "permuted": np.eye(3)[[1, 2, 0]],
        "oblique": Rotation.from_euler("xyz", (21, -13, 34), degrees=True).as_matrix(),
        "turned": Rotation.from_euler("xyz", (-95, 8, 172), degrees=True).as_matrix(),
    }[kind]
    affine = np.eye(4)
    affine[:3, :3] = axes * SPACING
    affine[:3, 3] = np.array([0, 30, -10]) - affine[:3, :3] @ (np.array(SHAPE) // 2)
    return affine


KINDS = ("identity", "flipped", "mirrored", "permuted", "oblique", "turned")
FORMATS = ("nii", "nii.gz", "dicom", "mha", "nrrd")


def write(path: Path, data: np.ndarray, affine: np.ndarray, form: str, modality="MR") -> Path:
    """Write a volume of integers in a format, by other means than the project's own."""
    if form == "dicom":
        write_series(path, data, affine, modality)
        return path
    path = path.with_name(f"{path.name}.{form}")
    if form.startswith("nii"):
        image = nib.Nifti1Image(data.astype(np.int16), affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.to_filename(path)
        return path
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T.astype(np.int16)))
    lps = RAS_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetDirection((lps[:3, :3] / spacing).ravel())
    image.SetOrigin(lps[:3, 3])
    sitk.WriteImage(image, str(path))
    return path


def numbered(shape=SHAPE) -> np.ndarray:
    """(I, J, K) int16, values that differ between neighbours."""
    return (np.arange(np.prod(shape)).reshape(shape) % 4000).astype(np.int16)


def blob(affine: np.ndarray, positions, shape=SHAPE) -> np.ndarray:
    """A volume (I, J, K) with a soft mark, 4 mm wide and 1000 high, at each position (mm, RAS)."""
    index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], -1)
    xyz = (index @ affine.T)[..., :3]
    return sum(1000 * np.exp(-(((xyz - p) ** 2).sum(-1)) / 2 / 4**2) for p in positions)


def value_at(path: Path, position) -> float:
    """What ITK, which counts in LPS, finds at a position (mm, RAS) of a file."""
    image = sitk.ReadImage(str(path))
    lps = (RAS_LPS[:3, :3] @ position).tolist()
    return float(image.EvaluateAtPhysicalPoint(lps, sitk.sitkLinear))


class Brighter:
    """In place of the network: the brighter source, so that marks of both stay."""

    multiple = 16

    def fuse(self, img1, img2, stretch=False):
        assert img1.shape == img2.shape and min(img1.shape[-2:]) >= 16
        assert img1.dtype == np.float32 and img1.min() >= 0 and img2.max() <= 1
        return torch.from_numpy(np.maximum(img1, img2))


def draw_heads(folder: Path) -> dict[str, Path]:
    """Files of the MNI152 template as MRI, and of a CT and a PET drawn from it, 4 mm voxels."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template  # takes seconds

    t1, grey = load_mni152_template(resolution=4), load_mni152_gm_template(resolution=4)
    mri, matter = t1.get_fdata(), grey.get_fdata()
    brain = ndimage.binary_fill_holes(mri > 0.1)
    away = ndimage.distance_transform_edt(~brain) * 4  # mm
    ct = np.where(brain, 25 + 15 * matter, np.where(away < 10, 900.0, -1000.0))
    pet = ndimage.gaussian_filter(matter, 1) * 20000
    paths = {}
    for name, data in (("mri", mri * 800), ("ct", ct), ("pet", pet)):
        paths[name] = folder / f"{name}.nii.gz"
        nib.Nifti1Image(data.astype(np.float32), t1.affine).to_filename(paths[name])
    return paths
