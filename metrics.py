"""Quality metrics for fused images, each defined once, and the command that compares methods.

A metric is a function `(fused, source1, source2) -> float` of three 8-bit luma images (H, W), uint8
or floats that are whole numbers in 0..255. source1 is CT or the luma of PET or SPECT, source2 is
MRI. `evaluate` computes many of them. A metric also takes `Luma` objects, which keep the maps that
several metrics share. It raises ValueError if the images hold other values, differ in size or are
too small.

The command compares folders by these metrics, or by what only one source shows (`--one-source`), or
runs methods on planted findings (`--findings`). The room evaluation/ does the work.

Sources: Wang et al., TIP 2004 (SSIM); Wang, Simoncelli, Bovik, Asilomar 2003 (MS-SSIM); Sheikh,
Bovik, TIP 2006 (VIF); Han et al., Inf. Fusion 2013 (VIFF); Xydeas, Petrović, Electron. Lett. 2000
(Qabf); Shreyamsha Kumar, SIViP 2013 (Nabf); Haghighat, Razian, AICT 2014 (FMI); Chen, Blum, Image
Vis. Comput. 2009 (QCB); Chen, Varshney, Inf. Fusion 2007 (QCV); Hossny et al., Electron. Lett. 2008
(QMI); Wang, Shen, Jin, in "Image Fusion", Academic Press 2008 (QNCIE); Aslantas, Bendes, AEU 2015
(SCD); Z. Liu et al., TPAMI 2012 (constants of QCB, QCV, QNCIE).

Legend: F fused, S1 S2 sources, S either; H W pixels, H(X) entropy, I(X;Y) mutual information. An
arrow points to the better values.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from args_setting import CASE_PATTERN, TASKS, MetricArgs
from cli import UserError, check_metrics, command_line, run_script

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(MetricArgs, "Compare folders of fused images.", check_metrics)

import numpy as np
from numpy import ndarray

import evaluation.findings as planted
import evaluation.one_source_tables as own_content
from dataset import Pair, as_told, case_of, match_pairs, people, task_pairs
from evaluation.compare import (
    Comparison,
    Sample,
    check_method_names,
    compare_methods,
    compare_samples,
    complete_pairs,
    differences,
    name_folders,
)
from evaluation.maps import (
    QABF_ANGLE,
    QABF_STRENGTH,
    SSIM_SIDE,
    VIF_NOISE,
    VIF_SIDES,
    Luma,
    LumaPair,
    Metric,
    check_names,
    luma_triple,
    measure,
    pearson,
    sigmoid,
    vif_information,
)
from evaluation.methods import Method, named_method, trivial_methods
from evaluation.tables import (
    aligned,
    check_outputs,
    images_and_people,
    print_differences,
    print_table,
    write_files,
    write_made,
)
from evaluation.windows import TINY, window_information
from inference import optimise
from weights import load_weights, shipped_path

MS_SSIM_SIDE = 161  # pixels; five scales of windows
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
VIFF_NOISE, VIFF_WEIGHTS = 0.005 * 255**2, (1.0, 0.0, 0.15, 1.0)
NABF_STRENGTH, NABF_ANGLE = (0.9999, -19.0, 0.5), (0.9995, -22.0, 0.5)

Image = ndarray | Luma


def en(fused: Image, source1: Image, source2: Image) -> float:
    """Entropy ↑: -Σ p log2 p over the 256 levels of F, 0..8 bits. Shannon 1948.

    Noise and a grey veil raise it as well as detail does. Variants: natural logarithm, fewer bins.
    """
    return luma_triple(fused, source1, source2)[0].entropy


def sd(fused: Image, source1: Image, source2: Image) -> float:
    """Standard deviation ↑ of F over all pixels, 0..127.5.

    Variants: divided by HW - 1; the root of the sum left undivided in some published code.
    """
    f, _, _ = luma_triple(fused, source1, source2)
    return math.sqrt(f.variance) / f.values.size


def sf(fused: Image, source1: Image, source2: Image) -> float:
    """Spatial frequency ↑: √(mean dx² + mean dy²) over the existing differences, >= 0.

    Eskicioglu, Fisher 1995. Variants: both sums divided by HW; images in 0..1.
    """
    f, _, _ = luma_triple(fused, source1, source2)
    dx, dy = np.diff(f.values, axis=1), np.diff(f.values, axis=0)
    return math.sqrt(np.mean(dx * dx) + np.mean(dy * dy))


def ag(fused: Image, source1: Image, source2: Image) -> float:
    """Average gradient ↑: Σ √((gx² + gy²)/2) / ((H-1)(W-1)), >= 0; central differences.

    Cui et al., Opt. Commun. 2015; one-sided at the border, as MATLAB's `gradient`. Variants:
    forward differences; the mean over HW.
    """
    f, _, _ = luma_triple(fused, source1, source2)
    gy, gx = np.gradient(f.values)
    h, w = f.shape
    return float(np.sqrt((gx * gx + gy * gy) / 2).sum()) / ((h - 1) * (w - 1))


def ei(fused: Image, source1: Image, source2: Image) -> float:
    """Edge intensity ↑: mean 3x3 Sobel magnitude of F, replicated border, >= 0.

    Variants: Sobel divided by 8; zero border, which counts the frame of a bright image as an edge.
    """
    f, _, _ = luma_triple(fused, source1, source2)
    return float(f.sobel_replicated.mean())


def mi(fused: Image, source1: Image, source2: Image) -> float:
    """Mutual information ↑: I(S1;F) + I(S2;F), 256x256 joint histograms, 0..16 bits.

    Qu, Zhang, Yan, Electron. Lett. 2002. Variants: the mean of the two; natural logarithm.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    return f.paired_with(s1).information + f.paired_with(s2).information


