"""What a job on two volumes needs, in small parts, and how words on a command line become it.

Source 1 is CT, PET or SPECT, source 2 is an MRI. Each part goes to the one function that reads it.
The words are those of the flags of test_asfe.py, which docs/volumes.md explains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from args_setting import TASKS
from cli import UserError, stem_of
from fusing import Output, Plan, forced_by
from volumes.io import NIFTI
from volumes.programs import check_name

WAYS_OF_VOLUMES = ("auto", "off", "check", "rigid")  # of --register, beside a file
SLICES = r"(axial|coronal|sagittal)_\d{4,}\.png"  # the names of the files of --png


@dataclass(frozen=True)
class Source:
    """A volume to read, and which of several in the file or folder."""

    path: Path
    series: str | None = None  # of a DICOM folder: its number in the list, or its UID
    where: str = ""  # which images of a series, as EchoTime=80,ImageType=M
    time: str = ""  # which point in time, from 1; or mean, or sum
    affine: str = "sform"  # which place of a NIfTI file with two, or qform
    nan_to_zero: bool = False  # take voxels that are not finite as 0


@dataclass(frozen=True)
class Registering:
    """How source 2 is registered with source 1."""

    how: str = "auto"  # auto, off, check, rigid, or file
    transform: Path | None = None  # for "file": of ITK, or a DICOM spatial registration
    via: Source | None = None  # a CT that is registered in the place of source 1
    keep_unmoved: bool = False  # the result also has the source that moves as it was


@dataclass(frozen=True)
class Levels:
    """Which values of source 1 become black and white."""

    window: str = "wide"  # of a CT, in HU: LEVEL,WIDTH or a name
    suv: float = 15.0  # of a PET: the SUV (g/ml, body weight) that becomes 1; 0: the maximum does


@dataclass(frozen=True)
class Slicing:
    """How slices go through the network."""

    axis: str = "auto"  # axial, coronal, sagittal; auto: those with the finest pixels
    tile: int = 0  # side of the tiles of a slice, in pixels; 0: none
    overlap: int = 64  # pixels over which tiles blend
    batch_size: int = 4  # slices of 256 x 256 pixels that go through the network together


@dataclass(frozen=True)
class Labels:
    """A segmentation of a source, which comes along onto the grid of the result."""

    path: Path  # a file of whole numbers, or a DICOM segmentation
    of: int = 0  # which source it belongs to, 1 or 2; 0: its grid or frame of reference tells


@dataclass(frozen=True)
class Writing:
    """What is written."""

    out: Path  # the fused volume, .nii or .nii.gz
    colour: str | None = None  # table of the RGB volume and the pictures; None: grey
    rgb: str = "type"  # of the RGB volume: NIfTI's type, or a fourth axis
    png: Path | None = None  # folder for the slices
    mosaic: Path | None = None  # PNG with a choice of slices
    dicom: Path | None = None  # folder for the slices as a DICOM series
    transform: Path | None = None  # file of ITK, FSL, FreeSurfer or AFNI, by its name
    moved: Path | None = None  # NIfTI file of the source without the grid, in its own unit
    derivative: Mapping[str, Any] | None = None  # of BIDS: what sidecars say of sources and space
    keep_patient: bool = False  # in it: copy patient and study of the source that has the grid


@dataclass(frozen=True)
class VolumeRequest:
    """Two volumes of one patient to fuse."""

    task: str  # CT-MRI, PET-MRI or SPECT-MRI
    source1: Source
    source2: Source
    writing: Writing
    registering: Registering = Registering()
    labels: Labels | None = None
    grid: str = "auto"  # of the result: 1 or 2, of a source, or the side of cubes in mm
    levels: Levels = Levels()
    slicing: Slicing = Slicing()
    forced: frozenset[str] = frozenset()  # of FORCED: what is fused although it is in doubt
    network: str = field(default="", compare=False)  # its name, for the sidecar

    @property
    def modality(self) -> str:
        """CT, PET or SPECT: of source 1."""
        return TASKS[self.task]

    @property
    def sources(self) -> tuple[Path, ...]:
        """All files and folders that are named to be read."""
        how = self.registering
        named = [self.source1.path, self.source2.path, how.via and how.via.path, how.transform]
        named.append(self.labels and self.labels.path)
        return tuple(path for path in named if path)

    def plan(self) -> Plan:
        """Every file that the request may write, see `plan_of`."""
        registered = self.registering.how != "off"
        return plan_of(self.writing, self.sources, registered, self.labels is not None)


def plan_of(
    writing: Writing, sources: tuple[Path, ...], registered: bool, labels: bool = False
) -> Plan:
    """Every file that may be written; UserError for a name that is none for its kind.

    Args:
        sources: all files and folders that are read.
        registered: a transform and a picture of it may be among them.
        labels: so may be the labels of a source.
    """
    out, stem = writing.out, stem_of(writing.out)
    suffix = nifti_suffix(out, "--out")
    check_names(writing, registered)
    sidecar = out.with_name(f"{stem}.json")
    beside = {  # what lies beside the result: whether it is wanted, and how its name ends
        "colour": (writing.colour, f"_colour{suffix}"),
        "labels": (labels, f"_labels{suffix}"),
        "transform": (registered, ".tfm"),
        "overlay": (registered, "_registration.png"),
    }
    named = (
        Output("png", writing.png, "--png", SLICES),
        Output("mosaic", writing.mosaic, "--mosaic"),
        Output("transform for a program", writing.transform, "--transform"),
        Output("moved source", writing.moved, "--moved"),
        Output("dicom", writing.dicom, "--dicom", r".*"),
    )
    outputs = [Output("grey", out), Output("sidecar", sidecar)]
    outputs += [
        Output(what, out.with_name(stem + end)) for what, (wanted, end) in beside.items() if wanted
    ]
    outputs += [output for output in named if output.path]
    if writing.derivative and writing.moved:
        aside = writing.moved.with_name(f"{stem_of(writing.moved)}.json")
        outputs.append(Output("sidecar of the moved source", aside))
    return Plan(tuple(outputs), sources, sidecar)


def check_names(writing: Writing, registered: bool) -> None:
    """UserError for a file's name that is none for its kind."""
    if writing.moved:
        nifti_suffix(writing.moved, "--moved")
    if writing.mosaic and writing.mosaic.suffix.lower() != ".png":
        raise UserError(f"--mosaic is {writing.mosaic}, expected a file name that ends in .png")
    if writing.transform:
        check_name(writing.transform)
        if not registered:
            raise UserError("--transform needs a registration, but --register is off")


