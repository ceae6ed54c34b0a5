"""Write a network as one ONNX file that fuses pairs of any size, and compare it with PyTorch.

    python export_onnx.py --task CT-MRI                 result/compact_CT-MRI.onnx
    python export_onnx.py --size paper --weights FILE   a checkpoint of the authors, too

The file computes what `ASFEFusion.fuse` does: inputs `img1` and `img2`, output `fused`, all
(batch, 1, height, width) float32 in [0, 1], from 16 x 16 up; mirroring to the multiple that the
network needs, cropping and clipping are inside. `onnx_example.py` runs it without PyTorch.

Before the file gets its name, ONNX Runtime computes it on three sizes, and numbers that differ by
more than `TOLERANCE` are an error. What exporters get wrong is spelled out below with matrix
products, for the exported copy only: Fourier transforms (ONNX has them on one axis and without an
inverse to real numbers) and shapes that are Python integers.

Legend: as in network.py; K = W/2+1 frequencies along W.
"""

import copy
import io
import json
import math
import warnings
from pathlib import Path

from args_setting import ROOT, ExportArgs
from cli import UserError, command_line, run_script, setup_runtime

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(ExportArgs, __doc__)

import numpy as np
import torch
from torch import Tensor, nn

from images import writable_folder, write_bytes
from network import AFF, MIN_SIDE, SFEF, ASFEFusion
from weights import load_model

TOLERANCE = 1e-4  # largest difference from PyTorch, of values in [0, 1]
CHECKED = ((1, 64, 64), (2, 100, 75), (1, 256, 192))  # batch, height, width
OPSET = 17
AXES = {0: "batch", 2: "height", 3: "width"}
MISSING = "export_onnx.py needs onnx and onnxruntime: pip install -r requirements-onnx.txt"


def waves(rows: int, columns: int, n: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / n, (rows, columns): the matrices of a transform of n points."""
    turns = torch.outer(torch.arange(rows), torch.arange(columns)) % n  # exact, as integers
    angle = turns.float() * (2 * math.pi / n)
    return angle.cos(), angle.sin()


def rfft2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, (B, C, H, K), of torch.fft.rfft2 of (B, C, H, W)."""
    h, w = x.shape[-2:]
    cos, sin = waves(w, w // 2 + 1, w)
    re, im = x @ cos, -(x @ sin)
    cos, sin = waves(h, h, h)
    return cos @ re + sin @ im, cos @ im - sin @ re


def irfft2(re: Tensor, im: Tensor, h: int, w: int) -> Tensor:
    """torch.fft.irfft2 with s=(h, w): (B, C, H, W). Missing rows and columns count as zeros."""
    re, im = re[..., :h, :], im[..., :h, :]
    cos, sin = waves(h, re.shape[-2], h)
    re, im = cos @ re - sin @ im, cos @ im + sin @ re
    cos, sin = waves(re.shape[-1], w, w)
    j = torch.arange(re.shape[-1])
    # frequencies but the first and the middle one stand for two, themselves and their mirror image
    twice = torch.where((j == 0) | (2 * j == w), 1.0, 2.0).unsqueeze(1)
    return (re @ (cos * twice) - im @ (sin * twice)) / (h * w)


class PortableAFF(AFF):
    """AFF with its transforms as matrix products."""

    def transform(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 2C, H, K)
        z = torch.stack(rfft2(x), 2).flatten(1, 2)  # c0.re, c0.im, c1.re, …
        return z / self.divisor(*x.shape[2:])

    def inverse(self, z: Tensor, height: int, width: int) -> Tensor:  # -> (B, C, H, W)
        z = z.unflatten(1, (-1, 2))  # (B, C, 2, H, K)
        if self.aff == "published":  # rows 0 and 1 become the parts of a K x 2 map, see AFF
            re, im = z[..., 0, :].transpose(2, 3), z[..., 1, :].transpose(2, 3)
        else:
            re, im = z[:, :, 0], z[:, :, 1]
        return irfft2(re, im, height, width) * self.divisor(height, width)

    def divisor(self, height: int, width: int) -> float:
        return 1.0 if self.fft_norm == "backward" else (height * width) ** 0.5


class PortableSFEF(SFEF):
    """SFEF with its logits as one matrix, which both softmaxes share."""

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, d)
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1)  # (E*S, d)
        logits = tokens @ slots.T  # (B, N, E*S)
        slot_in = logits.transpose(1, 2).softmax(-1) @ tokens  # (B, E*S, d)
        per_expert = slot_in.split(self.slot_embeds.shape[1], 1)  # E of (B, S, d)
        slot_out = torch.cat([f(t) for f, t in zip(self.experts, per_expert, strict=True)], 1)
        out = logits.softmax(-1) @ slot_out  # (B, N, d)
        out = out.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + out if self.residual else out