def qmi(fused: Image, source1: Image, source2: Image) -> float:
    """Normalised mutual information ↑: Σ over sources of 2 I(S;F) / (H(S) + H(F)), 0..2.

    Hossny et al. 2008; 0 where both entropies are. The toolbox's stretch only renames the levels,
    so it changes nothing. Variant: Qu's sum without the entropies is MI.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    terms = ((f.paired_with(s).information, s.entropy + f.entropy) for s in (s1, s2))
    return sum(2 * i / entropies if entropies > 0 else 0.0 for i, entropies in terms)


def ce(fused: Image, source1: Image, source2: Image) -> float:
    """Cross entropy ↓: mean over sources of Σ p_S log2(p_S/p_F) over the levels both have.

    Bulanon et al., Biosyst. Eng. 2009. Levels that one of them lacks are left out, so it is no
    divergence and can be negative. Variants: the sum, or the root mean square, of the two.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)

    def divergence(s: Luma) -> float:
        shared = (s.counts > 0) & (f.counts > 0)
        p, q = s.counts[shared] / s.values.size, f.counts[shared] / f.values.size
        return float((p * np.log2(p / q)).sum())

    return (divergence(s1) + divergence(s2)) / 2


def cc(fused: Image, source1: Image, source2: Image) -> float:
    """Correlation coefficient ↑: mean of Pearson's r(S1,F) and r(S2,F), -1..1.

    A constant image counts 0. The plain mean of the sources nearly maximises it. Variants: the
    sum of the two; r between F and the mean of the sources.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    return (f.paired_with(s1).correlation + f.paired_with(s2).correlation) / 2


def scd(fused: Image, source1: Image, source2: Image) -> float:
    """Sum of the correlations of differences ↑: r(F-S2, S1) + r(F-S1, S2), -2..2.

    Aslantas, Bendes 2015. A constant difference counts 0. Variant: differences formed in uint8,
    which cuts the negative ones off.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)

    def term(kept: Luma, removed: Luma) -> float:
        covariance = f.paired_with(kept).covariance - s1.paired_with(s2).covariance
        difference = f.variance + removed.variance - 2 * f.paired_with(removed).covariance
        return pearson(covariance, difference, kept.variance)

    return term(s1, s2) + term(s2, s1)


