"""The pairs of a BIDS folder, what is left out of it and why, and the names of their derivatives.

Sources: BIDS 1.10, https://bids-specification.readthedocs.io (entities, derivatives, BIDS URIs);
for CT, whose suffix is still a proposal there, the names that BEP 024 has; BIDS apps, whose flags
choose participants and sessions.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from args_setting import VERSION
from cli import UserError, stem_of
from fusing import SOFTWARE

MOVING, ANATOMY = ("ct", "pet"), ("T1w", "T2w", "FLAIR")
RAW = "raw"  # the name of the folder that is read, in the links of the derivatives
IGNORED = [
    "*_ct.*",
    "*_colour.nii*",
    "*_mosaic.png",
    "*_registration.png",
    "*.tfm",
    "*_xfm.*",
    "report.html",
    "report.csv",
    ".study/",
    "png/",
    "dicom/",
]  # written here, but none of BIDS's names


class Image(NamedTuple):
    """A file of a BIDS folder that may be fused."""

    path: Path
    entities: tuple[str, ...]  # such as "sub-1", in their order, without the suffix
    suffix: str

    def entity(self, key: str) -> str | None:
        """The value of an entity, such as "1" of sub-1; None without it."""
        found = (e.partition("-")[2] for e in self.entities if e.startswith(f"{key}-"))
        return next(found, None)

    @property
    def label(self) -> str:
        """What tells it from other images of its subject and session, in letters and digits."""
        others = [e for e in self.entities if not e.startswith(("sub-", "ses-"))]
        return re.sub(r"[^A-Za-z0-9]", "", "".join(others)) + self.suffix


@dataclass(frozen=True)
class Choice:
    """A BIDS folder, and what of it counts; without labels, all."""

    folder: Path
    participants: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()


class Pairs(NamedTuple):
    """What can be fused, and lines on what cannot."""

    pairs: list[tuple[Image, Image]]
    left_out: list[str]


def find_pairs(choice: Choice) -> Pairs:
    """Every CT and PET with the anatomy of its session, or with one that is unambiguous.

    Without anatomy in its own session, a CT or PET takes that of the subject level, else that of
    the only session that has one.

    Raises UserError for a label that is not there.
    """
    images, left = images_of(choice)
    pairs, used = [], set()
    for subject in sorted({image.entity("sub") for image in images}):
        mine = [image for image in images if image.entity("sub") == subject]
        anatomy = defaultdict(list)
        for image in mine:
            if image.suffix in ANATOMY:
                anatomy[image.entity("ses")].append(image)
        for image in (image for suffix in MOVING for image in mine if image.suffix == suffix):
            partners, why = partners_of(image, anatomy)
            pairs += [(image, partner) for partner in partners]
            used |= {partner.path for partner in partners}
            left += [(image.path, why)] if why else []
        others = [image for image in mine if image.suffix in ANATOMY and image.path not in used]
        left += [(image.path, "no CT or PET goes with it") for image in others]
    lines = [f"{path.relative_to(choice.folder)}: left out, {why}" for path, why in sorted(left)]
    return Pairs(pairs, lines)


def partners_of(image: Image, anatomy: dict[str | None, list[Image]]) -> tuple[list[Image], str]:
    """The anatomy for a CT or PET, by the sessions of its subject; or none, and why not."""
    for session in (image.entity("ses"), None):
        if session in anatomy:
            return ordered(anatomy[session]), ""
    if len(anatomy) == 1:
        return ordered(next(iter(anatomy.values()))), ""
    if not anatomy:
        return [], f"its subject has no {', '.join(ANATOMY)}"
    names = ", ".join(f"ses-{session}" for session in sorted(anatomy))
    return [], f"its session has no anatomy, and {names} have, so it is not clear which"


def ordered(images: list[Image]) -> list[Image]:
    """Anatomy by its kind."""
    return sorted(images, key=lambda image: (ANATOMY.index(image.suffix), image.path))


def images_of(choice: Choice) -> tuple[list[Image], list[tuple[Path, str]]]:
    """The images that count, and those that are no anatomy with the reason."""
    subjects = labels_of(choice.participants, "sub")
    sessions = labels_of(choice.sessions, "ses")
    found, left = [], []
    for path in sorted(choice.folder.glob("sub-*/**/*.nii*")):
        *entities, suffix = stem_of(path).split("_")
        image = Image(path, tuple(entities), suffix)
        if suffix not in (*MOVING, *ANATOMY) or not path.name.endswith((".nii", ".nii.gz")):
            continue
        if image.entity("part") not in (None, "mag"):
            left.append((path, f"part-{image.entity('part')} is no anatomy"))
        else:
            found.append(image)
    for key, wanted in (("sub", subjects), ("ses", sessions)):
        there = {image.entity(key) for image in found}
        if missing := sorted(wanted - there):
            raise UserError(f"{choice.folder}: has no image of {key}-{missing[0]} to fuse")
    return [i for i in found if chosen(i, subjects, sessions)], [
        (path, why) for path, why in left if not subjects and not sessions
    ]


def labels_of(given: Collection[str], key: str) -> set[str]:
    """Labels of a flag, with or without their key."""
    return {label.removeprefix(f"{key}-") for label in given}


def chosen(image: Image, subjects: Collection[str], sessions: Collection[str]) -> bool:
    """Whether an image counts; one without a session belongs to all of them."""
    session = image.entity("ses")
    in_session = not sessions or session is None or session in sessions
    return in_session and (not subjects or image.entity("sub") in subjects)


# --- words of a case -------------------------------------------------------------------------


def of_bids(
    choice: Choice, out: Path, shared: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and words of each pair.

    The name is a derivative's: the entities of source 1, the space that the result lies in, and
    `desc-fused` with what tells source 2 from others. Beside it come the moved source and, where
    one may be found, the transform.

    Args:
        out: folder of the derivatives.
        shared: the words that count for all cases.
    """
    found = find_pairs(choice)
    if not found.pairs:
        why = f": {'; '.join(found.left_out[:3])}" if found.left_out else ""
        raise UserError(
            f"{choice.folder}: no subject has *_ct or *_pet and {', '.join(ANATOMY)} that go "
            f"together{why}"
        )
    for images in found.pairs:
        yield case_of_pair(choice, images, out, shared)


