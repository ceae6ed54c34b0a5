"""What a stored value stands for: rescale slope and intercept, real world values, and units.

Sources: DICOM PS3.3 (C.11.1 modality LUT, C.7.6.16.2.11 real world value mapping, C.8.9.1 units of
PET), PS3.16 (context groups 83 and 84: units as UCUM codes).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom

from cli import UserError

UNITS = {"BQML": "Bq/ml", "CNTS": "counts", "GML": "SUV", "NM": "counts"}
MEASURED = ("BQML", "GML")  # units of PET in which values need no mapping
PREFERRED = ("GML", "BQML")  # of several mappings
UPTAKE = ("PT", "NM")
# UCUM codes of a mapping -> Units of PET, and what to multiply with
UCUM = {
    "{SUVbw}g/ml": ("GML", 1.0), "g/ml{SUVbw}": ("GML", 1.0), "g/mL{SUVbw}": ("GML", 1.0),
    "Bq/ml": ("BQML", 1.0), "Bq/mL": ("BQML", 1.0), "kBq/ml": ("BQML", 1e3),
    "kBq/mL": ("BQML", 1e3), "MBq/ml": ("BQML", 1e6), "MBq/mL": ("BQML", 1e6),
}  # fmt: skip


class Rescale(NamedTuple):
    """Value = stored value x slope + intercept, in a unit as PET's Units name it."""

    slope: float
    intercept: float
    unit: str
    note: str  # for the user, or empty


def rescale_of(
    file: Path, rescale: pydicom.Dataset, mappings: list[pydicom.Dataset], ds: pydicom.Dataset
) -> Rescale:
    """How the stored values of an image become real ones.

    Args:
        file: for messages.
        rescale: has RescaleSlope and RescaleIntercept, or neither.
        mappings: the items of the image's RealWorldValueMappingSequence.
        ds: the file's header. A mapping counts for PET and nuclear medicine where the rescaled
            values are not in Bq/ml or SUV already.

    Raises:
        UserError: a slope of 0, which makes all values one.
    """
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    units = str(ds.get("Units") or "")
    note = ""
    if mappings and ds.get("Modality") in UPTAKE and units not in MEASURED:
        usable = [known for item in mappings if (known := linear(item))]
        if len({known.unit for known in usable}) == len(usable) > 0:
            return min(usable, key=lambda known: PREFERRED.index(known.unit))
        note = (
            "its RealWorldValueMapping was not used, expected one of slope and intercept to "
            "Bq/ml or SUV"
        )
    if slope == 0:
        raise UserError(f"{file}: its rescale slope is 0, which makes all its values one")
    return Rescale(slope, intercept, units, note)


def linear(item: pydicom.Dataset) -> Rescale | None:
    """A mapping by a line to Bq/ml or SUV; None for any other."""
    codes = item.get("MeasurementUnitsCodeSequence") or [pydicom.Dataset()]
    unit, factor = UCUM.get(str(codes[0].get("CodeValue") or ""), ("", 1.0))
    slope, intercept = item.get("RealWorldValueSlope"), item.get("RealWorldValueIntercept")
    if not unit or slope is None or intercept is None:
        return None
    slope, intercept = float(slope) * factor, float(intercept) * factor
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        return None
    note = f"values in {UNITS[unit]} by its RealWorldValueMapping"
    return Rescale(slope, intercept, unit, note)
