"""The network is the published one; any size goes through; damaged weights are refused."""

import ctypes
import json
import pickle
import platform
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from direct import direct
from safetensors.torch import save
from torch import nn

from args_setting import ROOT, SIZES, ModelSize
from network import (
    AFF,
    SFEF,
    ASFEFusion,
    BlurPool,
    conv_bn,
    from_published,
    load_weights,
    pad_to_multiple,
    pick_device,
    save_weights,
)

PUBLISHED_STAGES = {  # module of ours -> name in the golden file
    **{f"encoder.blocks.{k}": f"encoder.block{k + 1}" for k in range(4)},
    **{f"fusion.{k}.aff1": f"fusionnet{k + 1}.AFFusion1" for k in range(4)},
    **{f"fusion.{k}.aff2": f"fusionnet{k + 1}.AFFusion2" for k in range(4)},
    **{f"fusion.{k}.casf": f"fusionnet{k + 1}.CASFusion" for k in range(4)},
    **{f"fusion.{k}.sfef": f"fusionnet{k + 1}.SFEFusion" for k in range(4)},
    **{f"decoder.up{k}": f"conv_up{k}" for k in range(1, 5)},
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def settled(model: ASFEFusion) -> ASFEFusion:
    """The model in evaluation mode, with running statistics as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


# as the published size in everything but its widths
NARROW = ModelSize((8, 10, 12, 16, 20), 4, (4,) * 4, dim=32, heads=2, experts=2, slots=8)


@pytest.fixture(scope="module")
def compact() -> ASFEFusion:
    torch.manual_seed(1)
    return settled(ASFEFusion("compact"))


# --- the published function ------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_file(shared, tmp_path_factory) -> Path:
    """A checkpoint in the published format: their names, unused tensors, DataParallel's prefix."""
    sys.path.insert(0, str(shared / "golden"))
    import weights

    arrays = weights.state_dict(shared / "golden" / "authors_keys.json")
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    blur = torch.outer(row, row) / 64
    state = {
        f"module.{name}": blur.expand(array.shape).clone()
        if name.endswith("down_anti.filt")
        else torch.from_numpy(np.asarray(array))
        for name, array in arrays.items()
    }
    path = tmp_path_factory.mktemp("published") / "ASFE.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def published_model(published_file) -> ASFEFusion:
    model, metadata = load_weights(published_file)
    assert metadata["aff"] == model.aff == "published"
    return model


CASES = ["ct_mri_16009", "noise_2x128x256"]


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(published_model, shared, case, monkeypatch):
    compare_golden(published_model, shared, case, monkeypatch)


@pytest.fixture
def published_on_cuda(published_file, monkeypatch):
    """In float32 as it is: without the shortened products that convolutions take by default."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return load_weights(published_file, "cuda")[0]


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors_on_cuda(published_on_cuda, shared, case, monkeypatch):
    compare_golden(published_on_cuda, shared, case, monkeypatch)


def compare_golden(model: ASFEFusion, shared: Path, case: str, monkeypatch) -> None:
    """Every stage of the network against the published implementation's, to 1e-4."""
    expected = np.load(shared / "golden" / "expected.npz")
    stages: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            if isinstance(module, SFEF) and inputs[1] is not None:
                output = module.forward(inputs[0])  # times no weight; tokens are normalised twice
            # the encoder takes one image after the other, or both as one batch
            both = "encoder" in name and len(output) == 2 * len(expected[f"{case}/img1"])
            for t in output.chunk(2) if both else [output]:
                i = int(f"{name}#0" in stages)
                stages[f"{name}#{i}"] = t.cpu().clone()  # as maps may be overwritten later

        return hook

    def keep_frequency(aff, name, spectrum, x):
        """The network transforms the sum of two spectra back; this looks at each alone."""
        z = spectrum(x)
        stages[f"{name}#0"] = aff.inverse(z, x.shape[2:]).cpu()
        return z

    handles = []
    for ours, theirs in PUBLISHED_STAGES.items():
        module = model.get_submodule(ours)
        if isinstance(module, AFF):
            whole = partial(keep_frequency, module, theirs, module.spectrum)
            monkeypatch.setattr(module, "spectrum", whole)
        else:
            handles.append(module.register_forward_hook(keep(theirs)))
    device = next(model.parameters()).device
    images = (torch.from_numpy(expected[f"{case}/img{i}"]).to(device) for i in (1, 2))
    with torch.no_grad():
        fused = model(*images).cpu()
    for handle in handles:
        handle.remove()

    for k in range(1, 5):  # their fusion module ends with SFEF
        stages[f"fusionnet{k}#0"] = stages[f"fusionnet{k}.SFEFusion#0"]
    names = {n.removeprefix(f"{case}/") for n in expected.files if n.startswith(f"{case}/")}
    assert names - {"img1", "img2", "fused"} == stages.keys()
    assert relative_error(fused, torch.from_numpy(expected[f"{case}/fused"])) < 1e-4
    for name, t in stages.items():
        c, h, w = t.shape[1:]
        sample = t[:, :: max(1, c // 8), :: max(1, h // 16), :: max(1, w // 16)]
        golden = torch.from_numpy(expected[f"{case}/{name}"])
        assert relative_error(sample, golden) < 1e-4, name


def test_only_the_listed_tensors_are_unused(published_file, shared):
    unused = set(json.loads((shared / "golden" / "authors_unused_keys.json").read_text()))
    state = torch.load(published_file, weights_only=True)
    dropped = {
        key.removeprefix("module.") for key, value in state.items() if not from_published({key: 0})
    }
    assert {key for key in dropped if not key.endswith("filt")} == unused


def test_the_order_of_weights_in_memory_changes_no_result(tmp_path):
    model = ASFEFusion("compact").eval()
    save_weights(model, tmp_path / "w.safetensors", {}, half=False)
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    for m in (model, loaded):
        embed = m.fusion[0].casf.embed1.weight  # (D, C, p, p)
        assert embed.permute(2, 3, 1, 0).is_contiguous()
    images = torch.rand(2, 1, 1, 32, 48)
    plain = deepcopy(model).to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        expected = model(*images)
        assert torch.equal(loaded(*images), expected)
        torch.testing.assert_close(plain(*images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aff", ["full", "published"])
@pytest.mark.parametrize("side", [(64, 96), (192, 128)])
@pytest.mark.parametrize("size", ["compact", NARROW], ids=["compact", "narrow"])
def test_equals_the_direct_version(aff, side, size):
    model = settled(ASFEFusion(size, aff))
    img1, img2 = torch.rand(2, 2, 1, *side)
    with torch.no_grad():
        assert relative_error(model(img1, img2), direct(model)(img1, img2)) < 1e-5
    # with gradients, normalisation is a pass of its own and nothing is done in place
    assert relative_error(model(img1, img2), direct(model)(img1, img2)) < 1e-5


@pytest.mark.parametrize("size", ["compact", NARROW], ids=["compact", "narrow"])
def test_bfloat16_autocast_stays_near(size):
    model = settled(ASFEFusion(size))
    img1, img2 = torch.rand(2, 1, 1, 64, 64)
    expected = model(img1, img2).detach()
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = model(img1, img2)
        with torch.no_grad():
            without = model(img1, img2)
    assert relative_error(with_gradients.float(), expected) < 0.1
    assert relative_error(without.float(), expected) < 0.1


@pytest.mark.parametrize("side", [(16, 24), (15, 33)])
def test_aff_is_the_fourier_transform_of_its_definition(side):
    """The default AFF against discrete Fourier sums in numpy, in float64."""
    aff = AFF(3, "backward").eval()
    nn.init.normal_(aff.bn.running_mean)
    x = torch.randn(1, 3, *side)
    h, w = side
    with torch.no_grad():
        got = aff(x)[0].double().numpy()
        weight = aff.conv.weight[:, :, 0, 0].double().numpy()

    rows = np.exp(-2j * np.pi * np.outer(np.arange(h), np.arange(h)) / h)
    columns = np.exp(-2j * np.pi * np.outer(np.arange(w), np.arange(w)) / w)
    spectrum = rows @ x[0].double().numpy() @ columns  # (3, H, W)
    half = spectrum[:, :, : w // 2 + 1]
    z = np.stack([half.real, half.imag], 1).reshape(6, h, -1)  # c0.re, c0.im, c1.re, …
    z = np.einsum("oc,chw->ohw", weight, z)
    mean, var = aff.bn.running_mean.numpy(), aff.bn.running_var.numpy()
    z = np.maximum((z - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None], 0)
    pooled = torch.from_numpy(np.stack([z.mean(0), z.max(0)])[None]).float()
    z = z * torch.sigmoid(aff.mask(pooled)).detach().double().numpy()[0]
    half = z[0::2] + 1j * z[1::2]
    # A real image's spectrum is point-symmetric; what the half lacks follows from that, and the
    # inverse ignores the imaginary parts of the sums over rows at frequency 0 and W/2.
    along_rows = np.einsum("hk,ckw->chw", rows.conj(), half) / h
    weights = np.full(w // 2 + 1, 2.0)
    weights[0] = 1
    if w % 2 == 0:
        weights[-1] = 1
    waves = columns.conj()[: w // 2 + 1]
    expected = np.einsum("chk,kw,k->chw", along_rows, waves, weights).real / w
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_aff_stays_in_float32_under_autocast():
    aff = AFF(4, "ortho").eval()
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = aff(x)
    assert got.dtype == torch.float32
    assert relative_error(got, aff(x)) < 1e-5  # bfloat16 would be 1e-3 off


def test_conv_bn_folds_without_a_change():
    conv, bn = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(conv_bn(conv, bn, x), bn(conv(x))) < 1e-5


def test_training_without_gradients_updates_every_batchnorm():
    """What the trainer does to settle the statistics of averaged weights."""
    model = ASFEFusion(NARROW).train()
    with torch.no_grad():
        model(*torch.rand(2, 2, 1, 32, 32))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert [name for name, bn in norms.items() if bn.num_batches_tracked == 0] == []


@pytest.mark.parametrize("height", [4, 16, 34, 64, 98, 130, 482])
def test_blurpool_of_rows_is_that_of_the_whole(height):
    pool, x = BlurPool(3), torch.rand(2, 3, height, 12)
    with torch.no_grad():
        assert torch.equal(pool(x), pool._rows(x, 1, 2))


def test_taps_are_taken_where_they_are_few():
    narrow = {size: ASFEFusion(size).narrow for size in ("compact", NARROW)}
    assert narrow == {"compact": False, NARROW: True}
    for change in ({"tail": 6}, {"sfef_residual": True}):
        assert not ASFEFusion(replace(NARROW, **change)).narrow


def test_parameter_counts():
    with torch.device("meta"):
        counts = {size: sum(p.numel() for p in ASFEFusion(size).parameters()) for size in SIZES}
    assert counts["paper"] == 170_982_569
    assert counts["compact"] <= 5_000_000


@pytest.mark.parametrize("aff", ["full", "published"])
def test_every_parameter_gets_a_gradient(aff):
    model = ASFEFusion("compact", aff).train()
    model(*torch.rand(2, 2, 1, 64, 64)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The published inverse transform reads only rows 0 and 1, but those through every weight.
    assert without == []


# --- any size --------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(16, 16), (100, 130), (255, 255), (192, 256), (512, 384)])
def test_any_size_goes_through(compact, side):
    fused = compact.fuse(*torch.rand(2, *side))
    assert fused.shape == side
    assert 0 <= fused.min() and fused.max() <= 1
    assert torch.isfinite(fused).all()


def test_padding_leaves_alone_what_needs_none(compact):
    images = torch.rand(2, 1, 1, 96, 64)
    assert torch.equal(pad_to_multiple(images[0], 16), images[0])
    with torch.no_grad():
        assert torch.equal(compact.fuse(*images), compact(*images).clamp(0, 1))


@pytest.mark.parametrize("side", [(16, 16), (20, 50), (127, 129)])
def test_padding_mirrors(side):
    x = torch.rand(1, 1, *side)
    padded = pad_to_multiple(x, 128)
    assert [n % 128 for n in padded.shape[2:]] == [0, 0]
    widths = [(0, p - n) for p, n in zip(padded.shape[2:], side, strict=True)]
    assert np.array_equal(padded[0, 0].numpy(), np.pad(x[0, 0].numpy(), widths, "symmetric"))


def test_fuse_takes_arrays_and_integers(compact):
    img = np.random.default_rng(0).integers(0, 256, (2, 32, 48), dtype=np.uint8)
    fused = compact.fuse(img[0], img[1])
    assert torch.equal(fused, compact.fuse(*(img / np.float32(255))))
    wide = img.astype(np.uint16) * 257
    assert torch.allclose(fused, compact.fuse(wide[0], wide[1]), atol=1e-6)
    read_only = img[:, ::-1].copy()[:, ::-1]
    read_only.setflags(write=False)
    assert torch.equal(fused, compact.fuse(read_only[0], read_only[1]))


def test_constant_images_give_no_nan(compact):
    for stretch in (False, True):
        for level in (0.0, 0.5, 1.0):
            flat = torch.full((64, 64), level)
            assert torch.isfinite(compact.fuse(flat, flat, stretch)).all()


def test_stretch_uses_the_whole_range(compact):
    fused = compact.fuse(*torch.rand(2, 2, 1, 32, 32), stretch=True)
    assert fused.amin((1, 2, 3)).eq(0).all() and fused.amax((1, 2, 3)).eq(1).all()


def test_fuse_keeps_the_mode(compact):
    model = ASFEFusion("compact").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse(*torch.rand(2, 16, 16))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("img1", "img2", "message"),
    [
        (torch.rand(16, 16), torch.rand(16, 17), "img1 is 16x16 and img2 is 16x17"),
        (torch.rand(15, 64), torch.rand(15, 64), "img1 is 15x64, expected at least 16x16"),
        (torch.rand(3, 64, 64), torch.rand(3, 64, 64), "img1 has shape"),
        (torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64), "img1 has shape"),
        (torch.full((16, 16), torch.nan), torch.rand(16, 16), "img1 has values that are not"),
        (torch.rand(16, 16), torch.rand(16, 16) + 1, "img2 has values from 1.* to .*, expected 0"),
        (torch.ones(16, 16).int(), torch.rand(16, 16), "img1 is of torch.int32, expected floats"),
    ],
)
def test_fuse_names_what_is_wrong(compact, img1, img2, message):
    with pytest.raises(ValueError, match=message):
        compact.fuse(img1, img2)


def test_forward_is_strict(compact):
    with pytest.raises(ValueError, match="multiples of 16"):
        compact(*torch.rand(2, 1, 1, 40, 64))
    with pytest.raises(ValueError, match="expected"):
        compact(torch.rand(1, 1, 32, 32), torch.rand(2, 1, 32, 32))


# --- weights ---------------------------------------------------------------------------------


def test_saved_weights_come_back(compact, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(compact, path, {"task": "PET-MRI", "metrics": {"SSIM": 0.7}}, half=False)
    model, metadata = load_weights(path)
    assert metadata["task"] == "PET-MRI" and metadata["size"] == "compact"
    assert metadata["metrics"] == {"SSIM": 0.7}
    images = torch.rand(2, 40, 56)
    assert torch.equal(model.fuse(*images), compact.fuse(*images))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_float16_weights_fit_the_promise(compact, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(compact, path, {})
    assert path.stat().st_size <= 10e6
    images = torch.rand(2, 64, 64)
    difference = load_weights(path)[0].fuse(*images) - compact.fuse(*images)
    assert difference.abs().mean() < 5e-3


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
    ],
)
def test_odd_metadata_are_refused(tmp_path, metadata):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save({"a": torch.zeros(2)}, {"asfe": json.dumps(metadata)}))
    with pytest.raises(ValueError, match="do not describe a network"):
        load_weights(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = ASFEFusion("compact")
    path = tmp_path / "w.safetensors"
    for value in (torch.nan, 1e6):  # the second only in float16
        nn.init.constant_(model.decoder.outlayer.weight, value)
        with pytest.raises(ValueError, match=r"decoder\.outlayer\.weight has values that are not"):
            save_weights(model, path, {})
    assert list(tmp_path.iterdir()) == []


# --- devices ---------------------------------------------------------------------------------


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "meta", "xpu"):
        with pytest.raises(ValueError, match="expected auto, cpu"):
            pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no such device"):
            pick_device("cuda")


SUBNORMAL = """
import io, sys
sys.path.insert(0, "benchmarks")
import forward, network, test_asfe, torch
if sys.argv[1] == "script":
    network.start(test_asfe.TestArgs(DEVICE="cpu", threads=2))
else:
    torch.set_num_threads(2)
    sys.stdin = io.StringIO("0")  # no pass: building the paper size starts threads
    forward.serve("paper", sys.argv[1])
a = torch.full((1024, 1024), 1e-20)
print("left:", int((a @ a).count_nonzero()))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86")
@pytest.mark.parametrize("who", ["script", "ours", "direct"])
def test_subnormal_numbers_are_zero_in_every_thread(who):
    """After `start`, and in the speed benchmark; its direct version keeps the library's default."""
    command = [sys.executable, "-c", SUBNORMAL, who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"left: {2**20 if who == 'direct' else 0}"


KEPT = """
import resource, sys, torch, network
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(2**22) for _ in range(6)]  # 16 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if sys.argv[1] == "kept":
    network.keep_freed_memory(network.ASFEFusion("compact"))
faults()
print(*sorted(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept():
    """Maps that were freed come back without page faults; by default they do not."""
    counts = []
    for choice in ("kept", "returned"):
        command = [sys.executable, "-c", KEPT, choice]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        counts.append([int(n) for n in done.stdout.split()])
    kept, returned = counts
    # at best, as a small thing in a gap may cost a map its old place once; of up to 24576
    assert kept[0] < 100
    assert kept[0] < returned[-1]


BUFFERS = """
import ctypes, sys, torch, network
class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
with torch.device("meta"):
    model = network.ASFEFusion("paper")
if sys.argv[1] == "kept":
    network.keep_freed_memory(model)
def in_use():
    info = libc.mallinfo2()
    return info.hblkhd + info.uordblks
before = in_use()
for p, c in zip(model.size.patch, model.size.channels[1:]):
    tokens = torch.ones(network.PATCH_ROWS, 256, model.size.dim)
    tokens @ torch.ones(network.PATCH_ROWS, model.size.dim, p * c)
print(in_use() - before)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="about MKL")
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="about glibc from 2.33 on",
)
def test_buffers_of_matrix_products_come_first():
    """After the widest product the others need no memory that stays; without it they do."""
    left = []
    for choice in ("kept", "returned"):
        command = [sys.executable, "-c", BUFFERS, choice]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        left.append(int(done.stdout))
    assert 10 * left[0] + 1e5 < left[1]
