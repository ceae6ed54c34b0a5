"""Methods compared on the same images: values, means, ranks and paired tests.

A method is a folder of fused images. The trivial fusions of evaluation/trivial.py always take part.
Sources: Demšar, JMLR 2006 (mean ranks, signed-rank test); Efron, Tibshirani 1993 (bootstrap); Holm
1979.

Legend: lumas are (H, W) uint8. A rank is 1 for the best method. Values are (images, metrics).
"""

import math
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray
from scipy import stats
from tqdm import tqdm

from args_setting import TASKS, MetricArgs
from cli import UserError, visible
from dataset import Pair, as_told, images_in, match_pairs, task_pairs
from evaluation.maps import SMALLEST_SIDE, Luma, Metric, measure
from evaluation.trivial import TRIVIAL
from images import read_luma8

RESAMPLES = 10_000


class Sample(NamedTuple):
    """The lumas of a pair of sources and of what each method fused of it."""

    source1: ndarray
    source2: ndarray
    fused: dict[str, ndarray]


@dataclass(frozen=True)
class Comparison:
    """Metrics of several methods on the same images; NaN where an image is too small for one."""

    title: str
    metrics: dict[str, Metric]
    images: list[str]
    values: dict[str, ndarray]  # method -> (images, metrics)

    def mean(self, method: str) -> ndarray:
        """(metrics,) over the images that have a value, NaN where none has."""
        valid = ~np.isnan(self.values[method])
        total = np.where(valid, self.values[method], 0).sum(axis=0)
        count = valid.sum(axis=0)
        return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)

    def ranks(self) -> dict[str, ndarray]:
        """method -> (metrics,) rank among the methods, 1 the best; ties share their mean rank."""
        means = np.array([self.mean(method) for method in self.values])
        sign = np.array([1 if m.higher_is_better else -1 for m in self.metrics.values()])
        ranks = stats.rankdata(-means * sign, axis=0, nan_policy="omit")
        return dict(zip(self.values, ranks, strict=True))

    def mean_ranks(self) -> dict[str, float]:
        """method -> mean of its ranks over the metrics that have values."""
        return {m: float(r[~np.isnan(r)].mean()) for m, r in self.ranks().items()}


# --- comparison ------------------------------------------------------------------------------


def compare_methods(
    metrics: dict[str, Metric],
    files: dict[str, Path | dict[str, Path]],
    pairs: Sequence[Pair],
    jobs: int = 0,
    title: str = "",
    skip_unmatched: bool = False,
) -> Comparison:
    """Evaluate the fused images of each method; `jobs` processes, 0: one for each core.

    `files` gives each method a folder, whose images belong to the pairs of their names, or the
    files themselves by the names of their pairs. All methods are judged on the same images. An
    image that no pair has is left out, with a note on stderr. With `skip_unmatched` so is a pair
    that a method lacks, for all methods.

    Raises:
        UserError: a method has a trivial fusion's name or lacks an image, a folder or file cannot
            be read, sizes differ, or every image is too small for every metric.
    """
    for method in files.keys() & TRIVIAL.keys():
        raise UserError(f"the name {method!r} is that of a trivial fusion, expected NAME=FOLDER")
    found = {m: f if isinstance(f, dict) else images_in(f) for m, f in files.items()}
    pairs = _complete_pairs(found, files, pairs, skip_unmatched)
    samples = read_samples(pairs, found)
    named = dict(zip((pair.name for pair in pairs), samples, strict=True))
    return compare_samples(metrics, named, jobs, title)


