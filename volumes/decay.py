"""By how much the dose of a PET has decayed when its values count: times and half-lives.

Sources: DICOM PS3.3 (C.8.9.1 PET series: DecayCorrection START is the start of the scan), the QIBA
FDG-PET profile and IBSI's guide to SUV, which name the private times of Siemens and GE; half-lives
of the nuclides in DICOM's context group 4020 from the Decay Data Evaluation Project.

All times are local to the scanner, without a time zone: what names another zone is converted. No
line has a date or a clock in it.
"""

import re
from datetime import datetime, timedelta, timezone, tzinfo
from typing import NamedTuple

import pydicom
from pydicom.sr.codedict import Code, codes

HOUR, DAY = 3600.0, timedelta(days=1)
ANY_DAY = "20000101"  # where no date is told at all
BEFORE = timedelta(minutes=10)  # a scan over time may begin so long before the injection
NOTED = 60.0  # s: if two times of the scan differ by more, a line says which one counts
LONGEST = 4  # half-lives of uptake
NEEDS_DATE = 11.5 * HOUR  # a half-life from which on the uptake may take more than a day
HALF_LIFE = 0.1  # the share by which a header's half-life may be off
# Who made a private block of fields, and the field of it with the time to which values are decayed
# (DICOM keeps the creator in (group, 10), and the field then at (group, 10xx)).
PRIVATE_TIMES = {
    "SIEMENS": ((0x0071, 0x0010), (0x0071, 0x1022)),
    "GE": ((0x0009, 0x0010), (0x0009, 0x100D)),
}
MAKERS = {"SIEMENS": r"SIEMENS|CPS|CTI", "GE": r"GE\b|GEMS|GENERAL ELECTRIC"}
OWN_TIME = "scanner's own start of the scan"
SERIES, ACQUISITION = "series' time", "first acquisition's time"
# mass and element as DICOM spells them -> symbol and half-life in s
NUCLIDES = {
    "11 Carbon": ("C", 1221.8), "13 Nitrogen": ("N", 597.9), "14 Oxygen": ("O", 70.6),
    "15 Oxygen": ("O", 122.2), "18 Fluorine": ("F", 6586.2), "22 Sodium": ("Na", 8.21e7),
    "38 Potassium": ("K", 458.0), "43 Scandium": ("Sc", 14008.0), "44 Scandium": ("Sc", 14500.0),
    "45 Titanium": ("Ti", 11088.0), "51 Manganese": ("Mn", 2772.0),
    "52 Manganese": ("Mn", 483100.0), "52m Manganese": ("Mn", 1266.0), "52 Iron": ("Fe", 29790.0),
    "60 Copper": ("Cu", 1422.0), "61 Copper": ("Cu", 12020.0), "62 Copper": ("Cu", 580.4),
    "64 Copper": ("Cu", 45720.0), "62 Zinc": ("Zn", 33090.0), "66 Gallium": ("Ga", 34160.0),
    "68 Gallium": ("Ga", 4062.6), "68 Germanium": ("Ge", 2.341e7), "70 Arsenic": ("As", 3156.0),
    "72 Arsenic": ("As", 93600.0), "73 Selenium": ("Se", 25740.0), "75 Bromine": ("Br", 5802.0),
    "76 Bromine": ("Br", 58320.0), "77 Bromine": ("Br", 205300.0), "82 Rubidium": ("Rb", 75.5),
    "86 Yttrium": ("Y", 53060.0), "90 Yttrium": ("Y", 230600.0), "89 Zirconium": ("Zr", 282280.0),
    "90 Niobium": ("Nb", 52560.0), "94m Technetium": ("Tc", 3120.0), "124 Iodine": ("I", 360800.0),
    "152 Terbium": ("Tb", 63000.0),
}  # fmt: skip


class NoSuvError(Exception):
    """Why there is no SUV, as a reason for the user."""


class Uptake(NamedTuple):
    """How long the dose had decayed, in s, and what to know about the time that counts."""

    seconds: float
    note: str


