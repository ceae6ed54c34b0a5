"""Drawn 8-bit images for the tests of the metrics."""

import numpy as np
import scipy.ndimage

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]  # fused, source1, source2


def textured(seed: int, shape: tuple[int, int] = (64, 72), sigma: float = 1.5) -> np.ndarray:
    """Blurred noise over all of 0..255."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    noise = scipy.ndimage.gaussian_filter(noise, sigma)
    return np.rint((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)


def triple(shape: tuple[int, int] = (64, 72)) -> Triple:
    source1, source2 = textured(1, shape), textured(2, shape, 2.5)
    fused = np.maximum(source1, source2) // 2 + textured(3, shape) // 4
    return fused, source1, source2


def awkward(shape: tuple[int, int]) -> dict[str, Triple]:
    """What a division, a logarithm or a root may stumble over."""
    rng = np.random.default_rng(7)
    noise = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(3)]
    binary = [(n > 127).astype(np.uint8) for n in noise]
    black, white = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
    dot = black.copy()
    dot[shape[0] // 2, shape[1] // 2] = 1
    return {
        "black": (black, black, black),
        "white": (white, white, white),
        "grey on black": (np.full(shape, 77, np.uint8), black, white),
        "black from noise": (black, noise[0], noise[1]),
        "noise from black": (noise[0], black, black),
        "noise": tuple(noise),
        "fused is source 1": (noise[0], noise[0], noise[1]),
        "fused is source 2": (noise[1], noise[0], noise[1]),
        "fused is both": (noise[0], noise[0], noise[0]),
        "inverted": (255 - noise[0], noise[0], noise[0]),
        "binary": tuple(binary),
        "binary, full range": tuple(b * 255 for b in binary),
        "one dot": (dot, black, dot),
        "dots apart": (dot, np.roll(dot, 1, axis=0), np.roll(dot, 1, axis=1)),
    }