def psnr(fused: Image, source1: Image, source2: Image) -> float:
    """Peak signal-to-noise ratio ↑: 10 log10(255² / mean of the two MSEs), dB.

    Infinite where F equals both sources. Variants: the mean of the two PSNRs; a peak of 255 on
    images in 0..1, which adds 48 dB.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    mse = (f.paired_with(s1).squared_error + f.paired_with(s2).squared_error) / 2
    return 10 * math.log10(255**2 / mse) if mse > 0 else math.inf


def ssim(fused: Image, source1: Image, source2: Image) -> float:
    """Structural similarity ↑: mean over the sources of mean SSIM, -1..1.

    Wang et al. 2004: Gaussian 11x11, σ 1.5, population variances, valid windows, L = 255, no
    downsampling; scikit-image's with gaussian_weights, written out because MS_SSIM shares its
    maps. Variants: the sum of the two; 7x7 mean windows; zero padding; L = 1 on 0..255.
    """
    f, s1, s2 = luma_triple(fused, source1, source2, SSIM_SIDE)
    return (f.paired_with(s1).similarity()[0] + f.paired_with(s2).similarity()[0]) / 2


def ms_ssim(fused: Image, source1: Image, source2: Image) -> float:
    """Multi-scale SSIM ↑: mean over the sources of Π cs_j^w_j · ssim_5^w_5, 0..1; sides >= 161.

    Wang et al. 2003: 2x2 means between the five scales; a scale's mean is cut at 0. An odd side
    gets a line of zeros first, as in pytorch-msssim. Variant: luminance at every scale.
    """
    f, s1, s2 = luma_triple(fused, source1, source2, MS_SSIM_SIDE)

    def product(pair: LumaPair) -> float:
        last = len(MS_SSIM_WEIGHTS) - 1
        means = [pair.similarity(k)[0 if k == last else 1] for k in range(last + 1)]
        powers = (max(m, 0.0) ** w for m, w in zip(means, MS_SSIM_WEIGHTS, strict=True))
        return math.prod(powers)

    return (product(f.paired_with(s1)) + product(f.paired_with(s2))) / 2


def vif(fused: Image, source1: Image, source2: Image) -> float:
    """Visual information fidelity ↑: VIFp(S1→F) + VIFp(S2→F), >= 0; F = S gives 1 for that source.

    Sheikh, Bovik 2006, pixel domain, four scales, noise variance 2. A source without detail
    counts 1; below 41 pixels the scales without a window are left out. Variants: the mean of the
    two; F as the reference; the wavelet-domain VIF.
    """
    f, s1, s2 = luma_triple(fused, source1, source2, VIF_SIDES[0])
    fidelity = 0.0
    for s in (s1, s2):
        maps = [vif_information(*m, VIF_NOISE) for m in f.paired_with(s).fidelity]
        carried, total = (sum(float(m[i].sum()) for m in maps) for i in (0, 1))
        fidelity += carried / total if total > 0 else 1.0
    return fidelity


def viff(fused: Image, source1: Image, source2: Image) -> float:
    """Visual information fidelity for fusion ↑: Σ_k w_k Σ(num + 1e-7) / Σ(den + 1e-7), >= 0.

    Han et al. 2013: noise variance 0.005·255²; at each pixel the source with the smaller gain is
    kept; weights (1, 0, 0.15, 1)/2.15, over the scales that have a window. Variant: VIF with the
    same name.
    """
    f, s1, s2 = luma_triple(fused, source1, source2, VIF_SIDES[0])
    ratios = []
    for maps1, maps2 in zip(f.paired_with(s1).fidelity, f.paired_with(s2).fidelity, strict=True):
        first = maps1[0] < maps2[0]
        kept = (np.where(first, m1, m2) for m1, m2 in zip(maps1, maps2, strict=True))
        carried, total = vif_information(*kept, VIFF_NOISE)
        ratios.append(float((carried + 1e-7).sum()) / float((total + 1e-7).sum()))
    weights = VIFF_WEIGHTS[: len(ratios)]
    return sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)


def qabf(fused: Image, source1: Image, source2: Image) -> float:
    """Edge preservation ↑: Σ Qg·Qa·g_S over Σ g_S, over both sources; 0..1, 0 without edges.

    Xydeas, Petrović 2000, L = 1; zero-padded Sobel. Where both strengths are equal G is that
    strength, as in the public code, not the paper's 1. Variants: reflected border; other constants.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    preserved, total = 0.0, 0.0
    g_f, a_f = f.sobel
    for g_s, a_s in (s1.sobel, s2.sobel):
        low, high = np.minimum(g_f, g_s), np.maximum(g_f, g_s)
        strength = np.divide(low, high, out=g_f.copy(), where=low != high)
        angle = 1 - np.abs(a_s - a_f) / (math.pi / 2)
        quality = sigmoid(strength, *QABF_STRENGTH) * sigmoid(angle, *QABF_ANGLE)
        preserved += float((quality * g_s).sum())
        total += float(g_s.sum())
    return preserved / total if total > 0 else 0.0


