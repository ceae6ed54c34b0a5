"""The cases of a study: from a table, a BIDS folder or two folders, checked before one runs.

Sources: BIDS 1.10, https://bids-specification.readthedocs.io (entities, derivatives); for CT, whose
suffix is still a proposal there, the names that BEP 024 has.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import limits
from args_setting import EXTENSIONS, StudyArgs, TestArgs, VolumeArgs
from cli import VOLUMES, UserError, check_mode, is_volume, mode_of, plain_type

# Settings that say where and how fast, not what: they are no columns, and no case depends on them.
ELSEWHERE = {"DEVICE", "threads", "data_dir", "png", "mosaic"}
SHARED = {f.name for f in fields(VolumeArgs)} | {"stretch"}  # a study has them for all its cases
COLUMNS = (SHARED - ELSEWHERE) | {"img1", "img2", "name"}
HINTS = {name: plain_type(hint) for name, hint in get_type_hints(TestArgs).items()}
FIELDS = {f.name: f for f in fields(TestArgs)}
WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
RECORDS = ".study"  # folder of the records, in the folder of the outputs


@dataclass(frozen=True)
class Case:
    """One pair: its name, the settings that test_asfe.py gets, and the file of what was done."""

    name: str
    settings: TestArgs
    record: Path

    def packed(self) -> str:
        """The case as JSON, which needs no module of ours to travel through a scheduler."""
        given = {
            f.name: getattr(self.settings, f.name)
            for f in fields(TestArgs)
            if getattr(self.settings, f.name) != f.default
        }
        return json.dumps([self.name, given, self.record], default=str)

    @staticmethod
    def unpacked(text: str) -> "Case":
        name, given, record = json.loads(text)
        given = {
            key: Path(value) if HINTS[key] is Path and value is not None else value
            for key, value in given.items()
        }
        return Case(name, TestArgs(**given), Path(record))


# --- finding them ----------------------------------------------------------------------------


def find_cases(args: StudyArgs) -> tuple[Path, list[Case]]:
    """The folder of everything that is written, and the cases in order; all paths are absolute.

    Raises UserError for anything that would make a case fail for sure; nothing is written then.
    """
    check_flags(args)
    for folder in (args.bids, args.dir1, args.dir2):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    out = (args.out or args.bids / "derivatives" / "asfe-fusion").absolute()
    find = of_table if args.table else of_bids if args.bids else of_folders
    cases = [finished(args, out, *found) for found in find(args)]
    check_cases(cases)
    return out, cases


def check_flags(args: StudyArgs) -> None:
    """UserError if the settings do not go together."""
    ways = [args.table, args.bids, args.dir1 and args.dir2]
    if sum(way is not None for way in ways) != 1 or bool(args.dir1) != bool(args.dir2):
        raise UserError("give a table, or --bids, or --dir1 with --dir2")
    if args.out is None and args.bids is None:
        raise UserError("--out is missing, expected the folder for the fused pairs")
    if args.inside and args.table is None:
        raise UserError("--inside is for a table")
    if args.mosaic:
        raise UserError("--mosaic is for one pair, a study writes one for each volume")
    if bool(args.scheduler) and bool(args.scheduler_file):
        raise UserError("give --scheduler or --scheduler-file, not both")
    if (args.scheduler or args.scheduler_file) and (args.jobs or args.memory):
        raise UserError("--jobs and --memory are for this machine, a cluster has its own")


def of_table(args: StudyArgs) -> Iterator[tuple[str, dict]]:
    """Name and settings of each row of a CSV; its paths are relative to its own folder."""
    rows = rows_of(args.table)
    names = rows[0][1] if rows else []
    for name in ("img1", "img2"):
        if name not in names:
            raise UserError(f"{args.table}: column {name} is missing, it has {', '.join(names)}")
    for name in names:
        if name not in COLUMNS or names.count(name) > 1:
            fault = "is there twice" if name in COLUMNS else "is no setting of a case"
            raise UserError(f"{args.table}: column {name!r} {fault}, see docs/study.md")
    if len(rows) == 1:
        raise UserError(f"{args.table}: has no cases")
    for line, cells in rows[1:]:
        where = f"{args.table}, line {line}"
        if len(cells) != len(names):
            raise UserError(f"{where}: has {len(cells)} cells, expected {len(names)}")
        row = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        for name in ("img1", "img2"):
            if name not in row:
                raise UserError(f"{where}: {name} is empty")
        label = row.pop("name", None) or stem(Path(row["img1"]))
        folder = args.table.absolute().parent
        yield (
            label,
            {name: value_of(args, folder, where, name, cell) for name, cell in row.items()},
        )


def rows_of(table: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV that are not empty, with their line numbers; UserError if it is none."""
    text = limits.read_table(table)
    header = text.partition("\n")[0]
    rows = csv.reader(text.splitlines(), delimiter=max(",;\t", key=header.count))
    try:
        return [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(row)]
    except csv.Error as error:
        raise UserError(f"{table}, line {rows.line_num}: {error}") from None


