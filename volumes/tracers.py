"""Tracers of PET: by which name a header tells them, and on which scale they are usually shown.

Only names of this list are told: a header's own text may hold anything.

Sources: DICOM PS3.16 (context group 4021: codes of PET radiopharmaceuticals, in SNOMED CT and in
the older SRT), BIDS 1.10 (PET: TracerName). Scales of amyloid and tau: the sections on image
display of the prescribing information of Amyvid (florbetapir), Neuraceq (florbetaben), Vizamyl
(flutemetamol) and Tauvid (flortaucipir). FDG: as in general use, nobody prescribes it.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pydicom

from volumes.dicom import read_dataset_of
from volumes.durations import content_of
from volumes.grid import Volume
from volumes.intensity import Scaling
from volumes.io import bids_sidecar
from volumes.quiet import quiet

DRUGS = "RadiopharmaceuticalInformationSequence"


class Tracer(NamedTuple):
    """A tracer, and its usual scale."""

    name: str
    codes: tuple[str, ...]  # of DICOM
    words: str  # a regular expression that finds it in a text of small letters
    scale: str  # for the user: the usual scale, and how to ask for it
    tops: tuple[float, float] | None = None  # SUV that are usually the top, from and to


TRACERS = (
    Tracer(
        "FDG",
        ("35321007", "C-B1031"),
        r"fdg|deoxyglucose|desoxyglucose",
        "usually shown from 0 to a SUV between 6 and 10: --suv 6 to --suv 10",
        (6.0, 10.0),
    ),
    Tracer(
        "florbetapir",
        ("456995000", "C-E0269"),
        r"florbetapir|amyvid|av-?45(?!\d)",
        "its maker shows it in grey or inverse grey, the brain's maximum at the top: --colour none "
        "and --suv 0, or --moved for a viewer",
    ),
    Tracer(
        "florbetaben",
        ("712736002", "C-D6858"),
        r"florbetaben|neuraceq",
        "its maker shows it in grey or inverse grey: --colour none, or --moved for a viewer",
    ),
    Tracer(
        "flutemetamol",
        ("456997008", "C-E0267"),
        r"flutemetamol|vizamyl",
        "its maker shows it in rainbow, Sokoloff or spectrum, with the pons at 90 % of the top: "
        "--colour rainbow, and --suv with the SUV of the pons divided by 0.9",
    ),
    Tracer(
        "flortaucipir",
        ("879808000",),
        r"flortaucipir|tauvid|av-?1451|t807",
        "its maker shows it in two colours that change at 1.65 times the mean of the cerebellum: "
        "--moved for a viewer with such a table",
    ),
)


def find_tracer(volume: Volume) -> Tracer | None:
    """The tracer that a PET's DICOM header or BIDS sidecar names; None if it is none of ours.

    A sidecar that names it is one more file that was read for the volume.
    """
    if volume.origin is not None:
        return tracer_of_header(volume.origin)
    for file in volume.files[:1]:
        sidecar = bids_sidecar(file)
        if found := named(str(content_of(sidecar).get("TracerName") or "")):
            volume.files += [] if sidecar in volume.files else [sidecar]
            return found
    return None


@quiet()
def tracer_of_header(file: Path) -> Tracer | None:
    """The tracer of a DICOM file: by its code, else by its text."""
    try:
        drugs = read_dataset_of(file, [DRUGS]).get(DRUGS) or [pydicom.Dataset()]
        codes = list(drugs[0].get("RadiopharmaceuticalCodeSequence") or [])
        values = {str(code.get("CodeValue") or "") for code in codes}
        texts = [str(code.get("CodeMeaning") or "") for code in codes]
        texts.append(str(drugs[0].get("Radiopharmaceutical") or ""))
    except (AttributeError, TypeError, ValueError):  # fields that make no sense name nothing
        return None
    by_code = next((tracer for tracer in TRACERS if values & {*tracer.codes}), None)
    return by_code or next(filter(None, map(named, texts)), None)


def named(text: str) -> Tracer | None:
    """The tracer that a text names, such as "18F-FDG"."""
    return next((tracer for tracer in TRACERS if re.search(tracer.words, text.lower())), None)


def tracer_lines(tracer: Tracer | None, scaling: Scaling) -> list[str]:
    """The usual scale of a tracer in a line; none where the PET is on it already."""
    if tracer is None:
        return []
    line = f"img1: its tracer is {tracer.name}, {tracer.scale}"
    if tracer.tops:
        in_suv = scaling.method["method"].startswith("SUV")
        if in_suv and tracer.tops[0] <= scaling.method["high"] <= tracer.tops[1]:
            return []
        line += "" if in_suv else "; there is no SUV here"
    return [line]
