"""The metrics have their stated values, on any 8-bit image; warnings are errors throughout."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_images import awkward, textured, triple
from skimage.measure import shannon_entropy
from stated import DRAWN, stated_metrics

import metrics
from dataset import task_pairs
from evaluation.maps import Luma

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries among themselves
]

CASES = [
    f"{pair}_{method}"
    for pair in ("CT_16009", "PET_25015", "SPECT_11010")
    for method in ("asfe", "max", "avg")
]


# --- the stated values -----------------------------------------------------------------------


def case_images(folder: Path, case: str) -> list[np.ndarray]:
    return [cv2.imread(str(folder / f"{case}_{k}.png"), cv2.IMREAD_GRAYSCALE) for k in "FAB"]


def check_stated(images: list[np.ndarray], stated: dict[str, float]) -> None:
    found = metrics.evaluate(*images, metrics.METRICS)
    elsewhere = {"QP", "kept1", "conspicuous1", "kept2", "conspicuous2", "foreign"}
    assert found.keys() == stated.keys() - elsewhere
    for name, value in found.items():
        # on a black background QCB is decided by the rounding of a Fourier transform
        tolerance = 2e-2 if name == "QCB" else 1e-6
        assert value == pytest.approx(stated[name], rel=tolerance), name


@pytest.mark.parametrize(("case", "stated"), stated_metrics(DRAWN / "expected.csv").items())
def test_stated_values_of_drawn_cases(case, stated):
    check_stated(case_images(DRAWN, case), stated)


@pytest.mark.parametrize("case", CASES)
def test_stated_values_of_slices(shared, case):
    stated = stated_metrics(shared / "metrics" / "expected.csv")[case]
    check_stated(case_images(shared / "metrics" / "cases", case), stated)


def test_published_means(shared):
    """Means over the 24 CT-MRI images that the paper's authors published, known to four digits."""
    means = {"EN": 5.4855, "SD": 58.372, "SF": 19.124, "MI": 3.1463, "SSIM": 0.3705, "VIF": 0.4032}
    means |= {"Qabf": 0.3434, "SCD": 1.0177, "FMI_pixel": 0.2295, "QCV": 2098.13}
    pairs = task_pairs(shared / "HMIFDatasets", "CT-MRI", "test")
    folder = shared / "published" / "ASFE-authors" / "CT-MRI"
    result = metrics.compare({"authors": folder}, pairs, jobs=2, metrics=list(means))
    assert len(result.images) == 24
    for name, mean in zip(result.metrics, result.mean("authors"), strict=True):
        assert mean == pytest.approx(means[name], rel=2e-4), name


# --- closed forms ----------------------------------------------------------------------------


def test_one_image_thrice():
    image = textured(0, (176, 180))
    entropy = shannon_entropy(image)
    mean_of_eigenvalues = np.array([1 + entropy / 4, 1 - entropy / 8, 1 - entropy / 8]) / 3
    exact = {
        "EN": entropy,
        "MI": 2 * entropy,
        "QMI": 2,
        "CE": 0,
        "CC": 1,
        "SCD": 0,  # both differences are constant
        "PSNR": math.inf,
        "SSIM": 1,
        "MS_SSIM": 1,
        "VIF": 2,
        "VIFF": 1,
        "Nabf": 0,
        "FMI_pixel": 1,
        "QCB": 1,
        "QCV": 0,
        "QNCIE": 1 + (mean_of_eigenvalues * np.log2(mean_of_eigenvalues)).sum() / 8,
    }
    found = metrics.evaluate(image, image, image, exact)
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-12)
    # G is the strength itself: far above the centre of its sigmoid wherever there is an edge
    ceiling = 0.9994 * 0.9879 / (1 + math.exp(-22 * 0.2))
    assert metrics.qabf(image, image, image) == pytest.approx(ceiling, rel=1e-4)


def test_constant_images():
    a, b, c = (np.full((40, 50), level, np.uint8) for level in (90, 30, 200))
    found = metrics.evaluate(a, b, c, metrics.METRICS)
    for name in ("EN", "SD", "SF", "AG", "EI", "MI", "QMI", "CE", "CC", "SCD", "Nabf"):
        assert found[name] == 0, name
    c1 = (0.01 * 255) ** 2
    luminance = [(2 * 90 * s + c1) / (90**2 + s**2 + c1) for s in (30, 200)]
    assert found["SSIM"] == pytest.approx(sum(luminance) / 2, rel=1e-9)
    assert found["PSNR"] == pytest.approx(10 * math.log10(255**2 / ((60**2 + 110**2) / 2)))
    assert found["FMI_pixel"] == found["VIFF"] == found["QCB"] == 1
    assert (found["VIF"], found["QCV"]) == (2, 0)
    assert not Luma(c).vif_moments[0].variance.any()  # 1e-10, of rounding, would count
    black = np.zeros_like(a)
    assert (
        metrics.qabf(a, black, black) == 0
    )  # and not 0 on bright sources: zero padding is an edge


