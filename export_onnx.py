"""Write a network as one ONNX file that fuses pairs of any size, and compare it with PyTorch.

    python export_onnx.py --task CT-MRI                 result/compact_CT-MRI.onnx
    python export_onnx.py --size paper --weights FILE   a checkpoint of the authors, too

The file computes what `ASFEFusion.fuse` does: inputs `img1` and `img2`, output `fused`, all
(batch, 1, height, width) float32 in [0, 1], from 16 x 16 up; mirroring to the multiple that the
network needs, cropping and clipping are inside. `onnx_example.py` runs it without PyTorch.

Before the file gets its name, ONNX Runtime computes it on three sizes. Numbers that differ by more
than `TOLERANCE` are an error.

Exporters get two things wrong, so the exported copy has them in other words. Fourier transforms are
matrix products: ONNX has transforms on one axis only, without an inverse to real numbers. Shapes
are computed in the graph, not as Python integers.

Legend: as in network.py; K = W/2+1 frequencies along W.
"""

import copy
import io
import json
import math
import tempfile
import warnings
from pathlib import Path

from args_setting import ROOT, ExportArgs
from cli import UserError, command_line, run_script, setup_runtime

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(ExportArgs, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import writable_folder, write_bytes
from network import MIN_SIDE, SFEF, ASFEFusion, FusionModule
from weights import load_model

TOLERANCE = 1e-4  # largest difference from PyTorch, of values in [0, 1]
CHECKED = ((1, 64, 64), (2, 100, 75), (1, 256, 192))  # batch, height, width
OPSET = 17
LARGEST_LOGIT = 70.0  # exp of it, summed over 1e8 pixels, is within float32
AXES = {0: "batch", 2: "height", 3: "width"}
MISSING = "export_onnx.py needs onnx and onnxruntime: pip install -r requirements-onnx.txt"


class Fourier:
    """Transforms of (B, C, H, W) as matrix products, in the frequencies of torch.fft.rfft2.

    A transform of the n = p m rows is two short ones: with j = m j1 + j2 and k = k1 + p k2,
    exp(-2 pi i j k / n) = exp(-2 pi i j1 k1 / p) exp(-2 pi i j2 (k1 + p k2) / n). The first factor
    sums over j1 whatever j2 is, the second over j2 for each k1 (Cooley and Tukey, 1965). A complex
    number is two real ones, so that the transposed matrices transform back.
    """

    def __init__(self, height: int, width: int, rows: int, norm: str):
        p, m, k = rows, height // rows, width // 2 + 1
        self.p, self.m = p, m
        angle = turns(torch.arange(p)[:, None] * torch.arange(p), p)  # of k1 and j1
        first = rotation(angle)  # (c' k1, c j1), where c and c' are real or imaginary
        self.first = first.unflatten(0, (2, p)).transpose(0, 1).flatten(0, 1)  # (k1 c', c j1)
        frequency = torch.arange(p)[:, None, None] + p * torch.arange(m)[:, None]  # (p, m, 1)
        self.second = rotation(turns(frequency * torch.arange(m), height))  # (k1, c' k2, c j2)
        self.angle = turns(torch.arange(width)[:, None] * torch.arange(k), width)  # (W, K)
        # Of a real row, all frequencies but the first and the middle one stand for two.
        i = torch.arange(k)
        self.twice = torch.where((i == 0) | (2 * i == width), 1.0, 2.0)
        self.scale = 1.0 if norm == "backward" else (height * width) ** -0.5
        self.scale_back = 1 / (height * width) / self.scale

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 2C, H, K), c0.re, c0.im, c1.re, …
        re, im = x @ (self.angle.cos() * self.scale), x @ (self.angle.sin() * -self.scale)
        z = torch.cat([re, im], 2)  # (B, C, c H, K)
        z = self.first @ z.unflatten(2, (2 * self.p, self.m)).flatten(3)  # (B, C, k1 c, j2 K)
        z = self.second @ z.unflatten(3, (self.m, -1)).unflatten(2, (self.p, 2)).flatten(3, 4)
        z = z.unflatten(3, (2, self.m)).permute(0, 1, 3, 4, 2, 5)  # (B, C, c, k2, k1, K)
        return z.flatten(3, 4).flatten(1, 2)

    def inverse(self, z: Tensor) -> Tensor:
        """(B, 2C, H, K), or fewer columns than K, -> (B, C, H, W)."""
        columns = z.shape[3]
        first, second = self.first.transpose(0, 1), self.second.transpose(1, 2)
        z = z.unflatten(2, (self.m, self.p)).unflatten(1, (-1, 2))  # (B, C, c, k2, k1, K)
        z = second @ z.permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B, C, k1, c j2, K)
        z = first @ z.unflatten(3, (2, self.m)).flatten(2, 3).flatten(3)  # (B, C, c j1, j2 K)
        re, im = z.unflatten(3, (self.m, -1)).flatten(2, 3).chunk(2, 2)  # (B, C, H, K) each
        angle = self.angle[:, :columns].transpose(0, 1)
        weight = (self.twice * self.scale_back)[:columns, None]
        return re @ (angle.cos() * weight) - im @ (angle.sin() * weight)


