"""The exported file gives the network's numbers, on any size, also without PyTorch."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from networks import relative_error, settled

import export_onnx
import test_asfe
from args_setting import ROOT, SIZES, ExportArgs, TestArgs
from cli import parse_args
from images import write_png
from network import AFF, SFEF, ASFEFusion
from phantom import phantom_pair
from weights import save_weights

pytest.importorskip("onnx", reason="needs requirements-onnx.txt")
pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")


@pytest.fixture
def call(in_process):
    """Run export_onnx.py in this process: exit code, stdout, stderr."""
    return lambda *argv: in_process(export_onnx, lambda: parse_args(ExportArgs), *argv)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "pet.onnx"
    export_onnx.main(ExportArgs(task="all", out=path))
    return path


@pytest.mark.parametrize("norm", ["backward", "ortho"])
@pytest.mark.parametrize("side", [(2, 2), (2, 16), (16, 2), (20, 64), (64, 20), (6, 7)])
@pytest.mark.parametrize("rows", [1, 2])
def test_transforms_as_matrix_products(norm, side, rows):
    fourier, x = export_onnx.Fourier(*side, rows, norm), torch.rand(2, 3, *side)
    z = AFF(3, norm).transform(x)
    assert relative_error(fourier.forward(x), z) < 1e-6
    assert relative_error(fourier.inverse(z), x) < 1e-6
    few = z[..., :2].clone()  # as where AFF computes what the published code does
    few[:, 1::2] = 0
    padded = torch.cat([few, torch.zeros_like(z[..., 2:])], 3)
    assert relative_error(fourier.inverse(few), AFF(3, norm).inverse(padded, *side)) < 1e-6


@pytest.mark.parametrize("aff", ["full", "published"])
@pytest.mark.parametrize("parts", [[], ["casf"], ["aff"], ["sfef"]])
@pytest.mark.parametrize("side", [(16, 48), (48, 16)])
def test_the_portable_network_is_the_same_function(aff, parts, side):
    model = settled(ASFEFusion(SIZES["compact"].without(parts), aff))
    img1, img2 = torch.rand(2, 2, 1, *side)
    with torch.no_grad():
        fused = export_onnx.PortableFusion(model)(img1, img2)
        assert relative_error(fused, model(img1, img2).clamp(0, 1)) < 1e-5


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("large", [False, True])
def test_experts_with_their_logits_as_a_matrix(residual, large):
    plain = SFEF(6, 3, 5, residual).eval()
    if large:  # exponentials of logits of some 200 overflow
        plain.norm.gamma.data *= 40
    portable = export_onnx.PortableSFEF(6, 3, 5, residual).eval()
    portable.load_state_dict(plain.state_dict())
    x = torch.rand(2, 6, 8, 12)
    with torch.no_grad():
        assert relative_error(portable(x), plain(x)) < (1e-4 if large else 1e-6)


def test_the_file_keeps_to_operators_of_onnx_and_has_its_constants_folded(exported):
    import onnx

    proto = onnx.load(exported)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 17)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not [node for node in proto.graph.node if node.op_type == "Constant"]


def test_openvino_takes_any_size_of_it(exported, shipped):
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    # by default OpenVINO computes in bfloat16 where the CPU can, see docs/deploy.md
    in_float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(exported, "CPU", in_float32)
    for size in (1, 64, 64), (2, 100, 75):
        batch, height, width = size
        img1, img2 = torch.rand(2, batch, 1, height, width)
        fused = compiled({"img1": img1.numpy(), "img2": img2.numpy()})[0]
        assert np.abs(fused - shipped.fuse(img1, img2).numpy()).max() <= export_onnx.TOLERANCE


@pytest.mark.parametrize("size", [(1, 16, 16), (1, 17, 240), (3, 90, 33)])
def test_the_file_fuses_sizes_it_was_not_checked_on(exported, shipped, size):
    batch, height, width = size
    img1, img2 = torch.rand(2, batch, 1, height, width)
    session = export_onnx.open_session(exported)
    described = json.loads(session.get_modelmeta().custom_metadata_map["asfe"])
    assert described == {"size": "compact", "task": "all", "aff": "full"}
    (fused,) = session.run(None, {"img1": img1.numpy(), "img2": img2.numpy()})
    assert fused.shape == (batch, 1, height, width)
    assert np.abs(fused - shipped.fuse(img1, img2).numpy()).max() <= export_onnx.TOLERANCE


def test_published_arithmetic_is_exported():
    model = settled(ASFEFusion("compact", "published"))
    file = export_onnx.export(model, {})
    assert max(export_onnx.differences(model, file)) <= export_onnx.TOLERANCE
    other = ASFEFusion("compact", "full")  # and it is not the other one
    other.load_state_dict(model.state_dict())
    assert max(export_onnx.differences(other.eval(), file)) > export_onnx.TOLERANCE


def test_the_example_writes_what_the_script_writes(exported, tmp_path):
    paths = [tmp_path / name for name in ("pet.png", "mri.png", "ours.png", "example.png")]
    for path, image in zip(paths, phantom_pair("PET-MRI", 100), strict=False):
        write_png(path, image)
    test_asfe.main(TestArgs(task="all", img1=paths[0], img2=paths[1], out=paths[2]))
    command = [ROOT / "onnx_example.py", exported, paths[0], paths[1], paths[3]]
    # PyTorch is out of reach
    barred = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
    barred += "runpy.run_path(sys.argv[0])"
    command = [sys.executable, "-c", barred, *map(str, command)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"fused image: {paths[3]}\n"
    ours, example = (cv2.imread(str(path)).astype(int) for path in paths[2:])
    assert np.ptp(ours) > 200 and np.abs(ours - example).max() <= 1


def test_the_example_says_in_one_line_what_is_wrong(exported, tmp_path, monkeypatch, capsys):
    for name, image in (
        ("a", np.zeros((32, 48))),
        ("b", np.zeros((32, 32))),
        ("s", np.zeros((8, 8))),
    ):
        write_png(tmp_path / f"{name}.png", image.astype(np.uint8))
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((32, 32), np.uint16))
    a, b, small, deep, out = (tmp_path / f"{n}.png" for n in ("a", "b", "s", "deep", "out"))
    cases = {
        "expected four files": (exported, a, b),
        "FUSED.png": (exported, a, a, tmp_path / "out.jpg"),
        "no.png: no such file": (exported, a, tmp_path / "no.png", out),
        "is 32x48": (exported, a, b, out),
        "expected 8 bits": (exported, deep, b, out),
        "is 8x8, expected at least 16x16": (exported, small, small, out),
        "no.onnx": (tmp_path / "no.onnx", a, a, out),
        "cannot be written": (exported, a, a, tmp_path / "no" / "out.png"),
    }
    for message, argv in cases.items():
        monkeypatch.setattr(sys, "argv", ["onnx_example.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "onnx_example.py"))
        err = capsys.readouterr().err.splitlines()
        mine = [line for line in err if line.startswith("onnx_example.py: error:")]
        assert stop.value.code == 2 and len(mine) == 1 and message in mine[0], (message, err)
    assert not out.exists()


def test_a_file_with_other_numbers_is_not_written(call, tmp_path, monkeypatch):
    right = export_onnx.rotation
    monkeypatch.setattr(export_onnx, "rotation", lambda angle: right(-angle))
    with pytest.raises(RuntimeError, match="the file differs by"):  # a bug of ours: a traceback
        call("--out", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "DIR/a.png"], "ends in .onnx"),
        (["--out", "DIR/file/a.onnx"], "exists"),
        (["--size", "paper"], "no weights of size paper"),
        (["--weights", "DIR/file"], "damaged"),
        (["--weights", "DIR/none.safetensors"], "no such file"),
        (["--task", "CT-PET"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, argv, message):
    (tmp_path / "file").write_text("")
    code, _, err = call(*(text.replace("DIR", str(tmp_path)) for text in argv))
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_absent_packages_are_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = call()
    assert code == 2 and "pip install -r requirements-onnx.txt" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("aff", ["full", "published"])
def test_the_paper_size(call, tmp_path, aff):
    model = settled(ASFEFusion(SIZES["paper"], aff))
    save_weights(model, tmp_path / "paper.safetensors", {})
    del model
    argv = ["--size", "paper", "--weights", tmp_path / "paper.safetensors"]
    code, out, err = call(*argv, "--out", tmp_path / "paper.onnx")
    assert code == 0, err
    assert out.count("differs from PyTorch by") == len(export_onnx.CHECKED)