def test_activity_of_simple_patterns():
    stripes = np.tile(np.array([0, 255], np.uint8), (40, 20))
    assert metrics.en(stripes, stripes, stripes) == 1
    assert metrics.sd(stripes, stripes, stripes) == 127.5
    assert metrics.sf(stripes, stripes, stripes) == 255
    board = (np.indices((40, 40)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert metrics.sf(board, board, board) == pytest.approx(255 * math.sqrt(2))
    ramp = np.tile(np.arange(0, 150, 3, dtype=np.uint8), (30, 1))  # 30 x 50, gx = 3
    assert metrics.ag(ramp, ramp, ramp) == pytest.approx(30 * 50 * 3 / math.sqrt(2) / (29 * 49))
    assert metrics.ei(ramp, ramp, ramp) == pytest.approx((48 * 24 + 2 * 12) / 50)


def test_information_of_simple_patterns():
    rows = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, axis=1)
    assert metrics.mi(rows, rows.T, rows.T) == pytest.approx(0, abs=1e-12)
    assert metrics.mi(rows, 255 - rows, rows.T) == pytest.approx(6)
    assert metrics.qmi(rows, 255 - rows, rows.T) == pytest.approx(1)


def test_cross_entropy_of_two_levels():
    source, fused = np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8)
    source[:20], fused[:10] = 9, 9
    # p_S = (1/2, 1/2), p_F = (3/4, 1/4)
    assert metrics.ce(fused, source, source) == pytest.approx(0.5 * math.log2(2 / 3) + 0.5)


def test_psnr_averages_the_errors_first():
    fused = np.full((32, 32), 100, np.uint8)
    assert metrics.psnr(fused, fused + 10, fused + 20) == pytest.approx(
        10 * math.log10(255**2 / 250)
    )


def test_scd_of_disjoint_sources():
    source1, source2 = textured(1), textured(2)
    source1[:, 36:], source2[:, :36] = 0, 0
    assert metrics.scd(source1 + source2, source1, source2) == pytest.approx(2)


def test_inverted_image():
    image = textured(4)
    assert metrics.vif(255 - image, image, image) == 0
    assert metrics.cc(255 - image, image, image) == pytest.approx(-1)
    assert metrics.ssim(255 - image, image, image) < 0


def test_vif_exceeds_one_with_more_contrast():
    image = textured(4) // 2
    assert metrics.vif(image * 2, image, image) > 2


@pytest.mark.parametrize("name", [n for n in metrics.METRICS if n != "VIFF"])  # keeps one at a tie
def test_swapped_sources(name):
    fused, source1, source2 = triple((176, 180))
    function = metrics.METRICS[name].function
    swapped = function(fused, source2, source1)
    assert swapped == pytest.approx(function(fused, source1, source2), rel=1e-9)


@pytest.mark.parametrize("harm", ["shift", "noise"])
def test_harm_makes_every_metric_of_the_sources_worse(harm):
    image = textured(5, (176, 180))
    spoilt = np.roll(image, 3, axis=1)
    if harm == "noise":
        noisy = image + np.random.default_rng(0).normal(0, 25, image.shape)
        spoilt = np.clip(noisy, 0, 255).astype(np.uint8)
    before = metrics.evaluate(image, image, image, metrics.METRICS)
    after = metrics.evaluate(spoilt, image, image, metrics.METRICS)
    activity = {"EN", "SD", "SF", "AG", "EI", "SCD"}  # the others compare with the sources
    if harm == "shift":
        assert (after["EN"], after["SD"]) == (before["EN"], before["SD"])
        activity.add("CE")  # a histogram does not move
    for name in metrics.METRICS.keys() - activity:
        sign = 1 if metrics.METRICS[name].higher_is_better else -1
        assert sign * after[name] < sign * before[name], name


# --- any 8-bit input -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (41, 40), (161, 170)], ids=str)
@pytest.mark.parametrize("kind", awkward((4, 4)))
def test_finite_on_any_input(shape, kind):
    images = awkward(shape)[kind]
    found = metrics.evaluate(*images, metrics.METRICS)
    same = all((images[0] == s).all() for s in images[1:])
    for name, value in found.items():
        assert type(value) is float
        assert math.isfinite(value) or (name == "PSNR" and same), name
    assert metrics.METRICS.keys() - found.keys() == ({"MS_SSIM"} if min(shape) < 161 else set())


def test_too_small_for_ms_ssim():
    fused, source1, source2 = triple((160, 200))
    with pytest.raises(ValueError, match=r"shape \(160, 200\), expected sides of 161 or more"):
        metrics.ms_ssim(fused, source1, source2)
    assert "MS_SSIM" not in metrics.evaluate(fused, source1, source2, ["EN", "MS_SSIM"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((np.full((32, 32), 0.5),) * 3, "fused holds other values"),
        ((np.full((32, 32), 256),) * 3, "fused holds other values"),
        ((np.full((32, 32), np.nan),) * 3, "fused holds other values"),
        ((np.zeros((32, 32, 3), np.uint8),) * 3, "fused has shape (32, 32, 3), expected (H, W)"),
        (
            (np.zeros((32, 32)), np.zeros((32, 32)), np.zeros((32, 33))),
            "source2 has shape (32, 33), expected (32, 32) as fused",
        ),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(ValueError) as error:
        metrics.evaluate(*images)
    assert message in str(error.value)


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="unknown metric 'QTE', expected some of EN, SD"):
        metrics.evaluate(*triple(), ["EN", "QTE"])


def test_floats_of_whole_levels_are_the_same():
    images = triple()
    assert metrics.evaluate(*(x.astype(np.float64) for x in images)) == metrics.evaluate(*images)


def test_evaluate_is_what_the_functions_say():
    images = triple((176, 180))
    found = metrics.evaluate(*images, metrics.METRICS)
    assert list(found) == list(metrics.METRICS)
    for name, value in found.items():
        assert metrics.METRICS[name].function(*images) == value, name


def test_panel():
    panel = "EN SD SF AG MI QMI CC SCD PSNR SSIM MS_SSIM VIF VIFF Qabf Nabf FMI_pixel QCB QCV QNCIE"
    assert panel.split() == list(metrics.PANEL)
    assert [n for n in metrics.METRICS if not metrics.METRICS[n].higher_is_better] == [
        "CE",
        "Nabf",
        "QCV",
    ]
