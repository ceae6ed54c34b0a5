"""Heads drawn from formulas, as CT, MRI, PET and SPECT would show them.

They are for the demo and the tests, where no patient's image may be. They have skull, cortex,
ventricles and a lesion with a calcified spot. The colour tables resemble those of the Harvard Whole
Brain Atlas.

Legend: H = W = `side` pixels; a tissue map is (H, W) with the tissue's share of a pixel, in [0, 1].
"""

import hashlib

import cv2
import numpy as np

from args_setting import TASKS

# How bright each modality shows a tissue: CT by density, MRI T2-weighted, PET and SPECT by uptake.
TISSUES = {
    #              CT    MRI   PET   SPECT
    "scalp": (0.34, 0.52, 0.04, 0.10),
    "bone": (1.00, 0.06, 0.00, 0.04),
    "csf": (0.10, 0.95, 0.06, 0.08),
    "grey": (0.36, 0.58, 0.80, 0.74),
    "white": (0.30, 0.40, 0.42, 0.42),
    "lesion": (0.22, 0.82, 1.00, 0.16),
    "calcification": (0.95, 0.10, 0.90, 0.10),
}
MODALITIES = ("CT", "MRI", "PET", "SPECT")
BLUR = {"CT": 0.6, "MRI": 0.5, "PET": 3.5, "SPECT": 5.0}  # sigma in pixels of a 256-pixel side
NOISE = {"CT": 0.012, "MRI": 0.02, "PET": 0.01, "SPECT": 0.01}
# value, then R, G, B
COLOURS = {
    "PET": (
        (0.0, 0, 0, 0),
        (0.15, 0, 0, 130),
        (0.35, 0, 85, 240),
        (0.5, 100, 143, 150),
        (0.62, 255, 247, 0),
        (0.82, 255, 160, 0),
        (1.0, 255, 0, 0),
    ),
    "SPECT": (
        (0.0, 0, 0, 0),
        (0.12, 45, 75, 80),
        (0.3, 70, 20, 125),
        (0.5, 140, 48, 131),
        (0.65, 212, 98, 78),
        (0.82, 255, 129, 36),
        (1.0, 255, 214, 236),
    ),
}


def phantom_pair(task: str, side: int = 256, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Source 1 and source 2 of a task as 8-bit images: CT and MRI grey, PET and SPECT RGB."""
    tissues = draw_tissues(side, seed)
    return render(TASKS[task], tissues, seed + 1), render("MRI", tissues, seed + 2)


def render(modality: str, tissues: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """What a modality shows of the tissues: (H, W), or (H, W, 3) RGB for PET and SPECT; uint8."""
    column = MODALITIES.index(modality)
    image = sum(TISSUES[name][column] * share for name, share in tissues.items())
    side = len(image)
    image = cv2.GaussianBlur(image, (0, 0), BLUR[modality] * side / 256)
    grain = np.random.default_rng(seed).standard_normal(image.shape)
    image = image + NOISE[modality] * cv2.GaussianBlur(grain, (0, 0), 0.7) * (image > 0.03)
    image = np.clip(image, 0, 1)
    if modality in COLOURS:
        value, *rgb = np.array(COLOURS[modality]).T
        image = np.stack([np.interp(image, value, channel) for channel in rgb], -1) / 255
    return np.rint(image * 255).astype(np.uint8)


def draw_tissues(side: int, seed: int) -> dict[str, np.ndarray]:
    """Tissue maps of one axial slice; they sum to 1 inside the head and to 0 outside."""
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    turn = np.arctan2(y, x)
    # The cortex is folded: sulci cut in from outside, and white matter bulges out between them.
    phase = rng.uniform(0, 2 * np.pi, 3)
    folds = np.sin(17 * turn + 2.5 * np.sin(4 * turn + phase[0]) + phase[1])
    folds = folds + 0.5 * np.sin(31 * turn + phase[2])
    radius = np.hypot(x / 0.56, y / 0.72)

    at = x, y
    head = _ellipse(at, (0, 0), (0.70, 0.87))
    skull = _ellipse(at, (0, 0), (0.645, 0.815))
    inside = _ellipse(at, (0, 0), (0.585, 0.75))
    brain = _soft(1.0 - 0.10 * np.clip(folds - 0.55, 0, 1) - radius, side * 0.3)
    brain = brain * (1 - _soft(0.010 - np.abs(x), side) * _soft(np.abs(y) - 0.26, side))
    white = brain * _soft(0.80 + 0.055 * folds - radius, side * 0.3)
    ventricles = np.maximum.reduce(
        [
            _ellipse(at, (s * 0.115, y0), (0.052, 0.20), s * tilt)
            for s in (-1, 1)
            for y0, tilt in ((-0.16, 0.35), (0.20, -0.45))
        ]
    )
    lesion = _ellipse(at, (0.29, 0.02), (0.105, 0.085), 0.4)
    calcification = _ellipse(at, (0.30, 0.01), (0.026, 0.020))

    shares, left = {}, np.ones_like(x)
    for name, mask in (  # of several at a pixel, the first one in this list has it
        ("calcification", calcification),
        ("lesion", lesion),
        ("csf", ventricles),
        ("white", white),
        ("grey", brain),
        ("csf", inside),
        ("bone", skull),
        ("scalp", head),
    ):
        shares[name] = shares.get(name, 0) + left * mask
        left = left * (1 - mask)
    return shares


def seed_of(*parts) -> int:
    """A seed of 64 bits that follows from numbers and names, the same on any machine."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _ellipse(
    at: tuple[np.ndarray, np.ndarray],
    centre: tuple[float, float],
    halves: tuple[float, float],
    tilt: float = 0.0,
) -> np.ndarray:
    """Inside of an ellipse with edges one pixel soft: (H, W) in [0, 1].

    Args:
        at: x and y of each pixel. All lengths are in halves of the image side.
        centre: of the ellipse, x and y.
        halves: half its width and half its height.
        tilt: in radians.
    """
    (x, y), (x0, y0), (half_width, half_height) = at, centre, halves
    c, s = np.cos(tilt), np.sin(tilt)
    u, v = c * (x - x0) + s * (y - y0), -s * (x - x0) + c * (y - y0)
    inside = 1 - np.hypot(u / half_width, v / half_height)
    return _soft(inside, len(x) / 2 * min(half_width, half_height))


def _soft(signed: np.ndarray, pixels_per_unit: float) -> np.ndarray:
    """A step at 0 that is about one pixel wide."""
    return np.clip(signed * pixels_per_unit + 0.5, 0, 1)
