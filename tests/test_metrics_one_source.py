"""kept, conspicuous, foreign, brighter and rise have their stated and their obvious values."""

import csv
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_images import textured
from stated import DRAWN, stated_metrics

from evaluation.one_source import (
    OneSource,
    brighter_than_both,
    luma_rise,
    one_source,
    one_source_maps,
)

STATED = "kept1", "conspicuous1", "kept2", "conspicuous2", "foreign"


def luma(path: Path) -> np.ndarray:
    """float64 in [0, 1], not rounded again."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) / 255
    return image if image.ndim == 2 else image @ [0.114, 0.587, 0.299]  # OpenCV has blue first


def measured(folder: Path, case: str) -> OneSource:
    return one_source(*(luma(folder / f"{case}_{k}.png") for k in "ABF"))


@pytest.mark.parametrize(("case", "stated"), stated_metrics(DRAWN / "expected.csv").items())
def test_drawn_cases_have_the_stated_values(case, stated):
    found = measured(DRAWN, case)._asdict()
    assert {n: found[n] for n in STATED} == pytest.approx({n: stated[n] for n in STATED}, rel=1e-6)


def test_real_cases_have_the_stated_values(shared):
    folder = shared / "metrics"
    with (folder / "one_source_expected.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row in rows:
        found = measured(folder / "cases", row["case"])._asdict()
        stated = {name: float(row[name]) for name in STATED}
        assert {n: found[n] for n in STATED} == pytest.approx(stated, abs=1e-8), row["case"]


# --- closed forms ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> tuple[np.ndarray, np.ndarray]:
    """Two textures that know nothing of each other, in the middle of the range."""
    return tuple(0.25 + 0.5 * textured(seed, (96, 96)) / 255 for seed in (1, 2))


def test_a_mixture_is_told_apart_into_its_gains(sources):
    s1, s2 = sources
    found = one_source(s1, s2, 0.7 * s1 + 0.2 * s2 + 0.05)
    assert found.kept1 == pytest.approx(0.7, abs=0.01)  # the floor of the variances takes a little
    assert found.kept2 == pytest.approx(0.2, abs=0.01)
    assert found.foreign == pytest.approx(0, abs=0.06)


def test_a_stretch_changes_what_is_kept_and_not_what_is_conspicuous(sources):
    s1, s2 = sources
    mean = one_source(s1, s2, (s1 + s2) / 2)
    stretched = one_source(s1, s2, s1 + s2 - 0.5)
    assert (mean.kept1, stretched.kept1) == pytest.approx((0.5, 1), abs=0.01)
    assert stretched.conspicuous1 == pytest.approx(mean.conspicuous1, abs=0.01)


def test_gain_beyond_one_and_below_zero_counts_as_one_and_zero(sources):
    s1, s2 = sources
    found = one_source(s1, s2, 1.5 * s1 - 0.5 * s2)
    assert (found.kept1, found.kept2) == pytest.approx((1, 0), abs=0.01)


def test_noise_is_foreign(sources):
    s1, s2 = sources
    noise = np.random.default_rng(0).random(s1.shape)
    assert one_source(s1, s2, noise).foreign > 0.95
    clean = one_source(s1, s2, (s1 + s2) / 2).foreign
    assert one_source(s1, s2, (s1 + s2) / 2 + 0.1 * noise).foreign > clean + 0.1


def test_bone_owes_the_mri_nothing(sources):
    _, mri = sources
    ct = np.zeros_like(mri)
    ct[:, 48:] = 250 / 255
    maps = one_source_maps(ct, mri, np.maximum(ct, mri))
    assert not maps.owed2[:, 48:].any()
    assert maps.owed2[:, :32].all()
    ct[:, 48:] = 249 / 255
    assert one_source_maps(ct, mri, ct).owed2[:, 70:].all()


def test_what_is_lost_is_mapped_where_it_is(sources):
    s1, s2 = sources
    fused = s1.copy()
    fused[:, :48] = s2[:, :48]  # the left half lacks source 1, the right half source 2
    maps = one_source_maps(s1, s2, fused)
    assert maps.lost1[:, :24].mean() > 20 * maps.lost1[:, 72:].mean()
    assert maps.lost2[:, 72:].mean() > 20 * maps.lost2[:, :24].mean()


def test_undefined_values_are_nan():
    flat = np.full((40, 40), 0.5)
    found = one_source(flat, flat, flat)
    assert all(math.isnan(x) for x in found[:5])
    dark = np.zeros((40, 40))
    assert math.isnan(one_source(dark, dark, dark).brighter)
    assert math.isnan(luma_rise(dark, flat, flat))


def test_brighter_counts_what_exceeds_both_by_more_than_15_levels():
    s1, s2 = np.full((4, 4), 100 / 255), np.full((4, 4), 60 / 255)
    s1[3], s2[3] = 0, 0  # outside of the head
    fused = np.full((4, 4), 115 / 255)  # exactly 15 above: not more
    assert brighter_than_both(s1, s2, fused) == 0
    fused[0] = 116 / 255
    assert brighter_than_both(s1, s2, fused) == pytest.approx(1 / 3)


def test_rise_is_that_of_the_lowest_quarter_of_uptake():
    pet = np.tile(np.repeat(np.array([0, 40, 80, 120, 160]) / 255, 4), (6, 1))
    mri = np.full(pet.shape, 0.3)
    fused = pet + np.where(pet == 40 / 255, 20, np.where(pet > 0, 60, 90)) / 255
    assert luma_rise(pet, mri, fused) == pytest.approx(20)


@pytest.mark.parametrize("shape", [(16, 16), (3, 50), (33, 20)], ids=str)
def test_images_smaller_than_the_window_have_values(shape):
    rng = np.random.default_rng(0)
    found = one_source(*(rng.random(shape) for _ in range(3)))
    assert np.isfinite(found).all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected three equal \(H, W\)"):
        one_source(np.zeros((4, 4)), np.zeros((4, 5)), np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"expected three equal \(H, W\)"):
        one_source(*(np.zeros((4, 4, 3)) for _ in range(3)))
