"""SFEF's two softmaxes at the sizes of the published scales: every form of mixing.py, measured.

    python benchmarks/attention.py --DEVICE cuda --json attention.json

Forward and backward, in bfloat16 autocast as in training: dispatch (slots over tokens), combine
(tokens over slots), and both with the experts between them left out. The error is relative, of the
output and of the worst gradient, against `explicit` in float32. What wins belongs into the last
two lines of mixing.py.

Legend: B pairs, N tokens, M slots, d width.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # the root first: metrics.py is there and here

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from timing import (  # noqa: E402
    describe_device,
    failure,
    measure,
    set_arithmetic,
    write_json,
)
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import mixing  # noqa: E402
from args_setting import run_script  # noqa: E402
from network import pick_device  # noqa: E402

SCALES = ((65536, 224), (16384, 320), (4096, 416), (1024, 512))  # N, d of a 256x256 pair
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def with_backend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([BACKENDS[name]]):
        return mixing.library(q, k, v)


def two(attend: Callable, tokens: Tensor, slots: Tensor) -> Tensor:
    return attend(tokens, slots, attend(slots, tokens, tokens))


def shared(tokens: Tensor, slots: Tensor) -> Tensor:
    return mixing.shared(tokens, slots, lambda slot_in: slot_in)


def candidates(compiled: bool) -> dict[str, tuple[Callable | None, Callable]]:
    """Name -> (one softmax or None, both)."""
    attends = {
        "library": mixing.library,
        **{f"library, {name}": partial(with_backend, name) for name in BACKENDS},
        "split": mixing.split,
        "explicit": mixing.explicit,
        "tiled": mixing.tiled,
    }
    every = {name: (attend, partial(two, attend)) for name, attend in attends.items()}
    every["shared"] = (None, shared)
    if compiled:
        for name, function in (("explicit", partial(two, mixing.explicit)), ("shared", shared)):
            every[f"{name}, compiled"] = (None, torch.compile(function, dynamic=False))
    return every


def inputs(batch: int, n: int, d: int, slots: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tokens of length 1 and slots of length about d, as an untrained SFEF has them; slot outputs.

    The slots are one set for the whole batch, as in the network.
    """
    torch.manual_seed(0)
    tokens = F.normalize(torch.randn(batch, n, d, device=device), dim=-1)
    rows = F.normalize(torch.randn(1, slots, d, device=device), dim=-1) * d
    return tokens, rows.repeat(batch, 1, 1), torch.randn(batch, slots, d, device=device)


def forward_backward(
    function: Callable, tensors: tuple[Tensor, ...], device: torch.device, precision: str
) -> list[Tensor]:
    """Output and gradients for a fixed weighting of the output."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    with set_arithmetic(device, precision):
        out = function(*tensors)
    weighting = torch.linspace(-1, 1, out.shape[-1], device=device).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weighting.expand_as(out))]


def errors(got: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    relative = [
        ((a.float() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(got, expected, strict=True)
    ]
    return {"error_output": relative[0], "error_gradient": max(relative[1:])}


def figures(
    function: Callable,
    reference: Callable,
    tensors: tuple[Tensor, ...],
    device: torch.device,
    args: argparse.Namespace,
) -> dict:
    """Time, memory and error of one candidate in one use, or why there are none."""
    try:
        got = forward_backward(function, tensors, device, args.precision)
    except Exception as error:  # compilers fail in any way, and the other figures must come
        return {"refused": failure(error)}
    expected = forward_backward(reference, tensors, device, "fp32")
    found = errors(got, expected)
    del got, expected
    before = torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else None
    run = partial(forward_backward, function, tensors, device, args.precision)
    found |= measure(run, device, args.repeats)
    if before is not None:
        found["peak_GB"] -= before
    return found


def scale_figures(n: int, d: int, device: torch.device, args: argparse.Namespace) -> dict:
    tokens, slots, slot_out = inputs(args.batch, n, d, args.slots, device)
    uses = {  # what to call, on what
        "dispatch": (lambda f, s, t: f(s, t, t), (slots, tokens)),
        "combine": (lambda f, t, s, o: f(t, s, o), (tokens, slots, slot_out)),
        "both": (lambda f, t, s: f(t, s), (tokens, slots)),
    }
    every = {}
    for name, (attend, both) in candidates(args.compile).items():
        for use, (call, tensors) in uses.items():
            function = both if use == "both" else attend
            if function is None:
                continue
            plain = partial(two, mixing.explicit) if use == "both" else mixing.explicit
            found = figures(partial(call, function), partial(call, plain), tensors, device, args)
            every.setdefault(name, {})[use] = found
            show(f"{n}x{d} {use:8} {name:20}", found)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return every


def show(title: str, found: dict) -> None:
    if "refused" in found:
        print(f"{title} {found['refused']}", flush=True)
        return
    peak = "" if found["peak_GB"] is None else f"{found['peak_GB']:8.2f} GB"
    off = f"error {found['error_output']:.1e}, gradient {found['error_gradient']:.1e}"
    print(f"{title} {found['ms']:9.2f} ms {peak}  {off}", flush=True)


def totals(scales: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """Milliseconds over the scales, by candidate and use; null where one refused."""
    out: dict[str, dict[str, float | None]] = {}
    for name in next(iter(scales.values())):
        for use in next(iter(scales.values()))[name]:
            times = [scale[name][use].get("ms") for scale in scales.values()]
            out.setdefault(name, {})[use] = None if None in times else sum(times)
    return out


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.DEVICE)
    about = describe_device(device)
    print(about["machine"], about.get("device", ""), "\n")
    settings = {"batch": args.batch, "slots": args.slots, "precision": args.precision}
    document = {"about": about, **settings, "scales": {}}
    for text in args.scales:
        n, d = map(int, text.split("x"))
        document["scales"][text] = scale_figures(n, d, device, args)
        write_json(args.json, document)
    document["total_ms"] = totals(document["scales"])
    write_json(args.json, document)
    print("\nboth, ms over all scales:")
    for name, uses in document["total_ms"].items():
        print(f"{name:20}", "refused" if uses["both"] is None else f"{uses['both']:.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--DEVICE", default="auto")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--scales", nargs="+", default=[f"{n}x{d}" for n, d in SCALES])
    parser.add_argument("--precision", default="bf16", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
