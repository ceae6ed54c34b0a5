"""Tests of metrics.py and metrics_report.py; warnings are errors throughout."""

import csv
import json
import math
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import scipy.stats
import torch
from skimage.measure import shannon_entropy
from skimage.metrics import structural_similarity

import metrics
from args_setting import MetricArgs, parse_args, run_script
from dataset import read_luma8, task_pairs, write_png
from metrics_report import (
    Comparison,
    compare,
    differences,
    name_folders,
    plot,
    print_table,
    report,
    table,
    to_csv,
    to_json,
)

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries among themselves
]

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ASFE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "metrics" / "expected.csv").is_file(),
    reason=f"{SHARED} has no expected values; ASFE_SHARED may point elsewhere",
)
CASES = [
    f"{pair}_{method}"
    for pair in ("CT_16009", "PET_25015", "SPECT_11010")
    for method in ("asfe", "max", "avg")
]


def textured(seed: int, shape: tuple[int, int] = (64, 72), sigma: float = 1.5) -> np.ndarray:
    """Blurred noise over all of 0..255."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    noise = scipy.ndimage.gaussian_filter(noise, sigma)
    return np.rint((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


def triple(shape: tuple[int, int] = (64, 72)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source1, source2 = textured(1, shape), textured(2, shape, 2.5)
    fused = np.maximum(source1, source2) // 2 + textured(3, shape) // 4
    return fused, source1, source2


# --- the stated values -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, float]]:
    values: dict[str, dict[str, float]] = {}
    with open(SHARED / "metrics" / "expected.csv", newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    return values


def case_images(case: str) -> list[np.ndarray]:
    folder = SHARED / "metrics" / "cases"
    return [cv2.imread(str(folder / f"{case}_{k}.png"), cv2.IMREAD_UNCHANGED) for k in "FAB"]


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_expected_values(case, expected):
    found = metrics.evaluate(*case_images(case), metrics.METRICS)
    assert found.keys() == expected[case].keys() - {"QP"}
    for name, value in found.items():
        tolerance = 2e-2 if name == "QCB" else 1e-6
        assert value == pytest.approx(expected[case][name], rel=tolerance), name


@needs_shared
def test_published_means():
    """Means over the 24 CT-MRI images that the paper's authors published, known to four digits."""
    known = {"EN": 5.4855, "SD": 58.372, "SF": 19.124, "MI": 3.1463, "SSIM": 0.3705, "VIF": 0.4032}
    known |= {"Qabf": 0.3434, "SCD": 1.0177, "FMI_pixel": 0.2295, "QCV": 2098.13}
    pairs = task_pairs(SHARED / "HMIFDatasets", "CT-MRI", "test")
    folder = SHARED / "published" / "ASFE-authors" / "CT-MRI"
    result = compare({"authors": folder}, pairs, jobs=2, metrics=list(known))
    assert len(result.images) == 24
    for name, mean in zip(result.metrics, result.mean("authors"), strict=True):
        assert mean == pytest.approx(known[name], rel=2e-4), name


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
    assert not metrics.Luma(c).vif_moments[0].variance.any()  # 1e-10, of rounding, would count
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


@pytest.mark.parametrize(
    "name", [n for n in metrics.METRICS if n != "VIFF"]
)  # keeps one where gains tie
def test_swapped_sources(name):
    fused, source1, source2 = triple((176, 180))
    value = metrics.METRICS[name].function(fused, source1, source2)
    swapped = metrics.METRICS[name].function(fused, source2, source1)
    assert swapped == pytest.approx(value, rel=1e-9)


def test_shifted_image():
    image = textured(5, (176, 180))
    shifted = np.roll(image, 3, axis=1)
    before, after = metrics.evaluate(image, image, image), metrics.evaluate(shifted, image, image)
    for name in ("EN", "SD"):
        assert after[name] == before[name]
    for name, value in after.items():
        if name not in ("EN", "SD", "SF", "AG", "SCD"):  # the others compare with the sources
            worse = (
                value < before[name]
                if metrics.METRICS[name].higher_is_better
                else value > before[name]
            )
            assert worse, name


