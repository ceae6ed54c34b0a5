"""SFEF's two softmaxes are the same function in every form, with gradients."""

import pytest
import torch
import torch.nn.functional as F

import mixing
from network import ASFEFusion

ATTEND = [mixing.library, mixing.split, mixing.explicit, mixing.few_columns, mixing.tiled]
MIX = [mixing.two_attentions, mixing.shared]


def named(functions: list) -> dict:
    return {"argvalues": functions, "ids": [f.__name__ for f in functions]}


def results(function, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def softmax_by_hand(q, k, v):
    weights = torch.exp(torch.einsum("bid,bjd->bij", q, k))
    return torch.einsum("bij,bjd->bid", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("function", **named(ATTEND))
@pytest.mark.parametrize(("n_q", "n_k"), [(5, 70), (70, 5)])
def test_one_softmax(function, n_q, n_k, monkeypatch):
    monkeypatch.setattr(mixing, "TILE", 32)  # three tiles, the last of them short
    q, k, v = (torch.randn(2, n, 12, dtype=torch.float64) for n in (n_q, n_k, n_k))
    for got, expected in zip(
        results(function, q, k, v), results(softmax_by_hand, q, k, v), strict=True
    ):
        # the tiles' levels are in float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            function(q, k, v), softmax_by_hand(q, k, v), rtol=1e-5, atol=1e-5
        )


def test_split_computes_every_column():
    q, k, v = torch.randn(3, 2, 6, 20)
    torch.testing.assert_close(mixing.split(q, k, v, 8), mixing.library(q, k, v))


@pytest.mark.parametrize("attend", **named(ATTEND))
@pytest.mark.parametrize("function", **named(MIX))
def test_both_softmaxes(function, attend, monkeypatch):
    monkeypatch.setattr(mixing, "TILE", 32)
    monkeypatch.setattr(mixing, "attend", attend)

    def by_hand(tokens, slots):
        slot_out = torch.tanh(softmax_by_hand(slots, tokens, tokens))
        return softmax_by_hand(tokens, slots, slot_out)

    tokens, slots = torch.randn(2, 70, 12), torch.randn(2, 6, 12)
    got = results(lambda t, s: function(t, s, torch.tanh), tokens, slots)
    for a, b in zip(got, results(by_hand, tokens, slots), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weigh_has_the_gradient_of_its_function():
    logits, v = torch.randn(2, 3, 5).double(), torch.randn(2, 5, 4).double()
    logits, v = logits.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradcheck(mixing.Weigh.apply, (logits, v))


@pytest.mark.parametrize("level", [-300.0, 300.0])
@pytest.mark.parametrize("function", **named(MIX))
def test_large_logits_do_not_overflow(function, level):
    tokens, slots = torch.randn(1, 40, 8), torch.randn(1, 4, 8)
    tokens[..., 0], slots[..., 0] = 1, level
    assert all(torch.isfinite(t).all() for t in results(
        lambda t, s: function(t, s, torch.tanh), tokens, slots))  # fmt: skip


@pytest.mark.parametrize("attend", **named(ATTEND))
@pytest.mark.parametrize("function", **named(MIX))
def test_bfloat16_autocast_stays_near(function, attend, monkeypatch):
    monkeypatch.setattr(mixing, "attend", attend)
    tokens = F.normalize(torch.randn(2, 70, 16), dim=-1)
    slots = 4 * torch.randn(2, 6, 16)
    exact = results(lambda t, s: function(t, s, torch.tanh), tokens, slots)

    def low(t, s):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(t, s, torch.tanh)
        assert out.dtype == torch.bfloat16
        return out.float()

    for a, b in zip(results(low, tokens, slots), exact, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("width", [12, 5])
@pytest.mark.parametrize("kept", [0, 2**24])
def test_in_place_is_the_same_function(kept, width, monkeypatch):
    monkeypatch.setattr(mixing, "KEPT", kept)
    monkeypatch.setattr(mixing, "PART", 32)  # three parts, the last of them short
    monkeypatch.setattr(mixing, "TILE", 48)
    tokens, slots, weight = torch.randn(2, 70, 12), torch.randn(2, 6, 12), torch.randn(12, width)

    def experts(slot_in):
        return torch.tanh(slot_in) if width == 12 else torch.tanh(slot_in) @ weight

    expected = softmax_by_hand(tokens, slots, experts(softmax_by_hand(slots, tokens, tokens)))
    with torch.no_grad():
        got = mixing.mix_in_place(tokens, slots, experts)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got is tokens) == (width == 12)


@pytest.mark.parametrize("kept", [0, 2**24])
def test_in_place_bears_slots_far_apart(kept, monkeypatch):
    """One slot's logits lie 400 below another's, so that no one shift of all would do."""
    monkeypatch.setattr(mixing, "KEPT", kept)
    monkeypatch.setattr(mixing, "PART", 16)
    tokens, slots = torch.randn(1, 40, 8), torch.randn(1, 4, 8)
    tokens[..., 0], slots[0, :, 0] = 1, torch.tensor([-200.0, 0.0, 100.0, 200.0])
    expected = softmax_by_hand(*(t.double() for t in (tokens, slots)), slots.double())
    seen = []
    with torch.no_grad():
        got = mixing.mix_in_place(tokens.clone(), slots, lambda t: seen.append(t) or slots)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-3)
    logits = slots.double() @ tokens.double().mT
    by_hand = torch.softmax(logits, -1) @ tokens.double()
    torch.testing.assert_close(seen[0], by_hand.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("below", [0, 40, 60, 85, 100, 104, 108, 112, 200, 400])
def test_in_place_bears_tokens_far_from_all_slots(below, monkeypatch):
    """Some tokens' best logits lie `below` under the others'; float32 has no power for all."""
    monkeypatch.setattr(mixing, "PART", 16)
    plain, explicit = [], mixing.explicit
    monkeypatch.setattr(mixing, "explicit", lambda *a: plain.append(1) or explicit(*a))
    tokens, slots, seen = torch.randn(2, 40, 8), torch.randn(2, 4, 8), []
    slots[..., 0], tokens[..., 0] = 1, 0
    tokens[:, ::3, 0] = tokens[:, 32:, 0] = -below  # the last part as a whole
    exact, exact_slots = (t.double() for t in (tokens, slots))
    with torch.no_grad():
        got = mixing.mix_in_place(tokens, slots, lambda t: seen.append(t) or slots)
    if below != 85:  # about where it begins
        assert len(plain) == (3 if below > 85 else 0)  # of three parts, all with such tokens
    expected = softmax_by_hand(exact, exact_slots, exact_slots)
    # of logits of up to `below` in float32
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6 * (below + 10))
    expected = softmax_by_hand(exact_slots, exact, exact)
    torch.testing.assert_close(seen[0], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_place_in_half_precision(dtype):
    tokens, slots = F.normalize(torch.randn(2, 40, 8), dim=-1), 3 * torch.randn(2, 4, 8)
    expected = mixing.two_attentions(tokens, slots, torch.tanh)
    with torch.no_grad():
        got = mixing.mix_in_place(tokens.to(dtype), slots.to(dtype), torch.tanh)
    assert (got.float() - expected).norm() < 0.01 * expected.norm()


def test_a_cpu_takes_the_library_whatever_cuda_takes(monkeypatch):
    tokens, slots = torch.randn(2, 30, 12), torch.randn(2, 6, 12)
    expected = mixing.two_attentions(tokens, slots, torch.tanh)
    for name in ("ATTEND_ON_CUDA", "MIX_ON_CUDA"):
        monkeypatch.setattr(mixing, name, None)
    assert torch.equal(mixing.mix(tokens, slots, torch.tanh), expected)
    assert torch.equal(mixing.attend(tokens, slots, slots), mixing.library(tokens, slots, slots))


@pytest.mark.parametrize("attend", **named(ATTEND))
@pytest.mark.parametrize("function", **named(MIX))
def test_the_network_trains_with_each(function, attend, monkeypatch):
    import network

    model = ASFEFusion("compact").train()
    images = torch.rand(2, 1, 1, 32, 32)

    def gradients():
        model.zero_grad()
        out = model(*images)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients()
    monkeypatch.setattr(mixing, "attend", attend)
    monkeypatch.setattr(network, "mix", function)
    for a, b in zip(gradients(), expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6
