"""What the benchmarks of a device share: times, peak memory, matrix rates, and a JSON of figures.

Every figure is named with its unit. Peak memory is what PyTorch's allocator of a CUDA device held
at most; elsewhere it is not measured and null.
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from machine import machine

PRECISIONS = {  # name -> (type of autocast, arithmetic of float32 products)
    "fp32": (None, "highest"),
    "tf32": (None, "high"),
    "bf16": (torch.bfloat16, "high"),
}


def set_arithmetic(device: torch.device, precision: str) -> AbstractContextManager:
    """Set the arithmetic of float32 products; the autocast to run in."""
    kind, products = PRECISIONS[precision]
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = products == "high"
    return torch.autocast(device.type, kind, enabled=kind is not None)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Callable, device: torch.device, repeats: int) -> dict:
    """Median milliseconds of `run()`, and the memory at its peak, with what was there before."""
    for _ in range(min(2, repeats)):  # the first runs allocate
        run()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"ms": statistics.median(times), "fastest_ms": min(times), "peak_GB": peak}


def matrix_rates(device: torch.device, side: int) -> dict[str, float]:
    """Fastest of ten products of two random side x side matrices, in TFLOP/s, by precision."""
    rates = {}
    for name, (kind, _) in PRECISIONS.items():
        set_arithmetic(device, name)
        a, b = torch.randn(2, side, side, device=device, dtype=kind or torch.float32)
        fastest = measure(lambda a=a, b=b: torch.mm(a, b), device, 10)["fastest_ms"]
        rates[name] = 2 * side**3 / fastest / 1e9
    return rates


def describe_device(device: torch.device) -> dict:
    """The machine, the device, the versions, date and command."""
    about = {"machine": machine("torch", "numpy"), "DEVICE": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["device_memory_GB"] = properties.total_memory / 1e9
        about["cuda"], about["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return about


def failure(error: Exception) -> str:
    """One line that says why something did not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def write_json(path: Path | None, document: dict) -> None:
    if path:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(path)
