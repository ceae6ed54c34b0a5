"""The grid of the output: whose it is, what a coarser one needs, and how overlap is measured."""

from dataclasses import replace

import numpy as np
import pytest

from cli import UserError
from volumes.grid import Volume, common, coverage, cubic, low_passed, onto_grid, pick_grid, resample


def boxed(shape, spacing, middle=(0, 0, 0)) -> Volume:
    """Zeros in a box about a middle, RAS mm."""
    affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Volume(np.zeros(shape, np.float32), affine)


def test_a_coarser_grid_gets_a_low_pass_first():
    """Stripes of 4.4 mm are as wide as the new voxels: point by point they would stay."""
    fine, coarse = boxed((176, 40, 40), 1.0), boxed((37, 9, 9), (4.6, 4.4, 4.4))
    x = fine.affine[0, 0] * np.arange(176)
    fine.data[:] = np.sin(2 * np.pi * x / 4.4)[:, None, None]
    inner = np.s_[4:-4, 2:-2, 2:-2]
    plain = resample(fine, coarse.data.shape, coarse.affine)[inner]
    done = onto_grid(fine, coarse)
    assert plain.max() > 0.7 and np.abs(done.data[inner]).max() < 0.1
    assert done.low_passed and "low-pass" in done.line
    slow = replace(fine, data=np.broadcast_to(x[:, None, None], fine.data.shape).astype(np.float32))
    gained = onto_grid(slow, coarse).data[inner] - resample(slow, *grid_of(coarse))[inner]
    assert np.abs(gained).max() < 0.01, "what a coarse grid holds stays"
    assert low_passed(fine, fine.affine) is fine
    assert not onto_grid(coarse, fine).low_passed


def grid_of(volume: Volume) -> tuple:
    return volume.data.shape, volume.affine


def test_auto_takes_the_mri_for_uptake_and_the_finer_pixels_for_ct():
    coarse, fine = boxed((40, 40, 30), 4.0), boxed((128, 128, 40), (1.0, 1.0, 4.0))
    thin = boxed((90, 90, 80), (1.5, 1.5, 1.5))
    assert pick_grid(coarse, fine, "PET", "auto")[0] == 2
    assert pick_grid(thin, coarse, "SPECT", "auto")[0] == 2
    assert pick_grid(fine, thin, "CT", "auto")[0] == 1
    assert pick_grid(thin, fine, "CT", "auto")[0] == 2, "in plane, whatever lies between slices"
    assert pick_grid(fine, fine, "CT", "auto")[0] == 1
    for number in (1, 2):
        which, grid = pick_grid(coarse, fine, "PET", str(number))
        assert which == number and grid is (coarse, fine)[number - 1]


def test_cubes_fill_the_same_field():
    fine = boxed((128, 100, 40), (1.0, 1.2, 4.0), (5, -8, 13))
    for mm in (0.8, 2.0, "3mm"):
        which, grid = pick_grid(fine, fine, "PET", str(mm))
        side = float(str(mm).removesuffix("mm"))
        assert which == 2 and np.allclose(grid.spacing, side)
        middle = grid.affine[:3] @ [*((np.array(grid.data.shape) - 1) / 2), 1]
        assert np.allclose(middle, (5, -8, 13))
        assert np.abs(np.array(grid.data.shape) * side - [128, 120, 160]).max() <= side
    assert np.allclose(cubic(fine, 1.0).affine[:3, :3], np.eye(3))


@pytest.mark.parametrize("grid", ("3", "0", "-1", "nan", "inf", "fine", "0.01"))
def test_a_grid_that_is_none_is_named(grid):
    volume = boxed((128, 100, 40), (1.0, 1.2, 4.0))
    if grid == "3":
        assert np.allclose(pick_grid(volume, volume, "CT", grid)[1].spacing, 3)
        return
    with pytest.raises(UserError, match="--grid"):
        pick_grid(volume, volume, "CT", grid)


def test_overlap_is_a_share_of_the_smaller_field():
    """A PET of 814 mm with an MRI of 256 mm in its middle misses nothing."""
    pet, mri = boxed((200, 200, 75), (4.07, 4.07, 3.0)), boxed((256, 256, 200), 1.0)
    assert coverage(pet, mri) < 0.15 and common(pet, mri) == common(mri, pet) == 1
    beside = boxed((256, 256, 200), 1.0, (814 / 2, 0, 0))
    assert common(pet, beside) == pytest.approx(0.5, abs=0.03)
    assert common(pet, boxed((256, 256, 200), 1.0, (900, 0, 0))) == 0
