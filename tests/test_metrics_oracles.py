"""The metrics against other libraries, or against a plain second implementation of the definition.

Warnings are errors throughout.
"""

import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import torch
from drawn_images import awkward, triple
from skimage.measure import shannon_entropy
from skimage.metrics import structural_similarity

import metrics

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries among themselves
]


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
    expected = sum(full_ref.vifp(s, fused) for s in sources)
    assert metrics.vif(fused, *sources) == pytest.approx(expected, rel=1e-6)


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
    carried = (np.log10(1 + gain**2 * v_s / (distortion + noise)) + 1e-7).sum()
    expected = carried / (np.log10(1 + v_s / noise) + 1e-7).sum()
    assert metrics.viff(fused, *sources) == pytest.approx(expected, rel=1e-9)


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

    (g_f, a_f), preserved, total = edges(fused), 0, 0
    for g, a in map(edges, sources):
        ratio = np.minimum(g, g_f) / np.maximum(np.maximum(g, g_f), 1e-9)
        strength = np.where(g == g_f, g_f, ratio)
        angle = 1 - np.abs(a - a_f) / (np.pi / 2)
        q_g = 0.9994 / (1 + np.exp(-15 * (strength - 0.5)))
        q_a = 0.9879 / (1 + np.exp(-22 * (angle - 0.8)))
        preserved, total = preserved + (q_g * q_a * g).sum(), total + g.sum()
    assert metrics.qabf(fused, *sources) == pytest.approx(preserved / total, rel=1e-6)


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
