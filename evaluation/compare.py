"""Methods compared on the same images: values, means, ranks and paired tests.

A method is a folder of fused images. The trivial fusions of evaluation/trivial.py always take part.

Images of one person are alike, so intervals and tests are over people: a bootstrap draws people,
each with all of their images, and a test takes one difference from each person.

Sources: Demšar, JMLR 2006 (mean ranks, signed-rank test); Efron, Tibshirani 1993 (bootstrap); Holm
1979.

Legend: lumas are (H, W) uint8. A rank is 1 for the best method. Values are (images, metrics).
"""

import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy import ndarray
from scipy import stats
from tqdm import tqdm

import limits
from args_setting import TASKS
from cli import UserError, visible
from dataset import Pair, images_in
from evaluation.maps import SMALLEST_SIDE, Luma, Metric, measure
from evaluation.trivial import TRIVIAL
from images import Pixels, decode, luma8

RESAMPLES = 10_000

Files = dict[str, Path]  # fused images by the names of their pairs
T = TypeVar("T")


class Sample(NamedTuple):
    """The lumas of a pair of sources and of what each method fused of it."""

    source1: ndarray
    source2: ndarray
    fused: dict[str, ndarray]


class StoredSample(NamedTuple):
    """A pair of sources and what each method fused of it, as their files store them."""

    source1: Pixels
    source2: Pixels
    fused: dict[str, Pixels]


@dataclass(frozen=True)
class Comparison:
    """Metrics of several methods on the same images; NaN where an image has no value of one."""

    title: str
    metrics: dict[str, Metric]
    images: list[str]
    values: dict[str, ndarray]  # method -> (images, metrics)
    people: list[str] = field(default_factory=list)  # of each image; empty: each is another person

    def with_people(self, people: dict[str, str]) -> "Comparison":
        """The same, knowing the person that each image shows; unchanged if `people` is empty."""
        if not people:
            return self
        return replace(self, people=[people[image] for image in self.images])

    @property
    def persons(self) -> list[str]:
        """Who each image shows; an image of which nobody knows it stands for itself."""
        return self.people or self.images

    def mean(self, method: str) -> ndarray:
        """(metrics,) over the images that have a value, NaN where none has."""
        return means_of_rows(self.values[method])

    def means_by_person(self, method: str) -> dict[str, ndarray]:
        """person -> (metrics,) over their images, in the order in which they come."""
        persons = np.array(self.persons)
        return {
            person: means_of_rows(self.values[method][persons == person])
            for person in dict.fromkeys(self.persons)
        }

    def resampled(self, method: str, seed: int) -> ndarray:
        """(RESAMPLES, metrics) means over people drawn with replacement, the same draws each time.

        NaN where no drawn image has a value.
        """
        return resampled_means(self.values[method], self.persons, seed)

    def ranks(self) -> dict[str, ndarray]:
        """method -> (metrics,) rank among the methods, 1 the best; ties share their mean rank."""
        means = np.array([self.mean(method) for method in self.values])
        sign = np.array([1 if m.higher_is_better else -1 for m in self.metrics.values()])
        ranks = stats.rankdata(-means * sign, axis=0, nan_policy="omit")
        return dict(zip(self.values, ranks, strict=True))

    def mean_ranks(self) -> dict[str, float]:
        """method -> mean of its ranks over the metrics that have values."""
        return {m: float(r[~np.isnan(r)].mean()) for m, r in self.ranks().items()}


