"""All 3x3 windows of an image, and the mutual information of two images' windows (FMI).

A window is taken as a random position k = 0..8 in it. The probability (pdf) of a position is in
proportion to its mass: its grey level less the lowest level of the window.

Only the pdf of each window is known, not their joint pdf. It is a mix of two extremes. In one the
positions are independent: the joint pdf is the product. In the other they are coupled as closely as
the two pdfs allow: each goes through its positions in order, and mass meets mass. The coupling is
not zero on a staircase of cells only, see `_staircase`.

Source: Haghighat, Razian, AICT 2014.

Legend: N windows, k position in a window, F fused image, S source, H entropy in bits; p pdf, cdf
its cumulated sums.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy import ndarray

CHUNK = 2048  # windows at a time, so that the tables of a chunk stay in the cache
TINY = 1e-300  # stands for 0 inside a logarithm; 0 * log2(TINY) is 0


class Windows(NamedTuple):
    """All 3x3 windows of an image, one a column, pixels ordered column by column."""

    lowest: ndarray  # (N,) uint8 grey level
    mass: ndarray  # (9, N) uint8, grey levels less the lowest: the pdf times `total`
    total: ndarray  # (N,)
    position_variance: ndarray  # (N,) of the position under the pdf, times total^2
    mass_variance: ndarray  # (N,) of the nine masses, times 81
    entropy: ndarray  # (N,) of the pdf, bits


def local_windows(levels: ndarray) -> Windows:
    """The (H-2)(W-2) windows of an (H, W) uint8 image."""
    h, w = levels.shape
    shifted = [levels[y : h - 2 + y, x : w - 2 + x] for x in range(3) for y in range(3)]
    pixels = np.stack(shifted).reshape(9, -1)
    lowest = pixels.min(axis=0)
    mass = pixels - lowest
    wide, position = mass.astype(np.int32), np.arange(9, dtype=np.int32)
    total = np.einsum("kn->n", wide)
    first = np.einsum("k,kn->n", position, wide)
    second = np.einsum("k,kn->n", position * position, wide)
    n = np.maximum(total, 1)
    return Windows(
        lowest,
        mass,
        total,
        total * second - first * first,
        9 * np.einsum("kn,kn->n", wide, wide) - total * total,
        np.log2(n) - cv2.LUT(mass, _mass_log_mass()).sum(axis=0) / n,
    )


@lru_cache
def _mass_log_mass() -> ndarray:
    """m * log2(m) of the masses m = 0..255."""
    m = np.arange(256.0)
    return m * np.log2(np.maximum(m, 1))


def window_information(f: Windows, s: Windows) -> float:
    """Mean over the windows of 2 I/(H_F + H_S), up to 1."""
    equal = (f.mass == s.mass).all(axis=0) & (f.lowest == s.lowest)
    flat = (f.total == 0) & (s.total == 0)
    # In the windows that are left out, one pdf is flat or has a single position: I is 0 there.
    chosen = np.flatnonzero((f.position_variance > 0) & (s.position_variance > 0) & ~equal)
    total = float(np.count_nonzero(equal | flat))
    for start in range(0, len(chosen), CHUNK):
        index = chosen[start : start + CHUNK]
        total += _normalised_information(
            Windows(*(x[..., index] for x in f)), Windows(*(x[..., index] for x in s))
        )
    return total / equal.size


def _normalised_information(f: Windows, s: Windows) -> float:
    """Sum of 2 I/(H_F + H_S) over windows with two or more positions each."""
    mass_f, mass_s = f.mass.astype(np.float64), s.mass.astype(np.float64)
    correlation = 9 * np.einsum("kn,kn->n", mass_f, mass_s) - f.total * s.total
    # A negative correlation wants the opposite coupling. Reversing one window has the same effect.
    mass_s = np.where(correlation < 0, mass_s[::-1], mass_s)
    p_f, p_s = mass_f / f.total, mass_s / s.total
    cdf_f, cdf_s = _cumulated(mass_f) / f.total, _cumulated(mass_s) / s.total
    covariance = -cdf_f.sum(axis=0) * cdf_s.sum(axis=0)
    for row in cdf_f:
        covariance += np.minimum(row, cdf_s).sum(axis=0)
    spread = f.position_variance / s.mass_variance * (s.position_variance / f.mass_variance)
    # The share of the coupling in the mix; the mix then has the correlation of the two windows.
    phi = np.abs(correlation) * np.sqrt(spread) / (f.total * s.total * covariance)

    # Beside the 17 cells of the staircase the joint pdf is (1 - phi) times the product.
    mass, product = _staircase(p_f, p_s, cdf_f, cdf_s)
    product *= 1 - phi
    joint = phi * mass + product
    entropies = f.entropy + s.entropy
    off_stairs = _plogp(1 - phi) - (1 - phi) * entropies - _plogp(product).sum(axis=0)
    information = entropies + off_stairs + _plogp(joint).sum(axis=0)
    return float((2 * information / entropies).sum())


def _cumulated(mass: ndarray) -> ndarray:
    """(9, N) -> (8, N) sums up to each position but the last."""
    cumulated = mass[:-1].copy()
    for k in range(1, len(cumulated)):
        cumulated[k] += cumulated[k - 1]
    return cumulated


def _staircase(
    p_f: ndarray, p_s: ndarray, cdf_f: ndarray, cdf_s: ndarray
) -> tuple[ndarray, ndarray]:
    """The coupling of greatest correlation, and the product p_f·p_s, on its 17 cells: (17, N) each.

    A cell is a pair of positions (k of F, k of S). The path begins at (0, 0). The cdf that reaches
    its next value first takes the next step, so each step moves one position on, and after 16 steps
    the path is at (8, 8). What the two cdfs have in common grows along the path; the mass of a cell
    is by how much it grows there.
    """
    n = p_f.shape[1]
    beyond = np.full((1, n), 2.0)  # more than any cdf: nothing steps beyond position 8
    cdf_f, cdf_s = np.vstack([cdf_f, beyond]).ravel(), np.vstack([cdf_s, beyond]).ravel()
    p_f, p_s = p_f.ravel(), p_s.ravel()
    at_f, at_s = np.arange(n), np.arange(n)  # places in the flat arrays: k * N + window
    edges, product = np.zeros((18, n)), np.empty((17, n))
    for k in range(17):
        end_f, end_s = cdf_f.take(at_f, mode="clip"), cdf_s.take(at_s, mode="clip")
        np.multiply(p_f.take(at_f, mode="clip"), p_s.take(at_s, mode="clip"), out=product[k])
        np.minimum(end_f, end_s, out=edges[k + 1])
        step_f = end_f <= end_s
        at_f += step_f * n
        at_s += ~step_f * n
    edges[17] = 1
    return np.diff(edges, axis=0), product


def _plogp(x: ndarray) -> ndarray:
    """x * log2(|x|), 0 at 0."""
    logs = np.abs(x)
    np.maximum(logs, TINY, out=logs)
    np.log2(logs, out=logs)
    logs *= x
    return logs