def nabf(fused: Image, source1: Image, source2: Image) -> float:
    """Fusion artefacts ↓: Σ (1-Q)·w where F's gradient exceeds both sources', over Σ w; 0..1.

    Shreyamsha Kumar's 2013 form of Petrović, Xydeas 2005: Sobel/8 on 0..255, Td = 2, Lg = 1.5.
    Variants: the original, without the exclusion; images in 0..1, where Td cuts everything off.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    g_f, a_f = f.sobel_reflected
    added = (g_f > s1.sobel_reflected[0]) & (g_f > s2.sobel_reflected[0])
    artefacts, weights = 0.0, 0.0
    for g_s, a_s in (s1.sobel_reflected, s2.sobel_reflected):
        low, high = np.minimum(g_f, g_s), np.maximum(g_f, g_s)
        strength = np.divide(low, high, out=np.zeros(f.shape), where=high > 0)
        angle = np.abs(np.abs(a_s - a_f) - math.pi / 2) * 2 / math.pi
        quality = np.sqrt(sigmoid(strength, *NABF_STRENGTH) * sigmoid(angle, *NABF_ANGLE))
        weight = np.where(g_s >= 2, g_s * np.sqrt(g_s), 0.001)
        artefacts += float(((1 - quality) * weight)[added].sum())
        weights += float(weight.sum())
    return artefacts / weights


def fmi_pixel(fused: Image, source1: Image, source2: Image) -> float:
    """Feature mutual information ↑: mean over 3x3 windows and sources of 2 I/(H_S + H_F), to 1.

    Haghighat, Razian 2014 ("fast FMI") on raw pixels; the joint pdf of two windows mixes their
    independent product with the coupling of greatest (or least) correlation. Equal windows, and
    windows flat in both, count 1. Variants: the 2011 FMI; gradient, wavelet or DCT features.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    return sum(window_information(f.windows, s.windows) for s in (s1, s2)) / 2


def qcb(fused: Image, source1: Image, source2: Image) -> float:
    """Contrast preservation ↑ in a model of human vision, 0..1.

    Chen, Blum 2009 with Z. Liu's constants: mean of λ p1 + (1-λ) p2, p the preserved part of the
    masked local contrast. On a black background rounding in the FFT decides, and programs in
    float64 differ by up to 2 %; hence the extended precision. Variants: other CSFs; no masking.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    preserved = []
    for s in (s1, s2):
        low, high = np.minimum(s.contrast, f.contrast), np.maximum(s.contrast, f.contrast)
        preserved.append(np.divide(low, high, out=np.ones(f.shape), where=high > 0))
    c1, c2 = s1.contrast**2, s2.contrast**2
    share = np.divide(c1, c1 + c2, out=np.full(f.shape, 0.5), where=c1 + c2 > 0)
    return float((share * preserved[0] + (1 - share) * preserved[1]).mean())


def qcv(fused: Image, source1: Image, source2: Image) -> float:
    """Perceived error ↓: Σ saliency·D over Σ saliency, both sources, 16x16 blocks; >= 0.

    Chen, Varshney 2007 with Z. Liu's constants: D is the block's mean squared CSF-filtered
    difference, saliency the sum of its Sobel magnitudes to the 5th; 0 where no source has any
    edge. Variants: unfiltered difference; other block sizes.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    error, weight = 0.0, 0.0
    for s in (s1, s2):
        error += float((s.saliency * f.paired_with(s).filtered_error).sum()) / 16**2
        weight += float(s.saliency.sum())
    return error / weight if weight > 0 else 0.0


