"""Opposed details: planted spots that add up to little or nothing."""

import math

import numpy as np
import pytest
from drawn_images import textured

from evaluation.opposed import opposed, opposed_places

SIDE = 96


def spot(y: int, x: int, radius: float = 3) -> np.ndarray:
    """A disc of ones in an image of zeros."""
    rows, columns = np.ogrid[:SIDE, :SIDE]
    return 1.0 * (np.hypot(rows - y, columns - x) <= radius)


@pytest.fixture
def sources() -> tuple[np.ndarray, np.ndarray]:
    """Grey, with a spot that is bright in source 1 and half as dark in source 2."""
    return 0.4 + 0.4 * spot(48, 48), 0.4 - 0.2 * spot(48, 48)


def test_the_stronger_source_counts_and_a_sum_loses_it(sources):
    source1, source2 = sources
    assert opposed(*sources, source1) == pytest.approx(1)
    assert opposed(*sources, source2) == 0
    assert opposed(*sources, (source1 + source2) / 2) == pytest.approx(0.25)
    assert opposed(*sources, source1 + source2 - 0.4) == pytest.approx(0.5)
    assert opposed(*sources, np.full_like(source1, 0.7)) == pytest.approx(0, abs=1e-9)
    assert opposed(*sources, 2 * source1) == pytest.approx(1), "gain beyond 1 is no gain"
    assert opposed(source2, source1, source1) == pytest.approx(1), "whichever source it is"


def test_where_sources_agree_or_one_is_flat_nothing_counts(sources):
    source1, _ = sources
    assert math.isnan(opposed(source1, source1, source1))
    assert math.isnan(opposed(source1, np.full_like(source1, 0.4), source1))
    faint = 0.4 - 0.01 * spot(48, 48)  # three levels
    assert math.isnan(opposed(source1, faint, source1))


def test_a_place_counts_by_its_weaker_detail_and_only_there(sources):
    source1, source2 = sources
    weight, stronger = opposed_places(0.4 + 0.4 * spot(48, 48), source2)
    assert weight[48, 48] > 0 and not weight[:24].any()
    assert stronger[48, 48] > 0, "that of source 1"
    more = opposed_places(source1, 0.4 - 0.4 * spot(48, 48))[0]
    assert more[48, 48] > 1.5 * weight[48, 48]


def test_bone_and_its_surroundings_do_not_count(sources):
    source1, source2 = sources
    bone = source1.copy()
    bone[:, 53:] = 1
    assert opposed_places(source1, source2)[0].any()
    assert not opposed_places(bone, source2)[0].any()


def test_texture_does_not_upset_it():
    first, second = (textured(seed, (SIDE, SIDE)) / 255 for seed in (1, 2))
    mean = opposed(first, second, (first + second) / 2)
    assert 0.05 < mean < 0.35, "a mean keeps half of the difference"
