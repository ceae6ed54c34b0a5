"""Volumes: every voxel at its patient coordinate, in every format and orientation."""

import itertools
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series
from scipy import ndimage
from volume_files import FORMATS, KINDS, SHAPE, affine_of, blob, numbered, value_at, write

from cli import UserError
from volumes.dicom import read_dicom
from volumes.grid import (
    AXES,
    Volume,
    coverage,
    displacement,
    pick_axis,
    pixel_sides,
    resample,
    slice_positions,
    slices,
    straightened,
)
from volumes.io import read_itk, read_nifti, read_volume


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_reading_keeps_values_and_positions(tmp_path, form, kind):
    """Each voxel of a volume of different values is at its patient coordinate, in any format."""
    data = np.random.default_rng(0).permutation(np.prod(SHAPE)).reshape(SHAPE) % 30000
    affine = affine_of(kind)
    volume = read_volume(write(tmp_path / "v", data, affine, form), None, "--series1")
    assert volume.data.dtype == np.float32 and sorted(volume.data.shape) == sorted(SHAPE)
    assert volume.placed and volume.code == 1 and not volume.notes
    # from the voxel that we have, over its patient coordinate, to the voxel that was written
    index = np.array([*np.ndindex(*volume.data.shape)])
    xyz = np.c_[index, np.ones(len(index))] @ volume.affine.T
    written = xyz @ np.linalg.inv(affine).T
    assert np.allclose(written, written.round(), atol=1e-4)
    i, j, k = written[:, :3].round().astype(int).T
    assert np.array_equal(volume.data[tuple(index.T)], data[i, j, k])
    if form != "dicom" or np.linalg.det(affine[:3, :3]) > 0:  # else its slices run the other way
        assert np.allclose(volume.affine, affine, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("kinds", "forms"),
    [
        *(((a, b), ("nii.gz", "nii.gz")) for a, b in itertools.product(KINDS, KINDS)),
        (("oblique", "turned"), ("dicom", "nii")),
        (("flipped", "oblique"), ("nii.gz", "dicom")),
        (("permuted", "identity"), ("dicom", "dicom")),
        (("oblique", "oblique"), ("dicom", "nrrd")),
        (("turned", "mirrored"), ("mha", "dicom")),
        (("mirrored", "permuted"), ("nrrd", "mha")),
    ],
)
def test_marks_stay_at_their_patient_coordinates(call, brighter, tmp_path, kinds, forms):
    """A mark in each source, found by ITK at the same coordinate of the fused volume."""
    mark1, mark2 = np.array([4.0, 27.0, -6.0]), np.array([-5.0, 33.0, -15.0])
    affine1, affine2 = map(affine_of, kinds)
    img1 = write(tmp_path / "a", blob(affine1, [mark1]) - 1000, affine1, forms[0], "CT")
    img2 = write(tmp_path / "b", blob(affine2, [mark2]), affine2, forms[1], "MR")
    out = tmp_path / "fused.nii.gz"
    how = ["--window=-500,1000", "--register", "off", "--force", "overlap"]
    # the frames of reference of two formats are unknown; some of the boxes overlap by halves
    code, stdout, err = call("--img1", img1, "--img2", img2, "--out", out, *how)
    assert code == 0, err
    fused = nib.load(out)
    source = read_volume(img1, None, "")
    assert fused.shape == source.data.shape
    assert np.allclose(fused.affine, source.affine, rtol=1e-6, atol=1e-6)
    assert np.allclose(fused.get_qform(), source.affine, rtol=1e-5, atol=1e-4)
    assert fused.header["sform_code"] == fused.header["qform_code"] == 1
    for mark in (mark1, mark2):
        assert value_at(out, mark) > 0.8
        # not at the positions that a mistaken flip would move it to
        for flip in np.diag([-1.0, 1, 1]), np.diag([1.0, -1, 1]), np.diag([1.0, 1, -1]):
            middle = np.array([0, 30, -10])
            with suppress(RuntimeError):  # outside of the image
                assert value_at(out, middle + flip @ (mark - middle)) < 0.5
    same = kinds[0] == kinds[1]
    assert ("nothing was resampled" in stdout) == same
    # the brightest voxels lie around the marks
    bright = np.argwhere(fused.get_fdata() > 0.9)
    xyz = (np.c_[bright, np.ones(len(bright))] @ fused.affine.T)[:, :3]
    nearest = np.min([np.linalg.norm(xyz - p, axis=1) for p in (mark1, mark2)], axis=0)
    assert len(bright) and nearest.max() < 5


