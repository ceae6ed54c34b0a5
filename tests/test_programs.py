"""Transforms of FSL, FreeSurfer, AFNI and ITK: landmarks by each program's own rules.

The rules are written down here once more, from the programs' documentation, and share no code with
the project or with the library that it uses.
"""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.spatial.transform import Rotation
from volume_files import SHAPE, affine_of, numbered, write

from cli import UserError
from volumes.io import read_volume
from volumes.pair import Sources, register
from volumes.programs import program_text, told_by_name
from volumes.report import Report
from volumes.requests import Registering
from volumes.transforms import exported, matrix_from

pytest.importorskip("nitransforms", reason="needs requirements-volumes.txt")
LPS = np.array([-1.0, -1.0, 1.0])
ENDS = (".tfm", ".txt", ".mat", ".lta", ".aff12.1D")
LANDMARKS = np.array([[0, 30, -10], [12, 20, -30], [-10, 41, 9], [15.5, 37, 2]], float)  # source 1
GRIDS = [("mirrored", "flipped"), ("flipped", "mirrored"), ("identity", "oblique")]


def move() -> np.ndarray:
    """Points of source 1 to points of source 2, RAS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", (9, -14, 21), degrees=True).as_matrix()
    matrix[:3, 3] = (7.3, -11.9, 4.6)
    return matrix


@pytest.fixture
def pair(tmp_path):
    """Makes two volumes of NIfTI files by the kinds of their grids; of unequal shape."""

    def make(kind1, kind2):
        paths = [
            write(tmp_path / f"{name}-{kind}", numbered(shape), affine_of(kind), "nii")
            for name, kind, shape in (("pet", kind1, SHAPE), ("T1w", kind2, (26, 22, 24)))
        ]
        return [read_volume(path) for path in paths]

    return make


# --- the rules of the programs: where a file brings points of source 1 -----------------------


def by_itk(path, volumes, points):
    """The transform maps points of the fixed image, in LPS, to points of the moving one."""
    transform = sitk.ReadTransform(str(path))
    return np.array([transform.TransformPoint((p * LPS).tolist()) for p in points]) * LPS


def flirt(volume, points):
    """FSL: voxels times their sides, x from the other end where the determinant is positive."""
    index = nib.affines.apply_affine(np.linalg.inv(volume.affine), points)
    if np.linalg.det(volume.affine) > 0:
        index[:, 0] = volume.data.shape[0] - 1 - index[:, 0]
    return index * np.linalg.norm(volume.affine[:3, :3], axis=0)


def by_fsl(path, volumes, points):
    """flirt's matrix maps -in (source 2) to -ref (source 1): look for what it brings there."""
    matrix = np.loadtxt(path)
    fixed, moving = volumes
    there = nib.affines.apply_affine(np.linalg.inv(matrix), flirt(fixed, points))
    index = there / np.linalg.norm(moving.affine[:3, :3], axis=0)
    if np.linalg.det(moving.affine) > 0:
        index[:, 0] = moving.data.shape[0] - 1 - index[:, 0]
    return nib.affines.apply_affine(moving.affine, index)


def lta_of(path):
    """Type, matrix, and of src and dst the shape and the affine, of a file of FreeSurfer."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    values = [line.partition("=")[::2] for line in lines if "=" in line]
    kind = int(next(v for k, v in values if k.strip() == "type"))
    start = lines.index("1 4 4") + 1
    matrix = np.array([list(map(float, line.split())) for line in lines[start : start + 4]])
    grids = []
    for side in ("src", "dst"):
        at = lines.index(f"{side} volume info")
        told = {k.strip(): v.split() for k, v in (li.split("=") for li in lines[at + 1 : at + 9])}
        size, sides = np.array(told["volume"], int), np.array(told["voxelsize"], float)
        axes = np.array([told[f"{c}ras"] for c in "xyz"], float).T * sides
        affine = np.eye(4)
        affine[:3, :3] = axes
        affine[:3, 3] = np.array(told["cras"], float) - axes @ (size / 2)
        grids.append((tuple(size), affine))
    return kind, matrix, grids


def by_freesurfer(path, volumes, points):
    """The matrix maps scanner RAS (type 1) of src (moving) to that of dst (fixed)."""
    kind, matrix, (src, dst) = lta_of(path)
    assert kind == 1
    for (shape, affine), volume in zip((dst, src), volumes, strict=True):
        assert shape == volume.data.shape and np.allclose(affine, volume.affine, atol=1e-3)
    return nib.affines.apply_affine(np.linalg.inv(matrix), points)


def card(volume):
    """AFNI's straight axes of a grid, in RAS: the nearest ones, from the same first voxel."""
    axes = volume.affine[:3, :3]
    straight = np.zeros((3, 3))
    for column in range(3):
        row = np.abs(axes[:, column]).argmax()
        straight[row, column] = np.sign(axes[row, column]) * np.linalg.norm(axes[:, column])
    return nib.affines.from_matvec(straight, volume.affine[:3, 3])


def by_afni(path, volumes, points):
    """Twelve numbers, from base (source 1) to source (source 2) in LPS of the straight axes."""
    matrix = np.vstack([np.loadtxt(path).reshape(3, 4), [0, 0, 0, 1]])
    fixed, moving = volumes
    index = nib.affines.apply_affine(np.linalg.inv(fixed.affine), points)
    base = nib.affines.apply_affine(card(fixed), index) * LPS
    there = nib.affines.apply_affine(matrix, base) * LPS
    index = nib.affines.apply_affine(np.linalg.inv(card(moving)), there)
    return nib.affines.apply_affine(moving.affine, index)