def test_best_direction_of_every_metric_but_activity():
    """Noise over the fused image makes each source-related metric worse."""
    image = textured(6, (176, 180))
    rng = np.random.default_rng(0)
    noisy = np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8)
    clean, spoilt = (
        metrics.evaluate(image, image, image, metrics.METRICS),
        metrics.evaluate(noisy, image, image, metrics.METRICS),
    )
    for name in metrics.METRICS.keys() - {"EN", "SD", "SF", "AG", "EI", "SCD"}:
        sign = 1 if metrics.METRICS[name].higher_is_better else -1
        assert sign * clean[name] > sign * spoilt[name], name


# --- any 8-bit input -------------------------------------------------------------------------


def awkward(shape: tuple[int, int]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    noise = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(3)]
    binary = [(n > 127).astype(np.uint8) for n in noise]
    black, white = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    dot = black.copy()
    dot[shape[0] // 2, shape[1] // 2] = 1
    return {
        "black": (black, black, black),
        "white": (white, white, white),
        "grey on black": (np.full(shape, 77, np.uint8), black, white),
        "black from noise": (black, noise[0], noise[1]),
        "noise from black": (noise[0], black, black),
        "noise": tuple(noise),
        "fused is source 1": (noise[0], noise[0], noise[1]),
        "fused is source 2": (noise[1], noise[0], noise[1]),
        "fused is both": (noise[0], noise[0], noise[0]),
        "inverted": (255 - noise[0], noise[0], noise[0]),
        "binary": tuple(binary),
        "binary, full range": tuple(b * 255 for b in binary),
        "one dot": (dot, black, dot),
        "dots apart": (dot, np.roll(dot, 1, axis=0), np.roll(dot, 1, axis=1)),
    }


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
    with pytest.raises(ValueError, match=r"MS_SSIM: image of shape \(160, 200\), .* 161"):
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


# --- independent oracles ---------------------------------------------------------------------


def test_ssim_against_scikit_image():
    fused, *sources = (x.astype(np.float64) for x in triple())
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [structural_similarity(s, fused, data_range=255, **options) for s in sources]
    assert metrics.ssim(fused, *sources) == pytest.approx(np.mean(values), rel=1e-10)


def test_entropy_and_correlation_against_libraries():
    fused, source1, source2 = triple()
    assert metrics.en(fused, source1, source2) == pytest.approx(shannon_entropy(fused), rel=1e-12)
    r = np.corrcoef([x.ravel().astype(float) for x in (fused, source1, source2)])
    assert metrics.cc(fused, source1, source2) == pytest.approx((r[0, 1] + r[0, 2]) / 2, rel=1e-10)
    differences = [fused.astype(float) - s for s in (source2, source1)]
    r1 = scipy.stats.pearsonr(differences[0].ravel(), source1.ravel()).statistic
    r2 = scipy.stats.pearsonr(differences[1].ravel(), source2.ravel()).statistic
    assert metrics.scd(fused, source1, source2) == pytest.approx(r1 + r2, rel=1e-10)


def test_information_against_scikit_learn():
    cluster = pytest.importorskip("sklearn.metrics")
    fused, *sources = triple()
    nats = sum(cluster.mutual_info_score(s.ravel(), fused.ravel()) for s in sources)
    assert metrics.mi(fused, *sources) == pytest.approx(nats / math.log(2), rel=1e-9)
    normalised = sum(
        cluster.normalized_mutual_info_score(s.ravel(), fused.ravel()) for s in sources
    )
    assert metrics.qmi(fused, *sources) == pytest.approx(normalised, rel=1e-9)


def test_vif_against_sewar():
    full_ref = pytest.importorskip("sewar.full_ref")
    fused, *sources = triple()
    known = sum(full_ref.vifp(s, fused) for s in sources)
    assert metrics.vif(fused, *sources) == pytest.approx(known, rel=1e-6)


def test_viff_of_a_small_image_is_its_first_scale():
    """At 32 pixels scales 1 and 2 have windows, and scale 2 weighs nothing."""
    fused, *sources = (x.astype(float) for x in triple((32, 32)))
    window = np.exp(-(np.arange(-8, 9) ** 2) / (2 * (17 / 5) ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    maps = []
    for source in sources:
        means = [
            scipy.signal.convolve2d(x, window, mode="valid")
            for x in (fused, source, fused**2, source**2, fused * source)
        ]
        v_f, v_s = means[2] - means[0] ** 2, means[3] - means[1] ** 2
        covariance = means[4] - means[0] * means[1]
        gain = np.maximum(covariance / v_s, 0)
        maps.append((gain, v_f - gain * covariance, v_s))
    gain, distortion, v_s = np.where(maps[0][0] < maps[1][0], maps[0], maps[1])
    noise = 0.005 * 255**2
    seen = (np.log10(1 + gain**2 * v_s / (distortion + noise)) + 1e-7).sum()
    known = seen / (np.log10(1 + v_s / noise) + 1e-7).sum()
    assert metrics.viff(fused, *sources) == pytest.approx(known, rel=1e-9)


@pytest.mark.parametrize("shape", [(176, 192), (161, 175), (203, 177)], ids=str)
def test_ms_ssim_against_pytorch_msssim(shape):
    pytorch_msssim = pytest.importorskip("pytorch_msssim")
    images = triple(shape)
    fused, *sources = (torch.from_numpy(x.astype(np.float64))[None, None] for x in images)
    values = [pytorch_msssim.ms_ssim(fused, s, data_range=255).item() for s in sources]
    assert metrics.ms_ssim(*images) == pytest.approx(np.mean(values), rel=1e-5)


def test_qabf_against_plain_convolution():
    fused, *sources = (x.astype(float) for x in triple())
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])

    def edges(image):
        sx = scipy.signal.convolve2d(image, kernel, mode="same")
        sy = scipy.signal.convolve2d(image, -kernel.T, mode="same")
        safe = np.where(sx == 0, 1, sx)
        return np.hypot(sx, sy), np.where(sx == 0, np.pi / 2, np.arctan(sy / safe))

    (g_f, a_f), kept, there = edges(fused), 0, 0
    for g, a in map(edges, sources):
        ratio = np.minimum(g, g_f) / np.maximum(np.maximum(g, g_f), 1e-9)
        strength = np.where(g == g_f, g_f, ratio)
        angle = 1 - np.abs(a - a_f) / (np.pi / 2)
        q_g = 0.9994 / (1 + np.exp(-15 * (strength - 0.5)))
        q_a = 0.9879 / (1 + np.exp(-22 * (angle - 0.8)))
        kept, there = kept + (q_g * q_a * g).sum(), there + g.sum()
    assert metrics.qabf(fused, *sources) == pytest.approx(kept / there, rel=1e-6)


def plain_fmi(fused: np.ndarray, source: np.ndarray) -> float:
    """The definition, window by window, with the whole 9x9 joint pdf."""
    total, position = 0.0, np.arange(9)
    h, w = fused.shape
    for y in range(h - 2):
        for x in range(w - 2):
            f, s = (i[y : y + 3, x : x + 3].T.ravel().astype(float) for i in (fused, source))
            if (f == s).all() or np.ptp(f) == np.ptp(s) == 0:
                total += 1
                continue
            p, q = ((v - v.min()) / np.ptp(v) if np.ptp(v) else np.ones(9) for v in (f, s))
            p, q = p / p.sum(), q / q.sum()
            sigma_p, sigma_q = (
                math.sqrt(max((v * position**2).sum() - (v * position).sum() ** 2, 0))
                for v in (p, q)
            )
            independent = np.outer(np.cumsum(p), np.cumsum(q))
            r = np.corrcoef(p, q)[0, 1] if np.ptp(p) and np.ptp(q) else 0
            bound = np.minimum.outer(np.cumsum(p), np.cumsum(q))
            if r < 0:
                bound = np.maximum(np.add.outer(np.cumsum(p), np.cumsum(q)) - 1, 0)
            space = (bound - independent).sum()
            phi = r * sigma_p * sigma_q / space if abs(space) > 1e-12 else 0
            coupled = np.diff(np.diff(np.pad(bound, (1, 0)), axis=0), axis=1)
            joint = phi * coupled + (1 - phi) * np.outer(p, q)
            h_p, h_q, h_joint = (
                -sum(v * math.log2(abs(v)) for v in t.ravel() if abs(v) > 1e-15)
                for t in (p, q, joint)
            )
            if h_p + h_q > 0:
                total += 2 * (h_p + h_q - h_joint) / (h_p + h_q)
    return total / ((h - 2) * (w - 2))


@pytest.mark.parametrize("kind", ["texture", "few levels", "noise"])
def test_fmi_against_the_plain_definition(kind):
    fused, *sources = triple((40, 44))
    if kind == "few levels":
        fused, sources = fused // 80, [s // 70 for s in sources]
    if kind == "noise":
        fused, *sources = awkward((40, 44))["noise"]
    plain = (plain_fmi(fused, sources[0]) + plain_fmi(fused, sources[1])) / 2
    assert metrics.fmi_pixel(fused, *sources) == pytest.approx(plain, rel=1e-9)


# --- the batched form ------------------------------------------------------------------------


def as_batch(triples) -> list[torch.Tensor]:
    stacks = (np.stack(images)[:, None] for images in zip(*triples, strict=True))
    return [torch.from_numpy(stack.astype(np.float32) / 255) for stack in stacks]


@pytest.mark.parametrize("shape", [(64, 72), (32, 33)], ids=str)
def test_batch_is_the_same_number(shape):
    triples = [triple(shape), *awkward(shape).values()]
    found = metrics.evaluate_batch(*as_batch(triples))
    assert list(found) == list(metrics.BATCH_METRICS)
    for name, values in found.items():
        assert values.shape == (len(triples),)
        known = [metrics.METRICS[name].function(*images) for images in triples]
        assert values.tolist() == pytest.approx(known, rel=1e-6, abs=1e-9), name


@needs_shared
def test_batch_on_real_images():
    triples = [case_images(case) for case in CASES[::2]]
    found = metrics.evaluate_batch(*as_batch(triples), ["SSIM", "Qabf", "VIF", "SCD"])
    for name, values in found.items():
        known = [metrics.METRICS[name].function(*images) for images in triples]
        assert values.tolist() == pytest.approx(known, rel=1e-4), name


def test_batch_rounds_to_what_a_file_would_hold():
    fused, img1, img2 = as_batch([triple()])
    there = metrics.evaluate_batch(fused, img1, img2)
    shaken = fused + (torch.rand_like(fused) - 0.5) * 0.9 / 255
    outside = torch.where(fused == 0, -0.2, shaken)
    for name, values in metrics.evaluate_batch(outside, img1, img2).items():
        assert torch.equal(values, there[name]), name


def test_batch_names_wrong_shapes():
    x = torch.zeros(2, 1, 32, 32)
    with pytest.raises(ValueError, match=r"img2 has shape \(2, 3, 32, 32\), expected"):
        metrics.evaluate_batch(x, x, torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="unknown metric 'QCB'"):
        metrics.evaluate_batch(x, x, x, ["QCB"])


# --- comparison, ranks and tests -------------------------------------------------------------


def made_up(values: dict[str, list[list[float]]], names: list[str]) -> Comparison:
    images = [f"image{k}" for k in range(len(next(iter(values.values()))))]
    return Comparison("made up", names, images, {m: np.array(v) for m, v in values.items()})


def test_mean_ranks_know_directions_and_ties():
    result = made_up(
        {
            "a": [[1.0, 9.0, 5.0], [3.0, 9.0, 5.0]],
            "b": [[3.0, 2.0, 5.0], [3.0, 2.0, 5.0]],
            "c": [[0.0, 1.0, 7.0], [1.0, 1.0, 7.0]],
        },
        ["EN", "QCV", "SSIM"],  # means: EN 2 3 0.5, QCV (lower is better) 9 2 1, SSIM 5 5 7
    )
    assert result.mean_ranks() == pytest.approx(
        {"a": (2 + 3 + 2.5) / 3, "b": (1 + 2 + 2.5) / 3, "c": (3 + 1 + 1) / 3}
    )


def test_empty_metrics_do_not_count_in_ranks():
    result = made_up({"a": [[1.0, math.nan]], "b": [[2.0, math.nan]]}, ["EN", "MS_SSIM"])
    assert result.mean_ranks() == {"a": 2.0, "b": 1.0}
    assert "MS_SSIM ↑" in table(result)


def test_differences_of_two_methods():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(24, 2)) + [0.0, 1.0]
    b = rng.normal(size=(24, 2))
    result = made_up({"a": a.tolist(), "b": b.tolist()}, ["EN", "SSIM"])
    rows = differences(result, "a", "b", seed=1)
    assert rows == differences(result, "a", "b", seed=1)
    assert rows != differences(result, "a", "b", seed=2)
    known = [scipy.stats.wilcoxon(a[:, k], b[:, k]).pvalue for k in range(2)]
    assert [row.p for row in rows] == pytest.approx(known)
    assert sorted(row.p_holm for row in rows) == pytest.approx(
        sorted([min(1, 2 * min(known)), max(2 * min(known), max(known))])
    )
    for k, row in enumerate(rows):
        gap = a[:, k] - b[:, k]
        assert row.mean == pytest.approx(gap.mean())
        half = 1.96 * gap.std() / math.sqrt(24)  # the normal approximation of the same interval
        assert (row.low, row.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.1)
        assert row.low < gap.mean() < row.high
    opposite = differences(result, "b", "a", seed=1)
    assert opposite[1].mean == pytest.approx(-rows[1].mean)


