"""Several images at one place: echoes, b-values, magnitude and phase, or points in time.

What differs is named, and the user chooses: by `--where` a contrast, by `--frame` a time.
Sources: DICOM PS3.3 (C.8.3.1 MR image, C.8.9 PET, C.7.6.16 multi-frame functional groups).
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom

from cli import UserError
from volumes.planes import FRAME, SAME, Plane

# What makes another image of the same slice, as --where names it.
CONTRASTS = (
    *("EchoTime", "DiffusionBValue", "ImageType", "InversionTime", "FlipAngle"),
    *("RepetitionTime", "EchoNumbers", "ConvolutionKernel", "StackID"),
    *("EnergyWindowVector", "DetectorVector", "RotationVector"),
)
# What tells points in time apart, the surest first; numbers of a file come last.
TIME_FIELDS = (
    *("TemporalPositionIdentifier", "FrameReferenceTime", "AcquisitionDateTime"),
    *("AcquisitionTime", "TriggerTime", "PhaseVector", "TimeSliceVector", "ContentTime"),
    *("AcquisitionNumber", "InstanceNumber"),
)
# How long an image took, in ms; the latter in enhanced files.
DURATIONS = ("ActualFrameDuration", "FrameAcquisitionDuration")
B_VALUE = 0x0019100C  # Siemens', before the standard had one
# In enhanced files: field -> its name there; the sequence around it does not matter.
ENHANCED = {
    "EchoTime": "EffectiveEchoTime",
    "ImageType": "FrameType",
    "InversionTime": "InversionTimes",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
    "FrameReferenceTime": "FrameReferenceDateTime",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
    "TriggerTime": "NominalCardiacTriggerDelayTime",
}


class Choice(NamedTuple):
    """What the user chose of a source that holds more than one volume."""

    where: str = ""  # as EchoTime=80,ImageType=M
    time: str = ""  # --frame: a number from 1, "mean" or "sum"
    affine: str = "sform"  # of NIfTI, or "qform"


ALL = Choice()


def fields_of(ds: pydicom.Dataset) -> dict[str, str]:
    """The fields of CONTRASTS, TIME_FIELDS and DURATIONS that a header has, as text."""
    found = {name: ds.get(name) for name in (*CONTRASTS, *TIME_FIELDS, *DURATIONS)}
    of_siemens = "SIEMENS MR HEADER" in str(ds.get(0x00190010, ""))
    if found["DiffusionBValue"] is None and B_VALUE in ds and of_siemens:
        found["DiffusionBValue"] = ds[B_VALUE].value
    return {name: _text(value) for name, value in found.items() if value not in (None, "")}


def frame_fields(groups: list[pydicom.Dataset]) -> dict[str, str]:
    """The same of a frame of an enhanced file, from its functional groups."""
    items = [e.value[0] for group in groups for e in group if e.VR == "SQ" and e.value]
    found = {}
    for name in (*CONTRASTS, *TIME_FIELDS, *DURATIONS):
        keyword = ENHANCED.get(name, name)
        value = next((item.get(keyword) for item in items if keyword in item), None)
        if value not in (None, ""):
            found[name] = _text(value)
    return found


def _text(value) -> str:
    """A field's value: the parts of several between backslashes, as in DICOM."""
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace").strip()
    many = not isinstance(value, str) and hasattr(value, "__iter__")
    return "\\".join(map(str, value)) if many else str(value)


# --- choosing --------------------------------------------------------------------------------


def chosen(path: Path, planes: list[Plane], where: str) -> tuple[list[Plane], str]:
    """The planes that `--where` names, and a note; UserError if there are none.

    A condition on a field that no plane has is for the other source.
    """
    notes = []
    for condition in filter(None, where.split(",")):
        name, _, value = (part.strip() for part in condition.partition("="))
        if name not in CONTRASTS or not value:
            raise UserError(
                f"--where is {condition!r}, expected FIELD=VALUE, FIELD of {', '.join(CONTRASTS)}"
            )
        if not any(name in p.fields for p in planes):
            continue
        kept = [p for p in planes if _matches(p.fields.get(name, ""), value)]
        if not kept:
            raise UserError(f"{path}: no image with {condition}; {name} is {_values(planes, name)}")
        if len(kept) < len(planes):
            notes.append(f"{name} {value}: {len(kept)} of {len(planes)} images")
        planes = kept
    return planes, "; ".join(notes)


def _matches(value: str, wanted: str) -> bool:
    """Whether a field is, or has among its parts, the wanted text or number."""
    for part in (value, *value.split("\\")):
        try:
            same = bool(np.isclose(float(part), float(wanted), rtol=1e-3, atol=1e-6))
        except ValueError:
            same = part.upper() == wanted.upper()
        if same:
            return True
    return False


def largest(path: Path, planes: list[Plane]) -> tuple[list[Plane], str]:
    """The planes of the kind that most have, and a note on the others.

    A kind is an orientation, size and spacing, a frame of reference, a modality and a unit. A
    localiser may be among the slices. UserError if no kind has more than half of the planes.
    """
    kinds: list[list[Plane]] = []
    for plane in planes:
        same = (kind for kind in kinds if _alike(kind[0], plane))
        kind = next(same, None)
        if kind is None:
            kinds.append([plane])
        else:
            kind.append(plane)
    kinds.sort(key=len, reverse=True)
    most = kinds[0]
    if len(most) == len(planes):
        return planes, ""
    other = kinds[1][0]
    differing = _differences(most[0], other)
    what = " and ".join(differing)
    if len(most) <= len(planes) / 2:
        raise UserError(
            f"{path}: mixed {what} in one series: {len(most)} images as {most[0].name}, "
            f"{len(planes) - len(most)} otherwise ({other.name}, …); take those of one kind"
        )
    left = len(planes) - len(most)
    scout = ", as a localiser's" if differing[0] == "orientations" else ""
    return most, f"{left} images with other {what} left out ({other.name}){scout}"