def uptake(headers: list[pydicom.Dataset], drug: pydicom.Dataset, half_life: float) -> Uptake:
    """The time from the injection to the moment to which the values of a series are decayed.

    The scanner says that moment in a private field or in an enhanced file. If it does not, the
    moment is the earliest of the series' and the acquisitions' times. The earliest, because a
    series that was derived later may carry the time of its making.

    Raises:
        NoSuvError: times that are missing, blanked, or too far apart to be those of one scan.
    """
    zone = zone_of(headers[0], drug)
    clocks = scan_clocks(headers, zone)
    if not clocks:
        raise NoSuvError("no time of injection or scan in its header")
    taken = OWN_TIME if OWN_TIME in clocks else min(clocks, key=clocks.__getitem__)
    injection, scan = injection_and_scan(drug, clocks[taken], zone, half_life)
    used = [clocks[taken]] if taken == OWN_TIME else clocks.values()
    if any(is_midnight(clock) for clock in (injection, *used)):
        raise NoSuvError("a time of injection or scan is exactly midnight, as if it was blanked")
    seconds = (scan - injection).total_seconds()
    if not -BEFORE.total_seconds() <= seconds <= LONGEST * half_life:
        raise NoSuvError("its times of injection and scan do not fit")
    others = {name: (clock - clocks[taken]).total_seconds() for name, clock in clocks.items()}
    return Uptake(seconds, time_note(taken, others, half_life))


def time_note(taken: str, others: dict[str, float], half_life: float) -> str:
    """A line: which time counts, and how another one would change the SUV; empty if none differs.

    Of several other times it names the one that differs most.

    Args:
        others: name of each time -> how many s later it is than the one that counts.
    """
    other, later = max(others.items(), key=lambda o: abs(o[1]), default=("", 0.0))
    if abs(later) <= NOTED:
        return ""
    where = "after" if later > 0 else "before"
    times = 2 ** min(later / half_life, 99.0)
    return (
        f"SUV is for the {taken}; the {other} is {abs(later) / 60:.0f} minutes {where} it and "
        f"would make it {times:.3g} times as high"
    )


# --- times of a scan -------------------------------------------------------------------------


def scan_clocks(headers: list[pydicom.Dataset], zone: tzinfo | None) -> dict[str, datetime]:
    """The times of a scan that a series' headers tell, by what they are the time of."""
    first, clocks = headers[0], {}
    days = [str(first.get(name) or "") for name in ("AcquisitionDate", "SeriesDate")]
    acquisition_day = days[0] or days[1] or ANY_DAY
    series = on_day(days[1] or acquisition_day, first.get("SeriesTime"))
    acquired = [acquired_at(ds, acquisition_day, zone) for ds in headers]
    for name, found in ((SERIES, [series]), (ACQUISITION, acquired)):
        if any(found):
            clocks[name] = min(clock for clock in found if clock)
    reference = min(clocks.values(), default=None)
    own = {clock for ds in headers if (clock := own_time(ds, zone, reference))}
    if own and (max(own) - min(own)).total_seconds() > NOTED:
        raise NoSuvError("its slices were decayed to several times")
    if own:
        clocks[OWN_TIME] = min(own)
    return clocks


def acquired_at(ds: pydicom.Dataset, day: str, zone: tzinfo | None) -> datetime | None:
    """When an image's acquisition began."""
    clock = on_day(str(ds.get("AcquisitionDate") or day), ds.get("AcquisitionTime"))
    return clock or date_time(ds.get("AcquisitionDateTime"), zone)


def own_time(
    ds: pydicom.Dataset, zone: tzinfo | None, reference: datetime | None
) -> datetime | None:
    """The time of decay correction by an enhanced file, or by the private field of a maker."""
    if ds.get("DecayCorrectionDateTime"):
        return date_time(ds.DecayCorrectionDateTime, zone)
    for maker, (creator, field) in PRIVATE_TIMES.items():
        names = f"{text_of(ds.get(creator))} {ds.get('Manufacturer') or ''}".upper()
        if field not in ds or not re.search(rf"\b({MAKERS[maker]})", names):
            continue
        value = text_of(ds[field])
        if re.match(r"\d{8}", value):
            return date_time(value, zone)
        if reference is None:
            continue
        clock = on_day(reference.strftime("%Y%m%d"), value)
        if clock is not None:
            return clock - DAY if clock > reference + BEFORE else clock
    return None


def text_of(element: pydicom.DataElement | None) -> str:
    """The value of a private field, which may be bytes."""
    value = "" if element is None or element.value is None else element.value
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip(
        "\0 "
    )


# --- the injection ---------------------------------------------------------------------------


def injection_and_scan(
    drug: pydicom.Dataset, scan: datetime, zone: tzinfo | None, half_life: float
) -> tuple[datetime, datetime]:
    """When the drug was injected and the scan began, both with their days.

    Where only clocks are told, the injection was in the day before the scan. That is refused for a
    nuclide whose uptake may take longer.
    """
    stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
    clock = drug.get("RadiopharmaceuticalStartTime")
    injection = date_time(stamp, zone)
    if injection is None and re.match(r"\d{8}", stamp):
        injection = on_day(stamp[:8], clock)
    if injection is not None:
        if scan.strftime("%Y%m%d") == ANY_DAY:
            scan = datetime.combine(injection.date(), scan.time())
            scan += DAY if scan < injection - BEFORE else timedelta(0)
        return injection, scan
    injection = on_day(scan.strftime("%Y%m%d"), clock)
    if injection is None:
        raise NoSuvError("no time of injection or scan in its header")
    if half_life >= NEEDS_DATE:
        raise NoSuvError("no date of injection, which a nuclide of so long a half-life needs")
    return injection - (DAY if injection > scan + BEFORE else timedelta(0)), scan