def means_of_rows(values: ndarray) -> ndarray:
    """(N, M) -> (M,) means over the rows that have a value, NaN where none has."""
    valid = ~np.isnan(values)
    total, count = np.where(valid, values, 0).sum(axis=0), valid.sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def resampled_means(values: ndarray, persons: Sequence[str], seed: int) -> ndarray:
    """(N, M) values of N images -> (RESAMPLES, M) means, each over as many people, drawn anew.

    A person who is drawn brings all of their images. NaN where none of them has a value, and
    everywhere if there is one person only, who cannot show how people differ.
    """
    names, who = np.unique(persons, return_inverse=True)
    if len(names) < 2:
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    valid = ~np.isnan(values)
    sums, counts = (np.zeros((len(names), values.shape[1])) for _ in range(2))
    np.add.at(sums, who, np.where(valid, values, 0))
    np.add.at(counts, who, valid)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    times = np.zeros((RESAMPLES, len(names)))  # that a person was drawn
    np.add.at(times, (np.arange(RESAMPLES)[:, None], drawn), 1)
    total, count = times @ sums, times @ counts
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def interval(drawn: ndarray) -> tuple[float, float]:
    """The 95 % interval of resampled means (RESAMPLES,); NaN twice without any."""
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, (2.5, 97.5)) if drawn.size else (math.nan, math.nan)
    return float(low), float(high)


# --- comparison ------------------------------------------------------------------------------


def compare_methods(
    metrics: dict[str, Metric],
    files: dict[str, Path | Files],
    pairs: Sequence[Pair],
    jobs: int = 0,
    title: str = "",
    skip_unmatched: bool = False,
) -> Comparison:
    """Evaluate the fused images of each method; `jobs` processes, 0: one for each core.

    `files` and `skip_unmatched` as in `complete_pairs`.

    Raises:
        UserError: as there, or a file cannot be read, sizes differ, or every image is too small for
            every metric.
    """
    found, pairs = complete_pairs(files, pairs, skip_unmatched)
    samples = read_samples(pairs, found)
    named = dict(zip((pair.name for pair in pairs), samples, strict=True))
    return compare_samples(metrics, named, jobs, title)


def compare_samples(
    metrics: dict[str, Metric], named: dict[str, Sample], jobs: int = 0, title: str = ""
) -> Comparison:
    """Evaluate lumas by the names of the images; `jobs` as in `compare_methods`.

    Raises UserError if every image is too small for every metric.
    """
    work = partial(evaluate_sample, metrics=metrics)
    rows = in_processes(work, list(named.values()), jobs, title)
    values = {method: np.array([row[method] for row in rows]) for method in rows[0]}
    if all(np.isnan(v).all() for v in values.values()):
        raise UserError(f"the images are too small for {', '.join(metrics)}")
    return Comparison(title, metrics, list(named), values)


