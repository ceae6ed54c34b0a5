"""Files of transforms: ITK's, in and out, and DICOM's spatial registration objects, in.

Those of other programs are in programs.py.

Sources: ITK's formats, of text (.tfm) and of MATLAB's level 4 (.mat), through SimpleITK; Spatial
Registration in DICOM PS3.3, A.39 and C.20.2, whose matrices go from a frame of reference to the
registered one.

Legend: matrices are (4, 4), RAS mm, from points of source 1 to points of source 2: the direction in
which ITK, elastix and ANTs resample source 2 onto source 1. In the files it is LPS.
"""

import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import SimpleITK as sitk  # noqa: N813

import limits
from cli import UserError, has_dicom_mark
from volumes.dicom import read_dataset_of
from volumes.grid import RAS_LPS, Volume
from volumes.headers import quiet_itk
from volumes.programs import (
    PROGRAMS,
    program_names,
    program_of,
    program_text,
    read_program,
    told_by_name,
)
from volumes.quiet import quiet

STRETCH = (0.8, 1.25)  # how much a transform may shrink or stretch a head
SCALES = (0.5, 2.0)  # the same of images
NEAR_ONE = 1e-6  # for rounding
# ITK's linear transforms, and how many parameters they have in d dimensions.
LINEAR = {
    **dict.fromkeys(("AffineTransform", "MatrixOffsetTransformBase"), lambda d: d * d + d),
    "FixedCenterOfRotationAffineTransform": lambda d: d * d + d,
    "CenteredAffineTransform": lambda d: d * d + 2 * d,
    **dict.fromkeys(("TranslationTransform", "ScaleTransform"), lambda d: d),
    **dict.fromkeys(("IdentityTransform", "CompositeTransform"), lambda d: 0),
    **dict.fromkeys(("Euler3DTransform", "VersorRigid3DTransform"), lambda d: 6),
    **dict.fromkeys(("Rigid3DTransform", "ComposeScaleSkewVersor3DTransform"), lambda d: 12),
    **dict.fromkeys(("CenteredEuler3DTransform", "ScaleVersor3DTransform"), lambda d: 9),
    **dict.fromkeys(("QuaternionRigidTransform", "Similarity3DTransform"), lambda d: 7),
    **dict.fromkeys(("VersorTransform", "Euler2DTransform", "Rigid2DTransform"), lambda d: 3),
    "ScaleSkewVersor3DTransform": lambda d: 15,
    "Similarity2DTransform": lambda d: 4,
    "CenteredRigid2DTransform": lambda d: 5,
    "CenteredSimilarity2DTransform": lambda d: 6,
}
# Other numbers, as a centre of rotation, in d dimensions; Euler angles have one more, for an order.
FIXED = (0, 2, 3, 4)
KIND = re.compile(r"(\w+)_(?:double|float)_(\d)_(\d)")
MOST = 16  # transforms in a file


class Found(NamedTuple):
    """The matrix of a file."""

    matrix: np.ndarray
    line: str = ""  # what the user should know of how it was taken
    checked: bool = True  # False: nothing in the file says which source is the fixed one


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
    try:
        check_transform(path, dimension)
        with quiet_itk:
            transform = sitk.ReadTransform(str(path))
    except UserError:
        raise
    except Exception:  # as of a kind that this version does not know
        raise UserError(
            f"{path}: no transform of {program_names()}, and no DICOM registration, "
            "--register rigid finds one"
        ) from None
    if transform.GetDimension() != dimension or not transform.IsLinear():
        refuse(path, transform.IsLinear(), transform.GetDimension(), dimension)
    return placing(matrix_of(transform), path)


def refuse(path: Path, linear: bool, found: int, expected: int) -> None:
    """UserError for a transform that is deforming, or in another number of dimensions."""
    kind = "linear" if linear else "deforming"
    raise UserError(
        f"{path}: a {kind} transform in {found}-D, expected a linear one in {expected}-D; resample "
        "the volumes with it first, and give --register off"
    )


def check_transform(path: Path, dimension: int) -> None:
    """Look at a file of ITK's transforms before ITK does, which some kill.

    Raises UserError for another kind of transform, ValueError for what is none.
    """
    ending = path.suffix.lower()
    if ending not in (".tfm", ".txt", ".mat"):
        raise ValueError("another ending")
    with path.open("rb") as file:
        data = file.read(limits.TRANSFORM_BYTES)
    steps = list(steps_of_mat(data) if ending == ".mat" else steps_of_text(data))
    if not 0 < len(steps) <= MOST:
        raise ValueError(f"{len(steps)} transforms")
    for name, parameters, fixed in steps:
        found = KIND.fullmatch(name)
        if not found:
            raise ValueError(f"{name} is no transform")
        kind, sides = found[1], {int(found[2]), int(found[3])}
        if kind not in LINEAR or sides != {dimension}:
            refuse(path, kind in LINEAR, max(sides), dimension)
        if parameters != LINEAR[kind](dimension) or fixed not in FIXED:
            raise ValueError(f"{kind} has {parameters} and {fixed} parameters")
    limits.check_bytes(path, limits.TRANSFORM_BYTES, " for a linear transform")


def steps_of_text(data: bytes) -> Iterator[tuple[str, int, int]]:
    """Kind, and counts of parameters and fixed ones, of the transforms in a file of text."""
    text = data.decode("ascii", "replace")
    for part in re.split(r"^Transform:", text, flags=re.MULTILINE)[1:]:
        lines = [line.partition(":") for line in part.splitlines()[1:]]
        counts = {name.strip(): len([float(v) for v in text.split()]) for name, _, text in lines
                  if name.strip() in ("Parameters", "FixedParameters")}  # fmt: skip
        name = part.splitlines()[0].strip()
        yield name, counts.get("Parameters", 0), counts.get("FixedParameters", 0)


