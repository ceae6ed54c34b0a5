"""Weights: what is saved comes back, and what is damaged or foreign is refused in one line."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from networks import NARROW
from safetensors import safe_open
from safetensors.torch import save
from stated import GOLDEN
from torch import nn

from args_setting import SIZES, WeightsArgs
from cli import UserError
from network import ASFEFusion
from weights import from_published, load_model, load_weights, save_weights


def test_saved_weights_come_back(compact, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(compact, path, {"task": "PET-MRI", "metrics": {"SSIM": 0.7}}, half=False)
    model, metadata = load_weights(path)
    assert metadata["task"] == "PET-MRI" and metadata["size"] == "compact"
    assert metadata["metrics"] == {"SSIM": 0.7}
    images = torch.rand(2, 40, 56)
    assert torch.equal(model.fuse(*images), compact.fuse(*images))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("modules", [["casf"], ["aff", "sfef"], ["blend"], ["casf", "blend"]])
def test_weights_tell_what_they_are_without(tmp_path, modules, capsys):
    path = tmp_path / "w.safetensors"
    save_weights(ASFEFusion(SIZES["compact"].without(modules)), path, {"task": "all"})
    model = load_model(WeightsArgs(weights=path), "CT-MRI", torch.device("cpu"))
    assert model.size == SIZES["compact"].without(modules)
    named = "".join(f" without {module}" for module in modules)
    assert f"(compact{named}, all, date unknown)" in capsys.readouterr().out


def test_float16_weights_fit_the_promise(compact, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(compact, path, {})
    assert path.stat().st_size <= 10e6
    images = torch.rand(2, 64, 64)
    difference = load_weights(path)[0].fuse(*images) - compact.fuse(*images)
    assert difference.abs().mean() < 5e-3


def test_what_float16_cannot_hold_stays_float32(tmp_path):
    """Statistics of a large network pass 65,504, where float16 ends; so may a weight."""
    model = ASFEFusion(NARROW).eval()
    large = model.decoder.up4.bn1.running_var
    large.fill_(481_097.0)
    weight = model.encoder.inlayer.weight
    with torch.no_grad():
        weight[0] = -1e6
    path = tmp_path / "w.safetensors"
    save_weights(model, path, {})
    with safe_open(path, "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in list(file.keys())}
    assert kinds["decoder.up4.bn1.running_mean"] == kinds["encoder.inlayer.weight"] == torch.float32
    assert kinds["decoder.up4.conv1.weight"] == torch.float16
    loaded = load_weights(path)[0]
    assert torch.equal(loaded.decoder.up4.bn1.running_var, large)
    assert torch.equal(loaded.encoder.inlayer.weight, weight)


def test_a_negative_variance_is_refused(tmp_path):
    model = ASFEFusion(NARROW)
    model.decoder.up1.bn2.running_var[0] = -1
    with pytest.raises(UserError, match=r"decoder\.up1\.bn2\.running_var has negative variances"):
        save_weights(model, tmp_path / "w.safetensors", {})


def damaged(path: Path, kind: str, compact: ASFEFusion) -> str:
    """Write a file that must be refused; returns a part of the message."""
    if kind == "empty":
        path.write_bytes(b"")
        return "damaged"
    if kind == "other keys":
        torch.save({"conv.weight": torch.zeros(3)}, path)
        return "shape"
    if kind == "other shapes":
        torch.save({"outlayer.weight": torch.zeros(1, 9, 1, 1)}, path)
        return "shape"
    if kind == "pickled code":
        path.write_bytes(pickle.dumps(Path("x")))
        return "pickled code"
    if kind == "not tensors":
        torch.save([1, 2], path)
        return "state dict"
    if kind == "text":
        path.write_text("hello world\n")
        return "damaged"
    if kind == "safetensors":
        save_weights(compact, path, {})
        return "damaged"
    if kind == "keys that are no names":
        torch.save({1: torch.zeros(3)}, path)
        return "state dict"
    if kind == "truncated":
        torch.save(from_published(compact.state_dict()), path)
        path.write_bytes(path.read_bytes()[:50_000])
        return "damaged"
    raise AssertionError(kind)


KINDS = ["empty", "other keys", "other shapes", "pickled code", "not tensors", "truncated"]
KINDS += ["text", "safetensors", "keys that are no names"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_damaged_checkpoints_are_refused(compact, tmp_path, kind):
    path = tmp_path / "w.pth"
    message = damaged(path, kind, compact)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 2**16
    with pytest.raises(UserError, match=r"would unpack to 4\d{6} bytes"):
        load_weights(path)


@pytest.mark.parametrize("cut", [0, 5, 1000, 100_000])
def test_truncated_safetensors_are_refused(compact, tmp_path, cut):
    path = tmp_path / "w.safetensors"
    save_weights(compact, path, {})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="damaged"):
        load_weights(path)


def test_foreign_safetensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match="not made by this project"):
        load_weights(path)
    with pytest.raises(ValueError, match="no such file"):
        load_weights(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "metadata",
    [
        {"size": "compact", "aff": "full", "widths": [1]},
        {"size": "compact", "aff": "full", "widths": {"depth": 3}},
        {"size": "compact", "aff": "full", "widths": {"channels": 5}},
        {"size": "compact", "aff": "full", "widths": {"experts": -1}},
        {"size": "compact", "aff": "full", "widths": {"channels": []}},
        {"size": "compact", "aff": "full", "widths": {"head": "x"}},
        {"size": "compact", "aff": "full", "widths": {"fft_norm": "x"}},
        {"size": "compact", "aff": "Published", "widths": {}},
        {"size": "compact", "aff": "full", "widths": {"channels": {}}},
        {"size": "compact", "aff": "full", "widths": {"channels": [16, 16, 32, 48, 64.0]}},
        {"size": "compact", "aff": "full", "widths": {"channels": [16, 16, 32, 48, 10**9]}},
        {"size": "compact", "aff": "full", "widths": {"experts": 1_000_000}},
        {"size": "compact", "aff": "full", "widths": {"slots": 10**12}},
        {"size": "compact", "aff": "full", "widths": {"heads": 0}},
        {"size": "compact", "aff": "full", "widths": {"heads": 7}},
        {"size": "compact", "aff": "full", "widths": {"fft_norm": []}},
        {"size": "compact", "aff": [], "widths": {}},
    ],
)
def test_odd_metadata_are_refused(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.zeros(2)}, {"asfe": json.dumps(metadata)}))
    with pytest.raises(ValueError, match="do not describe a network"):
        load_weights(path)


def test_metadata_nested_too_deep_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.zeros(2)}, {"asfe": "[" * 200_000 + "]" * 200_000}))
    with pytest.raises(UserError, match="damaged or not safetensors"):
        load_weights(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = ASFEFusion("compact")
    path = tmp_path / "w.safetensors"
    for value in (torch.nan, torch.inf):
        nn.init.constant_(model.decoder.outlayer.weight, value)
        with pytest.raises(ValueError, match=r"decoder\.outlayer\.weight has values that are not"):
            save_weights(model, path, {})
    assert list(tmp_path.iterdir()) == []


# --- the published code ----------------------------------------------------------------------


def test_only_the_listed_tensors_are_unused():
    unused = set(json.loads((GOLDEN / "authors_unused_keys.json").read_text()))
    keys = json.loads((GOLDEN / "authors_keys.json").read_text())
    dropped = {key for key in keys if not from_published({f"module.{key}": 0})}
    assert {key for key in dropped if not key.endswith("filt")} == unused
