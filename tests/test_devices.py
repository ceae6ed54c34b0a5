"""Forward pass and losses on tensors of device "cuda", without a card.

FakeTensorMode computes shapes, types and devices only. So a tensor made on the wrong device, or a
type that autocast cannot take, fails on any machine. Backward needs a real
card, see tests/test_cuda.py.
"""

from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import fusion_loss
from network import ASFEFusion


@pytest.fixture
def card():
    """Tensors are fake, and as far as autocast can see, there is a card that has bfloat16."""
    with (
        FakeTensorMode(),  # before the patches, as it would look for the card
        torch.no_grad(),
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        torch.backends.cudnn.flags(enabled=False),  # which would ask the card for its version
    ):
        yield


def on_cuda(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fake tensors of the same shapes and types, on a card."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype, device="cuda").as_strided(t.shape, t.stride())
        for name, t in tensors.items()
    }


@pytest.fixture(scope="module", params=["compact", "paper"])
def model(request) -> ASFEFusion:
    """A network without values; it is made before tensors are fake."""
    with torch.device("meta"):
        return ASFEFusion(request.param)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_forward_and_losses_stay_on_the_card(model, card, amp):
    state = on_cuda(dict(model.named_parameters())) | on_cuda(dict(model.named_buffers()))
    img1, img2 = torch.rand(2, 2, 1, 128, 128, device="cuda")
    with torch.autocast("cuda", amp, enabled=amp is not None):
        fused = torch.func.functional_call(model, state, (img1, img2))
    assert fused.device.type == "cuda" and fused.shape == img1.shape
    for recipe in ("paper", "sources"):
        loss, terms = fusion_loss(fused.float(), img1, img2, recipe)
        assert {t.device.type for t in (loss, *terms.values())} == {"cuda"}
        assert loss.dtype == torch.float32 and loss.shape == ()


def test_a_tensor_on_the_wrong_device_is_found(card):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="cuda") + torch.ones(3)
