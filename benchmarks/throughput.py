"""Inference on a device against the direct einsum version kept in tests/; of forward.py --DEVICE.

For both sizes and each arithmetic: pairs per second and peak memory at the batch sizes, and of what
`test_asfe.py` runs (float32, through `fuse`) a volume of slices in seconds. The largest image is
the largest square that one forward pass takes, found by doubling and then in steps of an eighth.
The share of the matrix rate counts the operations of the direct version's products.
"""

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
# the root first: metrics.py is there and here
sys.path[:1] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]

import torch  # noqa: E402
from direct import direct  # noqa: E402
from timing import (  # noqa: E402
    PRECISIONS,
    describe_device,
    failure,
    matrix_rates,
    measure,
    set_arithmetic,
    wait,
    write_json,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import mixing  # noqa: E402
from args_setting import run_script  # noqa: E402
from network import ASFEFusion, pick_device  # noqa: E402


def build(size: str, version: str, device: torch.device) -> ASFEFusion:
    torch.manual_seed(0)
    model = ASFEFusion(size).eval()
    return (direct(model, share=True) if version == "direct" else model).to(device)


@torch.no_grad()
def forward(model: ASFEFusion, images: torch.Tensor, precision: str) -> torch.Tensor:
    with set_arithmetic(images.device, precision):
        return model(*images)


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pairs_per_second(
    size: str, version: str, device: torch.device, args: argparse.Namespace
) -> dict[str, dict]:
    """Figures by batch and arithmetic."""
    model = build(size, version, device)
    found = {}
    for batch in args.batches:
        images = torch.rand(2, batch, 1, args.side, args.side, device=device)
        for precision in PRECISIONS:
            clear(device)
            run = partial(forward, model, images, precision)
            try:
                entry = measure(run, device, args.repeats)
                entry["pairs_per_s"] = 1e3 * batch / entry["ms"]
                text = f"{entry['pairs_per_s']:9.1f} pairs/s {entry['ms']:9.2f} ms"
            except RuntimeError as error:
                entry = {"refused": failure(error)}
                text = entry["refused"]
            found[f"batch {batch}, {precision}"] = entry
            print(f"{size:8} {version:7} batch {batch:2} {precision} {text}", flush=True)
    return found


def operations(size: str, device: torch.device, side: int) -> float:
    """TFLOP of the direct version's products for one pair."""
    model = build(size, "direct", device)
    with FlopCounterMode(display=False) as counter:
        forward(model, torch.rand(2, 1, 1, side, side, device=device), "fp32")
    return counter.get_total_flops() / 1e12


def largest_side(
    size: str, version: str, precision: str, device: torch.device, args: argparse.Namespace
) -> dict:
    """The largest square that goes through, and why the next did not."""
    try:
        model = build(size, version, device)
    except RuntimeError as error:  # what an index too large has broken stays so
        return {"side": None, "refused": failure(error)}
    end = time.perf_counter() + args.seconds
    best: dict = {"side": None, "seconds": None}

    def fits(side: int) -> bool:
        try:
            clear(device)
            start = time.perf_counter()
            images = torch.rand(2, 1, 1, side, side, device=device)
            out = forward(model, images, precision)
            wait(device)
            seconds = time.perf_counter() - start
            if not torch.isfinite(out).all():
                raise ValueError("values that are not finite")
        except (RuntimeError, ValueError) as error:  # also: more elements than an index counts
            best.update(refused_side=side, refused=failure(error))
            return False
        best.update(side=side, seconds=seconds)
        return True

    side = args.side
    while side <= args.largest and time.perf_counter() < end and fits(side):
        side *= 2
    step = max(model.multiple, side // 16 // model.multiple * model.multiple)
    side = side // 2 + step
    while side <= args.largest and time.perf_counter() < end and best["side"] and fits(side):
        side += step
    if time.perf_counter() >= end or side > args.largest:
        best["stopped"] = f"after {args.seconds} s or at {args.largest}"
    print(f"{size:8} {version:7} {precision} largest: {best}", flush=True)
    return best


def volume_seconds(size: str, precision: str, device: torch.device, args: argparse.Namespace):
    """Seconds for a volume of 8-bit slices in batches through `fuse`, transfers included."""
    model = build(size, "ours", device)
    generator = torch.Generator().manual_seed(0)
    shape = (args.slices, 1, args.volume_side, args.volume_side)
    volumes = [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in "12"]
    fused = torch.empty(shape, dtype=torch.uint8)

    def run(count: int) -> None:
        for i in range(0, count, args.volume_batch):
            part = slice(i, min(i + args.volume_batch, count))
            with set_arithmetic(device, precision):
                out = model.fuse(volumes[0][part], volumes[1][part])
            fused[part] = (out * 255).round().byte().cpu()

    clear(device)
    try:
        run(args.volume_batch)  # the first pass allocates
        start = time.perf_counter()
        run(args.slices)
        seconds = time.perf_counter() - start
    except RuntimeError as error:
        return {"refused": failure(error)}
    print(f"{size:8} {precision} volume {shape[0]}x{shape[2]}x{shape[3]}: {seconds:.2f} s")
    return {"s": seconds, "slices_per_s": args.slices / seconds}


def size_figures(size: str, document: dict, device: torch.device, args: argparse.Namespace) -> None:
    """Fill the document, and write it as it grows: the next figure may take all the time."""
    rates = document["matrix_TFLOP_per_s"]
    found = {"TFLOP_of_a_pair": operations(size, device, args.side), "pairs": {}, "volume": {}}
    document["sizes"][size] = found
    for version in ("direct", "ours"):
        found["pairs"][version] = pairs_per_second(size, version, device, args)
        write_json(args.json, document)
    for version, entries in found["pairs"].items():
        for name, entry in entries.items():
            base = found["pairs"]["direct"].get(f"{name.split(',')[0]}, fp32", {})
            if "pairs_per_s" in entry:
                rate = found["TFLOP_of_a_pair"] * entry["pairs_per_s"]
                entry["of_matrix_rate"] = rate / rates[name.split(", ")[1]]
                if version == "ours" and "pairs_per_s" in base:
                    faster = entry["pairs_per_s"] / base["pairs_per_s"]
                    entry["times_faster_than_direct_fp32"] = faster
    for precision in PRECISIONS:
        found["volume"][precision] = volume_seconds(size, precision, device, args)
        write_json(args.json, document)


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.DEVICE)
    mixing.ATTEND_ON_CUDA = getattr(mixing, args.attend)
    about = describe_device(device)
    print(about["machine"], about.get("device", ""), "\n")
    rates = matrix_rates(device, args.matrix)
    print("matrix rate, TFLOP/s:", {name: round(rate, 2) for name, rate in rates.items()}, "\n")
    names = ("side", "slices", "volume_side", "volume_batch", "attend")
    document = {"about": about, **{name: getattr(args, name) for name in names}}
    document |= {"matrix_TFLOP_per_s": rates, "sizes": {}}
    for size in args.sizes:
        size_figures(size, document, device, args)
    # last: it goes to the limits, and may leave the device in a state in which nothing runs
    for size in args.sizes:
        largest = document["sizes"][size]["largest"] = {}
        for version, precision in (("ours", "fp32"), ("ours", "bf16"), ("direct", "fp32")):
            found = largest_side(size, version, precision, device, args)
            largest[f"{version} {precision}"] = found
            write_json(args.json, document)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--DEVICE", default="auto")
    parser.add_argument("--sizes", nargs="+", default=["paper", "compact"])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--volume_side", type=int, default=512)
    parser.add_argument("--volume_batch", type=int, default=16)
    parser.add_argument("--largest", type=int, default=16384, help="largest side to try")
    parser.add_argument("--seconds", type=float, default=30, help="for each largest image")
    attends = ("library", "split", "explicit", "tiled")
    parser.add_argument("--attend", default=mixing.ATTEND_ON_CUDA.__name__, choices=attends)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