def nifti_suffix(path: Path, flag: str) -> str:
    """The ending of the name of a NIfTI file to write; UserError if it has another."""
    suffix = next((s for s in reversed(NIFTI) if path.name.lower().endswith(s)), None)
    if suffix is None or path.is_dir():
        raise UserError(
            f"{flag} is {path}, expected a file name that ends in .nii.gz or .nii for volumes"
        )
    return suffix


# --- from words ------------------------------------------------------------------------------


def request_from(words: Mapping[str, Any]) -> VolumeRequest:
    """The request that words on a command line ask for, by the names of the flags.

    What is absent has its default. Raises UserError for words that make no request.
    """
    task = words["task"]
    if task not in TASKS:
        raise UserError(
            f"task is {task}, but volumes need to know what img1 is: {', '.join(TASKS)}"
        )
    if not (words.get("img1") and words.get("img2") and words.get("out")):
        raise UserError("volumes need img1, img2 and out")
    if words.get("stretch") or words.get("metrics"):
        raise UserError("--stretch and --metrics are for images, not for volumes")
    return VolumeRequest(
        task,
        source_from(words, 1),
        source_from(words, 2),
        writing_from(words),
        registering_from(words),
        labels=labels_from(words),
        levels=Levels(**given(words, window="window", suv="suv")),
        slicing=Slicing(
            **given(words, axis="axis", tile="tile", overlap="overlap", batch_size="batch_size")
        ),
        forced=forced_by(words.get("force", "")),
        **given(words, grid="grid", network="size"),
    )


def given(words: Mapping[str, Any], **fields: str) -> dict[str, Any]:
    """Fields and what is given for them, by the flag of each; absent ones are left out."""
    return {name: words[flag] for name, flag in fields.items() if flag in words}


def source_from(words: Mapping[str, Any], number: int) -> Source:
    """Source 1 or 2."""
    own = given(words, series=f"series{number}", where="where", time="frame", affine="affine")
    own |= given(words, nan_to_zero="nan_to_zero")
    return Source(words[f"img{number}"], **own)


def registering_from(words: Mapping[str, Any]) -> Registering:
    """How to register; UserError for a companion CT that is of no use."""
    how, via, transform = words.get("register", "auto"), words.get("via"), None
    if how not in WAYS_OF_VOLUMES:
        how, transform = "file", Path(how)
    if via is None:
        return Registering(how, transform)
    if words["task"] == "CT-MRI":
        raise UserError("--via is for PET and SPECT, a CT is registered itself")
    if how in ("off", "file"):
        raise UserError(f"--via is for a registration, but --register is {words['register']}")
    source = Source(via, nan_to_zero=words.get("nan_to_zero", False))
    return Registering(how, transform, source)


def labels_from(words: Mapping[str, Any]) -> Labels | None:
    """The labels that come along, if there are any."""
    if not words.get("labels"):
        return None
    return Labels(words["labels"], {"1": 1, "2": 2}.get(words.get("labels_of"), 0))


def writing_from(words: Mapping[str, Any]) -> Writing:
    """What to write; UserError for flags that do not go together."""
    table = words.get("colour", "auto")
    if table not in ("auto", "none") and words["task"] == "CT-MRI":
        raise UserError("--colour is for PET and SPECT, CT and MRI are grey")
    default = None if words["task"] == "CT-MRI" else "warm"
    colour = {"auto": default, "none": None}.get(table, table)
    if words.get("keep_patient") and not words.get("dicom"):
        raise UserError("--keep-patient is for --dicom, no other output names a patient")
    if words.get("rgb", "type") != "type" and colour is None:
        raise UserError("--rgb is for the RGB volume, which --colour none leaves out")
    own = given(words, png="png", mosaic="mosaic", dicom="dicom", keep_patient="keep_patient")
    own |= given(words, moved="moved", transform="transform", derivative="derivative", rgb="rgb")
    return Writing(words["out"], colour, **own)
