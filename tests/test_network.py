"""The network is the published one in every stage, one path in every mode, and takes any size."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from direct import direct
from networks import NARROW, relative_error, settled
from stated import GOLDEN, golden_arrays
from torch import nn
from torch.profiler import ProfilerActivity, profile

from args_setting import SIZES
from cli import UserError
from inference import optimise
from network import AFF, SFEF, ASFEFusion, FusionModule, bands, blend, pad_to_multiple

PUBLISHED_STAGES = {  # module of ours -> name in the golden file
    **{f"encoder.blocks.{k}": f"encoder.block{k + 1}" for k in range(4)},
    **{f"fusion.{k}": f"fusionnet{k + 1}" for k in range(4)},
    **{f"fusion.{k}.aff1": f"fusionnet{k + 1}.AFFusion1" for k in range(4)},
    **{f"fusion.{k}.aff2": f"fusionnet{k + 1}.AFFusion2" for k in range(4)},
    **{f"fusion.{k}.casf": f"fusionnet{k + 1}.CASFusion" for k in range(4)},
    **{f"fusion.{k}.sfef": f"fusionnet{k + 1}.SFEFusion" for k in range(4)},
    **{f"decoder.up{k}": f"conv_up{k}" for k in range(1, 5)},
}


# --- the published function ------------------------------------------------------------------


@pytest.fixture(params=["noise_2x128x256", "ct_mri_16009"])
def golden(request) -> dict[str, np.ndarray]:
    """Two images, what the published code makes of them, and a sample of each of its stages."""
    if request.param == "noise_2x128x256":
        return golden_arrays(GOLDEN / "expected.npz", request.param)
    shared = request.getfixturevalue("shared")  # a slice of a person
    return golden_arrays(shared / "golden" / "expected.npz", request.param)


def test_golden_vectors(published_model, golden, monkeypatch):
    """In float64, so that what is left is the rounding of the published float32 values.

    It is 6e-6 and 7e-6 on any CPU. In float32 it goes up to 2e-5, by the instructions that
    libraries choose.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of AFF, around its transforms
    images = {name: golden[name].astype(np.float64) for name in ("img1", "img2")}
    compare_golden(copy.deepcopy(published_model).double(), golden | images, bound=1e-5)


def test_golden_vectors_of_the_optimised_network(published_model, golden):
    gone = ("AFFusion",)  # of which it makes the sum
    compare_golden(optimise(published_model), golden, gone)


@pytest.fixture
def published_on_cuda(published_model, monkeypatch):
    """In float32 as it is: without the shortened products that convolutions take by default."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield published_model.to("cuda")
    published_model.to("cpu")


def test_golden_vectors_on_cuda(published_on_cuda, golden):
    compare_golden(published_on_cuda, golden)


def compare_golden(
    model: ASFEFusion,
    golden: dict[str, np.ndarray],
    gone: tuple[str, ...] = (),
    bound: float = 3e-5,
) -> None:
    """Every stage of the network but those `gone` against the published ones, to `bound`.

    By default it is one for float32 on any CPU. A term that is wrong makes 1e-3 and more.
    """
    stages: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, inputs, output):
            # the encoder takes both images as one batch, or one after the other as the published
            both = "encoder" in name and len(output) == 2 * len(golden["img1"])
            for t in output.chunk(2) if both else [output]:
                stages[f"{name}#{int(f'{name}#0' in stages)}"] = t.cpu().clone()

        return hook

    handles = [
        model.get_submodule(ours).register_forward_hook(keep(theirs))
        for ours, theirs in PUBLISHED_STAGES.items()
    ]
    device = next(model.parameters()).device
    images = (torch.from_numpy(golden[f"img{i}"]).to(device) for i in (1, 2))
    with torch.no_grad():
        fused = model(*images).cpu()
    for handle in handles:
        handle.remove()

    names = golden.keys() - {"img1", "img2", "fused"}
    names = {name for name in names if not any(part in name for part in gone)}
    assert names == stages.keys()
    assert relative_error(fused, torch.from_numpy(golden["fused"])) < bound
    for name in names:
        c, h, w = stages[name].shape[1:]
        sample = stages[name][:, :: max(1, c // 8), :: max(1, h // 16), :: max(1, w // 16)]
        assert relative_error(sample, torch.from_numpy(golden[name])) < bound, name


@pytest.mark.parametrize("aff", ["full", "published"])
@pytest.mark.parametrize("side", [(64, 96), (192, 128)])
@pytest.mark.parametrize("size", ["compact", NARROW], ids=["compact", "narrow"])
def test_equals_the_direct_version(aff, side, size):
    model = settled(ASFEFusion(size, aff))
    img1, img2 = torch.rand(2, 2, 1, *side)
    with torch.no_grad():
        assert relative_error(model(img1, img2), direct(model)(img1, img2)) < 1e-5


@pytest.mark.parametrize("size", ["compact", NARROW], ids=["compact", "narrow"])
def test_bfloat16_autocast_stays_near(size):
    model = settled(ASFEFusion(size))
    img1, img2 = torch.rand(2, 1, 1, 64, 64)
    with torch.no_grad():
        expected = model(img1, img2)
        with torch.autocast("cpu", torch.bfloat16):
            results = model(img1, img2), optimise(model)(img1, img2)
    for result in results:
        assert relative_error(result.float(), expected) < 0.1


def test_the_blend_stays_in_float32_under_autocast():
    img1, img2 = torch.rand(2, 1, 1, 64, 64)
    expected = blend(img1, img2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(blend(img1, img2), expected)


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


def test_maps_stay_channels_last_and_attention_fused():
    """Where a map changes its layout, the experts' attention falls to a slow and large kernel."""
    model, seen = settled(ASFEFusion(NARROW)), []
    for module in model.modules():
        if isinstance(module, SFEF):
            module.register_forward_pre_hook(
                lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last))
            )
    images = torch.rand(2, 2, 1, 64, 96)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        model(*images)  # with gradients
        with torch.no_grad():
            model(*images)
            optimise(model)(*images)
    assert seen == [True] * 12
    kernels = {event.key for event in watched.key_averages() if "attention" in event.key}
    assert any("flash" in kernel for kernel in kernels)
    assert not any("math" in kernel for kernel in kernels), kernels


