"""Time and memory of a forward pass against the direct einsum version kept in tests/.

    python benchmarks/forward.py            (on an otherwise idle machine; a few minutes)
    python benchmarks/forward.py --DEVICE cuda --json forward.json     (throughput.py)

On a CPU both versions have the same weights and take turns in one process; beside each pair of
runs the machine's float32 matrix rate is measured, because a shared machine changes its speed
within seconds. The arithmetic floor is the forward's operations divided by that rate. Peak memory
is the resident set of a process of its own that loads the model and runs once.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import throughput  # noqa: E402
import torch  # noqa: E402
from direct import direct  # noqa: E402
from machine import machine  # noqa: E402

from args_setting import run_script  # noqa: E402
from network import ASFEFusion  # noqa: E402

GFLOP = 223  # of a 256 x 256 pair in the paper size, nearly all of it matrix products


def matrix_rate(side: int = 2048, repeats: int = 4) -> float:
    """Best float32 matrix product rate of a few, in GFLOP/s."""
    a, b = torch.randn(2, side, side)
    out = a @ b
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e9


@torch.no_grad()
def seconds(model: torch.nn.Module, side: int) -> float:
    img1, img2 = torch.rand(2, 1, 1, side, side)
    start = time.perf_counter()
    model(img1, img2)
    return time.perf_counter() - start


def build(size: str, version: str) -> ASFEFusion:
    torch.manual_seed(0)
    model = ASFEFusion(size).eval()
    return direct(model, share=True) if version == "direct" else model


def peak_memory(size: str, version: str, side: int) -> float:
    """GB resident at most, of a process that builds the model and, unless side is 0, runs once."""
    command = [sys.executable, __file__, "--only", size, version, str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)  # a process of `peak_memory`
    parser.add_argument("--DEVICE", default="cpu")
    args, others = parser.parse_known_args()
    if args.DEVICE != "cpu":
        others += ["--DEVICE", args.DEVICE, "--repeats", str(args.repeats)]
        run_script(throughput.main, throughput.parse(others))
        return
    if others:
        parser.error(f"unrecognised on a CPU: {' '.join(others)}")
    if args.only:
        size, version, side = args.only
        model = build(size, version)
        if int(side):
            seconds(model, int(side))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return

    print(machine("torch"), "\n")
    memory = {
        (size, version): peak_memory(size, version, 256)
        for size, version in (("paper", "direct"), ("paper", "ours"), ("compact", "ours"))
    }
    loaded, large = peak_memory("paper", "ours", 0), peak_memory("paper", "ours", 1024)
    models = {key: build(*key) for key in memory}
    times = {key: [] for key in models}
    floors = []
    for model in models.values():
        seconds(model, 256)  # the first pass allocates
    for _ in range(args.repeats):
        rates = [matrix_rate()]
        for key, model in models.items():
            times[key].append(seconds(model, 256))
            rates.append(matrix_rate())
        # the rate beside the run of ours in the paper size
        floors.append(times["paper", "ours"][-1] / (GFLOP / statistics.mean(rates[1:3])))
        print(*(f"{t[-1]:.3f}" for t in times.values()), *(f"{r:.0f}" for r in rates), flush=True)
    base = statistics.median(times["paper", "direct"])
    print("\n| 256x256 pair | median s | times faster | peak GB | of direct |")
    print("|---|---|---|---|---|")
    for key in models:
        median, gb = statistics.median(times[key]), memory[key]
        share = gb / memory["paper", "direct"]
        print(f"| {' '.join(key)} | {median:.2f} | {base / median:.1f} | {gb:.2f} | {share:.0%} |")
    print(f"\nours, paper size: {statistics.median(floors):.2f} times the arithmetic floor")
    print(f"ours, paper size: {loaded:.2f} GB before the first run, {large:.2f} GB at 1024x1024")


if __name__ == "__main__":
    main()