def turns(counts: Tensor, n: int) -> Tensor:
    """The angle of so many n-th parts of a turn."""
    return (counts % n).float() * (2 * math.pi / n)  # exact, as integers, up to here


def rotation(angle: Tensor) -> Tensor:
    """exp(-i angle) of (..., a, b) on parts that lie apart, real ones first: (..., 2a, 2b)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([torch.cat([cos, sin], -1), torch.cat([-sin, cos], -1)], -2)


class PortableFusionModule(FusionModule):
    """FusionModule with its transforms as matrix products, and one back for both modalities."""

    rows: int  # of which the height is a multiple

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, 2C, H, W)
        if not self.aff1:
            return super().forward(x, y)
        height, width = x.shape[2:]
        fourier = Fourier(height, width, self.rows, self.aff1.fft_norm)
        z = fourier.forward(torch.cat([x, y]))  # (2B, 2C, H, K)
        z = self.aff2.masked(z[: x.shape[0]]) + self.aff1.masked(z[x.shape[0] :])  # (B, 2C, H, K)
        if self.aff1.aff == "published":  # rows 0 and 1 become the parts of a K x 2 map, see AFF
            z = z.unflatten(1, (-1, 2))[:, :, :, :2].permute(0, 1, 3, 4, 2)  # (B, C, 2, K, 2)
            z = F.pad(z, (0, 0, 0, height))[:, :, :, :height].flatten(1, 2)
        spatial = self.casf(x, y) if self.casf else x + y
        return self.sfef(torch.cat([spatial, fourier.inverse(z)], 1))


class PortableSFEF(SFEF):
    """SFEF with its logits as one matrix, which both softmaxes share."""

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        gamma = self.norm.gamma * x.shape[1] ** 0.5
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1) * gamma  # (E*S, d)
        tokens = x.flatten(2)  # (B, d, N)
        tokens = tokens / column_sums(tokens.square()).sqrt().clamp(min=1e-12)
        logits = slots @ tokens  # (B, E*S, N)
        # A constant of the weights. The tokens' length is one, so that no logit is larger.
        small = float(slots.norm(dim=1).max()) < LARGEST_LOGIT
        dispatch = logits.exp() if small else logits.softmax(2)
        slot_in = dispatch @ tokens.transpose(1, 2) * gamma / dispatch.sum(2, keepdim=True)
        per_expert = slot_in.split(self.slot_embeds.shape[1], 1)  # E of (B, S, d)
        slot_out = torch.cat([f(t) for f, t in zip(self.experts, per_expert, strict=True)], 1)
        combine = dispatch if small else logits.softmax(1)
        out = slot_out.transpose(1, 2) @ combine / column_sums(combine)
        out = out.unflatten(2, x.shape[2:])
        return x + out if self.residual else out


def column_sums(t: Tensor) -> Tensor:
    """t.sum(1, keepdim=True) of (B, rows, columns); ONNX Runtime is slow at sums that stride."""
    return t.new_ones(1, t.shape[1]) @ t


class PortableFusion(nn.Module):
    """A copy of the network that takes any size, with all of its sizes computed in the graph."""

    def __init__(self, model: ASFEFusion):
        super().__init__()
        self.model = copy.deepcopy(model).to("cpu", memory_format=torch.contiguous_format).eval()
        self.model.requires_grad_(False)
        for module in self.model.modules():
            for kind in (PortableFusionModule, PortableSFEF):
                if type(module) is kind.__base__:
                    module.__class__ = kind
        for scale, module in enumerate(self.model.fusion):
            module.rows = model.multiple >> scale

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:  # two (B, 1, H, W) -> (B, 1, H, W)
        model, batch, (height, width) = self.model, img1.shape[0], img1.shape[-2:]
        both = torch.cat([img1, img2])
        both = mirror(mirror(both, 2, model.multiple), 3, model.multiple)
        scales = zip(model.fusion, model.encoder(both), strict=True)  # (2B, C, H, W), x then y
        fused = [fusion(scale[:batch], scale[batch:]) for fusion, scale in scales]
        out = model.head(model.decoder(*fused), both[:batch], both[batch:])
        return out[..., :height, :width].clamp(0, 1)


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
        # By tracing: torch.export takes minutes to reason about these shapes, with equal results.
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
    proto = onnx.load_from_string(folded(file.getvalue()))
    onnx.helper.set_model_props(proto, {"asfe": json.dumps(metadata)})
    return proto.SerializeToString()


def folded(file: bytes) -> bytes:
    """The same network with its constants computed, half of its nodes: it loads twice as fast."""
    onnx, onnxruntime = libraries()
    options = onnxruntime.SessionOptions()
    # The basic level keeps to ONNX's own operators, so that other runtimes read the file as well.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors only
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        proto = onnx.load(options.optimized_model_filepath)
    own = [opset for opset in proto.opset_import if not opset.domain]
    del proto.opset_import[:]
    proto.opset_import.extend(own)
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