def value_of(args: StudyArgs, folder: Path, where: str, name: str, cell: str):
    """What a cell of a table means for a setting; UserError if it is none of its values."""
    kind, extras = HINTS[name], FIELDS[name].metadata
    if kind is bool:
        if cell.lower() not in WORDS:
            raise UserError(f"{where}: {name} is {cell!r}, expected yes or no")
        return WORDS[cell.lower()]
    file = folder / cell
    if kind is Path or (name == "register" and file.is_file()):  # which may also be a word
        if not file.exists():
            raise UserError(f"{where}: {name} is {file}: no such file or folder")
        if args.inside and not file.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where}: {name} is {file}, which --inside forbids")
        return kind(file)
    try:
        value = kind(cell)
    except ValueError:
        raise UserError(f"{where}: {name} is {cell!r}, expected a number") from None
    if extras.get("choices") and value not in extras["choices"]:
        expected = ", ".join(extras["choices"])
        raise UserError(f"{where}: {name} is {cell!r}, expected one of {expected}")
    if "minimum" in extras and not value >= extras["minimum"]:
        raise UserError(f"{where}: {name} is {cell}, expected at least {extras['minimum']}")
    return value


def of_folders(args: StudyArgs) -> Iterator[tuple[str, dict]]:
    """Pairs of equal file name, without extension, of two folders of images or volumes."""
    sides = []
    for folder in (args.dir1, args.dir2):
        files: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.name.lower().endswith((*VOLUMES, *EXTENSIONS)):
                if stem(path) in files:
                    raise UserError(f"{folder}: both {files[stem(path)].name} and {path.name}")
                files[stem(path)] = path
        sides.append(files)
    files1, files2 = sides
    unmatched = sorted(files1.keys() ^ files2.keys())
    if unmatched and not args.skip_unmatched:
        lacking = args.dir2 if unmatched[0] in files1 else args.dir1
        raise UserError(
            f"{unmatched[0]} is not in {lacking} ({len(unmatched)} without a partner); "
            "--skip-unmatched leaves them out"
        )
    if not files1.keys() & files2.keys():
        raise UserError(f"no file name occurs in both {args.dir1} and {args.dir2}")
    for name in sorted(files1.keys() & files2.keys()):
        yield name, {"img1": files1[name], "img2": files2[name]}


