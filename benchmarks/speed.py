"""Time and memory of fusing a pair, or of a training step, against tests/direct.py.

    python benchmarks/speed.py                        fusing a 256x256 pair, both sizes
    python benchmarks/speed.py --parts                the same without a part of inference.py
    python benchmarks/speed.py --against ../before    beside another checkout of this repository
    python benchmarks/speed.py --onnx                 beside the exported file in ONNX Runtime
    python benchmarks/speed.py --train                a training step, as train_asfe.py takes it
    python benchmarks/speed.py --DEVICE cuda          on a GPU, also with --train
    python benchmarks/speed.py --versions optimised --sizes paper --side 1024

On a CPU, to be run on an idle machine, each version has a process of its own, and they take turns;
for training steps of the paper size these have 19 GB in all, less with `--batch 1`. Beside each
pass the float32 matrix rate is measured, as a shared machine changes its speed within seconds. The
floor is the time that the operations of the direct version take at this rate. Memory is the largest
resident set of the process, before the first pass and over all passes. On a GPU the versions run in
one process, one after the other, and memory is the peak of PyTorch's allocator.

"times faster" is over the table's first version, such as `direct` as PyTorch starts. "like for
like" is over `direct` with the same process settings and arithmetic. Both are medians over the
rounds, with their range.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from machine import ROOT, machine, make_parser, peak_gb, positive

# isort: split
import torch
from direct import direct
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cli
import inference
from args_setting import SIZES, TrainArgs
from cli import UserError, pick_device, run_script, setup_runtime
from network import ASFEFusion


class Version(NamedTuple):
    """A way to compute the network."""

    network: str  # direct, defined (network.py), optimised (inference.py) or onnx (exported)
    settings: bool = True  # the process has the settings of our commands, see cli.setup_runtime
    precision: str = "fp32"  # of training, see train_asfe.set_precision
    left_out: tuple[str, ...] = ()  # classes of inference.py, or a function of cli.py
    tree: Path = ROOT  # the checkout that it is taken from


FUSING = {
    "direct": Version("direct", settings=False),
    "direct with our settings": Version("direct"),
    "network.py": Version("defined"),
    "optimised": Version("optimised"),
}
TRAINING = {name: v for name, v in FUSING.items() if v.network != "optimised"}
PARTS = {
    "optimised": Version("optimised"),
    "freed memory returned": Version("optimised", left_out=("keep_freed_memory",)),
    "decoder as defined": Version("optimised", left_out=("FastConvBlock", "FastDecoder")),
    "max_pool2d": Version("optimised", left_out=("FastBlurPool",)),
    "two inverse transforms": Version("optimised", left_out=("FastFusionModule",)),
    "SFEF as two attentions": Version("optimised", left_out=("FastSFEF",)),
}
ENGINES = {name: FUSING[name] for name in ("network.py", "optimised")}
ENGINES["ONNX Runtime"] = Version("onnx")
# On a GPU the settings of the process change nothing, and the optimised network is network.py's.
FUSING_ON_GPU = {"direct": Version("direct"), "network.py": Version("defined")}
TRAINING_ON_GPU = FUSING_ON_GPU | {"network.py in bf16": Version("defined", precision="bf16")}


def versions_of(args: argparse.Namespace) -> dict[str, Version]:
    """What to compare, by name."""
    if args.DEVICE == "cuda":
        every = TRAINING_ON_GPU if args.train else FUSING_ON_GPU
    else:
        every = PARTS if args.parts else TRAINING if args.train else FUSING
        every = ENGINES if args.onnx else every
    if args.against:
        before = {f"before, {name}": v._replace(tree=args.against) for name, v in every.items()}
        every = before | every
    if unknown := set(args.versions) - every.keys():
        raise UserError(f"no version {sorted(unknown)}, expected some of {', '.join(every)}")
    return {name: v for name, v in every.items() if name in (args.versions or every)}


# --- what is timed ---------------------------------------------------------------------------


def build(size: str, version: Version, args: argparse.Namespace) -> Callable[[], object]:
    """Set the process up as the version says; what is timed, ready to be called."""
    for name in version.left_out:
        if name in vars(cli):
            setattr(cli, name, lambda: None)
        else:
            del inference.FASTER[vars(inference)[name].__base__]
    if version.settings:
        setup_runtime(args)
    elif args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = ASFEFusion(size)
    if version.network == "direct":
        direct(model, share=True)
    model = model.to(args.DEVICE)
    images = torch.rand(2, args.batch, 1, args.side, args.side, device=args.DEVICE)
    if args.train:
        return training_step(model, images, version.precision)
    model.eval()
    if version.network == "onnx":
        return onnx_session(model, images, args.threads)
    if version.network == "optimised":
        model = inference.optimise(model)
    return torch.no_grad()(partial(model, *images))


def onnx_session(model: ASFEFusion, images: Tensor, threads: int) -> Callable[[], object]:
    """A pass of the exported file."""
    import export_onnx

    session = export_onnx.open_session(export_onnx.export(model, {}), threads)
    return partial(session.run, None, dict(zip(("img1", "img2"), images.numpy(), strict=True)))


def training_step(model: ASFEFusion, images: Tensor, precision: str) -> Callable[[], None]:
    """A step of train_asfe.py with its default recipe."""
    import train_asfe  # not on top, as its packages would count as memory of fusing
    from checkpoints import Run, Stage

    args = TrainArgs(precision=precision)
    amp = train_asfe.set_precision(precision, images.device)
    batch = images.squeeze(2).transpose(0, 1).contiguous()  # (B, 2, side, side)
    stages = [Stage(batch.shape[-1], len(batch), 1000, frozen=False)]
    run = Run(args, stages, out=Path("unused"), started=0)
    state = train_asfe.make_state(model.train(), run, pairs=len(batch))
    alone = train_asfe.Processes(rank=0, world=1, device=images.device)
    return partial(train_asfe.make_step(model, state, args, amp, alone), batch)


def count_operations(size: str, args: argparse.Namespace) -> int:
    """Floating-point operations of the direct version's products, forward and, in training, back.

    Counted without computing anything; the Fourier transforms are left out. Raises UserError for
    sides that the network does not take.
    """
    with torch.device("meta"):
        model = direct(ASFEFusion(size), share=True).to("meta")
        images = torch.rand(2, args.batch, 1, args.side, args.side)
    if args.side % model.multiple:
        raise UserError(f"side is {args.side}, {size} expects a multiple of {model.multiple}")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(args.train):
        fused = model(*images)
        if args.train:
            fused.sum().backward()
    return counter.get_total_flops()


def matrix_rate(side: int = 2048, repeats: int = 4) -> float:
    """Best rate of a few products of large float32 matrices, in operations per second."""
    a, b = torch.randn(2, side, side)
    out = a @ b
    return 2 * side**3 / min(seconds_of(partial(torch.mm, a, b, out=out)) for _ in range(repeats))


def seconds_of(step: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """How long a step takes; `wait` returns once the device has done its work."""
    wait()
    begin = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begin


# --- how it is timed -------------------------------------------------------------------------


class Row:
    """What was measured of a version."""

    def __init__(self, version: Version):
        self.version = version
        self.seconds: list[float] = []
        self.floors: list[float] = []  # how many times the floor each pass took
        self.start_gb = self.peak_gb = 0.0


class Worker(Row):
    """A row, and the process of `serve` that it is measured in."""

    def __init__(self, size: str, name: str, version: Version, args: argparse.Namespace):
        super().__init__(version)
        flags = ["--serve", size, name.removeprefix("before, "), "--side", args.side]
        flags += ["--batch", args.batch, *(["--threads", args.threads] if args.threads else [])]
        flags += [f"--{kind}" for kind in ("train", "parts", "onnx") if getattr(args, kind)]
        command = [sys.executable, version.tree / "benchmarks" / "speed.py", *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __enter__(self) -> "Worker":
        _, self.start_gb = self.answer()
        self.step()  # the first pass allocates
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()

    def step(self) -> float:
        """Have the process make a step; its seconds."""
        time.sleep(0.1)  # threads of the others spin for a while after their work
        print(file=self.process.stdin)
        seconds, self.peak_gb = self.answer()
        return seconds

    def answer(self) -> tuple[float, float]:
        words = self.process.stdout.readline().split()
        if not words:
            raise UserError(f"a process ended before its time, code {self.process.wait()}")
        return float(words[0]), float(words[1])


def serve(size: str, version: Version, args: argparse.Namespace) -> None:
    """Build what is timed; then a step for each line that comes in: seconds and peak GB."""

    def answer(seconds: float) -> None:
        print(seconds, peak_gb(), flush=True)

    step = build(size, version, args)
    answer(0)
    for _ in sys.stdin:
        answer(seconds_of(step))


def measure_in_turns(
    size: str, versions: dict[str, Version], args: argparse.Namespace, operations: int
) -> dict[str, Row]:
    """Each version in a process of its own, on a CPU; every second round goes backwards."""
    with ExitStack() as stack:
        rows = {
            name: stack.enter_context(Worker(size, name, version, args))
            for name, version in versions.items()
        }
        for k in range(args.repeats):
            rates = [matrix_rate()]
            for row in list(rows.values())[:: -1 if k % 2 else 1]:
                row.seconds.append(row.step())
                rates.append(matrix_rate())
                row.floors.append(row.seconds[-1] / (operations / statistics.mean(rates[-2:])))
            taken = ", ".join(f"{name} {row.seconds[-1]:.3f}" for name, row in rows.items())
            rates = f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s"
            print(f"{size} {k + 1}: {taken} s; {rates}", flush=True)
    return rows


def measure_here(
    size: str, versions: dict[str, Version], args: argparse.Namespace
) -> dict[str, Row]:
    """One version after the other in this process, on a GPU."""
    rows = {}
    for name, version in versions.items():
        rows[name] = row = Row(version)
        step = build(size, version, args)
        row.start_gb = torch.cuda.memory_allocated() / 1e9
        for _ in range(3):  # the first steps allocate and choose kernels
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        row.seconds = [seconds_of(step, torch.cuda.synchronize) for _ in range(args.repeats)]
        row.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return rows


# --- tables ----------------------------------------------------------------------------------


def times_faster(base: Row, row: Row) -> str:
    """How many times as long as `row` the other took: median over the rounds, and range."""
    ratios = [b / s for b, s in zip(base.seconds, row.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def show(what: str, rows: dict[str, Row]) -> None:
    """The table of the versions."""
    heads = ("median s", "times faster", "like for like", "times the floor", "GB before", "peak GB")
    print(f"\n| {what} | {' | '.join(heads)} | of the first |\n|{'---|' * (len(heads) + 2)}")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        alike = row.version._replace(network="direct")
        like = next((other for other in rows.values() if other.version == alike), None)
        cells = (
            name,
            f"{statistics.median(row.seconds):#.4g}",
            times_faster(first, row),
            times_faster(like, row) if like else "",
            f"{statistics.median(row.floors):.2f}" if row.floors else "",
            f"{row.start_gb:.2f}",
            f"{row.peak_gb:.2f}",
            f"{row.peak_gb / first.peak_gb:.0%}",
        )
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def main(args: argparse.Namespace) -> None:
    if (args.parts or args.onnx) and (args.train or args.DEVICE == "cuda"):
        raise UserError("--parts and --onnx are for fusing on a CPU, without --train")
    if (args.parts and args.onnx) or (args.against and args.DEVICE == "cuda"):
        raise UserError("--parts goes without --onnx, and --against is for a CPU")
    if args.against and not (args.against / "benchmarks" / "speed.py").is_file():
        raise UserError(f"--against is {args.against}, expected a checkout of this repository")
    args.side = args.side or (TrainArgs.patch_size if args.train else 256)
    args.batch = args.batch or (TrainArgs.batch_size if args.train else 1)
    versions = versions_of(args)
    if args.serve:
        size, name = args.serve
        serve(size, versions[name], args)
        return
    device = pick_device(args.DEVICE)
    operations = {size: count_operations(size, args) for size in args.sizes}
    print(machine("torch"))
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device))
    if args.threads:
        torch.set_num_threads(args.threads)
    what = "training step" if args.train else "fusing"
    for size in args.sizes:
        if device.type == "cuda":
            rows = measure_here(size, versions, args)
        else:
            rows = measure_in_turns(size, versions, args, operations[size])
        show(f"{size}, {what}, {args.batch} of {args.side}x{args.side}", rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--DEVICE", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--train", action="store_true", help="training steps")
    parser.add_argument("--parts", action="store_true", help="the optimised network without a part")
    parser.add_argument("--onnx", action="store_true", help="the exported file, too")
    parser.add_argument("--against", type=Path, help="another checkout, with these flags and names")
    parser.add_argument("--sizes", nargs="+", default=tuple(SIZES), choices=tuple(SIZES))
    parser.add_argument("--versions", nargs="+", default=(), help="these only, by their names")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds")
    parser.add_argument("--side", type=positive, help="of the images, in pixels")
    parser.add_argument("--batch", type=positive, help="pairs that are taken together")
    parser.add_argument("--threads", type=positive, default=0, help="default PyTorch's choice")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # the process of a Worker
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
