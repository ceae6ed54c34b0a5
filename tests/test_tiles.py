"""Pairs that need more memory than is free: smaller batches, tiles by themselves, or one line."""

import json

import numpy as np
import pytest
import torch
from task_files import write_task

import limits
from args_setting import SIZES, shipped_path
from cli import UserError
from images import read_uint8, write_png
from inference import optimise
from network import ASFEFusion
from phantom import phantom_pair
from tiles import Passes, bytes_of, fitting, smaller
from weights import WithoutDraws, load_weights


def drawn(size: str) -> ASFEFusion:
    with WithoutDraws():
        return ASFEFusion(size)


@pytest.fixture(scope="module")
def compact():
    return optimise(load_weights(shipped_path("compact", "CT-MRI"))[0])


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""
    return lambda count: monkeypatch.setattr(limits, "free_bytes", lambda: count)


def test_what_fits_stays_as_it_was_wanted(compact, free):
    free(2 * 10**9)
    for wanted in (Passes(4), Passes(1, 512), Passes(2, 256, 32)):
        assert fitting(compact, (512, 512), wanted) is wanted


def test_a_batch_becomes_smaller_before_anything_goes_in_tiles(compact, free):
    one = limits.needed_bytes(512 * 512, compact.size)
    for batch in (1, 2, 3):
        free(batch * one + 1)
        found = fitting(compact, (512, 512), Passes(4))
        assert found[:3] == Passes(batch)[:3]
        assert f"{batch} at a time, which gives the same values" in found.line


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_as_large_as_fits(size, free):
    model, shape = drawn(size), (2000, 1500)
    for tile in (1024, 256):
        wanted = Passes(tile=tile)
        free(bytes_of(model, shape, wanted))
        found = fitting(model, shape, Passes(4))
        assert (found.batch, found.tile, found.overlap) == (1, tile, 64)
        assert found.tile % model.multiple == 0
        line = f"in tiles of {tile} pixels, which changes values a little"
        assert "a pair of 2000x1500 pixels needs about" in found.line and line in found.line
    free(bytes_of(model, shape, wanted) - 1)
    with pytest.raises(
        UserError, match=r"2000x1500 pixels needs about [\d.]+ [GM]B of memory at the "
    ):
        fitting(model, shape, Passes())


def test_tiles_that_were_asked_for_become_smaller_too(compact, free):
    shape = 1000, 1000
    free(bytes_of(compact, shape, Passes(tile=384)))
    found = fitting(compact, shape, Passes(2, 768, 600))
    assert (found.batch, found.tile, found.overlap) == (1, 384, 384 - compact.multiple)
    needs = [bytes_of(compact, shape, p) for p in smaller(compact, shape, Passes(3))]
    assert needs == sorted(needs, reverse=True)


def test_an_image_below_the_least_tile_is_refused(compact, free):
    free(10**6)
    with pytest.raises(UserError, match="64x64 pixels needs about 5 MB of memory at"):
        fitting(compact, (64, 64), Passes())


def test_freed_memory_is_asked_for_before_anything_changes(compact, monkeypatch):
    """What an earlier pass has left in this process is not missing."""
    amounts = iter([10**8, 10**10])
    monkeypatch.setattr(limits, "free_bytes", lambda: next(amounts))
    assert fitting(compact, (1024, 1024), Passes(1)) == Passes(1)


# --- commands --------------------------------------------------------------------------------


def test_a_folder_in_smaller_batches_has_the_same_values(call, tmp_path, free):
    data = write_task(tmp_path / "data", "CT-MRI", "test", dict.fromkeys("abcd", 64))
    argv = ["--task", "CT-MRI", "--data_dir", data, "--DEVICE", "cpu", "--batch-size", 4]
    assert call(*argv, "--out", tmp_path / "whole")[0] == 0
    free(2 * limits.needed_bytes(64 * 64, SIZES["compact"]))
    code, out, err = call(*argv, "--out", tmp_path / "two")
    assert code == 0 and out.count("fused 2 at a time, which gives the same values") == 1, err
    for name in "abcd":
        one, other = (read_uint8(tmp_path / way / f"{name}.png") for way in ("whole", "two"))
        assert np.abs(one.astype(int) - other).max() <= 1  # sums in another order may round so
        assert (one != other).mean() < 0.01


@pytest.fixture
def large(tmp_path) -> list:
    """Flags for a pair of 512 x 512 pixels."""
    for name, image in zip(("a", "b"), phantom_pair("CT-MRI", 512), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    pair = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "b.png", "--task", "CT-MRI"]
    return [*pair, "--DEVICE", "cpu"]


def test_a_pair_that_does_not_fit_goes_in_tiles(call, large, tmp_path, free, compact):
    assert call(*large, "--out", tmp_path / "whole.png")[0] == 0
    free(bytes_of(compact, (512, 512), Passes(tile=256)))
    for flags in ([], ["--stretch"]):
        code, out, err = call(*large, "--out", tmp_path / "tiles.png", *flags)
        assert code == 0 and "fused in tiles of 256 pixels, which changes values" in out, err
        one, other = (read_uint8(tmp_path / f"{name}.png") for name in ("whole", "tiles"))
        apart = np.abs(one.astype(int) - other)
        assert apart.max() > 0 and apart.mean() < (4 if not flags else 40)
        assert not flags or (other.min(), other.max()) == (0, 255)


def test_a_pair_that_does_not_fit_in_tiles_is_refused_before_anything_is_written(
    call, large, tmp_path, free
):
    free(5 * 10**7)
    code, _, err = call(*large, "--out", tmp_path / "out" / "f.png")
    assert code == 2 and "a pair of 512x512 pixels needs about 107 MB of memory at the least" in err
    assert "50 MB are free; end other programs, make the images smaller" in err
    assert not (tmp_path / "out").exists()


def test_volumes_take_tiles_and_their_sidecar_says_so(call, tmp_path, free, compact):
    pytest.importorskip("SimpleITK", reason="needs requirements-volumes.txt")
    import nibabel as nib

    for name, image in zip(("ct", "mri"), phantom_pair("CT-MRI", 512), strict=True):
        data = np.repeat(image.astype(np.int16)[..., None], 2, axis=2)
        data = data * 8 - 1000 if name == "ct" else data
        nib.Nifti1Image(data, np.diag([0.5, 0.5, 3, 1])).to_filename(tmp_path / f"{name}.nii")
    argv = ["--img1", tmp_path / "ct.nii", "--img2", tmp_path / "mri.nii", "--task", "CT-MRI"]
    argv += ["--out", tmp_path / "f.nii", "--register", "off", "--DEVICE", "cpu"]
    free(bytes_of(compact, (512, 512), Passes(tile=384)))
    code, out, err = call(*argv)
    assert code == 0 and "fused in tiles of 384 pixels, which changes values a little" in out, err
    told = json.loads((tmp_path / "f.json").read_text())
    assert (told["tile"], told["overlap"]) == (384, 64)
    assert any("in tiles of 384" in line for line in told["report"])


def test_a_gpu_has_memory_of_its_own(free):
    free(1)
    with torch.device("meta"):
        model = drawn("compact")
    assert fitting(model, (512, 512), Passes(4)) == Passes(4)