def of_bids(args: StudyArgs) -> Iterator[tuple[str, dict]]:
    """Every CT and PET of a BIDS folder with every T1w and T2w of its subject and session.

    The name is a derivative's: the entities of source 1, and `desc-fused` with those of source 2
    that tell it from others of the session.
    """
    sessions = defaultdict(lambda: defaultdict(list))
    for path in sorted(args.bids.glob("sub-*/**/*.nii*")):
        *entities, suffix = stem(path).split("_")
        if suffix in ("ct", "pet", "T1w", "T2w") and path.name.endswith((".nii", ".nii.gz")):
            who = tuple(e for e in entities if e.startswith(("sub-", "ses-")))
            sessions[who][suffix].append((path, entities))
    pairs = [
        (suffix, source1, mri, source2)
        for found in sessions.values()
        for suffix in ("ct", "pet")
        for source1 in found[suffix]
        for mri in ("T1w", "T2w")
        for source2 in found[mri]
    ]
    if not pairs:
        raise UserError(
            f"{args.bids}: no session of a subject has *_ct or *_pet and *_T1w or *_T2w"
        )
    for suffix, (path1, entities1), mri, (path2, entities2) in pairs:
        others = [e for e in entities2 if not e.startswith(("sub-", "ses-"))]
        label = re.sub(r"[^A-Za-z0-9]", "", "".join(others)) + mri
        name = "_".join([*entities1, f"desc-fused{label}", suffix])
        folder = path1.relative_to(args.bids).parent
        pet = args.task if args.task == "SPECT-MRI" else "PET-MRI"
        task = "CT-MRI" if suffix == "ct" else pet
        yield str(folder / name), {"img1": path1, "img2": path2, "task": task}


def stem(path: Path) -> str:
    """A file's name without its ending, also a double one: "ct" of "ct.nii.gz"."""
    ends = [end for end in (*VOLUMES, *EXTENSIONS) if path.name.lower().endswith(end)]
    return path.name[: -len(max(ends, key=len))] if ends else path.name


def finished(args: StudyArgs, out: Path, name: str, given: dict) -> Case:
    """The case of a name, with the study's settings where it has none of its own, and its files."""
    parts = Path(name).parts if args.bids else (name,)
    if not all(re.fullmatch(r"\w[\w .+-]*", part) for part in parts):
        raise UserError(f"{name!r} cannot be a file's name, expected letters, digits, -, _, + or .")
    given = {key: getattr(args, key) for key in SHARED} | given
    given = {k: v.absolute() if isinstance(v, Path) else v for k, v in given.items()}
    volumes = is_volume(given["img1"]) or is_volume(given["img2"])
    given["out"] = out / f"{name}{'.nii.gz' if volumes else '.png'}"
    if volumes:
        given["mosaic"] = out / f"{name}_mosaic.png"
    if given["png"]:
        given["png"] /= name
    return Case(name, TestArgs(**given), out / RECORDS / f"{name}.json")


# --- checking them ---------------------------------------------------------------------------


def check_cases(cases: list[Case]) -> None:
    """UserError for files that would meet, and for settings that no case of their kind can have."""
    sources = {
        path.resolve()
        for case in cases
        for path in (case.settings.img1, case.settings.img2)
        if path.is_file()
    }
    owners: dict[str, Case] = {}
    for case in cases:
        check_mode(case.settings)
        if case.name.lower() in owners:
            raise UserError(f"two cases are called {case.name}, a column `name` tells them apart")
        owners[case.name.lower()] = case
    writers: dict[str, Case] = {}
    for case in cases:
        for path in planned(case.settings):
            if path.resolve() in sources:
                raise UserError(
                    f"{path} is a source and would be overwritten, choose another --out"
                )
            other = writers.setdefault(str(path).lower(), case)
            if other is not case:
                raise UserError(f"{path} would be written by {other.name} and by {case.name}")


def planned(settings: TestArgs) -> list[Path]:
    """The files that a case may write, and the folder of its slices if it has one."""
    if mode_of(settings) != "volumes":
        return [settings.out]
    try:
        from volumes.outputs import plan_outputs  # its packages are an extra
    except ModuleNotFoundError as error:
        raise UserError(
            f"volumes need {error.name}: pip install -r requirements-volumes.txt"
        ) from None
    return [path for path in plan_outputs(settings) if path]
