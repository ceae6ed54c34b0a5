"""Body-weight SUV of a PET series, from its DICOM header.

Sources: DICOM PS3.3 (C.8.9 PET), the QIBA FDG-PET profile and, for counts of Philips, their DICOM
conformance statement (factors to SUV and to Bq/ml in private fields).
"""

from datetime import datetime, timedelta

import numpy as np
import pydicom

PHILIPS = (0x70530010, 0x70531000, 0x70531009)  # who made the two, factor to SUV, factor to Bq/ml
BODIES = {"BSA": "body surface", "LBM": "lean mass", "LBMJAMES128": "lean mass",
    "LBMJANMA": "lean mass", "IBW": "ideal weight"}  # fmt: skip


def suv_factor(headers: list[pydicom.Dataset]) -> tuple[float | None, str]:
    """What turns a PET series' values into body-weight SUV (g/ml), or None and the reason why not.

    SUV = activity concentration (Bq/ml) x weight (g) / dose (Bq). The dose is decayed from the
    injection to the time that the scanner corrected the values to.

    Args:
        headers: one for each file of the series.

    Fields that make no sense raise whatever pydicom, or the arithmetic, raises for them.
    """
    ds = headers[0]
    if ds.get("Modality") != "PT":
        return None, "not a PET series"
    if ds.get("Units") == "GML":
        kind = str(ds.get("SUVType") or "BW")
        if kind == "BW":
            return 1.0, ""
        return None, f"its SUV is by {BODIES.get(kind, 'something else')}, not by body weight"
    activity = 1.0  # Bq/ml of a value of 1
    if ds.get("Units") == "CNTS":
        suv, activity = (philips_factor(ds, tag) for tag in PHILIPS[1:])
        if suv:
            return suv, ""
    if ds.get("Units") not in ("BQML", "CNTS") or not activity:
        return None, "its units are not Bq/ml"
    drug = (ds.get("RadiopharmaceuticalInformationSequence") or [pydicom.Dataset()])[0]
    weight = float(ds.get("PatientWeight") or 0)  # kg
    dose = float(drug.get("RadionuclideTotalDose") or 0)  # Bq
    half_life = float(drug.get("RadionuclideHalfLife") or 0)  # s
    for name, value in (("weight", weight), ("injected dose", dose), ("half-life", half_life)):
        if not (np.isfinite(value) and value > 0):
            return None, f"no {name} in its header"
    if ds.get("DecayCorrection") == "ADMIN":
        return activity * weight * 1000 / dose, ""
    if ds.get("DecayCorrection") != "START":
        return None, "its decay correction is neither START nor ADMIN"
    scan = scan_start(headers)
    injection = injection_time(drug, scan)
    if scan is None or injection is None:
        return None, "no time of injection or scan in its header"
    elapsed = (scan - injection).total_seconds()
    if not 0 <= elapsed <= 10 * half_life:
        return None, "its times of injection and scan do not fit"
    return activity * weight * 1000 / (dose * 2 ** (-elapsed / half_life)), ""


def philips_factor(ds: pydicom.Dataset, tag: int) -> float:
    """A private factor of Philips' PET counts, 0 where there is none that makes sense."""
    if tag not in ds or "PHILIPS PET" not in str(ds.get(PHILIPS[0], "")).upper():
        return 0.0
    value = ds[tag].value
    value = value.decode("ascii").strip("\0 ") if isinstance(value, bytes) else value
    factor = float(value or 0)
    return factor if np.isfinite(factor) and factor > 0 else 0.0


def scan_start(headers: list[pydicom.Dataset]) -> datetime | None:
    """The time START refers to: the series', or the first acquisition's if that was before.

    A series made later from the images carries the time when it was made.
    """
    series = moment(headers[0].get("SeriesDate"), headers[0].get("SeriesTime"))
    acquired = [moment(ds.get("AcquisitionDate"), ds.get("AcquisitionTime")) for ds in headers]
    return min((t for t in (series, *acquired) if t), default=None)


def injection_time(drug: pydicom.Dataset, scan: datetime | None) -> datetime | None:
    """When the drug was injected; where only the clock is told, within the day before `scan`."""
    stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
    if stamp:
        return moment(stamp[:8], stamp[8:].split("+")[0].split("-")[0])
    day = scan.strftime("%Y%m%d") if scan else None
    injection = moment(day, drug.get("RadiopharmaceuticalStartTime"))
    if injection and injection > scan:
        injection -= timedelta(days=1)
    return injection


def moment(date, time) -> datetime | None:
    """A DICOM date YYYYMMDD and time HHMM[SS[.ffffff]]; None where one is missing."""
    date, time = str(date or ""), str(time or "")
    if len(date) < 8 or len(time) < 4:
        return None
    whole, _, fraction = time.partition(".")
    start = datetime.strptime(date[:8] + whole.ljust(6, "0")[:6], "%Y%m%d%H%M%S")
    return start + timedelta(seconds=float(f"0.{fraction or 0}"))