def case_of_pair(
    choice: Choice, images: tuple[Image, Image], out: Path, shared: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Name and words of a pair, see `of_bids`."""
    grid = shared["grid"].lower()
    number = grid_number(*images, grid)
    giver, mover = images if number == 1 else images[::-1]
    space, told = [f"space-{giver.suffix}"], {}
    if grid not in ("auto", "1", "2"):
        side = grid.removesuffix("mm")
        space.append(f"res-{re.sub('[^a-z0-9]', 'p', side)}mm")
        told["Resolution"] = f"cubes of {side} mm"
    told["SpatialReference"] = uri(choice, giver)
    told["Sources"] = [uri(choice, image) for image in images]
    image1, image2 = images
    stem = "_".join([*image1.entities, *space, f"desc-fused{image2.label}", image1.suffix])
    own = "_".join([*mover.entities, *space, f"desc-coreg{giver.label}", mover.suffix])
    folder = out / mover.path.relative_to(choice.folder).parent
    pet_task = "SPECT-MRI" if shared["task"] == "SPECT-MRI" else "PET-MRI"
    words = {
        "img1": image1.path,
        "img2": image2.path,
        "task": "CT-MRI" if image1.suffix == "ct" else pet_task,
        "moved": folder / f"{own}.nii.gz",
        "derivative": told,
    }
    if grid == "auto":
        words["grid"] = str(number)
    if shared["register"] != "off":
        way = f"from-{mover.suffix}_to-{giver.label}_mode-image_xfm.txt"
        words["transform"] = folder / "_".join([*mover.entities, way])
    return str(image1.path.relative_to(choice.folder).parent / stem), words


def uri(choice: Choice, image: Image) -> str:
    """The BIDS URI of an image of the folder that is read."""
    return f"bids:{RAW}:{image.path.relative_to(choice.folder).as_posix()}"


def grid_number(image1: Image, image2: Image, grid: str) -> int:
    """Whose grid the result has, which its name says: as --grid auto does, by the headers alone."""
    if grid in ("1", "2"):
        return int(grid)
    if image1.suffix != "ct":
        return 2
    try:
        from volumes.grid import finer_source  # its packages are an extra
        from volumes.io import opened_nifti

        spacings = []
        for image in (image1, image2):
            with opened_nifti(image.path) as file:
                spacings.append(np.array(file.header.get_zooms()[:3]))
        return finer_source(*spacings)
    except Exception:  # damaged in any way: the case will say so when it runs
        return 2


# --- files of the derivatives ----------------------------------------------------------------


def description(bids: Path, out: Path) -> str:
    """dataset_description.json of the derivatives in `out`, of a BIDS folder."""
    code = {"Name": SOFTWARE, "Version": VERSION, "Description": "fused CT or PET and MRI"}
    content = {
        "Name": f"Fused volumes of {bids.resolve().name}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [code],
        "DatasetLinks": {RAW: Path(os.path.relpath(bids.resolve(), out.resolve())).as_posix()},
    }
    return json.dumps(content, indent=1) + "\n"


def ignored() -> str:
    """.bidsignore: what lies beside the derivatives and has no name of BIDS."""
    return "\n".join(IGNORED) + "\n"
