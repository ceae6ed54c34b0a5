"""Transforms as FSL, FreeSurfer and AFNI write them, in and out, through nitransforms.

Each program has its own coordinates, and its own idea of what a file maps. Here a file is always
the one that a program writes when it registers source 2 (moving) with source 1 (fixed):

    FSL         flirt -in source2 -ref source1 -omat FILE.mat
    FreeSurfer  mri_robust_register --mov source2 --dst source1 --lta FILE.lta
    AFNI        3dAllineate -source source2 -base source1 -1Dmatrix_save FILE.aff12.1D

An LTA names both grids, and a name of BIDS says from where to where, so that these two are also
taken the other way round.

Sources: FSL's scaled millimetres (flirt FAQ); FreeSurfer's transform.h, whose matrix goes from the
points of `src` to those of `dst`; AFNI's 3dAllineate -help, DICOM order (LPS) from base to source,
oblique axes taken as the nearest straight ones; BIDS derivatives, from-_to-_mode-_xfm.

Legend: matrices are (4, 4), RAS mm, from points of source 1 to points of source 2.
"""

import re
from pathlib import Path

import nibabel as nib
import numpy as np

import limits
from cli import UserError, installed, stem_of
from volumes.grid import Volume, same_voxels
from volumes.io import NIFTI, PAIRS

PROGRAMS = {".mat": "FSL", ".lta": "FreeSurfer", ".1d": "AFNI"}  # by the ending of a file's name
ITK_ENDS = (".tfm", ".txt")
TOLD = re.compile(r"from-([A-Za-z0-9]+)_to-([A-Za-z0-9]+)_mode-(image|points)_xfm")
MRIS = {"mri", "mr", "t1w", "t2w", "flair", "pdw", "inplanet1", "inplanet2"}
OURS, THEIRS = "ASFE-Fusion", "NiTransforms"


def program_of(path: Path) -> str | None:
    """FSL, FreeSurfer or AFNI, by a file's name; None for another, which is ITK's or DICOM's.

    ITK writes .mat, too: that is not text.
    """
    program = PROGRAMS.get(path.suffix.lower())
    if program == "FSL" and path.is_file() and len(numbers_of(path)) != 16:
        return None
    return program


def numbers_of(path: Path) -> list[float]:
    """The numbers of a file that has nothing else; empty for any other file."""
    try:
        return [float(word) for word in text_of(path).split()]
    except (UserError, ValueError):
        return []


def text_of(path: Path) -> str:
    """A short text; UserError for a file that is none."""
    data = limits.read_bytes(path, limits.TRANSFORM_BYTES, " for a linear transform")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: no text, expected a transform of {program_names()}") from None


def program_names() -> str:
    """The programs, for messages."""
    return "ITK (.tfm, .txt, .mat), FSL (.mat), FreeSurfer (.lta) or AFNI (.aff12.1D)"


def library():
    """nitransforms' formats by the names of the programs; UserError if it is not installed."""
    with installed("transforms of FSL, FreeSurfer and AFNI need"):
        from nitransforms.io import afni, fsl, lta
    return {
        "FSL": fsl.FSLLinearTransform,
        "FreeSurfer": lta.FSLinearTransform,
        "AFNI": afni.AFNILinearTransform,
    }


def grid_of(volume: Volume) -> nib.Nifti1Image:
    """An image without values that lies where a volume does."""
    return nib.Nifti1Image(np.broadcast_to(np.uint8(0), volume.data.shape), volume.affine)


def check_order(program: str, path: Path, sources: tuple[Volume, Volume]) -> None:
    """UserError where a program counts from a corner of its own file, which was not read here.

    FSL does so always, and AFNI for oblique axes. A DICOM series has no first voxel of its own:
    each converter takes another.
    """
    for number, volume in enumerate(sources, 1):
        slanted = np.abs(nib.affines.obliquity(volume.affine)).max() > 1e-4
        if not is_nifti(volume) and (program == "FSL" or (program == "AFNI" and slanted)):
            raise UserError(
                f"{path}: {program} counts from the first voxel of a NIfTI file, and img{number} "
                "is none; convert it first, or take .tfm or .lta"
            )


def is_nifti(volume: Volume) -> bool:
    """Whether a volume came from a NIfTI file."""
    return any(file.name.lower().endswith((*NIFTI, *PAIRS)) for file in volume.files)


