"""The losses: golden values of the published code, SSIM against scikit-image, gradients."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from stated import GOLDEN, golden_arrays

import metrics
from evaluation.one_source import one_source
from losses import (
    bone_loss,
    brightness_loss,
    content_loss,
    fusion_loss,
    gradient_loss,
    information_loss,
    max_content_loss,
    max_gradient_loss,
    mirrored_gaussian,
    one_source_loss,
    sobel,
    ssim,
    structure_loss,
    term_weights,
    vif,
)
from phantom import phantom_pair


@pytest.fixture
def images():
    return torch.rand(3, 2, 1, 48, 40)


def test_golden_values():
    golden = golden_arrays(GOLDEN / "expected.npz", "loss")
    fused, img1, img2 = (torch.from_numpy(golden[n]) for n in ("fused", "img1", "img2"))
    fused.requires_grad_()
    content = content_loss(fused, img1, img2, "published")
    gradient = gradient_loss(fused, img1, img2, "published")
    total, terms = fusion_loss(fused, img1, img2, "paper", "published")
    tensor_norm = np.log1p(golden["structure_tensor_norm"])
    for got, expected in [
        (content, golden["content"]),
        (gradient, tensor_norm),
        (ssim(fused, img1).mean(), golden["ssim1"]),
        (ssim(fused, img2).mean(), golden["ssim2"]),
        (total, golden["total"]),
        (terms["structure"], 2 - golden["ssim1"] - golden["ssim2"]),
    ]:
        assert got.item() == pytest.approx(float(expected), rel=1e-5)
    (0.5 * content + 0.5 * gradient).backward()
    expected = torch.from_numpy(golden["grad_without_ssim"])
    assert (fused.grad - expected).norm() < 1e-5 * expected.norm()


def test_ssim_is_scikit_images(images):
    """Zero padding done by hand: then every window of the image itself lies inside."""
    a, b = images[0, 0, 0].double(), images[1, 0, 0].double()
    _, full = structural_similarity(
        *(np.pad(t.numpy(), 5) for t in (a, b)),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    got = ssim(a[None, None], b[None, None])
    assert got.item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_ssim_of_equal_images_is_one(images):
    assert torch.allclose(ssim(images[0], images[0]), torch.ones(2))
    assert structure_loss(images[0], images[0], images[0]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("recipe", ["paper", "sources"])
def test_losses_depend_on_neither_batch_nor_tiling(images, recipe):
    whole, _ = fusion_loss(*images, recipe)
    halves = [fusion_loss(*images[:, i : i + 1], recipe)[0] for i in range(2)]
    assert whole.item() == pytest.approx(torch.stack(halves).mean().item(), rel=1e-5)


def test_vif_is_that_of_the_metrics():
    """Within the damping of variances near zero; phantoms have large flat parts."""
    img1, img2 = (torch.from_numpy(i)[None, None] / 255 for i in phantom_pair("CT-MRI", 128))
    for fused in (torch.maximum(img1, img2), (img1 + img2) / 2, img1):
        fused = (fused * 255).round() / 255
        got = vif(fused, torch.cat([img1, img2], 1)).sum(1)
        expected = metrics.vif(*((i[0, 0] * 255).round().numpy() for i in (fused, img1, img2)))
        assert got.item() == pytest.approx(expected, rel=0.02)
        assert information_loss(fused, img1, img2).item() == pytest.approx(2 - got.item())


def test_vif_has_the_noise_of_the_metrics():
    """Texture everywhere: without a flat part, the damping does not hide another noise."""
    img1, img2, fused = (255 * torch.rand(3, 1, 1, 96, 96)).round()
    fused = ((img1 + img2 + fused) / 3).round()
    got = vif(fused / 255, torch.cat([img1, img2], 1) / 255).sum(1)
    expected = metrics.vif(*(image[0, 0].numpy() for image in (fused, img1, img2)))
    assert got.item() == pytest.approx(expected, rel=0.002)


def test_vif_of_images_below_its_window_is_one():
    assert torch.equal(vif(*torch.rand(2, 3, 1, 16, 16)), torch.ones(3, 1))


@pytest.mark.parametrize("side", [17, 20, 48])
def test_vif_of_small_images_has_a_finite_gradient(side):
    fused, img1, img2 = torch.rand(3, 2, 1, side, side)
    fused.requires_grad_()
    information_loss(fused, img1, img2).backward()
    assert torch.isfinite(fused.grad).all()


@pytest.mark.parametrize("recipe", ["paper", "sources"])
def test_every_term_gives_a_gradient(images, recipe):
    fused = images[0].clone().requires_grad_()
    images[1, 0, 0, :4, :4] = 1  # bone
    total, terms = fusion_loss(fused, images[1], images[2], recipe)
    assert set(terms) == set(term_weights(recipe)) and len(terms) == (3 if recipe == "paper" else 7)
    for term in terms.values():
        (gradient,) = torch.autograd.grad(term, fused, retain_graph=True)
        assert gradient.abs().sum() > 0
    total.backward()
    assert torch.isfinite(fused.grad).all()


@pytest.mark.parametrize("recipe", ["paper", "sources"])
@pytest.mark.parametrize("level", [0.0, 0.7])
def test_constant_images_give_finite_gradients(recipe, level):
    flat = torch.full((2, 1, 32, 32), level)
    fused = flat.clone().requires_grad_()
    total, _ = fusion_loss(fused, flat, flat, recipe)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(fused.grad).all()


def test_the_minimum_is_where_it_should_be(images):
    img1, img2 = images[1], images[2]
    assert content_loss((img1 + img2) / 2, img1, img2) < 1e-5
    assert max_content_loss(torch.maximum(img1, img2), img1, img2) == 0
    assert max_gradient_loss(img1, img1, torch.zeros_like(img1)) == 0


def test_sobel_of_a_ramp():
    ramp = (2 * torch.arange(9.0) + 3 * torch.arange(7.0)[:, None])[None, None]
    inner = sobel(ramp)[..., 1:-1, 1:-1]
    assert torch.allclose(inner[:, 0], torch.tensor(2.0))
    assert torch.allclose(inner[:, 1], torch.tensor(3.0))


def test_other_weights(images):
    weights = term_weights("sources", ["gradient=7", "content=0"])
    assert weights == term_weights("sources") | {"gradient": 7, "content": 0}
    total, terms = fusion_loss(*images, weights=weights)
    expected = sum(weights[name] * term for name, term in terms.items())
    assert total.item() == pytest.approx(expected.item()) and total != fusion_loss(*images)[0]
    with pytest.raises(ValueError, match="'gradient', expected TERM=NUMBER"):
        term_weights("paper", ["gradient"])


def test_unknown_recipe(images):
    for weights in (None, {"content": 1.0}):  # which used to train `detail`
        with pytest.raises(ValueError, match="expected paper or sources"):
            fusion_loss(*images, "best", weights=weights)


# --- what only one source shows --------------------------------------------------------------


def heads() -> tuple[torch.Tensor, torch.Tensor]:
    """A phantom pair, (1, 1, 128, 128) each."""
    return tuple(torch.from_numpy(i)[None, None] / 255 for i in phantom_pair("CT-MRI", 128))


def test_the_loss_of_one_source_is_its_measure():
    """An image that keeps every gain within 0 to 1 has the loss 2 - kept1 - kept2."""
    img1, img2 = heads()
    for share in (0.3, 0.5, 0.8):
        fused = share * img1 + (1 - share) * img2
        found = one_source(*(i[0, 0].double().numpy() for i in (img1, img2, fused)))
        expected = 2 - found.kept1 - found.kept2
        assert one_source_loss(fused, img1, img2).item() == pytest.approx(expected, abs=0.03)


def test_mirrored_windows_are_those_of_scipy():
    image = torch.rand(1, 1, 40, 23, dtype=torch.float64)
    rows, columns = (mirrored_gaussian(n, image) for n in image.shape[-2:])
    expected = gaussian_filter(image[0, 0].numpy(), 4, mode="reflect", truncate=4)
    assert np.allclose((rows @ image @ columns.T)[0, 0], expected, atol=1e-12)


def test_what_is_missing_costs_more_than_what_is_too_much():
    img1 = heads()[0] / 2  # so that nothing is clipped
    flat = torch.zeros_like(img1)
    little, right, much = (one_source_loss(g * img1, img1, flat) for g in (0.6, 1, 1.4))
    assert right.item() == pytest.approx(0, abs=0.01)
    assert little.item() == pytest.approx(0.4, abs=0.02)
    assert much.item() == pytest.approx(0.2 * 0.4, abs=0.02)


def test_bone_owes_nothing_to_the_other_source_and_is_to_be_solid():
    bone, texture = torch.ones(1, 1, 48, 48), torch.rand(1, 1, 48, 48)
    assert one_source_loss(bone, bone, texture) == 0
    assert bone_loss(bone - 0.02, bone, texture).item() == pytest.approx(0, abs=1e-6)
    assert bone_loss(bone - 0.12, bone, texture).item() == pytest.approx(0.1, abs=1e-6)
    assert bone_loss(texture, texture.clamp(max=0.97), bone) == 0, "no bone"


def test_brightness_beyond_both_sources_is_counted():
    img1, img2 = torch.full((1, 1, 32, 32), 0.3), torch.full((1, 1, 32, 32), 0.5)
    assert brightness_loss(img2 + 0.02, img1, img2).item() == pytest.approx(0, abs=1e-6)
    assert brightness_loss(img2 + 0.12, img1, img2).item() == pytest.approx(0.1, abs=1e-6)


def test_beyond_white_there_is_still_a_gradient():
    img1, img2 = heads()
    fused = (torch.maximum(img1, img2) + 1.5).requires_grad_()
    one_source_loss(fused, img1, img2).backward()
    assert fused.grad.abs().sum() > 0 and torch.isfinite(fused.grad).all()