class PortableFusion(nn.Module):
    """A copy of the network that takes any size, with all of its sizes computed in the graph."""

    def __init__(self, model: ASFEFusion):
        super().__init__()
        self.model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
        self.model.requires_grad_(False)
        for module in self.model.modules():
            for kind in (PortableAFF, PortableSFEF):
                if type(module) is kind.__base__:
                    module.__class__ = kind

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:  # two (B, 1, H, W) -> (B, 1, H, W)
        model, (height, width) = self.model, img1.shape[-2:]
        a, b = (mirror(mirror(t, 2, model.multiple), 3, model.multiple) for t in (img1, img2))
        scales = zip(model.encoder(a), model.encoder(b), strict=True)  # x and y, (B, C, H, W)
        fused = [fusion(x, y) for fusion, (x, y) in zip(model.fusion, scales, strict=True)]
        return model.head(model.decoder(*fused), a, b)[..., :height, :width].clamp(0, 1)


def mirror(x: Tensor, axis: int, multiple: int) -> Tensor:
    """`network.pad_to_multiple` on one axis, without a branch that a trace would fix."""
    n = x.shape[axis]
    i = torch.arange(n + -n % multiple) % (2 * n)
    return x.index_select(axis, torch.minimum(i, 2 * n - 1 - i))


def export(model: ASFEFusion, metadata: dict) -> bytes:
    """The network as an ONNX file, with JSON-able metadata; unchecked, see `differences`."""
    onnx, _ = libraries()
    pair = tuple(torch.rand(2, 2, 1, 3 * MIN_SIDE, 4 * MIN_SIDE))
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on Python integers that are constants: they are
        # by tracing: torch.export takes minutes to reason about these shapes, for the same numbers
        torch.onnx.export(
            PortableFusion(model),
            pair,
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["img1", "img2"],
            output_names=["fused"],
            dynamic_axes={name: AXES for name in ("img1", "img2", "fused")},
        )
    proto = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(proto, {"asfe": json.dumps(metadata)})
    return proto.SerializeToString()


def differences(model: ASFEFusion, file: bytes, threads: int = 0) -> list[float]:
    """Largest absolute difference of the file from `model.fuse`, for each size of `CHECKED`."""
    session = open_session(file, threads)
    rng, found = np.random.default_rng(0), []
    for batch, height, width in CHECKED:
        # noise, the hardest case for the transforms, which grows from dark to bright
        ramp = np.linspace(0, 1, width, dtype=np.float32)
        img1, img2 = rng.random((2, batch, 1, height, width), np.float32) * ramp
        expected = model.fuse(img1, img2).cpu().numpy()
        (got,) = session.run(None, {"img1": img1, "img2": img2})
        same = got.shape == expected.shape and np.isfinite(got).all()
        found.append(float(np.abs(got - expected).max()) if same else math.inf)
    return found


def open_session(file: Path | bytes, threads: int = 0):
    """An ONNX Runtime session on the CPU; 0 threads leave the choice to the runtime."""
    _, onnxruntime = libraries()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def libraries():
    """The modules onnx and onnxruntime; UserError says how to get them."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise UserError(MISSING) from None
    return onnx, onnxruntime


def main(args: ExportArgs) -> None:
    libraries()
    device = setup_runtime(args)
    out = args.out or ROOT / "result" / f"{args.size}_{args.task}.onnx"
    if out.suffix.lower() != ".onnx" or out.is_dir():
        raise UserError(f"--out is {out}, expected a file name that ends in .onnx")
    model = load_model(args, args.task, device)
    writable_folder(out.resolve().parent)
    file = export(model, {"size": args.size, "task": args.task, "aff": model.aff})
    found = differences(model, file, args.threads)
    for (batch, height, width), difference in zip(CHECKED, found, strict=True):
        print(f"{batch} x {height} x {width}: differs from PyTorch by {difference:.1e} at most")
    if max(found) > TOLERANCE:
        raise RuntimeError(f"the file differs by {max(found):.1e}, allowed is {TOLERANCE:.0e}")
    write_bytes(out, file)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, any batch, any size from {MIN_SIDE} up")


if __name__ == "__main__":
    run_script(main, ARGS)