# --- out -------------------------------------------------------------------------------------


def check_name(path: Path) -> None:
    """UserError for a file's name that belongs to none of the programs."""
    if path.suffix.lower() not in (*PROGRAMS, *ITK_ENDS) or path.is_dir():
        raise UserError(
            f"--transform is {path}, expected a file name that ends in .tfm or .txt (ITK), .mat "
            "(FSL), .lta (FreeSurfer) or .aff12.1D (AFNI)"
        )


def program_text(path: Path, matrix: np.ndarray, source1: Volume, source2: Volume) -> bytes:
    """The content of a file for FSL, FreeSurfer or AFNI, by its name."""
    program = PROGRAMS[path.suffix.lower()]
    check_order(program, path, (source1, source2))
    kind, fixed, moving = library()[program], grid_of(source1), grid_of(source2)
    if program == "FreeSurfer":
        # nitransforms writes the inverse of the matrix, which goes from moving to fixed, but calls
        # the fixed grid `src`. FreeSurfer's `src` is where its matrix starts.
        text = kind.from_ras(matrix, moving=fixed, reference=moving).to_string()
        return text.replace(THEIRS, OURS).encode()
    return kind.from_ras(matrix, moving=moving, reference=fixed).to_string().encode()


# --- in --------------------------------------------------------------------------------------


def read_program(
    path: Path, program: str, source1: Volume, source2: Volume
) -> tuple[np.ndarray, bool]:
    """The matrix of a file of FSL, FreeSurfer or AFNI.

    Returns: from points of source 1 to points of source 2; whether the file says itself which two
    grids it is for, so that its name does not count.

    Raises UserError for a file that cannot be read, or whose program counts in other voxels.
    """
    check_order(program, path, (source1, source2))
    text, kind = text_of(path), library()[program]
    fixed, moving = grid_of(source1), grid_of(source2)
    try:
        found = kind.from_string(text)
        sides = grids_of(found, text) if program == "FreeSurfer" else None
        matrix = np.array(found.to_ras(moving=moving, reference=fixed), dtype=float)
    except Exception:  # a parser of strange text may stumble in any way
        raise UserError(f"{path}: no transform of {program} that can be read") from None
    if sides is not None:
        src, dst = sides
        if lies_on(src, source1) and lies_on(dst, source2) and not same_voxels(source1, source2):
            return np.linalg.inv(matrix), True
        return matrix, lies_on(src, source2) and lies_on(dst, source1)
    return matrix, False


def grids_of(lta, text: str) -> tuple[Volume, Volume] | None:
    """`src` and `dst` of an LTA as volumes without values; None if it does not tell them.

    Those that nitransforms itself has written are the wrong way round, see `program_text`.
    """
    if THEIRS in text.partition("\n")[0]:
        return None
    sides = [lta["src"], lta["dst"]]
    if not all(side.structarr["valid"] for side in sides):
        return None
    shapes = [tuple(int(n) for n in side.structarr["volume"]) for side in sides]
    if min(map(min, shapes)) < 1:
        return None
    values = [np.broadcast_to(np.uint8(0), shape) for shape in shapes]
    src, dst = (Volume(v, side.as_affine()) for v, side in zip(values, sides, strict=True))
    return src, dst


def lies_on(grid: Volume, source: Volume) -> bool:
    """Whether a grid's voxels are those of a source, in any order."""
    return sorted(grid.data.shape) == sorted(source.data.shape) and same_voxels(source, grid)


def told_by_name(path: Path, paths: tuple[Path, Path], modality: str) -> str | None:
    """What a BIDS name says: "source 2" moves onto source 1, "source 1", or nothing that helps.

    Args:
        paths: of source 1 and source 2.
        modality: of source 1.
    """
    told = TOLD.search(path.name)
    if told is None:
        return None
    start, end, mode = told.groups()
    first, second = ({stem_of(p).rpartition("_")[2].lower()} for p in paths)
    first, second = first | {modality.lower()}, second | MRIS
    first, second = first - second, second - first
    forth = start.lower() in first or end.lower() in second
    back = start.lower() in second or end.lower() in first
    if forth == back:
        return None
    # an image that moves from 1 to 2 is resampled by a map of the points of 2 to those of 1
    moves_source2 = back if mode == "image" else forth
    return "source 2" if moves_source2 else "source 1"
