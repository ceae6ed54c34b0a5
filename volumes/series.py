"""The series of a DICOM folder: listing and choosing one, patients, and copies of a file.

Sources: DICOM PS3.3 (C.7.3.1 series, C.8.3.1 MR image, C.8.9 PET).

Patients are compared in memory. No message holds a name, number or date of one.
"""

import re
from collections.abc import Collection
from itertools import combinations
from pathlib import Path

import numpy as np
import pydicom

from cli import UserError

Headers = list[tuple[Path, pydicom.Dataset]]  # files, each with its header
Patient = tuple[str, ...]  # the fields of IDENTITY in their order
IDENTITY = {"PatientID": "ID", "PatientBirthDate": "date of birth", "PatientSex": "sex"}
CODE = re.compile(r"[A-Z0-9_ ]{1,16}")  # what a DICOM code string may hold
SHORT = {"EchoTime": "TE", "RepetitionTime": "TR", "InversionTime": "TI"}  # times in ms


def frame_count(ds: pydicom.Dataset) -> int:
    """Images in a file."""
    return int(ds.get("NumberOfFrames") or 1)


def by_series(headers: Headers) -> dict[str, Headers]:
    """Headers by series UID, in the order of the series' numbers."""
    groups: dict[str, Headers] = {}
    for file, ds in headers:
        groups.setdefault(str(ds.get("SeriesInstanceUID", "")), []).append((file, ds))

    def number(uid: str) -> tuple[int, str]:
        return int(groups[uid][0][1].get("SeriesNumber") or 0), uid

    return {uid: groups[uid] for uid in sorted(groups, key=number)}


def choose(path: Path, groups: dict[str, Headers], series: str | None, flag: str) -> Headers:
    """The series that `series` names, or the only one; else a UserError that lists them."""
    if series in groups:
        return groups[series]
    if series is not None and series.isdecimal() and 1 <= int(series) <= len(groups):
        return list(groups.values())[int(series) - 1]
    if series is None and len(groups) == 1:
        return next(iter(groups.values()))
    listed = "; ".join(f"{i}: {describe(group)}" for i, group in enumerate(groups.values(), 1))
    wrong = "" if series is None else f"no series {series!r}; "
    raise UserError(f"{path}: {wrong}choose by {flag} one of {len(groups)} series: {listed}")


def choose_ct(path: Path, groups: dict[str, Headers]) -> Headers:
    """The only CT among the series of `--via`, or its only series.

    Else a UserError that says what to give.
    """
    cts = [group for group in groups.values() if group[0][1].get("Modality") == "CT"]
    if len(cts) == 1:
        return cts[0]
    if not cts and len(groups) == 1:
        return next(iter(groups.values()))
    among = cts or list(groups.values())
    kind = "series are CT" if cts else "series, and none is a CT"
    listed = "; ".join(f"{describe(group)} (in {_folders(path, group)})" for group in among)
    raise UserError(
        f"{path}: {len(among)} {kind}; give --via a folder that has the one alone: {listed}"
    )


def _folders(path: Path, group: Headers) -> str:
    """The folders of a series' files, as seen from `path`."""
    found = sorted({file.parent for file, _ in group})
    return ", ".join(str(f.relative_to(path)) if path in f.parents else str(f) for f in found[:3])


def describe(group: Headers) -> str:
    """A series in a line: what tells a T1 from a FLAIR, and nothing of the patient."""
    ds = group[0][1]
    images = sum(frame_count(header) for _, header in group)
    modality = _code(ds.get("Modality")) or "unknown modality"
    parts = [f"{modality}{_plane_name(ds)}, {images} images of {ds.Rows}x{ds.Columns}"]
    try:
        spacing = [float(v) for v in _field(ds, "PixelSpacing") or ()]
        thickness = _field(ds, "SliceThickness")
        sides = [*spacing, *([float(thickness)] if thickness else [])]
        parts += ["x".join(f"{v:.3g}" for v in sides) + " mm"] if spacing else []
        times = {name: _field(ds, keyword) for keyword, name in SHORT.items()}
        parts += [" ".join(f"{name} {float(v):g}" for name, v in times.items() if v)]
    except (TypeError, ValueError):
        parts += ["sizes or times that make no sense"]
    parts += [" ".join(filter(None, map(_code, ds.get("ImageType") or ())))]
    if modality in ("CT", "MR"):
        parts += [f"contrast {'yes' if ds.get('ContrastBolusAgent') else 'no'}"]
    return ", ".join(part for part in parts if part)