def steps_of_mat(data: bytes) -> Iterator[tuple[str, int, int]]:
    """The same of a file of MATLAB's level 4: a matrix for the parameters, one for the fixed."""
    matrices, at = [], 0
    while at < len(data):
        order = "<" if data[at : at + 4] in (struct.pack("<i", n) for n in (0, 10)) else ">"
        if len(data) < at + 20:
            raise ValueError("cut")
        kind, rows, columns, imaginary, length = struct.unpack_from(f"{order}5i", data, at)
        if kind not in (0, 10, 1000, 1010) or imaginary or not 0 < length <= 64:
            raise ValueError("no matrix of level 4")
        count = rows * columns
        if min(rows, columns) < 0 or count > 64:
            raise ValueError(f"a matrix of {rows}x{columns}")
        name = data[at + 20 : at + 20 + length].rstrip(b"\0").decode("ascii", "replace")
        at += 20 + length + count * (8 if kind % 100 == 0 else 4)
        matrices.append((name, count))
    if at != len(data) or len(matrices) % 2:
        raise ValueError("cut")
    for (name, count), (_, fixed) in zip(matrices[::2], matrices[1::2], strict=True):
        yield name, count, fixed


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


def matrix_from(path: Path, source1: Volume, source2: Volume, modality: str) -> Found:
    """The matrix of a file for `--register FILE`, RAS.

    Args:
        modality: of source 1.

    Raises:
        UserError: no file, no linear transform, or one for other frames of reference.
    """
    if not path.is_file():
        raise UserError(
            f"--register is {path}, expected auto, off, check, rigid, or a file with a transform"
        )
    if has_dicom_mark(path):
        return Found(RAS_LPS @ read_registration(path, source1, source2) @ RAS_LPS)
    told = told_by_name(path, names_of(source1, source2), modality)
    fixed, moving = (source2, source1) if told == "source 1" else (source1, source2)
    if program := program_of(path):
        matrix, named = read_program(path, program, fixed, moving)
        matrix = placing(matrix, path)
    else:
        matrix, named = RAS_LPS @ read_transform(path) @ RAS_LPS, False
    if told == "source 1":
        line = "the file's name says that it moves img1 onto img2, so its inverse is taken"
        return Found(np.linalg.inv(matrix), line)
    return Found(matrix, checked=named or told is not None)


def names_of(source1: Volume, source2: Volume) -> tuple[Path, Path]:
    """The first file of each source."""
    return tuple(next(iter(volume.files), Path()) for volume in (source1, source2))


@quiet()
def read_registration(path: Path, source1: Volume, source2: Volume) -> np.ndarray:
    """The matrix, LPS, of a DICOM spatial registration object between two frames of reference."""
    try:
        ds = read_dataset_of(path)
        known = known_matrices(ds)
    except UserError:
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        raise UserError(f"{path}: a damaged DICOM file, export the registration again") from None
    if not ds.get("RegistrationSequence"):
        raise UserError(f"{path}: DICOM, but no spatial registration (REG), give one that is")
    keys = [registered_as(volume, known) for volume in (source1, source2)]
    for i, key in enumerate(keys, 1):
        if key not in known:
            raise UserError(
                f"{path}: does not register the frame of reference of img{i}, --register rigid "
                "registers these two"
            )
    there, back = (regular(known[key], path) for key in keys)
    return placing(np.linalg.inv(back) @ there, path)


def known_matrices(ds: pydicom.Dataset) -> dict[str, np.ndarray]:
    """The matrices of a registration, by the UID of a frame of reference or of an image.

    A frame of reference of which parts are moved in several ways is left out.
    """
    by_frame: dict[str, list[np.ndarray]] = {}
    by_image: dict[str, np.ndarray] = {}
    if "FrameOfReferenceUID" in ds:
        by_frame[str(ds.FrameOfReferenceUID)] = [np.eye(4)]
    for item in ds.get("RegistrationSequence", []):
        if "FrameOfReferenceUID" in item:
            by_frame.setdefault(str(item.FrameOfReferenceUID), []).append(chained(item))
        for image in item.get("ReferencedImageSequence") or []:
            by_image[str(image.ReferencedSOPInstanceUID)] = chained(item)
    one = {uid: found[-1] for uid, found in by_frame.items() if np.allclose(found, found[-1])}
    return by_image | one


def registered_as(volume: Volume, known: dict[str, np.ndarray]) -> str | None:
    """The key of `known_matrices` for a volume: one of its images, else its frame of reference."""
    if volume.origin is not None:
        image = str(read_dataset_of(volume.origin, ["SOPInstanceUID"]).get("SOPInstanceUID"))
        if image in known:
            return image
    return volume.frame_of_reference


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


def exported(
    path: Path, matrix: np.ndarray, source1: Volume, source2: Volume, modality: str
) -> bytes:
    """A matrix for the program that a file's name asks for, see programs.py; ITK's by default.

    The matrix is from points of source 1 to points of source 2. A name of BIDS may say that the
    file moves source 1 onto source 2; then it does. `modality` is that of source 1.
    """
    if told_by_name(path, names_of(source1, source2), modality) == "source 1":
        matrix, source1, source2 = np.linalg.inv(matrix), source2, source1
    if path.suffix.lower() in PROGRAMS:
        return program_text(path, matrix, source1, source2)
    return transform_text(matrix, np.zeros(3))


def text_of(transform: sitk.Transform) -> bytes:
    """The bytes of a transform's file (.tfm)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.tfm"
        sitk.WriteTransform(transform, str(path))
        return path.read_bytes()