def qncie(fused: Image, source1: Image, source2: Image) -> float:
    """Nonlinear correlation information entropy ↑: 1 + Σ (λ/3) log256(λ/3), 0..1.

    Wang, Shen, Jin 2008: λ are the eigenvalues of the matrix of I/8 of the three image pairs with
    ones on its diagonal. Moves in the third decimal. Variants: rank-based bins; base 2.
    """
    f, s1, s2 = luma_triple(fused, source1, source2)
    pairs = s1.paired_with(s2), f.paired_with(s1), f.paired_with(s2)
    a, b, c = (pair.information / 8 for pair in pairs)
    share = np.linalg.eigvalsh([[1, a, b], [a, 1, c], [b, c, 1]]) / 3
    return 1 + float(share @ np.log2(np.maximum(share, TINY))) / 8


METRICS = {
    "EN": Metric(en, True),
    "SD": Metric(sd, True),
    "SF": Metric(sf, True),
    "AG": Metric(ag, True),
    "EI": Metric(ei, True),
    "MI": Metric(mi, True),
    "QMI": Metric(qmi, True),
    "CE": Metric(ce, False),
    "CC": Metric(cc, True),
    "SCD": Metric(scd, True),
    "PSNR": Metric(psnr, True),
    "SSIM": Metric(ssim, True, SSIM_SIDE),
    "MS_SSIM": Metric(ms_ssim, True, MS_SSIM_SIDE),
    "VIF": Metric(vif, True, VIF_SIDES[0]),
    "VIFF": Metric(viff, True, VIF_SIDES[0]),
    "Qabf": Metric(qabf, True),
    "Nabf": Metric(nabf, False),
    "FMI_pixel": Metric(fmi_pixel, True),
    "QCB": Metric(qcb, True),
    "QCV": Metric(qcv, False),
    "QNCIE": Metric(qncie, True),
}
PANEL = tuple(name for name in METRICS if name not in ("EI", "CE"))


def evaluate(
    fused: Image, source1: Image, source2: Image, names: Iterable[str] = PANEL
) -> dict[str, float]:
    """The named metrics of one fused image, in the order asked for.

    A metric that needs a larger image (MS_SSIM: sides of 161 pixels) is left out of the result.
    Raises UserError if a name is unknown, ValueError for the images as the metrics do.
    """
    return measure(check_names(names, METRICS), *luma_triple(fused, source1, source2))


def compare(
    files: dict[str, Path | dict[str, Path]],
    pairs: Sequence[Pair],
    jobs: int = 0,
    metrics: Sequence[str] = PANEL,
    title: str = "",
    skip_unmatched: bool = False,
) -> Comparison:
    """What `compare_methods` says of the named metrics; UserError also if a name is unknown."""
    return compare_methods(check_names(metrics, METRICS), files, pairs, jobs, title, skip_unmatched)


def compare_lumas(named: dict[str, Sample], title: str = "") -> Comparison:
    """What `compare_samples` says of the panel, in this process: after CUDA a fork would hang."""
    return compare_samples(check_names(PANEL, METRICS), named, 1, title)


# --- the command -----------------------------------------------------------------------------


def main(args: MetricArgs) -> None:
    """Compare what the command line names, print it, and write the files it asks for."""
    check_metrics(args)
    files = outputs(args)
    if args.findings:
        compare_findings(args, files)
    elif args.one_source:
        compare_own_content(args, files)
    else:
        compare_folders(args, files)


def outputs(args: MetricArgs) -> dict[str, Path]:
    """The files that a command line asks for, by what they hold; UserError as `check_outputs`."""
    names = ("csv", "json", "markdown", "latex", "plot")
    files = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    check_outputs(files)
    return files


def compare_folders(args: MetricArgs, files: dict[str, Path]) -> None:
    """The metrics of folders of fused images."""
    folders = name_folders(args.fused)
    check_method_names(folders, args.between)
    pairs, title = named_pairs(args)
    names = args.metrics or PANEL
    result = compare(folders, pairs, args.jobs, names, title, args.skip_unmatched)
    result = result.with_people(known_people(args, pairs))
    rows = differences(result, *args.between, args.seed) if args.between else []
    write_files(result, files, args.rank, rows, args.between)
    print_table(result, args.rank)
    if rows:
        print_differences(result, rows, args.between)


