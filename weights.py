"""Weights: the shipped files, loading and saving, and checkpoints of the published code."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import cli
import limits
from args_setting import MODULES, SIZES, ModelSize, WeightsArgs, shipped_path
from cli import UserError, file_hash
from network import ASFEFusion

# Where the published checkpoints call a part otherwise; applied in this order.
RENAMED = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^module\.", ""),
        (r"^encoder\.block(\d)\.", lambda m: f"encoder.blocks.{int(m[1]) - 1}."),
        (r"^fusionnet(\d)\.", lambda m: f"fusion.{int(m[1]) - 1}."),
        (r"^conv_up", "decoder.up"),
        (r"^outlayer\.", "decoder.outlayer."),
        (r"\.AFFusion(\d)\.conv_layer1\.", r".aff\1.mask."),
        (r"\.AFFusion(\d)\.conv_layer\.", r".aff\1.conv."),
        (r"\.AFFusion(\d)\.", r".aff\1."),
        (r"\.CASFusion\.", ".casf."),
        (r"\.patchembed(\d)\.proj\.", r".embed\1."),
        (r"\.QKV_Block(\d)\.norm1\.", r".norm\1."),
        (r"\.QKV_Block(\d)\.attn\.qkv\.", r".qkv\1."),
        (r"\.depatch\.projection\.0\.", ".unpatch."),
        (r"\.SFEFusion\.experts\.", ".sfef."),
        (r"\.SFEFusion\.", ".sfef."),
        (r"(\.experts\.\d)\.3\.", r"\1.2."),  # the published expert has a dropout at place 2
    )
)
# Stored by the published code but never used in its forward pass, or rebuilt from a formula here.
UNUSED = re.compile(r"\.QKV_Block\d\.(attn\.proj|norm2|mlp)\.|\.down_anti\.filt$")
# The least and the most that a file may ask for. The published network is within these bounds.
BOUNDS = {
    "channels": (2, 1024),
    "tail": (2, 1024),
    "patch": (1, 64),
    "dim": (1, 4096),
    "heads": (1, 64),
    "experts": (1, 64),
    "slots": (1, 4096),
}


class Trained(NamedTuple):
    """Which trained network to load; the fields are those of WeightsArgs."""

    weights: Path | None = None  # its file; None: the shipped one
    size: str = "compact"
    aff: str = "auto"  # inverse transform of AFF: full, published, or auto, as the file says


def weights_path(which: Trained | WeightsArgs, task: str) -> Path:
    """The file of a trained network; UserError if none is shipped for its size."""
    path = which.weights or shipped_path(which.size, task)
    if which.weights is None and not path.is_file():
        raise UserError(
            f"no weights of size {which.size} for {task}, expected {path}; train, or use --weights"
        )
    return path


def load_model(
    which: Trained | WeightsArgs,
    task: str,
    device: torch.device | str,
    say: Callable[[str], None] = cli.say,
) -> ASFEFusion:
    """A trained network in evaluation mode.

    `say` gets which it is: file, size, task and date, and if it learned another task.
    Raises UserError if there is none, or if its file does not fit.
    """
    path = weights_path(which, task)
    aff = None if which.aff == "auto" else which.aff
    model, metadata = load_weights(path, device, aff)
    check_size(path, metadata, which.size)
    learned, day = metadata.get("task"), metadata.get("date")
    what = which.size + "".join(f" without {module}" for module in parts_of(model.size)[1])
    say(f"weights: {path} ({what}, {learned or 'task unknown'}, {day or 'date unknown'})")
    if learned not in (None, "all", task):
        say(f"note: these weights learned {learned}, but the task is {task}")
    return model


def load_sized(
    path: Path, size: str, device: torch.device | str, aff: str | None = None
) -> ASFEFusion:
    """`load_weights` of a file that must be of one size; UserError if it is not."""
    model, metadata = load_weights(path, device, aff)
    check_size(path, metadata, size)
    return model


def check_size(path: Path, metadata: dict, size: str) -> None:
    """UserError if the metadata of a file name another size."""
    if metadata["size"] != size:
        raise UserError(f"weights {path} are of size {metadata['size']}, expected size {size}")


def load_weights(
    path: Path, device: torch.device | str = "cpu", aff: str | None = None
) -> tuple[ASFEFusion, dict]:
    """A model in evaluation mode and the metadata of its file.

    Takes our safetensors, and state dicts (`.pth`) made by the published code, also wrapped in
    `module.` by DataParallel; those select `aff="published"`, unless `aff` says another variant.
    Pickled code is never run.

    Raises:
        UserError: the file is absent, damaged, of another model, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    digest = file_hash(path)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
    else:
        state = from_published(read_state_dict(path))
        metadata = {"size": "paper", "widths": asdict(SIZES["paper"]), "aff": "published"}
    model = described_by(metadata | {"aff": aff or metadata["aff"]}, path)
    check_state(model.state_dict(), state, path)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    check_finite(state, f"weights {path}")
    model.load_state_dict(state, assign=True)
    model.weights_sha256 = digest
    return model.to(device, memory_format=torch.channels_last).eval(), metadata


def save_weights(model: ASFEFusion, path: Path, metadata: dict, half: bool = True) -> None:
    """Write safetensors with JSON-able `metadata`; whole or not at all.

    If `half`, weights are float16, but for BatchNorm's statistics and whatever does not fit:
    float16 ends at 65,504. Size, widths and AFF variant are added to the metadata. Raises UserError
    for values that are not finite.
    """
    from images import write_bytes  # not on top: torch.hub loads without image libraries

    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    check_finite(state, f"weights for {path}")
    if half:
        state = {key: halved(key, value) for key, value in state.items()}
    state = {key: value.contiguous() for key, value in state.items()}
    name, _ = parts_of(model.size)
    metadata = {"size": name, "widths": asdict(model.size), "aff": model.aff, **metadata}
    write_bytes(path, save(state, {"asfe": json.dumps(metadata)}))


