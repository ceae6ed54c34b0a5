"""Time of ONNX Runtime beside PyTorch on the CPU, in one process, turn by turn.

    python benchmarks/onnx_cpu.py --threads 2

Both have the same weights, threads and 256x256 pair. The ratio is taken within each round, since a
shared machine changes its speed within seconds.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from machine import machine  # noqa: E402

from export_onnx import export, open_session  # noqa: E402
from network import load_weights  # noqa: E402


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", type=int, nargs="+", default=[256])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine("torch", "onnxruntime"))
    print("load average:", *(f"{load:.1f}" for load in os.getloadavg()))
    model, _ = load_weights(ROOT / "model_pre" / "compact_CT-MRI.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "compact.onnx", {})
        session = open_session(Path(folder) / "compact.onnx", args.threads)
    for side in args.sides:
        img1, img2 = torch.rand(2, 1, 1, side, side)
        pair = {"img1": img1.numpy(), "img2": img2.numpy()}
        seconds(model.fuse, img1, img2), seconds(session.run, None, pair)  # the first allocates
        rounds = [
            (seconds(model.fuse, img1, img2), seconds(session.run, None, pair))
            for _ in range(args.repeats)
        ]
        torch_s, onnx_s = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(b / a for a, b in rounds)
        print(
            f"{side}x{side}: PyTorch {torch_s:.2f} s, ONNX Runtime {onnx_s:.2f} s; ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