def compare_own_content(args: MetricArgs, files: dict[str, Path]) -> None:
    """What folders of fused images keep of what only one source shows."""
    folders = name_folders(args.fused)
    check_method_names(folders, args.between)
    pairs, title = named_pairs(args)
    found, pairs = complete_pairs(folders, pairs, args.skip_unmatched)
    if args.maps:
        own_content.check_maps(args.maps, found, pairs)
    modalities = (TASKS[args.task], "MRI") if title else ("source 1", "source 2")
    result = own_content.compare_one_source(found, pairs, args.jobs, title)
    result = result.with_people(known_people(args, pairs))
    if title == "CT-MRI" or not (title or own_content.shows_colour(result)):
        result = own_content.without_uptake(result)
    rows = differences(result, *args.between, args.seed) if args.between else []
    own_content.write_one_source(result, files, modalities, args.seed, rows, args.between)
    if args.maps:
        own_content.write_maps(args.maps, found, pairs, modalities)
    own_content.print_one_source(result, modalities, list(folders), args.seed)
    for method in folders if args.per_person else ():
        print(own_content.person_table(result, modalities, method))
    if rows:
        print_differences(result, rows, args.between)


def compare_findings(args: MetricArgs, files: dict[str, Path]) -> None:
    """What methods that can be run keep of planted findings."""
    if others := files.keys() - {"csv", "plot"}:
        raise UserError(f"--findings writes --csv and --plot, not --{min(others)}")
    pairs, title = named_pairs(args)
    methods = methods_of(args)
    results = {
        name: planted.measure_findings(fuse, pairs, args.seed, name)
        for name, fuse in methods.items()
    }
    who = known_people(args, pairs)
    own = {pair.name: pair.name for pair in pairs}
    summaries = {
        name: planted.summary(found, args.task, who or own, args.seed)
        for name, found in results.items()
    }
    makers = {
        "csv": lambda _: planted.to_csv(results, args.task),
        "plot": lambda path: planted.plot(
            results, methods, pairs, args.task, path.suffix.lstrip(".")
        ),
    }
    write_made(files, makers)
    where = images_and_people(len(pairs), "pairs", who.values())
    print(f"{title}: findings planted into {where}".lstrip(": "))
    print(aligned(planted.table_lines(summaries)))


def methods_of(args: MetricArgs) -> dict[str, Method]:
    """Ours, the trivial fusions, and what --method names, by name."""
    model, _ = load_weights(args.weights or shipped_path(args.size, args.task))
    model = optimise(model)
    methods: dict[str, Method] = {"ours": lambda a, b: model.fuse(a, b).numpy()}
    methods |= trivial_methods()
    for text in args.method:
        name, method = named_method(text, methods)
        methods[name] = method
    return methods


def named_pairs(args: MetricArgs) -> tuple[list[Pair], str]:
    """The pairs of sources that a command line names, and the title of their table.

    Raises UserError if only one of --dir1 and --dir2 is given, or a folder does not fit.
    """
    if (args.dir1 is None) != (args.dir2 is None):
        raise UserError("--dir1 and --dir2 come together, only one was given")
    if args.dir1:
        return as_told(match_pairs(args.dir1, args.dir2, args.skip_unmatched), args.levels), ""
    how = args.skip_unmatched, args.cases, args.case_pattern
    pairs = task_pairs(args.data_dir, args.task, args.split, *how)
    return as_told(pairs, args.levels), args.task


def known_people(args: MetricArgs, pairs: list[Pair]) -> dict[str, str]:
    """The person of each pair by its name; empty where nobody says who is who.

    In the data set people.csv says it. In folders of yours the names do, by --case_pattern.
    """
    told = args.case_pattern != CASE_PATTERN
    if args.dir1 and not told:
        return {}
    try:
        cases = {pair.name: case_of(pair, args.case_pattern) for pair in pairs}
    except UserError:
        if told:
            raise
        return {}  # other images in the data folder, of other names
    listed = {} if args.dir1 else people(args.data_dir)
    return {name: listed.get((args.task, case), case) for name, case in cases.items()}


if __name__ == "__main__":
    run_script(main, ARGS)
