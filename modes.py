"""Which of its five things test_asfe.py fuses, by its flags.

This loads nothing slow, so that a wrong combination of flags is an error at once.
"""

from dataclasses import fields
from pathlib import Path

from args_setting import EXTENSIONS, TestArgs, VolumeArgs, WeightsArgs
from cli import UserError

VOLUMES = tuple(".nii .nii.gz .hdr .img .img.gz .mgz .mgh .mha .mhd .nrrd .nhdr .dcm .ima".split())
READING = {"levels", "page"}
# What to fuse, in the words of the errors, and the settings that count there only.
MODES = {
    "the test split": {"cases", "case_pattern", "skip_unmatched", "contact_rows"} | READING,
    "two folders": {"skip_unmatched", "contact_rows"} | READING,
    "one pair of images": {"register", "force"} | READING,
    "volumes": {f.name for f in fields(VolumeArgs)} - {f.name for f in fields(WeightsArgs)},
    "the demo": set(),
}


def mode_of(args: TestArgs) -> str:
    """Which of MODES the settings ask for; UserError if they are not clear."""
    given = {name for name in ("img1", "img2", "dir1", "dir2") if getattr(args, name)}
    if given not in (set(), {"img1", "img2"}, {"dir1", "dir2"}):
        raise UserError("give --img1 with --img2, or --dir1 with --dir2, or none of them")
    if given and (args.demo or not args.out):
        raise UserError("--img1 and --dir1 need --out and go without --demo")
    if "img1" in given:
        to_volume = args.out.name.lower().endswith(VOLUMES)
        volumes = to_volume or is_volume(args.img1) or is_volume(args.img2)
        return "volumes" if volumes else "one pair of images"
    if "dir1" in given:
        return "two folders"
    return "the demo" if args.demo else "the test split"


def is_volume(path: Path) -> bool:
    """Whether a path is for volumes/: by its name, a folder (DICOM), or DICOM's mark in it."""
    if path.is_dir() or path.name.lower().endswith(VOLUMES):
        return True
    if path.suffix.lower() in EXTENSIONS or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def check_mode(args: TestArgs) -> str:
    """`mode_of`; UserError if a setting of MODES was given that has no effect on what is fused."""
    mode = mode_of(args)
    for f in fields(args):
        users = [name for name, settings in MODES.items() if f.name in settings]
        if users and mode not in users and getattr(args, f.name) != f.default:
            raise UserError(f"--{f.name} is for {' and '.join(users)}, but this fuses {mode}")
    return mode