def _differences(a: Plane, b: Plane) -> list[str]:
    """In what two planes cannot be slices of one stack."""
    same = {
        "orientations": np.allclose(a.directions, b.directions, atol=1e-3),
        "sizes": a.size == b.size,
        "pixel spacings": np.allclose(a.spacing, b.spacing, rtol=1e-3),
    }
    kinds = ("frames of reference", "modalities", "units")
    same |= {what: one == other for what, one, other in zip(kinds, a.kind, b.kind, strict=True)}
    return [what for what, equal in same.items() if not equal]


def _alike(a: Plane, b: Plane) -> bool:
    return not _differences(a, b)


def durations_of(stacks: list[list[Plane]]) -> list[float]:
    """How long each point in time took, in s; 0 where it is not told."""
    return [float(np.mean([_duration(plane) for plane in stack])) for stack in stacks]


def _duration(plane: Plane) -> float:
    text = next((plane.fields[name] for name in DURATIONS if name in plane.fields), "")
    order = _order(text)[0]
    return order / 1000 if np.isfinite(order) else 0.0


# --- images at one place ---------------------------------------------------------------------


def by_time(path: Path, planes: list[Plane], time: str) -> tuple[list[list[Plane]], str]:
    """The planes of each point in time that `time` chooses, and a note.

    Args:
        path: the file or folder that messages name.
        planes: of one orientation, size and spacing.
        time: "" if there is one point only; else its number from 1, or mean or sum for all.

    Raises:
        UserError: several images at one place, and no choice among them.
    """
    places = _places(planes)
    several = [place for place in places if len(place) > 1]
    if not several:
        return [planes], ""
    head = f"{path}: duplicate slices, {len(several)} positions occur twice or more"
    for name in CONTRASTS:
        if any(len(_distinct(place, name)) > 1 for place in several):
            raise UserError(f"{head}: {_contrasts(several)}")
    count = len(places[0])
    keys = (*TIME_FIELDS, FRAME)
    key = next((n for n in keys if all(_tells_apart(place, n) for place in several)), None)
    if key is None or any(len(place) != count for place in places):
        a, b = several[0][:2]
        depth = a.position @ np.cross(*a.directions)
        raise UserError(
            f"{head}: {a.name} and {b.name} lie both at {depth:.2f} mm, and no field of their "
            "headers tells which to take; remove one of them"
        )
    number = number_of(time, count, f"{head}: {count} points in time, by {key}")
    times = [sorted(place, key=lambda p: _order(p.fields[key])) for place in places]
    stacks = [[place[t] for place in times] for t in range(count)]
    if number is None:
        return stacks, f"{time} of {count} points in time, by {key}"
    return [stacks[number]], f"point {number + 1} of {count} in time, by {key}"


def number_of(time: str, count: int, what: str) -> int | None:
    """The index from 0 of `--frame`, None for mean and sum; UserError if it is none of `count`."""
    if time in ("mean", "sum"):
        return None
    if time.isdecimal() and 1 <= int(time) <= count:
        return int(time) - 1
    wrong = f", but --frame is {time!r}" if time else ""
    raise UserError(f"{what}{wrong}; choose by --frame 1 to {count}, or --frame mean or sum")


def _places(planes: list[Plane]) -> list[list[Plane]]:
    """Planes by their position along the normal."""
    normal = np.cross(*planes[0].directions)
    planes = sorted(planes, key=lambda p: float(p.position @ normal))
    depth = [float(p.position @ normal) for p in planes]
    places = [[planes[0]]]
    for plane, before, here in zip(planes[1:], depth, depth[1:], strict=False):
        if here - before < SAME:
            places[-1].append(plane)
        else:
            places.append([plane])
    return places


def _distinct(planes: list[Plane], name: str) -> set[str]:
    return {p.fields.get(name, "") for p in planes}


def _tells_apart(place: list[Plane], name: str) -> bool:
    """Whether each plane of a place has the field, and no two have the same."""
    return "" not in _distinct(place, name) and len(_distinct(place, name)) == len(place)


def _contrasts(several: list[list[Plane]]) -> str:
    """What varies among planes at one place, and how to choose."""
    names = [n for n in CONTRASTS if any(len(_distinct(place, n)) > 1 for place in several)]
    planes = [plane for place in several for plane in place]
    listed = "; ".join(f"{name} is {_values(planes, name)}" for name in names)
    example = _values(planes, names[0]).replace(",", " ").split()[0]
    alone = all(len(_distinct(place, names[0])) == len(place) for place in several)
    more = f",{names[1]}=…" if len(names) > 1 and not alone else ""
    return f"{listed}; choose by --where {names[0]}={example}{more}"


def _values(planes: list[Plane], name: str) -> str:
    """The values of a field, without the parts that all have, as "20 or 80"."""
    found = [value.split("\\") for value in sorted(_distinct(planes, name), key=_order)]
    shared = set.intersection(*map(set, found)) if len(found) > 1 else set()
    shown = [" ".join(v for v in value if v not in shared) or "none" for value in found]
    return ", ".join(shown[:-1]) + " or " + shown[-1] if len(shown) > 1 else shown[0]


def _order(value: str) -> tuple[float, str]:
    """Numbers by their size, other text after them."""
    number = re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", value)
    try:
        return (float(value), "") if number else (np.inf, value)
    except ValueError:
        return np.inf, value
