"""Time and memory of a forward pass against the direct einsum version kept in tests/.

    python benchmarks/forward.py            (on an otherwise idle machine; a few minutes)
    python benchmarks/forward.py --DEVICE cuda --json forward.json     (throughput.py)

On a CPU every version has a process of its own, and they take turns: `direct` with the library's
defaults, ours as test_asfe.py runs it, with subnormal numbers as zero, freed memory kept and MKL's
buffers first, and `direct` once more with these three. Beside each pass the machine's float32
matrix rate is measured, because a shared machine changes its speed within seconds. The arithmetic
floor is the forward's operations divided by that rate. Peak memory is the largest resident set of
the process over all of its passes.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from direct import direct  # noqa: E402
from machine import machine  # noqa: E402

from args_setting import TestArgs, run_script  # noqa: E402
from network import ASFEFusion, keep_freed_memory, start  # noqa: E402

VERSIONS = (
    ("paper", "direct"),
    ("paper", "ours"),
    ("compact", "ours"),
    ("paper", "direct, run as ours"),
)
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
def serve(size: str, version: str) -> None:
    """Build a network; then, for each side that comes in, fuse a pair: seconds and peak GB."""
    if version != "direct":
        start(TestArgs(DEVICE="cpu"))  # before anything that has threads
    torch.manual_seed(0)
    model = ASFEFusion(size).eval()
    if version != "ours":
        direct(model, share=True)
    if version != "direct":
        keep_freed_memory(model)
    for line in sys.stdin:
        images = torch.rand(2, 1, 1, int(line), int(line))
        begin = time.perf_counter()
        if int(line):
            model(*images)
        seconds = time.perf_counter() - begin
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)


class Version:
    """A process of `serve`."""

    def __init__(self, size: str, version: str):
        command = [sys.executable, __file__, "--only", size, version]
        self.name, self.seconds, self.gb = f"{size} {version}", [], 0.0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> "Version":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()

    def fuse(self, side: int) -> float:
        """Seconds of a pass; side 0 makes none."""
        self.process.stdin.write(f"{side}\n")
        seconds, self.gb = map(float, self.process.stdout.readline().split())
        return seconds


def take_turns(versions: list[Version], repeats: int) -> list[float]:
    """Fill in `seconds` of each; returns how many times the floor ours in the paper size took."""
    floors = []
    for version in versions:
        version.fuse(256)  # the first pass allocates
    for _ in range(repeats):
        rates = [matrix_rate()]
        for version in versions:
            version.seconds.append(version.fuse(256))
            rates.append(matrix_rate())
        floors.append(versions[1].seconds[-1] / (GFLOP / statistics.mean(rates[1:3])))
        taken = (f"{version.seconds[-1]:.3f}" for version in versions)
        print(*taken, *(f"{rate:.0f}" for rate in rates), flush=True)
    return floors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # a process of `Version`
    parser.add_argument("--DEVICE", default="cpu")
    args, others = parser.parse_known_args()
    if args.DEVICE != "cpu":
        import throughput  # here, as its imports would count as memory of a pass on a CPU

        others += ["--DEVICE", args.DEVICE, "--repeats", str(args.repeats)]
        run_script(throughput.main, throughput.parse(others))
        return
    if others:
        parser.error(f"unrecognised on a CPU: {' '.join(others)}")
    if args.only:
        serve(*args.only)
        return

    print(machine("torch"), "\n")
    with Version(*VERSIONS[1]) as large:
        large.fuse(0)
        loaded = large.gb
        large.fuse(1024)
    base, ours, *_ = versions = [Version(*name) for name in VERSIONS]
    with ExitStack() as stack:
        for version in versions:
            stack.enter_context(version)
        floors = take_turns(versions, args.repeats)
        print("\n| 256x256 pair | median s | times faster | peak GB | of direct |")
        print("|---|---|---|---|---|")
        for v in versions:
            median = statistics.median(v.seconds)
            faster = statistics.median(base.seconds) / median
            share = v.gb / base.gb
            print(f"| {v.name} | {median:.2f} | {faster:.1f} | {v.gb:.2f} | {share:.0%} |")
        rounds = [b / o for b, o in zip(base.seconds, ours.seconds, strict=True)]
    print(f"\nours, paper size: {min(rounds):.1f} to {max(rounds):.1f} times faster in a round")
    print(f"ours, paper size: {statistics.median(floors):.2f} times the arithmetic floor")
    print(f"ours, paper size: {loaded:.2f} GB before a pass, {large.gb:.2f} GB at 1024x1024")


if __name__ == "__main__":
    main()