def test_the_way_a_volume_is_stored_does_not_change_the_fused_one(call, weights, heads, tmp_path):
    """The network sees each slice as it is looked at, however the voxels are ordered."""
    results = {}
    for name in ("plain", "turned"):
        paths = []
        for source in ("ct", "mri"):
            image = nib.load(heads[source])
            if name == "turned" or source == "mri":
                codes = nib.orientations.axcodes2ornt(("S", "L", "A"))
                image = image.as_reoriented(
                    nib.orientations.ornt_transform(
                        nib.orientations.io_orientation(image.affine), codes
                    )
                )
            paths.append(tmp_path / f"{name}_{source}.nii.gz")
            image.to_filename(paths[-1])
        out = tmp_path / f"{name}.nii.gz"
        argv = ["--img1", paths[0], "--img2", paths[1], "--out", out, "--weights", weights]
        code, stdout, err = call(*argv)
        assert code == 0, err
        assert ("reordered, not resampled" in stdout) == (name == "plain")
        results[name] = nib.load(out)
    canonical = [nib.as_closest_canonical(image) for image in results.values()]
    assert np.allclose(canonical[0].affine, canonical[1].affine)
    assert np.ptp(canonical[0].get_fdata()) > 0.2
    assert np.allclose(canonical[0].get_fdata(), canonical[1].get_fdata(), atol=1e-3)
    assert results["turned"].shape != results["plain"].shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", AXES)
def test_slices_are_as_they_are_looked_at(kind, axis):
    affine = affine_of(kind)
    index = np.stack([*np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), np.ones(SHAPE)], -1)
    right, front, up = np.moveaxis((index @ affine.T)[..., :3], -1, 0)
    views = [slices(a, affine, axis) for a in (right, front, up)]
    assert np.shares_memory(slices(right, affine, axis), right)
    r, a, s = views
    across, down = {"axial": (r, a), "coronal": (r, s), "sagittal": (a, s)}[axis]
    # patient's left, or posterior, on the right; posterior, or inferior, at the bottom
    assert (across[:, :, -1] < across[:, :, 0]).all() and (down[:, -1] < down[:, 0]).all()
    along = {"axial": s, "coronal": -a, "sagittal": -r}[axis]
    assert (along[-1] > along[0]).all()
    spread = [np.linalg.norm([np.ptp(np.diff(v, axis=n)) for v in views]) for n in (1, 2)]
    assert max(spread) < 1e-9
    sides = [np.linalg.norm([np.diff(v, axis=n).flat[0] for v in views]) for n in (1, 2)]
    assert np.allclose(sides, pixel_sides(affine, axis))
    middle = {"axial": s, "coronal": a, "sagittal": r}[axis].mean((1, 2))
    names = [("RL", "AP", "SI")[AXES.index(axis)][int(m < 0)] for m in middle]
    expected = [f"{n} {abs(m):.0f}" for n, m in zip(names, middle, strict=True)]
    assert slice_positions(SHAPE, affine, axis) == expected


def test_the_finest_slices_are_chosen():
    def affine(*spacing):
        return np.diag([*spacing, 1.0])

    assert pick_axis(affine(1, 1, 1), "auto") == "axial"
    assert pick_axis(affine(1, 1, 5), "auto") == "axial"
    assert pick_axis(affine(4, 1, 1), "auto") == "sagittal"
    assert pick_axis(affine(1, 1.2, 1), "auto") == "coronal"
    assert pick_axis(affine(1, 1.0001, 1), "auto") == "axial"
    assert pick_axis(affine(1, 1, 5), "coronal") == "coronal"
    permuted = np.eye(4)[[1, 2, 0, 3]] @ affine(1, 1, 5)  # stored k runs to the patient's front
    expected = {0: "sagittal", 1: "coronal", 2: "axial"}[int(np.abs(permuted[:3, 2]).argmax())]
    assert pick_axis(permuted, "auto") == expected != "axial"


