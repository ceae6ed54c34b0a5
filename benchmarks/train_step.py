"""Time and memory of a training step against the direct einsum version kept in tests/.

    python benchmarks/train_step.py --DEVICE cuda --json step.json

A step is forward, loss, backward, gradient clipping and AdamW. The direct version runs in float32
before ours and after; the faster of its two medians counts. Operations are those of the direct
version's products, forward and backward; their share of the measured matrix rate says how much is
left.
`--attend` and `--mix` try other forms of SFEF's softmaxes (mixing.py). "recomputed" shows what
memory is to be had by torch.utils.checkpoint around AFF and SFEF; as it is, AFF's BatchNorm then
counts each batch twice in its running statistics, so it is only measured here.
"""

import argparse
import gc
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
# the root first: metrics.py is there and here
sys.path[:1] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]

import torch  # noqa: E402
from direct import direct  # noqa: E402
from timing import (  # noqa: E402
    describe_device,
    failure,
    matrix_rates,
    measure,
    set_arithmetic,
    wait,
    write_json,
)
from torch import nn  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import mixing  # noqa: E402
from args_setting import TrainArgs, run_script  # noqa: E402
from checkpoints import Parts, save_checkpoint  # noqa: E402
from losses import fusion_loss  # noqa: E402
from network import ASFEFusion, pick_device  # noqa: E402
from train_asfe import GRADIENT_CLIP, moving_average  # noqa: E402

# name -> (version, precision, compiled)
VARIANTS = {
    "direct fp32": ("direct", "fp32", False),
    "fp32": ("ours", "fp32", False),
    "tf32": ("ours", "tf32", False),
    "bf16": ("ours", "bf16", False),
    "bf16 recomputed": ("recomputed", "bf16", False),
    "direct fp32, again": ("direct", "fp32", False),
    "bf16 compiled": ("ours", "bf16", True),  # last, as nobody knows how long a compiler takes
}


class Step:
    """A network with what a training step needs; calling it makes one."""

    def __init__(self, size: str, variant: str, device: torch.device, args: argparse.Namespace):
        version, self.precision, compiled = VARIANTS[variant]
        torch.manual_seed(0)
        model = ASFEFusion(size)
        model = (direct(model, share=True) if version == "direct" else model).to(device).train()
        if version == "recomputed":
            for fusion in model.fusion:
                again = partial(checkpoint, use_reentrant=False)
                for aff in (fusion.aff1, fusion.aff2):
                    aff.spectrum = partial(again, aff.spectrum)
                fusion.sfef.forward = partial(again, fusion.sfef.forward)
        self.model, self.device, self.recipe = model, device, args.recipe
        self.network: nn.Module = torch.compile(model) if compiled else model
        self.optimiser = torch.optim.AdamW(model.parameters(), 1e-5)
        self.images = torch.rand(2, args.batch, 1, args.side, args.side, device=device)

    def gradients(self) -> None:
        self.optimiser.zero_grad()
        with set_arithmetic(self.device, self.precision):
            fused = self.network(*self.images)
        fusion_loss(fused.float(), *self.images, self.recipe)[0].backward()

    def __call__(self) -> None:
        self.gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimiser.step()


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def count_operations(size: str, device: torch.device, args: argparse.Namespace) -> float:
    """TFLOP of the direct version's products in a step, forward and backward."""
    step = Step(size, "direct fp32", device, args)
    with FlopCounterMode(display=False) as counter:
        step.gradients()
    return counter.get_total_flops() / 1e12


def variant_figures(
    size: str, variant: str, device: torch.device, args: argparse.Namespace
) -> dict:
    """Time, memory, pairs per second; the first step apart, as it compiles."""
    try:
        step = Step(size, variant, device, args)
        start = time.perf_counter()
        step()
        wait(device)
        first = time.perf_counter() - start
        step.optimiser.zero_grad()
        held = torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else None
        found = measure(step, device, args.repeats)
    except Exception as error:  # compilers fail in any way, and the other figures must come
        return {"refused": failure(error)}
    found |= {"weights_and_moments_GB": held, "first_step_s": first}
    found |= {"pairs_per_s": 1e3 * args.batch / found["ms"]}
    return found


