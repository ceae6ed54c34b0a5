"""Times of metrics.py: each metric, the panel, and per-image library code for the common part.

    python benchmarks/metrics.py [--data_dir HMIFDatasets --fused result/CT-MRI]

Without --fused: 24 drawn pairs of 256x256. The library side is scikit-image (entropy, MSE, SSIM),
scikit-learn (mutual information) and sewar (MS-SSIM, VIF), one call for each fused-source pair.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # the root first: this file has the name of another

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import sewar  # noqa: E402
from machine import machine  # noqa: E402
from numpy import ndarray  # noqa: E402
from skimage.measure import shannon_entropy  # noqa: E402
from skimage.metrics import mean_squared_error, structural_similarity  # noqa: E402
from sklearn.metrics import mutual_info_score  # noqa: E402

import metrics  # noqa: E402
from dataset import read_luma8, task_pairs  # noqa: E402

Triple = tuple[ndarray, ndarray, ndarray]
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


def stored_pairs(data_dir: Path, task: str, fused: Path) -> list[Triple]:
    return [
        tuple(map(read_luma8, (fused / f"{pair.name}.png", pair.path1, pair.path2)))
        for pair in task_pairs(data_dir, task, "test")
    ]


def library_calls(fused: ndarray, source1: ndarray, source2: ndarray) -> None:
    """The common part as per-image scripts compute it."""
    shannon_entropy(fused)
    for source in (source1, source2):
        mutual_info_score(source.ravel(), fused.ravel())
        mean_squared_error(source, fused)
        structural_similarity(
            source.astype(float), fused.astype(float), data_range=255, **SSIM_OPTIONS
        )
        sewar.msssim(source, fused)
        sewar.vifp(source, fused)


def panel(triple: Triple) -> dict[str, float]:
    return metrics.evaluate(*triple)


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
        list(pool.map(panel, triples[:jobs]))
        start = time.perf_counter()
        list(pool.map(panel, triples))
        return 1e3 * (time.perf_counter() - start) / len(triples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=HERE.parent / "HMIFDatasets")
    parser.add_argument("--task", default="CT-MRI")
    parser.add_argument("--fused", type=Path, help="folder of fused images; without it drawn pairs")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.fused:
        triples = stored_pairs(args.data_dir, args.task, args.fused)
    else:
        triples = drawn_pairs()
    cv2.setNumThreads(1)
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


if __name__ == "__main__":
    main()