def test_resampling_agrees_with_interpolation_by_scipy():
    rng = np.random.default_rng(1)
    moving = Volume(rng.random((17, 19, 23)).astype(np.float32), affine_of("oblique"))
    target = affine_of("mirrored")
    ours = resample(moving, SHAPE, target)
    index = np.stack([*np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), np.ones(SHAPE)])
    positions = np.tensordot(np.linalg.inv(moving.affine) @ target, index, 1)[:3]
    theirs = ndimage.map_coordinates(moving.data, positions, order=1, mode="nearest")
    last = np.array(moving.data.shape)[:, None, None, None] - 1
    inside = ((positions > 0) & (positions < last)).all(0)
    outside = ((positions < -0.51) | (positions > last + 0.51)).any(0)
    assert inside.sum() > 500 and outside.sum() > 500
    assert np.abs(ours - theirs)[inside].max() < 1e-4
    assert (ours[outside] == moving.data.min()).all()
    share = coverage(Volume(np.zeros(SHAPE), target), moving)
    within = ((positions >= -0.5) & (positions <= last + 0.5)).all(0).mean()
    assert share == pytest.approx(within, abs=0.02)


def test_a_gantry_tilt_is_straightened(call, brighter, tmp_path):
    """Sheared axes have no qform: such a series is resampled to right angles, and said so."""
    affine = affine_of("identity")
    affine[1, 2] = 3 * np.tan(np.radians(20))
    mark = np.array([3.0, 33.0, -16.0])
    write_series(tmp_path / "ct", blob(affine, [mark]) - 1000, affine, "CT")
    write_series(tmp_path / "mr", blob(affine, [mark]), affine, "MR")
    out = tmp_path / "f.nii.gz"
    argv = ["--img1", tmp_path / "ct", "--img2", tmp_path / "mr", "--window=-500,1000"]
    code, stdout, err = call(*argv, "--out", out)
    assert code == 0, err
    assert "tilt 20.0 degrees" in stdout and "resampled to right angles" in stdout
    fused = nib.load(out)
    axes = fused.affine[:3, :3] / np.linalg.norm(fused.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert np.allclose(fused.get_qform(), fused.affine, atol=1e-4)
    assert value_at(out, mark) > 0.7
    tilted = read_dicom(tmp_path / "ct")
    straight = straightened(tilted)
    box = [tilted, Volume(np.zeros(straight.data.shape), straight.affine)]
    assert coverage(*box) > 0.999, "nothing is cut off"
    upright = Volume(np.zeros(SHAPE, np.float32), affine_of("oblique"))
    assert straightened(upright) is upright


def test_displacement_is_that_of_the_farthest_voxel():
    moved = np.eye(4)
    moved[0, 3] = 2
    assert displacement((5, 5, 5), np.eye(4), moved) == 2
    assert displacement((5, 6, 7), np.eye(4), np.diag([1, 1, 1.5, 1])) == pytest.approx(3)


def test_samples_of_nibabel():
    folder = Path(nib.__file__).parent / "tests" / "data"
    for name in ("anatomical.nii", "standard.nii.gz", "example_nifti2.nii.gz"):
        image = nib.load(folder / name)
        if len(image.shape) > 3:
            with pytest.raises(UserError, match="4-D"):
                read_nifti(folder / name)
            continue
        volume = read_nifti(folder / name)
        assert np.array_equal(volume.data, image.get_fdata(dtype=np.float32))
        assert np.allclose(volume.affine, image.affine, rtol=1e-6)
    with pytest.raises(UserError, match=r"4-D \(20 volumes\)"):
        read_nifti(folder / "functional.nii")


def test_sform_and_qform_that_differ_are_named(tmp_path):
    image = nib.Nifti1Image(numbered(), affine_of("identity"))
    image.set_sform(affine_of("identity"), 1)
    image.set_qform(affine_of("flipped"), 1)
    image.to_filename(tmp_path / "v.nii")
    volume = read_nifti(tmp_path / "v.nii")
    assert "sform and qform differ" in volume.notes[0]
    assert np.allclose(volume.affine, affine_of("identity"))


def test_a_nrrd_without_a_space_has_no_place(tmp_path):
    path = write(tmp_path / "v", numbered(), affine_of("oblique"), "nrrd")
    assert read_itk(path).placed
    head, data = path.read_bytes().split(b"\n\n", 1)
    lines = [x for x in head.split(b"\n") if not x.startswith(b"space")]
    path.write_bytes(b"\n".join(lines) + b"\n\n" + data)
    assert not read_itk(path).placed
