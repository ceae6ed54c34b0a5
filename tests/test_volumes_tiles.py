"""Large slices of volumes: tiles against the whole, and batches."""

import itertools

import cv2
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from volume_files import (
    Brighter,
)

import volumes
from args_setting import ROOT, TestArgs
from network import load_weights
from volumes_levels import ct_levels


@pytest.mark.parametrize("length", (16, 50, 64, 100, 128, 200, 237, 512))
def test_tiles_cover_a_side_and_overlap(length):
    for tile, common in ((64, 16), (64, 48), (128, 64), (96, 30)):
        starts = volumes.tile_starts(length, tile, common, 16)
        assert all(s % 16 == 0 for s in starts) and starts == sorted(set(starts))
        assert starts[0] == 0 and starts[-1] + tile >= length
        assert all(a + tile - b >= common for a, b in itertools.pairwise(starts))
        assert all(s < length for s in starts)


class Local(Brighter):
    """A network without global parts: a blur, mirrored at the edge, and so wrong at tiles' edges.

    `shift` makes each call brighter by that much, as a global part may.
    """

    def __init__(self, shift=0.0):
        self.shift, self.calls = shift, 0

    def fuse(self, img1, img2):
        blurred = ndimage.gaussian_filter((img1 + img2) / 2, (0, 0, 3, 3), mode="mirror")
        self.calls += 1
        return torch.from_numpy(blurred + np.float32(self.shift * self.calls))


def test_tiles_of_a_local_network_give_the_whole():
    rng = np.random.default_rng(4)
    img1, img2 = rng.random((2, 2, 1, 150, 237)).astype(np.float32)
    whole = volumes.fuse_tiled(Local(), img1, img2, 0, 32)
    local = Local()
    tiled = volumes.fuse_tiled(local, img1, img2, 64, 32)
    assert local.calls > 20 and tiled.shape == whole.shape
    assert np.abs(tiled - whole).max() < 1 / 255
    # tiles that differ in brightness meet in a ramp, without a step
    flat = np.full((1, 1, 150, 237), 0.5, np.float32)
    uneven = volumes.fuse_tiled(Local(0.01), flat, flat, 64, 32)
    assert np.ptp(uneven) > 0.05
    for axis in (2, 3):
        assert np.abs(np.diff(uneven, axis=axis)).max() < 0.01 * 12 / 32
    one = Local()
    volumes.fuse_tiled(one, img1, img2, 256, 32)
    assert one.calls == 1, "a tile as large as the image is the image"


@pytest.mark.xfail(
    strict=False,
    reason="not met by the weights of 2026-11-22 (1.13/255 here): their attention is global",
)
def test_tiles_of_the_network_agree_with_the_whole(heads):
    """On slices of the template, enlarged to 384 pixels, with the shipped weights."""
    model, _ = load_weights(ROOT / "model_pre" / "compact_PET-MRI.safetensors")
    pair = []
    for name, high in (("pet", 20000), ("mri", 800)):
        data = nib.load(heads[name]).get_fdata(dtype=np.float32) / high
        stack = volumes.slices(data, nib.load(heads[name]).affine, "axial")[[20, 26]]
        pair.append(np.stack([_enlarged(image, 384) for image in stack])[:, None])
    whole = volumes.fuse_tiled(model, *pair, 0, 64)
    tiled = volumes.fuse_tiled(model, *pair, 256, 64)
    assert np.abs(tiled - whole).mean() < 1 / 255


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    image = cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_LINEAR)
    return np.clip(image, 0, 1)


def test_batches_are_smaller_for_large_slices(monkeypatch):
    seen = []

    class Watched(Brighter):
        def fuse(self, img1, img2):
            seen.append(img1.shape)
            return super().fuse(img1, img2)

    scale = ct_levels("0,2")
    for side, tile, expected in ((64, 0, [4, 2]), (512, 0, [1] * 6), (512, 256, [4] * 9 + [2] * 9)):
        seen.clear()
        stack, out = np.zeros((6, side, side), np.float32), np.empty((6, side, side), np.int16)
        args = TestArgs(batch_size=4, tile=tile)
        volumes.fuse_slices(Watched(), (stack, stack), (scale, scale), out, args)
        assert [shape[0] for shape in seen] == expected
        assert (out == round(volumes.TOP / 2)).all()
