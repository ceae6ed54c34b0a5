"""Times of the metrics: each one, the panel, and per-image library code for the common part.

    python benchmarks/metric_times.py                              24 drawn pairs of 256x256
    python benchmarks/metric_times.py --fused result/CT-MRI        fused test images of --task

The library side is scikit-image (entropy, MSE, SSIM), scikit-learn (mutual information) and sewar
(MS-SSIM, VIF), one call for each fused-source pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import sewar
from machine import machine, make_parser, positive
from numpy import ndarray
from skimage.measure import shannon_entropy
from skimage.metrics import mean_squared_error, structural_similarity
from sklearn.metrics import mutual_info_score

import metrics
from args_setting import DATA_DIR, TASKS
from cli import run_script
from dataset import task_pairs
from evaluation.compare import read_samples

Triple = tuple[ndarray, ndarray, ndarray]  # fused, source 1, source 2
COMMON = ("EN", "MI", "PSNR", "SSIM", "MS_SSIM", "VIF")
SSIM_OPTIONS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def drawn_pairs(count: int = 24, side: int = 256) -> list[Triple]:
    """Textured ellipses on black, a third of the image empty, as a head in its slice."""
    rng, pairs = np.random.default_rng(0), []
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    head = (x / 0.8) ** 2 + (y / 0.95) ** 2 < 1
    for _ in range(count):
        images = []
        for sigma in (1.0, 3.0):
            image = cv2.GaussianBlur(rng.standard_normal((side, side)), (0, 0), sigma)
            image = 255 * (image - image.min()) / np.ptp(image)
            images.append(np.where(head, np.rint(image), 0).astype(np.uint8))
        fused = np.rint(0.6 * np.maximum(*images) + 0.4 * images[0]).astype(np.uint8)
        pairs.append((fused, *images))
    return pairs


def stored_pairs(data_dir: Path, task: str, folder: Path) -> list[Triple]:
    """The fused images of a folder with their sources."""
    pairs = task_pairs(data_dir, task, "test")
    samples = read_samples(pairs, {"": {pair.name: folder / f"{pair.name}.png" for pair in pairs}})
    return [(sample.fused[""], sample.source1, sample.source2) for sample in samples]


def library_calls(fused: ndarray, source1: ndarray, source2: ndarray) -> None:
    """The common part as per-image scripts compute it."""
    shannon_entropy(fused)
    for source in (source1, source2):
        mutual_info_score(source.ravel(), fused.ravel())
        mean_squared_error(source, fused)
        images = source.astype(float), fused.astype(float)
        structural_similarity(*images, data_range=255, **SSIM_OPTIONS)
        sewar.msssim(source, fused)
        sewar.vifp(source, fused)


def milliseconds(function: Callable, triples: list[Triple]) -> tuple[float, float]:
    """Median wall and CPU time of `function(*triple)`."""
    function(*triples[0])
    wall, cpu = [], []
    for triple in triples:
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        function(*triple)
        wall.append(1e3 * (time.perf_counter() - start_wall))
        cpu.append(1e3 * (time.process_time() - start_cpu))
    return statistics.median(wall), statistics.median(cpu)


def pooled_milliseconds(triples: list[Triple], jobs: int) -> float:
    """Wall time of the panel per pair with `jobs` processes that are already up."""
    with ProcessPoolExecutor(jobs, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        list(pool.map(metrics.evaluate, *zip(*triples[:jobs], strict=True)))
        start = time.perf_counter()
        list(pool.map(metrics.evaluate, *zip(*triples, strict=True)))
        return 1e3 * (time.perf_counter() - start) / len(triples)


def main(args: argparse.Namespace) -> None:
    stored = (args.data_dir, args.task, args.fused)
    triples = stored_pairs(*stored) if args.fused else drawn_pairs()
    triples = triples[: args.pairs]
    cv2.setNumThreads(1)  # also before the fork of other processes
    print(machine("numpy", "scipy", "scikit-image", "scikit-learn", "sewar"))
    print(f"{len(triples)} pairs; ms per pair, median\n\n{'':12}{'wall':>8}{'CPU':>8}")

    def line(name: str, function: Callable) -> float:
        wall, cpu = milliseconds(function, triples)
        print(f"{name:12}{wall:8.1f}{cpu:8.1f}", flush=True)
        return wall

    for name in metrics.PANEL:
        line(name, metrics.METRICS[name].function)
    print()
    whole = line("panel", metrics.evaluate)
    line("common part", lambda *triple: metrics.evaluate(*triple, COMMON))
    libraries = line("libraries", library_calls)
    pooled = pooled_milliseconds(triples, args.jobs)
    print(f"\npanel with --jobs {args.jobs}: {pooled:.1f} ms per pair (wall, {len(triples)} pairs)")
    print(f"panel / libraries' common part, one process each: {whole / libraries:.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--fused", type=Path, help="folder of fused images; without it drawn pairs")
    parser.add_argument("--task", default="CT-MRI", choices=tuple(TASKS))
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    parser.add_argument("--pairs", type=positive, default=24, help="at most so many")
    parser.add_argument("--jobs", type=positive, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