RULES = dict(zip(ENDS, (by_itk, by_itk, by_fsl, by_freesurfer, by_afni), strict=True))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kinds", GRIDS)
def test_landmarks_agree_in_every_program(tmp_path, pair, end, kinds):
    volumes = pair(*kinds)
    path = tmp_path / f"t{end}"
    path.write_bytes(exported(path, move(), *volumes, "PET"))
    expected = nib.affines.apply_affine(move(), LANDMARKS)
    assert np.abs(RULES[end](path, volumes, LANDMARKS) - expected).max() < 0.1
    found = matrix_from(path, *volumes, "PET")
    assert np.abs(nib.affines.apply_affine(found.matrix, LANDMARKS) - expected).max() < 0.1
    assert str(tmp_path) not in path.read_bytes().decode(), "no path of a source is told"


def test_an_lta_the_other_way_round_is_turned(tmp_path, pair):
    """FreeSurfer's usual way: the PET is moved onto the T1w. Voxels to voxels, too (type 0)."""
    pet, mri = pair("mirrored", "flipped")
    path = tmp_path / "coreg.lta"
    path.write_bytes(program_text(path, np.linalg.inv(move()), mri, pet))
    assert np.allclose(matrix_from(path, pet, mri, "PET").matrix, move(), atol=1e-4)
    _, matrix, (src, dst) = lta_of(path)
    voxels = np.linalg.inv(dst[1]) @ matrix @ src[1]
    lines = path.read_text().splitlines()
    start = lines.index("1 4 4") + 1
    lines[start : start + 4] = [" ".join(f"{v:.9f}" for v in row) for row in voxels]
    text = "\n".join(lines).replace("type      = 1", "type      = 0 # LINEAR_VOX_TO_VOX")
    path.write_text(text + "\nsubject fsaverage\nfscale 0.150000\n")
    assert np.allclose(matrix_from(path, pet, mri, "PET").matrix, move(), atol=1e-3)


@pytest.mark.parametrize("end", (".txt", ".mat", ".aff12.1D"))
def test_a_name_of_bids_says_which_source_moves(tmp_path, pair, end):
    volumes = pair("mirrored", "flipped")
    for name, (fixed, moving) in (
        ("from-pet_to-T1w", volumes[::-1]),
        ("from-T1w_to-pet", volumes),
    ):
        path = tmp_path / f"sub-1_{name}_mode-image_xfm{end}"
        path.write_bytes(exported(path, move(), *volumes, "PET"))
        assert np.allclose(matrix_from(path, *volumes, "PET").matrix, move(), atol=1e-3), name
        way = move() if fixed is volumes[0] else np.linalg.inv(move())
        points = nib.affines.apply_affine(np.eye(4) if fixed is volumes[0] else move(), LANDMARKS)
        found = RULES[end](path, (fixed, moving), points)
        assert np.abs(found - nib.affines.apply_affine(way, points)).max() < 0.1, name


def test_names_that_do_not_help_are_passed_over(tmp_path):
    paths = tmp_path / "sub-1_ct.nii", tmp_path / "sub-1_T2w.nii"
    for name, expected in (
        ("from-ct_to-T2w_mode-image_xfm.mat", "source 1"),
        ("from-ct_to-T2w_mode-points_xfm.mat", "source 2"),
        ("from-MRI_to-CT_mode-image_xfm.mat", "source 2"),
        ("from-orig_to-MNI_mode-image_xfm.mat", None),
        ("from-ct_to-ct_mode-image_xfm.mat", None),
        ("ct2mri.mat", None),
    ):
        assert told_by_name(tmp_path / name, paths, "CT") == expected, name


def test_fsl_needs_the_voxels_of_its_own_file(tmp_path):
    paths = [
        write(tmp_path / k, numbered(), affine_of("identity"), "dicom", k) for k in ("CT", "MR")
    ]
    volumes = [read_volume(path) for path in paths]
    for end in (".mat", ".aff12.1D", ".lta"):
        path = tmp_path / f"t{end}"
        if end == ".mat":
            with pytest.raises(UserError, match="FSL counts from the first voxel of a NIfTI file"):
                exported(path, move(), *volumes, "PET")
        else:
            path.write_bytes(exported(path, move(), *volumes, "PET"))
            assert np.allclose(matrix_from(path, *volumes, "CT").matrix, move(), atol=1e-3)


@pytest.mark.parametrize("end", (".mat", ".lta", ".1D", ".txt"))
@pytest.mark.parametrize("content", (b"", b"1 0 0", b"\xff" * 40, b"nan " * 12, b"a b\n" * 9))
def test_a_damaged_transform_is_one_line(tmp_path, pair, end, content):
    path = tmp_path / f"t{end}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"t{end}"):
        matrix_from(path, *pair("mirrored", "flipped"), "CT")


def test_a_transform_of_the_other_way_is_in_doubt(tmp_path, heads):
    """ITK's file does not say which image was fixed: the one that fits better is named."""
    mri = read_volume(heads["mri"])
    shift = np.eye(4)
    shift[:3, 3] = (14, -8, 6)
    ct = read_volume(heads["ct"])
    ct.affine = np.linalg.inv(shift) @ ct.affine
    for matrix, wrong in ((shift, False), (np.linalg.inv(shift), True)):
        path = tmp_path / "t.tfm"
        path.write_bytes(exported(path, matrix, ct, mri, "CT"))
        report = Report()
        register(Sources(ct, mri, None, "CT"), Registering("file", path), (), report)
        assert any("the inverse of the transform fits better" in d for d in report.doubts) == wrong