# --- DICOM's dates and clocks ----------------------------------------------------------------


def on_day(day: str, clock) -> datetime | None:
    """A date YYYYMMDD and a time HHMM[SS[.ffffff]]; None where one is missing."""
    found = re.match(r"(\d{4})(\d{2})?(\.\d+)?$", str(clock or "").strip())
    if not found or len(day) < 8:
        return None
    whole, seconds, fraction = found.groups(default="")
    start = datetime.strptime(day[:8] + whole + (seconds or "00"), "%Y%m%d%H%M%S")
    return start + timedelta(seconds=float(fraction or 0))


def date_time(stamp, zone: tzinfo | None) -> datetime | None:
    """A moment YYYYMMDDHHMM[SS[.ffffff]][+HHMM] in local time; None where it tells no clock."""
    found = re.match(r"(\d{8})(\d{4,6}(?:\.\d+)?)([+-]\d{4})?$", str(stamp or "").strip())
    clock = on_day(*found.groups()[:2]) if found else None
    if clock is None or not found[3] or zone is None:
        return clock
    return clock.replace(tzinfo=offset(found[3])).astimezone(zone).replace(tzinfo=None)


def zone_of(ds: pydicom.Dataset, drug: pydicom.Dataset) -> tzinfo | None:
    """The time zone of the clocks without one: the file's, or that of the injection."""
    own = str(ds.get("TimezoneOffsetFromUTC") or "")
    if not own:
        stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
        own = "".join(re.findall(r"[+-]\d{4}$", stamp))
    return offset(own) if own else None


def offset(text: str) -> timezone:
    """A time zone from +HHMM or -HHMM."""
    hours, minutes = int(text[1:3]), int(text[3:5])
    away = timedelta(hours=hours, minutes=minutes)
    return timezone(-away if text[0] == "-" else away)


def is_midnight(clock: datetime) -> bool:
    """Whether a time of day is 0:00 to the microsecond."""
    return clock.time().isoformat() == "00:00:00"


# --- half-lives ------------------------------------------------------------------------------


def check_half_life(drug: pydicom.Dataset, half_life: float) -> None:
    """NoSuvError if the header's half-life, in s, is not that of the nuclide that it names."""
    named = nuclide_of(drug)
    if named and abs(half_life / NUCLIDES[named][1] - 1) > HALF_LIFE:
        symbol, mass = NUCLIDES[named][0], named.split()[0]
        raise NoSuvError(f"its half-life is not that of {symbol}-{mass}, which its header names")


def nuclide_of(drug: pydicom.Dataset) -> str:
    """The nuclide that a code names, as in NUCLIDES; empty where it names none that we know."""
    items = drug.get("RadionuclideCodeSequence") or [pydicom.Dataset()]
    value, scheme, meaning = (
        str(items[0].get(name) or "")
        for name in ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")
    )
    snomed = {"SNM3": "SRT", "99SDM": "SRT"}.get(scheme, scheme)
    code = Code(value, snomed, meaning)
    names = {spelt(name): known for name, known in codes.cid4020.concepts.items()}
    for name in NUCLIDES:
        if value and name in names and code == names[name]:
            return name
    return next((name for name in NUCLIDES if is_meant(name, meaning)), "")


def spelt(keyword: str) -> str:
    """The name in NUCLIDES of a keyword of pydicom's, as "18 Fluorine" of "_18Fluorine"."""
    return re.sub(r"_(\d+m?)", r"\1 ", keyword)


def is_meant(name: str, meaning: str) -> bool:
    """Whether a code's meaning, as ^18^Fluorine, F-18 or 18F, is a nuclide of NUCLIDES."""
    mass, element = name.split()
    found = re.search(r"\d+m?", meaning)
    letters = "".join(re.findall(r"[A-Za-z]+", meaning.replace(found[0], " "))) if found else ""
    if not found or found[0] != mass or not letters:
        return False
    letters = letters.lower()
    begins = len(letters) > 3 and element.lower().startswith(letters[:4])
    return begins or letters == NUCLIDES[name][0].lower()
