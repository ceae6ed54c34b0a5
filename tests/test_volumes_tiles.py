"""Large slices of volumes: tiles against the whole, and batches."""

import itertools
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from volume_files import Brighter

from args_setting import ROOT
from tiles import fuse_tiled, reduction, tile_starts
from volumes.grid import slices
from volumes.intensity import STORED_ONE, ct_scaling
from volumes.requests import Slicing
from volumes.tiles import fuse_slices, passes_of
from weights import load_weights


@pytest.mark.parametrize("length", (16, 50, 64, 100, 128, 200, 237, 512))
def test_tiles_cover_a_side_and_overlap(length):
    for tile, common in ((64, 16), (64, 48), (128, 64), (96, 30)):
        starts = tile_starts(length, tile, common, 16)
        assert all(s % 16 == 0 for s in starts) and starts == sorted(set(starts))
        assert starts[0] == 0 and starts[-1] + tile >= length
        assert all(a + tile - b >= common for a, b in itertools.pairwise(starts))
        assert all(s < length for s in starts)


def test_a_slice_is_reduced_to_a_tile():
    assert [reduction(n, n, 256) for n in (272, 512, 528, 1024, 4096)] == [2, 2, 4, 4, 16]
    assert reduction(4096, 4096, 64) == 4, "tiles of 16 pixels are the smallest"
    assert (reduction(16, 512, 256), reduction(48, 1024, 256)) == (1, 2)


class Local(Brighter):
    """A network without global parts: a blur, mirrored at the edge, and so wrong at tiles' edges.

    `shift` makes each image of `side` columns brighter by that much than the one before.
    """

    def __init__(self, shift=0.0, side=0):
        self.shift, self.side, self.calls, self.shapes = shift, side, 0, []

    def fuse(self, img1, img2):
        blurred = ndimage.gaussian_filter((img1 + img2) / 2, (0, 0, 2, 2), mode="reflect")
        self.shapes.append(img1.shape[2:])
        if img1.shape[-1] == self.side:
            self.calls += 1
            blurred += np.float32(self.shift * self.calls)
        return torch.from_numpy(blurred)


class Overall(Brighter):
    """A network with a global part: the first source, darker by the mean of the second."""

    def fuse(self, img1, img2):
        return torch.from_numpy(img1 - img2.mean((2, 3), keepdims=True) / 2)


def test_tiles_of_a_local_network_give_the_whole():
    rng = np.random.default_rng(4)
    img1, img2 = ndimage.gaussian_filter(rng.random((2, 2, 1, 150, 237)), (0, 0, 0, 2, 2))
    img1, img2 = np.float32(img1), np.float32(img2)
    whole = fuse_tiled(Local(), img1, img2, 0, 32)
    local = Local()
    tiled = fuse_tiled(local, img1, img2, 128, 64)
    assert tiled.shape == whole.shape and np.ptp(whole) > 0.1
    assert np.abs(tiled - whole).max() < 1 / 255
    # the slice of 160 x 240 with its padding, reduced; 6 tiles, each reduced and as it is
    assert local.shapes == [(80, 120), *[(64, 64), (128, 128)] * 6]
    one = Local()
    fuse_tiled(one, img1, img2, 256, 32)
    assert one.shapes == [(150, 237)], "a tile as large as the image is the image"


def test_tiles_that_differ_meet_in_a_ramp():
    flat = np.full((1, 1, 150, 237), 0.5, np.float32)
    uneven = fuse_tiled(Local(0.01, 64), flat, flat, 64, 32)
    assert np.ptp(uneven) > 0.05
    most = 0.01 * len(tile_starts(237, 64, 32, 16))  # between a tile and the one below it
    for axis in (2, 3):
        assert np.abs(np.diff(uneven, axis=axis)).max() < most * np.pi / 2 / 32


def test_tiles_know_of_the_rest_of_their_slice():
    img1 = np.random.default_rng(5).uniform(0.6, 1, (2, 1, 192, 330)).astype(np.float32)
    img2 = np.zeros_like(img1)
    img2[0, 0, 40:150, 30:90] = img2[1, 0, 100:, 200:] = 1
    whole = fuse_tiled(Overall(), img1, img2, 0, 64)
    tiled = fuse_tiled(Overall(), img1, img2, 128, 64)
    assert np.abs(tiled - whole).max() < 0.01


@pytest.mark.parametrize("source", ("ct", "pet"))
def test_tiles_of_the_network_agree_with_the_whole(heads, source):
    """On a slice of the template, enlarged to 384 pixels, with the shipped weights."""
    model, _ = load_weights(ROOT / "model_pre" / "compact_all.safetensors")
    pair = [_enlarged(heads[name], 384) for name in (source, "mri")]
    whole = fuse_tiled(model, *pair, 0, 64)
    apart = (fuse_tiled(model, *pair, 256, 64) - whole)[0, 0]
    # no seam: across the ends of a tile the difference changes no faster than beside them
    ends = {end for start in tile_starts(384, 256, 64, 16) for end in (start, start + 256)}
    seam = 0.0
    for axis in (0, 1):
        change = np.abs(np.diff(apart, axis=axis)).mean(1 - axis)  # [n]: from pixel n to n + 1
        for end in ends - {0, 384}:
            beside = *change[end - 9 : end - 2], *change[end + 1 : end + 8]
            seam = max(seam, change[end - 1] / max(beside))
    mean, most = 255 * np.abs(apart).mean(), 255 * np.abs(apart).max()
    print(f"{source}: {mean:.2f} of 255 levels on average, {most:.0f} at most, seam {seam:.2f}")
    assert mean < 2 and seam < 1.3


def _enlarged(path: Path, side: int) -> np.ndarray:
    """(1, 1, side, side) in [0, 1]: the axial slice 26 of a drawn head."""
    volume = nib.load(path)
    high, low = {"ct": (1000, -100), "pet": (20000, 0), "mri": (800, 0)}[path.name.split(".")[0]]
    image = slices(volume.get_fdata(dtype=np.float32), volume.affine, "axial")[26]
    image = cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_LINEAR)
    return np.clip((image - low) / (high - low), 0, 1)[None, None]


def test_batches_are_smaller_for_large_slices(monkeypatch):
    seen = []

    class Watched(Brighter):
        def fuse(self, img1, img2):
            seen.append(img1.shape)
            return super().fuse(img1, img2)

    scale = ct_scaling("0,2")
    for side, tile, expected in (
        (64, 0, [4, 2]),
        (512, 0, [1] * 6),
        (512, 256, [4] * 19 + [2] * 19),
    ):
        seen.clear()
        stack, out = np.zeros((6, side, side), np.float32), np.empty((6, side, side), np.int16)
        passes = passes_of(Watched(), (side, side), Slicing(tile=tile, batch_size=4))
        done = list(fuse_slices(Watched(), (stack, stack), (scale, scale), out, passes))
        assert done == sorted(done) and done[-1] == 6
        assert [shape[0] for shape in seen] == expected
        assert (out == round(STORED_ONE / 2)).all()
