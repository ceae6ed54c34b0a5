"""Fusion methods that can be run: as functions of two lumas, made from an ONNX file or a command.

Legend: lumas are (H, W) float32 in [0, 1].
"""

import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray

from cli import UserError
from evaluation.trivial import TRIVIAL
from images import read_luma8, to_uint8, write_png

Method = Callable[[ndarray, ndarray], ndarray]


def trivial_methods() -> dict[str, Method]:
    """The trivial fusions, which work on 8 bits, by their names."""

    def of(fuse: Callable[[ndarray, ndarray], ndarray]) -> Method:
        return lambda a, b: fuse(to_uint8(a), to_uint8(b)) / np.float32(255)

    return {name: of(fuse) for name, fuse in TRIVIAL.items()}


def named_method(text: str, taken: dict[str, Method]) -> tuple[str, Method]:
    """The name and the method of NAME=FILE.onnx or NAME=COMMAND; UserError if it is neither.

    Nor may the name be one that is taken.
    """
    name, sign, what = text.partition("=")
    if not sign or not name or name in taken:
        raise UserError(f"--method is {text!r}, expected NAME=FILE.onnx or NAME=COMMAND")
    return name, of_onnx(Path(what)) if what.endswith(".onnx") else of_command(what)


def of_onnx(path: Path) -> Method:
    """The network of an ONNX file that takes two (1, 1, H, W) float32 images in [0, 1]."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError("--method FILE.onnx needs: pip install -r requirements-onnx.txt") from None
    if not path.is_file():
        raise UserError(f"--method {path}: no such file")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # a parser of strange bytes may stumble in any way
        raise UserError(f"--method {path}: not an ONNX file ({error})") from None
    names = [tensor.name for tensor in session.get_inputs()]
    if len(names) != 2:
        raise UserError(f"--method {path}: has {len(names)} inputs, expected two images")

    def fuse(luma1: ndarray, luma2: ndarray) -> ndarray:
        feed = dict(zip(names, (luma1[None, None], luma2[None, None]), strict=True))
        return checked(session.run(None, feed)[0].squeeze(), luma1, str(path)).clip(0, 1)

    return fuse


def of_command(text: str) -> Method:
    """A command with {1}, {2} and {out} for the sources and the fused image, as PNG files."""
    if not all(name in text for name in ("{1}", "{2}", "{out}")):
        raise UserError(f"--method {text!r}: expected {{1}}, {{2}} and {{out}} in the command")

    def fuse(luma1: ndarray, luma2: ndarray) -> ndarray:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / f"{name}.png" for name in ("1", "2", "out")}
            write_png(files["1"], to_uint8(luma1))
            write_png(files["2"], to_uint8(luma2))
            words = shlex.split(text)
            for name, path in files.items():
                words = [word.replace(f"{{{name}}}", str(path)) for word in words]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode or not files["out"].is_file():
                last = (done.stderr.strip().splitlines() or ["it wrote no image"])[-1]
                raise UserError(f"--method {text!r} failed: {last}")
            return checked(read_luma8(files["out"]) / np.float32(255), luma1, text)

    return fuse


def checked(fused: ndarray, source: ndarray, text: str) -> ndarray:
    """A fused image; UserError if it has another size than its source, or holds NaN."""
    if fused.shape != source.shape:
        shapes = ("x".join(map(str, image.shape)) for image in (fused, source))
        raise UserError("--method {!r} made {} of {}, expected equal sizes".format(text, *shapes))
    if not np.isfinite(fused).all():
        raise UserError(f"--method {text!r} made values that are not finite")
    return fused
