"""The optimised network computes what the definition does, and shares its parameters."""

import pytest
import torch
from networks import NARROW, relative_error, settled
from torch import nn

import inference
import network
from args_setting import MODULES, SIZES
from inference import conv_bn, optimise
from network import SFEF, ASFEFusion


@pytest.fixture(params=["compact", NARROW], ids=["compact", "narrow"])
def model(request) -> ASFEFusion:
    return settled(ASFEFusion(request.param))


@pytest.mark.parametrize("aff", ["full", "published"])
@pytest.mark.parametrize("side", [(64, 96), (32, 32)])
def test_it_is_the_same_function(model, aff, side):
    model = settled(ASFEFusion(model.size, aff))
    fast = optimise(model)
    assert fast is not model and type(model.decoder) is not type(fast.decoder)
    images = torch.rand(2, 2, 1, *side)
    before = images.clone()
    with torch.no_grad():
        assert relative_error(fast(*images), model(*images)) < 1e-5
    assert torch.equal(images, before), "arguments are not written into"
    assert torch.allclose(fast.fuse(*images[:, 0, 0]), model.fuse(*images[:, 0, 0]), atol=1e-5)
    assert relative_error(optimise(fast)(*images), model(*images)) < 1e-5, "twice is once"


@pytest.mark.parametrize("modules", [["casf"], ["aff"], ["sfef"], MODULES])
def test_it_is_the_same_function_without_some_modules(modules):
    model = settled(ASFEFusion(SIZES["compact"].without(modules)))
    images = torch.rand(2, 2, 1, 32, 48)
    with torch.no_grad():
        assert relative_error(optimise(model)(*images), model(*images)) < 1e-5


@pytest.mark.parametrize("residual", [True, False])
def test_shared_logits_serve_where_they_can(monkeypatch, residual):
    """And where an exponential would overflow, or the matrix be large, the definition does."""
    plain = SFEF(6, 3, 5, residual).eval()
    fast = inference.FastSFEF(6, 3, 5, residual).eval()
    fast.load_state_dict(plain.state_dict())
    calls = []
    defined = network.attend
    monkeypatch.setattr(network, "attend", lambda *qkv: calls.append(0) or defined(*qkv))

    def attends() -> bool:
        before, x = len(calls), torch.randn(2, 6, 8, 12)
        with torch.no_grad():
            out, ours = fast(x), len(calls) - before
            assert out.isfinite().all() and relative_error(out, plain(x)) < 1e-5
        return ours > 0

    assert not attends()
    monkeypatch.setattr(inference, "LARGEST_LOGITS", 2 * 15 * 8 * 12)
    assert attends()
    monkeypatch.undo()
    monkeypatch.setattr(network, "attend", lambda *qkv: calls.append(0) or defined(*qkv))
    for module in plain, fast:
        module.norm.gamma.data *= 20  # logits of up to 6 x 20
    assert attends()


def test_modules_inside_do_not_write_into_their_arguments(model):
    """A map that a module got, or returned, is the same after the pass."""
    fast, seen = optimise(model), []

    def keep(_, inputs, output):
        for t in (*inputs, output):
            if isinstance(t, torch.Tensor):
                seen.append((t, t.clone()))

    for module in (*fast.encoder.blocks, *fast.fusion, *fast.decoder.children()):
        module.register_forward_hook(keep)
    with torch.no_grad():
        fast(*torch.rand(2, 1, 1, 32, 32))
    assert len(seen) > 20 and all(torch.equal(kept, then) for kept, then in seen)


def test_it_shares_parameters_and_statistics(model):
    fast, images = optimise(model), torch.rand(2, 1, 1, 32, 32)
    pairs = zip(fast.state_dict(keep_vars=True).items(), model.state_dict(keep_vars=True).items(),
                strict=True)  # fmt: skip
    assert all(name == theirs and a is b for (name, a), (theirs, b) in pairs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.9
        model.encoder.blocks[0].bn2.running_var *= 2
        assert relative_error(fast(*images), model(*images)) < 1e-5


def test_with_gradients_and_in_training_it_is_the_definition(model):
    fast, images = optimise(model), torch.rand(2, 2, 1, 32, 32)
    expected = torch.autograd.grad(model(*images).square().mean(), list(model.parameters()))
    got = torch.autograd.grad(fast(*images).square().mean(), list(fast.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model.train()(*images)
        after = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        assert torch.equal(fast.train()(*images), expected)
    assert all(torch.equal(v, after[k]) for k, v in fast.state_dict().items())


def test_in_half_precision_it_computes_as_defined():
    model = settled(ASFEFusion(SIZES["compact"].without(["aff"]))).half()
    images = torch.rand(2, 1, 1, 32, 48).half()
    with torch.no_grad():
        out = optimise(model)(*images)
        assert out.isfinite().all() and torch.equal(out, model(*images))


def test_another_device_keeps_its_model():
    with torch.device("meta"):
        model = ASFEFusion(NARROW)
    assert optimise(model) is model


def test_conv_bn_folds_without_a_change():
    conv, bn = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    x, y = torch.randn(2, 2, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(conv_bn(conv, bn, x, y), bn(conv(torch.cat([x, y], 1)))) < 1e-5