def halved(key: str, value: Tensor) -> Tensor:
    """A tensor of a network in float16, if it holds its values and they are no statistics."""
    largest = torch.finfo(torch.float16).max
    if not value.is_floating_point() or "running_" in key or value.abs().max() > largest:
        return value
    return value.half()


def parts_of(size: ModelSize) -> tuple[str, list[str]]:
    """The name of a size in SIZES, else "custom", and those of MODULES that it is without."""
    for name, whole in SIZES.items():
        # A module counts only if the whole size has it: else leaving it out changes nothing.
        lacks = [m for m in MODULES if size.without([m]) == size and whole.without([m]) != whole]
        if whole.without(lacks) == size:
            return name, lacks
    return "custom", []


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for a state dict of the published code; its unused tensors are left out."""
    ours = {}
    for key, value in state.items():
        if not UNUSED.search(key):
            for pattern, name in RENAMED:
                key = pattern.sub(name, key)
            ours[key] = value
    return ours


def described_by(metadata: dict, path: Path) -> ASFEFusion:
    """A network without values, as the metadata of a file say; UserError if they do not."""
    try:
        widths = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["widths"].items()}
        size = ModelSize(**widths)
        check_widths(size)
        with torch.device("meta"), WithoutDraws():  # as the values are replaced at once
            return ASFEFusion(size, metadata["aff"])
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        raise UserError(f"weights {path}: the metadata do not describe a network") from None


class WithoutDraws(TorchFunctionMode):
    """Leaves initial values out: no normal numbers are drawn.

    On "meta" PyTorch would load modules for them, which takes seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.init.normal_:
            return kwargs["tensor"]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs or {})


def check_widths(size: ModelSize) -> None:
    """ValueError for widths that no network has, before a crafted file costs time or memory."""
    for name, default in asdict(ModelSize()).items():
        value = getattr(size, name)
        values, defaults = (v if isinstance(v, tuple) else (v,) for v in (value, default))
        low, high = BOUNDS.get(name, (None, None))
        alike = list(map(type, values)) == list(map(type, defaults))
        if not alike or (name in BOUNDS and not low <= min(values) <= max(values) <= high):
            raise ValueError(f"{name} is {value!r}, expected the like of {default!r}")
    if size.dim % size.heads:
        raise ValueError(f"dim is {size.dim}, expected a multiple of heads, {size.heads}")


def check_finite(state: dict[str, Tensor], name: str) -> None:
    """UserError that names the first tensor with a value that no network can compute with.

    That is a value that is not finite, or a negative variance.
    """
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name}: {key} has values that are not finite")
        if key.endswith("running_var") and (value < 0).any():
            raise UserError(f"{name}: {key} has negative variances")


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], path: Path) -> None:
    """UserError that names the first tensor of a file that is not one of the network's."""
    want, got = ({key: tuple(t.shape) for key, t in part.items()} for part in (own, state))
    for key in {**want, **got}:
        if want.get(key) != got.get(key):
            shapes = f"has shape {got.get(key)}, expected {want.get(key)}"
            raise UserError(f"weights {path}: {key!a} {shapes}")
        value, floats = state[key], own[key].is_floating_point()
        plain = value.layout == torch.strided and value.device.type == "cpu" and not (
            value.is_quantized or value.is_complex()
        )  # fmt: skip
        if not plain or value.is_floating_point() != floats or value.dtype == torch.bool:
            kind = str(value.dtype).removeprefix("torch.")
            expected = "real numbers" if floats else "integers"
            raise UserError(f"weights {path}: {key} is {kind}, expected {expected}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file of ours; UserError for any other."""
    limits.check_bytes(path, limits.WEIGHTS_BYTES, " for weights")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > limits.HEADER_BYTES:
            raise ValueError(f"a header of {header} bytes")
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("asfe", "null"))
            names = file.keys()  # the file itself cannot be iterated
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"weights {path}: damaged or not safetensors ({reason})") from None
    if not isinstance(metadata, dict) or not {"size", "widths", "aff"} <= metadata.keys():
        raise UserError(f"weights {path}: not made by this project, expected `asfe` metadata")
    return state, metadata


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file; UserError if it is damaged or holds anything else."""
    try:
        state = load_plain(path)
    except pickle.UnpicklingError:
        raise UserError(f"weights {path}: damaged, or pickled code, which is not run") from None
    except UserError:
        raise
    except Exception as error:  # a parser of strange bytes may stumble in any way
        first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"weights {path}: damaged or not a checkpoint ({first_line})") from None
    items = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        raise UserError(f"weights {path}: expected a state dict of tensors")
    return dict(items)


def load_plain(path: Path, most: int = limits.WEIGHTS_BYTES):
    """What `torch.save` wrote, on the CPU, if it is tensors and plain values.

    Raises UserError for a file that has more than `most` bytes or would unpack to more than it has,
    and what torch raises for a damaged one.
    """
    length = limits.check_bytes(path, most, " for a checkpoint")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > length:  # PyTorch does not pack
            raise UserError(f"{path}: damaged or not a checkpoint, it would unpack to {size} bytes")
    with warnings.catch_warnings():  # the error that follows says enough
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
