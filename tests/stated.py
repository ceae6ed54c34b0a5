"""Values that others computed: golden vectors of the published code, metrics of nine cases.

See tests/data/README.md.
"""

import csv
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
DRAWN = DATA / "metrics" / "drawn"


def golden_arrays(file: Path, case: str) -> dict[str, np.ndarray]:
    """The arrays of one case of an expected.npz, by their names within the case."""
    with np.load(file) as arrays:
        mine = [name for name in arrays.files if name.startswith(f"{case}/")]
        return {name.removeprefix(f"{case}/"): arrays[name] for name in mine}


def stated_metrics(file: Path) -> dict[str, dict[str, float]]:
    """Case -> metric -> value of an expected.csv."""
    values: dict[str, dict[str, float]] = {}
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            values.setdefault(row["case"], {})[row["metric"]] = float(row["value"])
    return values