def test_hooks_fire_and_keep_what_they_saw():
    """Without gradients as well: no later step writes over a map."""
    model, seen = settled(ASFEFusion(NARROW)), {}
    names = "encoder.blocks.0", "fusion.0", "fusion.0.aff1", "fusion.0.aff2", "fusion.0.casf.embed1"

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output, output.clone()

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    encoded = []
    model.encoder.register_forward_hook(lambda _, inputs, output: encoded.extend(output))
    with torch.no_grad():
        model(*torch.rand(2, 1, 1, 32, 32))
    assert seen.keys() == set(names) and len(encoded) == 4
    assert all(torch.equal(kept, then) for kept, then in seen.values())


def test_training_without_gradients_updates_every_batchnorm():
    """What the trainer does to settle the statistics of averaged weights."""
    model = ASFEFusion(NARROW).train()
    with torch.no_grad():
        model(*torch.rand(2, 2, 1, 32, 32))
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert [name for name, bn in norms.items() if bn.num_batches_tracked == 0] == []


def test_parameter_counts():
    with torch.device("meta"):
        counts = {size: sum(p.numel() for p in ASFEFusion(size).parameters()) for size in SIZES}
    assert counts["paper"] == 170_982_569
    assert counts["compact"] <= 5_000_000


@pytest.mark.parametrize(
    ("size", "aff"),
    [("compact", "full"), ("compact", "published"), (NARROW, "full")],
    ids=["compact", "compact, published", "narrow"],
)
def test_every_parameter_gets_a_gradient(size, aff):
    """No unused one: DistributedDataParallel would wait for its gradient."""
    model = ASFEFusion(size, aff).train()
    model(*torch.rand(2, 2, 1, model.multiple, model.multiple)).square().mean().backward()
    # The published inverse transform reads only rows 0 and 1, but those through every weight.
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_an_ablation_puts_the_plain_thing_in_place_of_a_module():
    x, y = torch.rand(2, 2, 8, 16, 16)
    images = torch.rand(2, 1, 1, 32, 32)

    def parts(*without):
        torch.manual_seed(0)
        module = FusionModule(8, 4, SIZES["compact"].without(without), "full").eval()
        model = ASFEFusion(SIZES["compact"].without(without)).eval()
        assert torch.allclose(optimise(model).fuse(*images), model.fuse(*images), atol=1e-5)
        return module, sum(p.numel() for p in model.parameters())

    whole, most = parts()
    module, fewer = parts("casf")
    expected = module.sfef(torch.cat([x + y, module.aff2(x) + module.aff1(y)], 1))
    assert torch.allclose(module(x, y), expected, atol=1e-5) and fewer < most
    module, fewer = parts("aff")
    spatial = module.casf(x, y)
    assert torch.allclose(module(x, y), module.sfef(torch.cat([spatial, spatial], 1)), atol=1e-5)
    assert fewer < most
    module, fewer = parts("sfef")
    joined = torch.cat([module.casf(x, y), module.aff2(x) + module.aff1(y)], 1)
    assert torch.allclose(module(x, y), module.sfef(joined), atol=1e-5)
    assert module.sfef.kernel_size == (1, 1)
    assert fewer < most
    assert set(parts("casf", "aff", "sfef")[0].state_dict()) == {"sfef.weight", "sfef.bias"}
    assert whole.casf and ASFEFusion(SIZES["compact"].without(["blend"])).size.head == "image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("Paper",), "size is 'Paper', expected one of paper, compact"),
     (("compact", "Published"), "aff is 'Published', expected full or published")],
)  # fmt: skip
def test_unknown_variants_are_named(arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        ASFEFusion(*arguments)


# --- any size --------------------------------------------------------------------------------


DISCS = (30, 40), (60, 50)  # centres


def test_the_blend_keeps_what_either_image_shows():
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    disc1, disc2 = (0.25 * torch.sigmoid(5 - torch.hypot(y - r, x - c)) for r, c in DISCS)
    dark, bright = torch.full((1, 1, 96, 96), 0.3), torch.full((1, 1, 96, 96), 0.6)
    for img1, img2 in (dark, bright), (bright, dark):
        plain = blend(img1, img2)
        assert torch.allclose(plain, torch.maximum(img1, img2), atol=1e-5)
        for change in disc1, -disc2:
            for planted in (img1 + change, img2), (img1, img2 + change):
                kept = (blend(*planted) - plain)[0, 0]
                inside = change.abs() > 0.12
                assert kept[inside].mean() / change[inside].mean() > 0.8
    # the weaker of two details is weakened, unless it is strong itself
    waves = 0.02 * torch.sin(y) + dark
    stripes = 0.05 * torch.sin(x) + bright
    assert (blend(waves, stripes) - blend(dark, stripes)).std() < 0.4 * waves.std()


def test_bands_add_up_to_the_images():
    images = torch.rand(2, 2, 48, 64)
    assert torch.allclose(sum(bands(images)), images, atol=1e-6)


def test_the_head_adds_gains_on_bands_and_keeps_black_black(compact):
    heads = torch.rand(2, 1, 1, 96, 96)
    heads[..., :40, :] = 0
    gains = torch.randn(1, 6, 96, 96) / 10
    fused = compact.head(gains, *heads)
    assert fused[..., :40, :].max() <= 0
    assert torch.equal(compact.head(0 * gains, *heads), blend(*heads))
    middle_of_img2 = bands(heads[1])[1]
    one = torch.zeros(1, 6, 96, 96)
    one[:, 3] = 0.1  # the second source's gain in the second band
    expected = torch.minimum(blend(*heads) + 0.1 * middle_of_img2, heads.sum(0))
    assert torch.allclose(compact.head(one, *heads), expected, atol=1e-6)


def test_the_head_of_earlier_weights_keeps_white_white():
    model = ASFEFusion(replace(NARROW, head="blend")).eval()
    heads = torch.zeros(2, 1, 1, 96, 96)
    heads[0, ..., 60:70, 60:90] = 1
    fused = model.head(torch.randn(1, 2, 96, 96) / 10, *heads)
    assert fused[..., 60:70, 60:90].min() >= 0.97 - 1e-6, "bone, where the MRI is black"


@pytest.mark.parametrize("side", [(16, 16), (100, 130), (255, 255), (192, 256), (512, 384)])
def test_any_size_goes_through(compact, side):
    fused = compact.fuse(*torch.rand(2, *side))
    assert fused.shape == side
    assert fused.min() >= 0 and fused.max() <= 1
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
    for foreign in (wide.astype(">u2"), (wide / 65535).astype(">f4")):  # bytes in another order
        assert torch.allclose(fused, compact.fuse(foreign[0], foreign[1]), atol=1e-6)
    read_only = img[:, ::-1].copy()[:, ::-1]
    read_only.setflags(write=False)
    assert torch.equal(fused, compact.fuse(read_only[0], read_only[1]))


def test_a_result_that_is_not_finite_is_refused():
    model = settled(ASFEFusion(NARROW))
    with torch.no_grad():
        model.decoder.outlayer.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="the fused image has values that are not finite"):
        model.fuse(*torch.rand(2, 16, 16))


def test_constant_images_give_no_nan(compact):
    for stretch in (False, True):
        for level in (0.0, 0.5, 1.0):
            flat = torch.full((64, 64), level)
            assert torch.isfinite(compact.fuse(flat, flat, stretch)).all()


def test_stretch_uses_the_whole_range(compact):
    fused = compact.fuse(*torch.rand(2, 2, 1, 32, 32), stretch=True)
    assert fused.amin((1, 2, 3)).eq(0).all() and fused.amax((1, 2, 3)).eq(1).all()


def test_fuse_keeps_the_mode_of_every_module(monkeypatch):
    model = ASFEFusion(NARROW).train()
    model.encoder.blocks[0].bn1.eval()  # as a trainer freezes it
    modes = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse(*torch.rand(2, 16, 16))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.fuse(*torch.rand(2, 16, 16))
    assert [module.training for module in model.modules()] == modes


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
        (torch.rand(0, 1, 16, 16), torch.rand(0, 1, 16, 16), "img1 is 16x16, expected at least"),
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