def compare_samples(
    metrics: dict[str, Metric], named: dict[str, Sample], jobs: int = 0, title: str = ""
) -> Comparison:
    """Evaluate what is at hand, by the names of the images; `jobs` and the rest as above.

    Raises UserError if every image is too small for every metric.
    """
    samples = list(named.values())
    work = partial(evaluate_sample, metrics=metrics)
    jobs = min(jobs or os.cpu_count() or 1, len(samples))
    bar = {"total": len(samples), "desc": title, "unit": "pair", "leave": False, "disable": None}
    with OPENCV_ON_ONE_THREAD:  # the cores share out the pairs, not the rows of one image
        if jobs == 1:
            rows = list(tqdm(map(work, samples), **bar))
        else:
            with ProcessPoolExecutor(jobs, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
                rows = list(tqdm(pool.map(work, samples), **bar))
    values = {method: np.array([row[method] for row in rows]) for method in rows[0]}
    if all(np.isnan(v).all() for v in values.values()):
        raise UserError(f"the images are too small for {', '.join(metrics)}")
    return Comparison(title, metrics, list(named), values)


class OneThread:
    """OpenCV on one thread inside of `with`, on as many as before after it.

    OpenCV has one such number for the whole process, and several threads may be inside at once: the
    first to enter notes the number, the last to leave restores it. A process that is forked while
    OpenCV has more threads crashes when it sets the number, so fork inside, too.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.inside, self.former = 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.former = cv2.getNumThreads()
                cv2.setNumThreads(1)
            self.inside += 1

    def __exit__(self, *_) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                cv2.setNumThreads(self.former)


OPENCV_ON_ONE_THREAD = OneThread()


def _complete_pairs(
    found: dict[str, dict[str, Path]],
    files: dict[str, Path | dict[str, Path]],
    pairs: Sequence[Pair],
    skip_unmatched: bool,
) -> list[Pair]:
    """The pairs of which every method has an image; UserError if one is left out unasked."""
    names, lacking = {pair.name for pair in pairs}, []
    for method, images in found.items():
        if extra := sorted(images.keys() - names):
            _note(f"{files[method]}: no sources for {', '.join(extra)}; left out")
        if missing := sorted(names - images.keys()):
            lacking.append(f"{files[method]} lacks {', '.join(missing)}")
    if lacking and not skip_unmatched:
        raise UserError(f"{'; '.join(lacking)} (--skip-unmatched compares without them)")
    if lacking:
        _note(f"{'; '.join(lacking)}; left out for every method")
    complete = [pair for pair in pairs if all(pair.name in images for images in found.values())]
    if not complete:
        raise UserError("no pair of sources has a fused image in every folder")
    return complete


def _note(text: str) -> None:
    print(f"note: {visible(text)}", file=sys.stderr)


def read_samples(pairs: Sequence[Pair], found: dict[str, dict[str, Path]]) -> list[Sample]:
    """The lumas of all pairs; UserError names every file whose size does not fit."""
    samples, wrong = [], []
    for pair in pairs:
        paths = {method: images[pair.name] for method, images in found.items()}
        source1, source2 = map(read_luma8, (pair.path1, pair.path2), pair.readings)
        fused = {method: read_luma8(path) for method, path in paths.items()}
        if min(source1.shape) < SMALLEST_SIDE:
            wrong.append(f"{pair.path1} is {_size(source1)}, expected at least 3x3")
        others = zip((pair.path2, *paths.values()), (source2, *fused.values()), strict=True)
        for path, image in others:
            if image.shape != source1.shape:
                sizes = _size(image), _size(source1)
                wrong.append(f"{path} is {sizes[0]}, expected {sizes[1]} as {pair.path1}")
        samples.append(Sample(source1, source2, fused))
    if wrong:
        raise UserError("; ".join(wrong))
    return samples


def _size(image: ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def evaluate_sample(sample: Sample, metrics: dict[str, Metric]) -> dict[str, list[float]]:
    """method -> value of each metric, the trivial fusions first; NaN for what needs more pixels."""
    trivial = {m: combine(sample.source1, sample.source2) for m, combine in TRIVIAL.items()}
    sources = Luma(sample.source1), Luma(sample.source2)  # their maps serve every method
    rows = {}
    for method, image in (trivial | sample.fused).items():
        values = measure(metrics, Luma(image), *sources)
        rows[method] = [values.get(name, math.nan) for name in metrics]
    return rows


# --- paired tests ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What a method has more than another in one metric, paired by image."""

    metric: str
    mean: float
    low: float  # 95 % interval of the mean, percentiles of the bootstrap
    high: float
    p: float  # Wilcoxon's signed-rank test, two-sided
    p_holm: float  # the same, corrected for the number of metrics


def differences(result: Comparison, method1: str, method2: str, seed: int) -> list[Difference]:
    """Paired tests of method1 - method2, metric by metric, each over the images that have both.

    Raises UserError if the comparison has no such method.
    """
    for method in (method1, method2):
        if method not in result.values:
            raise UserError(f"no method {method!r}, expected two of {', '.join(result.values)}")
    rng, rows = np.random.default_rng(seed), []
    with np.errstate(invalid="ignore"):  # PSNR may be infinite in both
        gaps = result.values[method1] - result.values[method2]
    for name, column in zip(result.metrics, gaps.T, strict=True):
        column = column[np.isfinite(column)]
        if not column.size:
            continue
        drawn = column[rng.integers(column.size, size=(RESAMPLES, column.size))].mean(axis=1)
        low, high = np.percentile(drawn, (2.5, 97.5))
        p = float(stats.wilcoxon(column).pvalue) if column.any() else 1.0
        rows.append((name, float(column.mean()), float(low), float(high), p))
    holm = _holm([row[-1] for row in rows])
    return [Difference(*row, p_holm) for row, p_holm in zip(rows, holm, strict=True)]


def _holm(p: list[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for all of them together."""
    corrected, least = [0.0] * len(p), 0.0
    for k, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - k) * p[i]))
        corrected[i] = least
    return corrected


# --- what a command names --------------------------------------------------------------------


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


def name_folders(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER as it says; else the last part of the path that is not a task's name.

    Raises UserError if none is given, one has no name, or two have the same.
    """
    if not given:
        raise UserError("--fused names no folder, expected at least one")
    folders: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).exists():
            folder, parts = text, Path(text).resolve().parts
            name = parts[-2] if parts[-1] in TASKS else parts[-1]
        if not name:
            raise UserError(f"{text} has no name, expected NAME=FOLDER")
        if name in folders:
            raise UserError(
                f"{folder} and {folders[name]} would both be named {name!r}, expected NAME=FOLDER"
            )
        folders[name] = Path(folder)
    return folders
