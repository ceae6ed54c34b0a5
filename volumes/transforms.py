"""Files of transforms: ITK's, in and out, and DICOM's spatial registration objects, in.

Sources: ITK's text format (.tfm) through SimpleITK; Spatial Registration in DICOM PS3.3, A.39 and
C.20.2, whose matrices go from a frame of reference to the registered one.

Legend: matrices are (4, 4), RAS mm, from points of source 1 to points of source 2: the direction in
which ITK, elastix and ANTs resample source 2 onto source 1. In the files it is LPS.
"""

import tempfile
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813

from cli import UserError, has_dicom_mark
from volumes.grid import RAS_LPS, Volume
from volumes.quiet import quiet

STRETCH = (0.8, 1.25)  # how much a transform may shrink or stretch a head
SCALES = (0.5, 2.0)  # the same of images
NEAR_ONE = 1e-6  # for rounding


def matrix_of(transform: sitk.Transform) -> np.ndarray:
    """The matrix (d + 1, d + 1) of a linear transform of ITK, in its own direction and axes."""
    n = transform.GetDimension()
    origin = np.array(transform.TransformPoint([0.0] * n))
    matrix = np.eye(n + 1)
    matrix[:n, n] = origin
    for i in range(n):
        matrix[:n, i] = np.array(transform.TransformPoint(np.eye(n)[i].tolist())) - origin
    return matrix


def read_transform(path: Path, dimension: int = 3) -> np.ndarray:
    """The matrix (d + 1, d + 1), LPS, of a linear transform of ITK; UserError if it is none."""
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError:
        raise UserError(
            f"{path}: no transform of ITK (.tfm, .txt, .mat) and no DICOM registration, "
            "--register rigid finds one"
        ) from None
    if transform.GetDimension() != dimension or not transform.IsLinear():
        kind = "linear" if transform.IsLinear() else "deforming"
        raise UserError(
            f"{path}: a {kind} transform in {transform.GetDimension()}-D, expected a linear one in "
            f"{dimension}-D; resample img2 with it first, and give --register off"
        )
    return placing(matrix_of(transform), path)


def regular(matrix: np.ndarray, path: Path) -> np.ndarray:
    """The matrix itself; UserError if it has no inverse, or is none of points in space."""
    last = np.eye(len(matrix))[-1]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:-1, :-1])) < 1e-6:
        raise UserError(f"{path}: its matrix has no inverse, --register rigid finds another")
    if not np.allclose(matrix[-1], last, atol=1e-6):
        raise UserError(f"{path}: the last row of its matrix is not 0 0 0 1, export it again")
    return matrix


def placing(matrix: np.ndarray, path: Path) -> np.ndarray:
    """The matrix itself; UserError if no scan of a head can be moved so onto another of it.

    That is one that mirrors, shears, or scales by more than STRETCH; images, whose pixels have no
    size, may be scaled by up to SCALES, the same both ways.
    """
    regular(matrix, path)
    linear = matrix[:-1, :-1]
    if np.linalg.det(linear) < 0:
        raise UserError(f"{path}: its matrix mirrors, left would be right; give one that does not")
    sizes = np.linalg.svd(linear, compute_uv=False)
    low, high = STRETCH if len(linear) == 3 else SCALES
    uneven = sizes[0] / sizes[-1] > STRETCH[1] / STRETCH[0]
    if uneven or sizes[-1] < low * (1 - NEAR_ONE) or sizes[0] > high * (1 + NEAR_ONE):
        found = " and ".join(f"{size:.3g}" for size in (sizes[-1], sizes[0]))
        raise UserError(
            f"{path}: its matrix stretches by {found}, expected {low:g} to {high:g} in every "
            "direction; --register rigid finds another"
        )
    return matrix


def matrix_from(path: Path, source1: Volume, source2: Volume) -> np.ndarray:
    """The matrix of a file for `--register FILE`.

    Raises:
        UserError: no file, no linear transform, or one for other frames of reference.
    """
    if not path.is_file():
        raise UserError(
            f"--register is {path}, expected auto, off, check, rigid, or a file with a transform"
        )
    lps = (
        read_registration(path, source1, source2) if has_dicom_mark(path) else read_transform(path)
    )
    return RAS_LPS @ lps @ RAS_LPS


@quiet()
def read_registration(path: Path, source1: Volume, source2: Volume) -> np.ndarray:
    """The matrix, LPS, of a DICOM spatial registration object between two frames of reference."""
    try:
        ds = pydicom.dcmread(path)
        known = {str(ds.FrameOfReferenceUID): np.eye(4)} if "FrameOfReferenceUID" in ds else {}
        for item in ds.get("RegistrationSequence", []):
            if "FrameOfReferenceUID" in item:
                known[str(item.FrameOfReferenceUID)] = chained(item)
    except (AttributeError, IndexError, KeyError, ValueError, TypeError, NotImplementedError):
        raise UserError(f"{path}: a damaged DICOM file, export the registration again") from None
    if not ds.get("RegistrationSequence"):
        raise UserError(f"{path}: DICOM, but no spatial registration (REG), give one that is")
    for i, volume in enumerate((source1, source2), 1):
        if volume.frame_of_reference not in known:
            raise UserError(
                f"{path}: does not register the frame of reference of img{i}, --register rigid "
                "registers these two"
            )
    there, back = (regular(known[v.frame_of_reference], path) for v in (source1, source2))
    return placing(np.linalg.inv(back) @ there, path)


def chained(item: pydicom.Dataset) -> np.ndarray:
    """The matrix of an item of a registration sequence, the first of its matrices applied first."""
    total = np.eye(4)
    for step in item.MatrixRegistrationSequence[0].MatrixSequence:
        values = np.array(step.FrameOfReferenceTransformationMatrix, dtype=float)
        total = values.reshape(4, 4) @ total
    return total


def transform_text(matrix: np.ndarray, centre: np.ndarray) -> bytes:
    """The text of ITK's file (.tfm) for a rigid matrix, or an affine one, in RAS, with a centre."""
    lps, middle = RAS_LPS @ matrix @ RAS_LPS, RAS_LPS[:3, :3] @ centre
    rotation = lps[:3, :3]
    rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-6) and np.linalg.det(rotation) > 0
    transform = sitk.Euler3DTransform() if rigid else sitk.AffineTransform(3)
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(rotation.ravel().tolist())
    transform.SetTranslation((lps[:3, 3] + rotation @ middle - middle).tolist())
    return text_of(transform)


def text_of(transform: sitk.Transform) -> bytes:
    """The bytes of a transform's file (.tfm)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.tfm"
        sitk.WriteTransform(transform, str(path))
        return path.read_bytes()