def trainer_figures(size: str, device: torch.device, args: argparse.Namespace) -> dict:
    """What train_asfe.py adds: the moving average after a step, the checkpoint after an epoch."""
    step = Step(size, "fp32", device, args)
    step()
    averaged = AveragedModel(step.model, multi_avg_fn=moving_average(0.995))
    average = measure(partial(averaged.update_parameters, step.model), device, args.repeats)
    schedule = LambdaLR(step.optimiser, lambda _: 1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    parts = Parts(step.model, averaged, step.optimiser, schedule, scaler)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_checkpoint(Path(folder) / "last.pt", parts, TrainArgs(), {})
        seconds = time.perf_counter() - start
    return {"moving_average_ms": average["ms"], "checkpoint_s": seconds}


def size_figures(size: str, document: dict, device: torch.device, args: argparse.Namespace) -> None:
    """Fill the document, and write it after each figure: the next may take all the time."""
    operations, rates = count_operations(size, device, args), document["matrix_TFLOP_per_s"]
    figures = document["sizes"][size] = {"TFLOP_of_a_step": operations}
    clear(device)
    try:
        figures |= trainer_figures(size, device, args)
    except RuntimeError as error:  # out of memory, where the steps in bfloat16 may still fit
        figures["trainer_refused"] = failure(error)
    every = figures["steps"] = {}
    for variant in VARIANTS:
        if VARIANTS[variant][2] and not args.compile:
            continue
        clear(device)
        found = every[variant] = variant_figures(size, variant, device, args)
        if "ms" in found:
            rate = operations / found["ms"] * 1e3
            found |= {"TFLOP_per_s": rate}
            found["of_matrix_rate"] = rate / rates[VARIANTS[variant][1]]
        show(f"{size:8} {variant:20}", found)
        compare_with_direct(every)
        write_json(args.json, document)
    clear(device)


def compare_with_direct(every: dict[str, dict]) -> None:
    """How much faster each variant is than the direct one, and its share of that one's memory."""
    base = [every[name] for name in every if name.startswith("direct") and "ms" in every[name]]
    if base:
        fastest = min(base, key=lambda found: found["ms"])
        for found in every.values():
            if "ms" in found:
                found["times_faster_than_direct"] = fastest["ms"] / found["ms"]
                if found["peak_GB"] is not None:
                    found["memory_of_direct"] = found["peak_GB"] / fastest["peak_GB"]


def show(title: str, found: dict) -> None:
    if "refused" in found:
        print(f"{title} {found['refused']}", flush=True)
        return
    peak = "" if found["peak_GB"] is None else f"{found['peak_GB']:7.2f} GB"
    share = f"{found['TFLOP_per_s']:.2f} TFLOP/s, {found['of_matrix_rate']:.1%} of the matrix rate"
    print(f"{title} {found['ms']:9.1f} ms {peak}  {share}", flush=True)


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.DEVICE)
    mixing.ATTEND_ON_CUDA = getattr(mixing, args.attend)
    mixing.MIX_ON_CUDA = getattr(mixing, args.mix)
    about = describe_device(device)
    print(about["machine"], about.get("device", ""), "\n")
    rates = matrix_rates(device, args.matrix)
    print("matrix rate, TFLOP/s:", {name: round(rate, 2) for name, rate in rates.items()}, "\n")
    names = ("batch", "side", "recipe", "attend", "mix")
    document = {"about": about, **{name: getattr(args, name) for name in names}}
    document |= {"matrix_TFLOP_per_s": rates, "sizes": {}}
    for size in args.sizes:
        size_figures(size, document, device, args)
        print()
    for size, found in document["sizes"].items():
        for variant, step in found["steps"].items():
            if "times_faster_than_direct" in step:
                memory = step.get("memory_of_direct")
                memory = "" if memory is None else f", {memory:.0%} of its memory"
                faster = step["times_faster_than_direct"]
                print(f"{size} {variant}: {faster:.1f} times as fast as direct{memory}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--DEVICE", default="auto")
    parser.add_argument("--sizes", nargs="+", default=["paper", "compact"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--recipe", default="detail", choices=("detail", "paper"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    attends = ("library", "split", "explicit", "tiled")
    parser.add_argument("--attend", default=mixing.ATTEND_ON_CUDA.__name__, choices=attends)
    mixes = ("two_attentions", "shared")
    parser.add_argument("--mix", default=mixing.MIX_ON_CUDA.__name__, choices=mixes)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