def in_processes(work: Callable[[T], dict], items: Sequence[T], jobs: int, title: str) -> list:
    """`work` of each item, in this order, in `jobs` processes (0: one for each granted core)."""
    jobs = min(jobs or limits.granted_cores(), len(items))
    bar = {"total": len(items), "desc": title, "unit": "pair", "leave": False, "disable": None}
    with OPENCV_ON_ONE_THREAD:  # the cores share out the pairs, not the rows of one image
        if jobs == 1:
            return list(tqdm(map(work, items), **bar))
        with ProcessPoolExecutor(jobs, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
            return list(tqdm(pool.map(work, items), **bar))


class OneThread:
    """OpenCV on one thread inside of `with`, on as many as before after it.

    OpenCV has one such number for the whole process, and several threads may be inside at once: the
    first to enter notes the number, the last to leave restores it. If a process is forked while
    OpenCV has more threads, the new process crashes when it sets the number. So fork inside, too.
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


def complete_pairs(
    files: dict[str, Path | Files], pairs: Sequence[Pair], skip_unmatched: bool
) -> tuple[dict[str, Files], list[Pair]]:
    """The files of each method, and the pairs of which every method has one.

    `files` gives each method a folder, whose images belong to the pairs of their names, or the
    files themselves. An image that no pair has is left out, with a note on stderr. With
    `skip_unmatched` so is a pair that a method lacks, for all methods.

    Raises:
        UserError: a method has a trivial fusion's name, its folder cannot be read or lacks an
            image, or no pair is left.
    """
    check_method_names(files)
    found = {m: f if isinstance(f, dict) else images_in(f) for m, f in files.items()}
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
    return found, complete


def check_method_names(given: Iterable[str], wanted: Iterable[str] = ()) -> None:
    """UserError if a method has a trivial fusion's name, or a wanted name is neither."""
    given = list(given)
    for method in TRIVIAL.keys() & set(given):
        raise UserError(f"the name {method!r} is that of a trivial fusion, expected NAME=FOLDER")
    for method in wanted:
        if method not in (known := [*TRIVIAL, *given]):
            raise UserError(f"no method {method!r}, expected two of {', '.join(known)}")


def _note(text: str) -> None:
    print(f"note: {visible(text)}", file=sys.stderr)


def read_samples(pairs: Sequence[Pair], found: dict[str, Files]) -> list[Sample]:
    """The lumas of all pairs in 8 bits; UserError names every file whose size does not fit."""
    return [
        Sample(
            luma8(sample.source1),
            luma8(sample.source2),
            {method: luma8(pixels) for method, pixels in sample.fused.items()},
        )
        for sample in decode_samples(pairs, found)
    ]


def decode_samples(pairs: Sequence[Pair], found: dict[str, Files]) -> list[StoredSample]:
    """The stored pixels of all pairs; UserError names every file whose size does not fit."""
    samples, wrong = [], []
    for pair in pairs:
        paths = {method: images[pair.name] for method, images in found.items()}
        source1, source2 = map(decode, (pair.path1, pair.path2), pair.readings)
        fused = {method: decode(path) for method, path in paths.items()}
        if min(_sides(source1)) < SMALLEST_SIDE:
            wrong.append(f"{pair.path1} is {_size(source1)}, expected at least 3x3")
        others = zip((pair.path2, *paths.values()), (source2, *fused.values()), strict=True)
        wrong += [
            f"{path} is {_size(image)}, expected {_size(source1)} as {pair.path1}"
            for path, image in others
            if _sides(image) != _sides(source1)
        ]
        samples.append(StoredSample(source1, source2, fused))
    if wrong:
        raise UserError("; ".join(wrong))
    return samples


def _sides(image: Pixels) -> tuple[int, int]:
    return image.values.shape[:2]


def _size(image: Pixels) -> str:
    return "x".join(map(str, _sides(image)))


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
    low: float  # 95 % interval of the mean, percentiles of the bootstrap over people
    high: float
    p: float  # Wilcoxon's signed-rank test of the people's mean differences, two-sided
    p_holm: float  # the same, corrected for the number of metrics


def differences(result: Comparison, method1: str, method2: str, seed: int) -> list[Difference]:
    """Paired tests of method1 - method2, metric by metric, each over the images that have both.

    Raises UserError if the comparison has no such method.
    """
    for method in (method1, method2):
        if method not in result.values:
            raise UserError(f"no method {method!r}, expected two of {', '.join(result.values)}")
    with np.errstate(invalid="ignore"):  # PSNR may be infinite in both
        gaps = result.values[method1] - result.values[method2]
    gaps = np.where(np.isfinite(gaps), gaps, np.nan)
    paired = replace(result, values={"": gaps})
    means, drawn = paired.mean(""), paired.resampled("", seed)
    of_people = np.array(list(paired.means_by_person("").values()))
    rows = []
    for k, name in enumerate(result.metrics):
        column = of_people[:, k][~np.isnan(of_people[:, k])]
        if column.size:
            p = float(stats.wilcoxon(column).pvalue) if column.any() else 1.0
            rows.append((name, float(means[k]), *interval(drawn[:, k]), p))
    holm = _holm([row[-1] for row in rows])
    return [Difference(*row, p_holm) for row, p_holm in zip(rows, holm, strict=True)]


def _holm(p: list[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for all of them together."""
    corrected, least = [0.0] * len(p), 0.0
    for k, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - k) * p[i]))
        corrected[i] = least
    return corrected


# --- names -----------------------------------------------------------------------------------


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
