"""Drawn from formulas: heads as CT, MRI, PET and SPECT would show them, and shapes of findings.

The heads are for the demo and the tests, where no patient image may be: skull, cortex, ventricles
and a lesion with a calcified spot. The colour tables resemble those of the Harvard Whole Brain
Atlas. The shapes are planted into images, in training and to measure what a fusion keeps of them.

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
    # the cortex is folded: sulci cut in from outside, white matter bulges out between them
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
    for name, mask in (  # the first that covers a pixel has it
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


SHAPES = ("disc", "blob", "ring", "line")


def finding(
    shape: str, sides: tuple[int, int], centre: tuple[float, float], radius: float, turn: float = 0
) -> np.ndarray:
    """The share that a finding has of each pixel: (H, W) float32 in [0, 1], its edges soft.

    Args:
        shape: "disc"; "blob", a gaussian; "ring", hollow by half; "line", a third as wide as long.
        centre: row and column, in pixels.
        radius: of the disc and the ring, twice the blob's sigma, half the line's length; in pixels.
        turn: angle of the line, in radians.
    """
    y, x = np.ogrid[: sides[0], : sides[1]]
    y, x = y - np.float32(centre[0]), x - np.float32(centre[1])
    distance = np.hypot(x, y)
    if shape == "blob":
        return np.exp(-2 * (distance / radius) ** 2).astype(np.float32)
    if shape == "line":
        along, across = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        distance = np.maximum(np.abs(along), radius - radius / 3 + np.abs(across))
    disc = np.clip((radius - distance) / 2 + 0.5, 0, 1)  # falls over two pixels
    if shape == "ring":
        disc = disc - np.clip((radius / 2 - distance) / 2 + 0.5, 0, 1)
    return disc.astype(np.float32)


def seed_of(*parts) -> int:
    """One seed for a few numbers and names, the same on any machine; of 64 bits."""
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