def test_difference_of_equal_methods():
    values = [[1.0, math.inf], [2.0, math.inf]]
    (row,) = differences(made_up({"a": values, "b": values}, ["EN", "PSNR"]), "a", "b", 0)
    assert (row.metric, row.mean, row.low, row.high, row.p, row.p_holm) == ("EN", 0, 0, 0, 1, 1)


class Terminal(StringIO):
    def isatty(self):
        return True


def test_table_marks_the_best_and_the_second(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = made_up({"a": [[1.0, 3.0]], "b": [[2.0, 2.0]], "c": [[3.0, 1.0]]}, ["EN", "QCV"])
    screen = Terminal()
    print_table(result, file=screen)
    en, qcv = screen.getvalue().splitlines()[2:4]
    assert en.split() == ["EN", "↑", "1.0000", "\033[4m2.0000\033[0m", "\033[1m3.0000\033[0m"]
    assert qcv.split() == ["QCV", "↓", "3.0000", "\033[4m2.0000\033[0m", "\033[1m1.0000\033[0m"]
    page = StringIO()
    print_table(result, file=page)
    assert "\033" not in page.getvalue()


def test_narrow_terminal_shows_all_methods(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    result = made_up({f"method{k}": [[float(k)]] for k in range(7)}, ["EN"])
    page = StringIO()
    print_table(result, file=page)
    assert all(f"method{k}" in page.getvalue() for k in range(7))
    assert max(map(len, page.getvalue().splitlines())) <= 40


def test_markdown_and_latex():
    result = made_up({"a|b": [[1.0, 0.00001]], "c_d": [[2.0, 2000.0]]}, ["MS_SSIM", "Nabf"])
    assert table(result, "markdown", rank=True).splitlines() == [
        r"| metric | a\|b | c_d |",
        "| :-- | --: | --: |",
        "| MS_SSIM ↑ | <ins>1.0000</ins> | **2.0000** |",
        "| Nabf ↓ | **1.00e-05** | <ins>2000.0</ins> |",
        "| mean rank ↓ | **1.50** | **1.50** |",
    ]
    latex = table(result, "latex")
    assert r"metric & a|b & c\_d \\" in latex
    assert r"MS\_SSIM $\uparrow$ & \underline{1.0000} & \textbf{2.0000} \\" in latex


def test_plot_is_a_picture_with_a_panel_for_each_metric():
    pytest.importorskip("matplotlib")
    values = np.random.default_rng(0).normal(size=(5, 7))
    values[:, 3], values[2, 4] = np.nan, np.inf
    result = made_up({"a": values.tolist(), "b": values.tolist()}, list(metrics.PANEL[:7]))
    picture = cv2.imdecode(np.frombuffer(plot(result, "png"), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture.shape[1] > 1000 and picture.std() > 10


def test_csv_and_json_leave_small_images_empty():
    result = made_up({"a": [[1.5, math.nan], [2.5, math.nan]]}, ["EN", "MS_SSIM"])
    rows = ["method,image,EN,MS_SSIM", "a,image0,1.5,", "a,image1,2.5,", "a,mean,2.0,"]
    assert to_csv(result).splitlines() == rows
    document = json.loads(to_json(result, True, [], ()))
    assert document["methods"]["a"]["mean"] == {"EN": 2.0, "MS_SSIM": None}


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> Path:
    """Three pairs with a colour source 1, and two methods: ours (colour) and theirs (grey)."""
    for folder in ("PET", "MRI", "ours", "theirs"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(("p1", "p2", "p3")):
        fused, source1, source2 = (textured(10 * k + j, (40, 48)) for j in range(3))
        tinted = np.stack([source1, source1 // 2, 255 - source1], axis=2)
        write_png(tmp_path / "PET" / f"{name}.png", tinted)
        write_png(tmp_path / "MRI" / f"{name}.png", source2)
        write_png(tmp_path / "ours" / f"{name}.png", np.stack([fused, source2, fused], axis=2))
        write_png(tmp_path / "theirs" / f"{name}.png", source2)
    return tmp_path


def run(folder: Path, *more: str | Path) -> None:
    argv = ["--dir1", folder / "PET", "--dir2", folder / "MRI", "--jobs", "1", *more]
    if "--fused" not in more:
        argv += ["--fused", folder / "ours", folder / "theirs"]
    run_script(report, parse_args(MetricArgs, [str(word) for word in argv]))


def fails(capsys, folder: Path, *more: str | Path) -> str:
    """Run with an error: the one line, after a check that nothing was printed or written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(folder, "--csv", folder / "out.csv", "--json", folder / "out.json", *more)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(folder.rglob("*")) == before
    *notes, line = err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    return line


def test_command_line_table(folders, capsys):
    run(folders)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "means over 3 images"
    assert lines[1].split() == ["metric", "max", "mean", "ours", "theirs"]
    assert [line.split()[0] for line in lines[2:21]] == list(metrics.PANEL)
    psnr = next(line for line in lines if line.startswith("MS_SSIM"))
    assert psnr.split() == ["MS_SSIM", "↑"]


def test_command_line_files(folders, capsys):
    outputs = {name: folders / f"out.{name}" for name in ("csv", "json", "markdown", "latex")}
    flags = [word for name, path in outputs.items() for word in (f"--{name}", path)]
    run(folders, *flags, "--rank", "--between", "ours", "max", "--metrics", "EN", "SSIM", "MS_SSIM")
    shown = capsys.readouterr().out
    assert "mean rank ↓" in shown and "ours - max" in shown and "p (Holm)" in shown
    images = {
        name: [read_luma8(folders / f / f"{name}.png") for f in ("ours", "PET", "MRI")]
        for name in ("p1", "p2", "p3")
    }
    with open(outputs["csv"], newline="") as file:
        rows = {(row["method"], row["image"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4 * (3 + 1)
    for name, triple_ in images.items():
        assert float(rows["ours", name]["SSIM"]) == metrics.ssim(*triple_)
        assert rows["ours", name]["MS_SSIM"] == ""
        fused, pet, mri = triple_
        assert float(rows["max", name]["EN"]) == metrics.en(np.maximum(pet, mri), pet, mri)
        mean = np.floor((pet.astype(float) + mri) / 2 + 0.5)
        assert float(rows["mean", name]["EN"]) == metrics.en(mean, pet, mri)
    average = np.mean([metrics.ssim(*triple_) for triple_ in images.values()])
    assert float(rows["ours", "mean"]["SSIM"]) == pytest.approx(average)
    document = json.loads(outputs["json"].read_text())
    assert document["methods"]["ours"]["mean"]["SSIM"] == pytest.approx(average)
    assert document["methods"]["theirs"]["images"]["p2"]["MS_SSIM"] is None
    assert document["mean_rank"].keys() == {"max", "mean", "ours", "theirs"}
    assert [row["metric"] for row in document["difference"]["metrics"]] == ["EN", "SSIM"]
    assert outputs["markdown"].read_text().startswith("| metric | max | mean | ours | theirs |")
    assert outputs["latex"].read_text().startswith(r"\begin{tabular}{lrrrr}")


def test_two_processes_say_the_same(folders):
    for jobs in ("1", "2"):
        run(folders, "--jobs", jobs, "--csv", folders / f"{jobs}.csv", "--metrics", "EN", "VIF")
    assert (folders / "1.csv").read_text() == (folders / "2.csv").read_text()


def test_command_line_plot(folders):
    pytest.importorskip("matplotlib")
    run(folders, "--plot", folders / "out.png", "--metrics", "EN", "SD")
    assert cv2.imread(str(folders / "out.png")) is not None


def test_missing_images_are_named(folders, capsys):
    (folders / "theirs" / "p2.png").unlink()
    assert "theirs lacks p2" in fails(capsys, folders)
    run(folders, "--skip_unmatched", "--csv", folders / "out.csv", "--metrics", "EN")
    captured = capsys.readouterr()
    assert "theirs lacks p2; left out for every method" in captured.err
    assert "means over 2 images" in captured.out
    assert "p2" not in (folders / "out.csv").read_text()


def test_extra_images_are_named(folders, capsys):
    write_png(folders / "ours" / "p9.png", textured(1))
    run(folders, "--metrics", "EN")
    captured = capsys.readouterr()
    assert "ours: no sources for p9; left out" in captured.err
    assert "means over 3 images" in captured.out


def test_different_size_is_named(folders, capsys):
    write_png(folders / "theirs" / "p3.png", textured(1, (50, 40)))
    write_png(folders / "MRI" / "p1.png", textured(1, (40, 47)))
    line = fails(capsys, folders)
    assert "MRI/p1.png is 47x40, expected 48x40 as" in line
    assert "theirs/p3.png is 40x50, expected 48x40 as" in line and "PET/p3.png" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fused", "nowhere"], "nowhere: no such folder"),
        (["--fused", "ours", "a=ours", "a=theirs"], "would both be named 'a'"),
        (["--fused", "max=ours"], "'max' is that of a trivial fusion"),
        (["--metrics", "NIQE"], "unknown metric 'NIQE'"),
        (["--between", "ours", "hers"], "no method 'hers'"),
        (["--markdown", "nowhere/table.md"], "the folder of nowhere/table.md is not there"),
        (["--plot", "out.gif2"], "gif2"),
        (["--metrics", "MS_SSIM"], "the images are too small for MS_SSIM"),
    ],
)
def test_bad_command_lines_end_in_one_line(folders, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(folders)
    if flags[0] != "--fused":
        flags = [*flags, "--fused", "ours", "theirs"]
    assert message in fails(capsys, folders, *flags)


def test_damaged_image_is_named(folders, capsys):
    (folders / "ours" / "p1.png").write_bytes(b"no image")
    assert "ours/p1.png" in fails(capsys, folders)


def test_folders_are_named_by_what_tells_them_apart(tmp_path):
    given = [str(tmp_path / "one" / "PET-MRI"), f"x={tmp_path}", str(tmp_path / "two")]
    assert list(name_folders(given)) == ["one", "x", "two"]


def test_script_itself(folders):
    command = [sys.executable, ROOT / "metrics.py", "--fused", folders / "nowhere", "--dir1"]
    command += [folders / "PET", "--dir2", folders / "MRI"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"metrics.py: error: {folders}/nowhere: no such folder\n"
