"""What a fused image should reach at least, and how much of it is missing.

Pixels that are optimised directly reach all floors together; the floors are a little lower than
their values (docs/training.md). A network is chosen by the sum of what it lacks. More than a floor
does not count, so it cannot make up for a value that is too low.
"""

import math
from collections.abc import Mapping

# task -> value of `evaluation.one_source` or metric -> the least that is asked for
FLOORS = {
    "CT-MRI": {"SSIM": 0.735, "VIF": 0.51, "Qabf": 0.60, "kept": 0.82, "conspicuous": 0.70},
    "PET-MRI": {"SSIM": 0.702, "VIF": 0.81, "Qabf": 0.745, "kept": 0.72, "conspicuous": 0.60},
    "SPECT-MRI": {"SSIM": 0.723, "VIF": 0.63, "Qabf": 0.70, "kept": 0.64, "conspicuous": 0.42},
}
# task -> value -> the most that is taken
CEILINGS = {
    "CT-MRI": {"foreign": 0.18, "brighter": 0.03},
    "PET-MRI": {"foreign": 0.11, "brighter": 0.04, "rise": 42},
    "SPECT-MRI": {"foreign": 0.14, "brighter": 0.05, "rise": 33},
}
UNITS = {"rise": 255}  # grey levels; all other values are shares


def shortfall(task: str, values: Mapping[str, float]) -> float:
    """The sum of what a task's mean values lack of its floors and exceed its ceilings; 0 is best.

    A value that is undefined (NaN) lacks nothing.
    """
    lacking = [
        (least - values[name]) / UNITS.get(name, 1) for name, least in FLOORS[task].items()
    ] + [(values[name] - most) / UNITS.get(name, 1) for name, most in CEILINGS[task].items()]
    return sum(max(0.0, lack) for lack in lacking if not math.isnan(lack))
