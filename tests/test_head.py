"""What is taken for the head, and how much of it both scans must show to be registered."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from volume_files import draw_heads

from volumes.intensity import head, mri_scaling
from volumes.io import read_nifti
from volumes.register import LEVELS, incomplete, pyramid, turned


def ball_in_noise(inside: float, noise: float, added: bool) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 14 voxels in a field of 48 with uniform noise around it, and where it is."""
    rng = np.random.default_rng(0)
    index = np.indices((48, 48, 48)) - 24
    ball = np.sqrt((index**2).sum(0)) < 14
    values = rng.uniform(0, noise, ball.shape)
    return np.where(ball, inside + values * added, values).astype(np.float32), ball


@pytest.mark.parametrize(
    ("inside", "noise", "added"),
    [
        (1, 1, False),
        (1, 1, True),
        (3, 1, False),
        (60, 100, True),
        (800, 1000, True),
        (0.5, 1, True),
    ],
)
def test_a_ball_in_uniform_noise_is_not_the_whole_field(inside, noise, added):
    data, ball = ball_in_noise(inside, noise, added)
    mask = head(data)
    assert mask.mean() < 0.3, "the ball is a tenth of the field"
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.7
    assert "inside the head" in mri_scaling(data).method["method"]


def test_a_head_without_noise_is_as_before():
    data, ball = ball_in_noise(3, 1, False)
    data[~ball] = 0
    assert np.array_equal(head(data), ball)


def test_where_no_head_stands_out_the_scale_says_so():
    noise = np.random.default_rng(0).uniform(0, 1, (24, 24, 24)).astype(np.float32)
    data = noise + 100
    data[0, 0, 0] = 0
    scaling = mri_scaling(data)
    assert "of the whole field, as no head stands out" in scaling.text
    assert "of the whole field" in scaling.method["method"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    paths = draw_heads(tmp_path_factory.mktemp("h"))
    return read_nifti(paths["ct"]), read_nifti(paths["mri"])


def doubts(source1, source2, kind="CT") -> str:
    level = pyramid(source1, source2, kind, LEVELS[:2])[1]
    return "; ".join(incomplete(turned((0, 0, 0)), level, kind))


def test_whole_heads_are_complete(drawn):
    assert not doubts(*drawn)


def test_a_brain_beside_a_whole_head_is_in_doubt(drawn):
    ct, mri = drawn
    thick = ndimage.grey_dilation(ct.data, 5)  # scalp and skull of 18 mm
    assert "has one no skull?" in doubts(replace(ct, data=thick), mri)
    assert not doubts(replace(ct, data=thick), mri, "PET"), "which is a brain in any case"


@pytest.mark.parametrize("which", (0, 1))
def test_a_slab_is_in_doubt(drawn, which):
    volumes = list(drawn)
    start = volumes[which].affine.copy()
    start[:3, 3] += start[:3, 2] * 18
    slab = replace(volumes[which], data=volumes[which].data[:, :, 18:30], affine=start)
    volumes[which] = slab
    assert "only 48 mm of the head are in both, expected 60" in doubts(*volumes)
