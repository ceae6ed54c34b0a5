"""Body-weight SUV of a PET series, from its DICOM header.

Sources: DICOM PS3.3 (C.8.9 PET), the QIBA FDG-PET profile and, for counts of Philips, their DICOM
conformance statement (factors to SUV and to Bq/ml in private fields). Times are in decay.py.
"""

import numpy as np
import pydicom

from volumes.decay import NoSuvError, check_half_life, uptake

PHILIPS = (0x70530010, 0x70531000, 0x70531009)  # who made the two, factor to SUV, factor to Bq/ml
BODIES = {"BSA": "body surface", "LBM": "lean mass", "LBMJAMES128": "lean mass",
    "LBMJANMA": "lean mass", "IBW": "ideal weight"}  # fmt: skip
DOSES = (1e5, 1e11)  # Bq that can have been injected
WEIGHTS = (0.5, 400.0)  # kg that a patient can have
NEEDED = {"ATTN": "attenuation", "DECAY": "decay"}  # corrections, as CorrectedImage names them


def suv_factor(headers: list[pydicom.Dataset]) -> tuple[float | None, str]:
    """What turns a PET series' values into body-weight SUV (g/ml), and a line about it.

    SUV = activity concentration (Bq/ml) x weight (g) / dose (Bq). The dose is decayed from the
    injection to the time that the scanner corrected the values to.

    Args:
        headers: one for each file of the series.

    Returns: the factor, or None; the line is the reason why not, or what to know about the factor,
        or empty.

    Fields that make no sense raise whatever pydicom, or the arithmetic, raises for them.
    """
    try:
        return known_factor(headers)
    except NoSuvError as reason:
        return None, str(reason)


def known_factor(headers: list[pydicom.Dataset]) -> tuple[float, str]:
    """The factor and a note, which may be empty; NoSuvError where there is none."""
    ds = headers[0]
    if ds.get("Modality") != "PT":
        raise NoSuvError("not a PET series")
    if ds.get("Units") == "GML":
        kind = str(ds.get("SUVType") or "BW")
        if kind == "BW":
            return 1.0, ""
        raise NoSuvError(f"its SUV is by {BODIES.get(kind, 'something else')}, not by body weight")
    check_corrections(ds)
    activity = 1.0  # Bq/ml of a value of 1
    if ds.get("Units") == "CNTS":
        factors = {tuple(philips_factor(one, tag) for tag in PHILIPS[1:]) for one in headers}
        if len(factors) > 1:
            raise NoSuvError("its slices have several factors from counts")
        suv, activity = factors.pop()
        if suv:
            return suv, ""
    if ds.get("Units") not in ("BQML", "CNTS") or not activity:
        raise NoSuvError("its units are not Bq/ml")
    return by_dose(headers, activity)


def by_dose(headers: list[pydicom.Dataset], activity: float) -> tuple[float, str]:
    """The factor from weight and injected dose, and a note; `activity` is Bq/ml of a value of 1."""
    ds = headers[0]
    drugs = ds.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()]
    if len(drugs) > 1:
        raise NoSuvError("its header has several injections")
    drug = drugs[0]
    weight = positive(ds, "PatientWeight", "weight")  # kg
    dose = positive(drug, "RadionuclideTotalDose", "injected dose")  # Bq
    half_life = positive(drug, "RadionuclideHalfLife", "half-life")  # s
    if not DOSES[0] <= dose <= DOSES[1]:
        raise NoSuvError("its injected dose is not between 0.1 and 100000 MBq; the field is in Bq")
    if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        raise NoSuvError("its weight is not between 0.5 and 400 kg")
    if any(dose_and_weight(one) != dose_and_weight(ds) for one in headers):
        raise NoSuvError("its slices differ in weight or injected dose")
    check_half_life(drug, half_life)
    at_injection = activity * weight * 1000 / dose
    correction = ds.get("DecayCorrection")
    if correction == "ADMIN":
        return at_injection, ""
    if correction != "START" and not ds.get("DecayCorrectionDateTime"):
        raise NoSuvError("its decay correction is neither START nor ADMIN")
    seconds, note = uptake(headers, drug, half_life)
    return at_injection * 2 ** (seconds / half_life), note


def positive(ds: pydicom.Dataset, keyword: str, name: str) -> float:
    """A number of a header; NoSuvError where it is missing or not above 0."""
    value = float(ds.get(keyword) or 0)
    if not (np.isfinite(value) and value > 0):
        raise NoSuvError(f"no {name} in its header")
    return value


def dose_and_weight(ds: pydicom.Dataset) -> tuple[str, str]:
    """What must be the same in all files of a series."""
    drug = (ds.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()])[0]
    return str(ds.get("PatientWeight")), str(drug.get("RadionuclideTotalDose"))


def check_corrections(ds: pydicom.Dataset) -> None:
    """NoSuvError if the header lists corrections, and one that SUV needs is not among them."""
    made = ds.get("CorrectedImage")
    if not made:
        return
    made = [made] if isinstance(made, str) else list(made)
    if missing := [what for code, what in NEEDED.items() if code not in made]:
        raise NoSuvError(f"its values are not corrected for {' and '.join(missing)}")


def philips_factor(ds: pydicom.Dataset, tag: int) -> float:
    """A private factor of Philips' PET counts, 0 where there is none that makes sense."""
    if tag not in ds or "PHILIPS PET" not in str(ds.get(PHILIPS[0], "")).upper():
        return 0.0
    value = ds[tag].value
    value = value.decode("ascii").strip("\0 ") if isinstance(value, bytes) else value
    factor = float(value or 0)
    return factor if np.isfinite(factor) and factor > 0 else 0.0