def _code(value) -> str:
    """A code of a header, empty if it is anything else, such as text."""
    return str(value) if CODE.fullmatch(str(value or "")) else ""


def _field(ds: pydicom.Dataset, keyword: str):
    """A field of a header or, in enhanced multi-frame files, of its first frame; else None."""
    if ds.get(keyword):
        return ds.get(keyword)
    keyword = "EffectiveEchoTime" if keyword == "EchoTime" else keyword
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in list(ds.get(name) or ())[:1]:
            for element in group:
                if element.VR == "SQ" and element.value and element.value[0].get(keyword):
                    return element.value[0].get(keyword)
    return None


def _plane_name(ds: pydicom.Dataset) -> str:
    """The plane of a header's first image, with a blank before it; empty where it is not told."""
    directions = _field(ds, "ImageOrientationPatient")
    try:
        normal = np.cross(*np.reshape([float(v) for v in directions], (2, 3)))
    except (TypeError, ValueError):
        return ""
    main = int(np.abs(normal).argmax())
    oblique = "" if abs(normal[main]) > 0.98 else " oblique"
    return f"{oblique} {('sagittal', 'coronal', 'axial')[main]}"


def patient_of(path: Path, headers: Headers) -> Patient:
    """What identifies the patient of a series, only to be compared; UserError if two are in it."""
    found = list(dict.fromkeys(identity_of(ds) for _, ds in headers))
    if any(are_two(one, other) for one, other in combinations(found, 2)):
        raise UserError(f"{path}: images of two patients in one series; take those of one")
    return found[0]


def identity_of(ds: pydicom.Dataset) -> Patient:
    """What identifies the patient of an image, only to be compared."""
    return tuple(str(ds.get(keyword) or "").strip().upper() for keyword in IDENTITY)


def differing(one: Patient | None, other: Patient | None) -> list[str]:
    """What differs between two patients, by names of IDENTITY, where both are told."""
    pairs = zip(IDENTITY.values(), one or (), other or (), strict=False)
    return [name for name, a, b in pairs if a and b and a != b]


def are_two(one: Patient | None, other: Patient | None) -> bool:
    """Whether two patients' IDs differ, and one thing more.

    The ID alone does not count: two hospitals give one patient two IDs.
    """
    found = differing(one, other)
    return "ID" in found and len(found) > 1


def check_patients(
    one: Patient | None,
    other: Patient | None,
    forced: Collection[str] = (),
    second: str = "img2",
) -> list[str]:
    """Lines on two sources whose patients differ, without a name, number or date.

    Args:
        forced: what is fused although it is in doubt; two patients only with "patient".
        second: the name of the other source.

    Raises:
        UserError: the two are of two patients, see `are_two`.
    """
    found = differing(one, other)
    if not found:
        return []
    if not are_two(one, other):
        return [f"img1 and {second} differ in the patient's {found[0]}: are they of one patient?"]
    line = f"img1 and {second} are of two patients: {' and '.join(found)} differ"
    if "patient" not in forced:
        raise UserError(
            f"{line}; give two scans of one patient, or --force patient if they are of one"
        )
    return [f"forced (patient): {line}"]


def once(headers: Headers) -> tuple[Headers, int]:
    """The headers without copies of a file, and how many these were.

    Copies have the UID of one SOP instance. Its number and position must also be the same, since
    some tools that make files anonymous give one UID to all.
    """
    seen: dict[tuple, tuple[Path, pydicom.Dataset]] = {}
    for i, (file, ds) in enumerate(headers):
        uid = str(ds.get("SOPInstanceUID") or i)
        place = ds.get("ImagePositionPatient"), ds.get("InstanceNumber")
        seen.setdefault((uid, *map(str, place)), (file, ds))
    return list(seen.values()), len(headers) - len(seen)


def refuse_mosaic(path: Path, ds: pydicom.Dataset) -> None:
    """UserError for a Siemens mosaic: one image that is a sheet of slices."""
    private = "SIEMENS MR HEADER" in str(ds.get((0x0019, 0x0010), "")) and (0x0019, 0x100A) in ds
    if private or "MOSAIC" in (ds.get("ImageType") or ()):
        raise UserError(
            f"{path}: a Siemens mosaic, many slices drawn in one image; "
            "convert it with dcm2niix and give the NIfTI file"
        )
