"""How long frames over time took, and what their mean and their sum are.

Sources: DICOM PS3.3 (C.8.9.4 PET image: ActualFrameDuration in ms; C.7.6.16 frame content), BIDS
1.10 (PET: FrameDuration in s, in the JSON file of the image's name).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOST = 2**22  # bytes of a sidecar that is read
TOLERANCE = 1e-3  # of the longest duration: a smaller difference does not count


def mean_weights(durations: Sequence[float], count: int) -> tuple[np.ndarray, str]:
    """The weights of `count` frames in their mean, of sum 1, and a few words on them.

    Concentrations are means over a frame's time, so longer frames weigh more. Without durations for
    all of them, frames weigh the same, and the words say so.
    """
    times = np.array([float(d) for d in durations])
    if len(times) != count or not (np.isfinite(times).all() and (times > 0).all()):
        return np.full(count, 1 / count), "unweighted, as no durations of its frames are told"
    weights = times / times.sum()
    if np.ptp(times) <= TOLERANCE * times.max():
        return np.full(count, 1 / count), "all of one duration"
    return weights, f"weighted by their durations, {times.min():g} to {times.max():g} s"


def beside(sidecar: Path) -> list[float]:
    """FrameDuration of a JSON file of BIDS, in s; [] where there is none that makes sense."""
    found = content_of(sidecar).get("FrameDuration")
    numbers = found if isinstance(found, list) else [found]
    wrong = any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers)
    return [] if wrong else [float(n) for n in numbers]


def content_of(sidecar: Path) -> dict:
    """What a JSON file of BIDS says; empty where there is none, or none that makes sense."""
    try:
        if sidecar.stat().st_size > MOST:
            return {}
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def sum_words(count: int) -> str:
    """What a sum of concentrations is, in a few words."""
    return f"of concentrations, {count} times their unweighted mean, and no amount"
