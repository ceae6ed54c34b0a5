"""The cases of a study: from a table, a BIDS folder or two folders, checked before one runs.

A BIDS folder is in bids.py.
"""

import csv
import math
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import limits
from cli import (
    ONE_PAIR,
    VOLUME_PAIR,
    VOLUMES,
    Column,
    Runtime,
    UserError,
    installed,
    is_volume,
    stem_of,
)
from dataset import Pair, match_files
from fusing import ImageRequest, check_plans, image_request_from
from images import is_image
from studies.bids import Choice, find_pairs, of_bids
from weights import Trained

if TYPE_CHECKING:  # its packages are an extra
    from volumes.requests import VolumeRequest

# Settings that say where and how fast, not what: a table has no column for them.
ELSEWHERE = {"DEVICE", "threads", "data_dir", "png", "mosaic"}
OUTPUTS = {"dicom", "moved", "transform"}  # columns whose paths need not be there
# Flags that name a folder, in which each case has one of its name, or a file with this ending.
FOLDERS = {"png": "", "dicom": "", "moved": ".nii.gz"}
WORDS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
RECORDS = ".study"  # folder of the records, in the folder of the outputs
Found = tuple[str, dict[str, Any]]  # the name of a case, and its own words by the names of flags


@dataclass(frozen=True)
class Listing:
    """Where the pairs of a study are: in one of a table, a BIDS folder and two folders."""

    out: Path  # folder of everything that is written
    table: Path | None = None
    bids: Path | None = None
    dir1: Path | None = None
    dir2: Path | None = None
    skip_unmatched: bool = False  # two folders: leave out files without a partner
    participants: tuple[str, ...] = ()  # of a BIDS folder: their labels; none: all
    sessions: tuple[str, ...] = ()  # the same of sessions
    inside: bool = False  # refuse paths that lie outside of the table's folder

    @property
    def choice(self) -> Choice:
        """What counts of the BIDS folder."""
        return Choice(self.bids, self.participants, self.sessions)


@dataclass(frozen=True)
class Case:
    """One pair: its name, what to fuse, with which network, where, and its record."""

    name: str
    request: "ImageRequest | VolumeRequest"
    trained: Trained
    runtime: Runtime  # nothing of the result depends on it
    record: Path

    def packed(self) -> bytes:
        """The case as bytes, which need no module of ours to travel through a scheduler."""
        return pickle.dumps(self)

    @staticmethod
    def unpacked(data: bytes) -> "Case":
        """The case that `packed` has packed, here or in the process that sent it."""
        return pickle.loads(data)


# Of what is fused ("one pair of images", …), for which task and with which words given: the words
# that have no effect, and why.
NoEffect = Callable[[str, str, Iterable[str]], dict[str, str]]


# --- finding them ----------------------------------------------------------------------------


def find_cases(
    listing: Listing, words: Mapping[str, Any], columns: dict[str, Column], no_effect: NoEffect
) -> list[Case]:
    """The cases in order; all paths are absolute.

    Args:
        words: what counts for every case that has no own word for it, by the names of flags.
        columns: what a table may hold, and the default of each of these words.
        no_effect: which of the given words have no effect, see `NoEffect`.

    Raises UserError for anything that would make a case fail for sure; nothing is written then.
    """
    for folder in (listing.bids, listing.dir1, listing.dir2):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    if listing.table:
        found = of_table(listing, columns)
    elif listing.bids:
        found = of_bids(listing.choice, listing.out, words)
    else:
        found = of_folders(listing)
    cases = []
    for name, words_here in words_of_cases(found, words, columns, no_effect):
        check_name(name, many=listing.bids is not None)
        cases.append(case_of(listing.out, name, words_here))
    check_cases(cases)
    return cases


def of_table(listing: Listing, columns: dict[str, Column]) -> Iterator[Found]:
    """Name and words of each row of a CSV; its paths are relative to its own folder."""
    table = listing.table
    names, rows = read_table(table)
    check_header(table, names, columns)
    if not rows:
        raise UserError(f"{table}: has no cases")
    for line, cells in rows:
        where = f"{table}, line {line}"
        if len(cells) != len(names):
            raise UserError(f"{where}: has {len(cells)} cells, expected {len(names)}")
        row = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        for name in ("img1", "img2"):
            if name not in row:
                raise UserError(f"{where}: {name} is empty")
        label = row.pop("name", None) or stem_of(Path(row["img1"]))
        words = {}
        for name, cell in row.items():
            value = value_of(columns[name], cell, f"{where}: {name}", table.absolute().parent)
            if isinstance(value, Path):
                check_path(value, f"{where}: {name}", listing, name not in OUTPUTS)
            words[name] = value
        yield label, words


def read_table(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a CSV, and its other rows with their line numbers; blank ones are left out."""
    text = limits.read_table(table)
    header = text.partition("\n")[0]
    rows = csv.reader(text.splitlines(), delimiter=max(",;\t", key=header.count))
    try:
        found = [(rows.line_num, [cell.strip() for cell in row]) for row in rows if any(row)]
    except csv.Error as error:
        raise UserError(f"{table}, line {rows.line_num}: {error}") from None
    return (found[0][1] if found else []), found[1:]


def check_header(table: Path, names: list[str], columns: dict[str, Column]) -> None:
    """UserError for a column that is missing, unknown or there twice."""
    for name in ("img1", "img2"):
        if name not in names:
            raise UserError(f"{table}: column {name} is missing, it has {', '.join(names)}")
    for name in names:
        known = name in columns and name not in ELSEWHERE
        if not known or names.count(name) > 1:
            fault = "is there twice" if known else "is no setting of a case"
            raise UserError(f"{table}: column {name!r} {fault}, see docs/study.md")


def value_of(column: Column, cell: str, where: str, folder: Path) -> Any:
    """What a cell of a table means; UserError, which begins with `where`, if it means nothing.

    Paths are relative to `folder`.
    """
    if column.kind is bool:
        if cell.lower() not in WORDS:
            raise UserError(f"{where} is {cell!r}, expected yes or no")
        return WORDS[cell.lower()]
    if column.kind is Path:
        return folder / cell
    try:
        value = column.kind(cell)
    except ValueError:
        raise UserError(f"{where} is {cell!r}, expected a number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} is {cell}, expected a finite number")
    if column.choices and value not in column.choices:
        raise UserError(f"{where} is {cell!r}, expected one of {', '.join(column.choices)}")
    if column.minimum is not None and not value >= column.minimum:
        raise UserError(f"{where} is {cell}, expected at least {column.minimum}")
    if where.endswith(" register") and (folder / cell).is_file():  # else it is a word
        return folder / cell
    return value


def check_path(path: Path, where: str, listing: Listing, there: bool) -> None:
    """UserError for a path that `--inside` forbids, or, if it should be `there`, that is not.

    The former comes first: whether a file outside is there is nobody's business.
    """
    folder = listing.table.absolute().parent.resolve()
    if listing.inside and not is_inside(path, folder):
        raise UserError(f"{where} is {path}, which --inside forbids")
    if there and not path.exists():
        raise UserError(f"{where} is {path}: no such file or folder")
    if listing.inside and there:
        for file in files_of(path):
            if not is_inside(file, folder):
                raise UserError(f"{where} is {path}, for which {file} is read: --inside forbids it")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with its links followed, lies in a folder; one that leads nowhere does not.

    `folder` is resolved.
    """
    try:
        return path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # links in a circle
        return False


def files_of(path: Path) -> list[Path]:
    """Every file that may be opened to read a source that is there."""
    if not is_volume(path):
        return [path]
    with installed("volumes need"):
        from volumes import io
    return io.files_of(path)


def of_folders(listing: Listing) -> Iterator[Found]:
    """Pairs of equal file name, without extension, of two folders of images or volumes."""
    folders = listing.dir1, listing.dir2
    matched, _ = match_files(*folders, listing.skip_unmatched, takes=is_source)
    for name, (path1, path2) in matched.items():
        yield name, {"img1": path1, "img2": path2}


def left_out(listing: Listing) -> list[str]:
    """A line for each file that is there and is not fused, with the reason.

    A table names what is fused, so there are none for it.
    """
    if listing.bids:
        return find_pairs(listing.choice).left_out
    if listing.dir1 and listing.skip_unmatched:
        _, names = match_files(listing.dir1, listing.dir2, skip_unmatched=True, takes=is_source)
        return [f"{name}: left out, without a partner" for name in names]
    return []


def is_source(path: Path) -> bool:
    """Whether a file of a folder is an image or a volume by its name.

    An .img beside an .hdr of its name is not: both are one volume, and the .hdr stands for it.
    """
    name = path.name.lower()
    if name.startswith("._"):
        return False
    second = name.endswith((".img", ".img.gz")) and path.with_name(f"{stem_of(path)}.hdr").exists()
    return is_image(path) or (name.endswith(VOLUMES) and not second)


def check_name(name: str, many: bool) -> None:
    """UserError for a name that no file can have; `many`: with its folders."""
    parts = Path(name).parts if many else (name,)
    if not all(re.fullmatch(r"\w[\w .+-]*", part) for part in parts):
        raise UserError(f"{name!r} cannot be a file's name, expected letters, digits, -, _, + or .")


def placed(flag: str, value: Any, name: str) -> Any:
    """What a shared word means for the case of a name: below a folder, each has its own place."""
    return value / f"{name}{FOLDERS[flag]}" if flag in FOLDERS and value else value


def words_of_cases(
    found: Iterator[Found],
    shared: Mapping[str, Any],
    columns: dict[str, Column],
    no_effect: NoEffect,
) -> Iterator[Found]:
    """Each case with all of its words: its own, else those that all share.

    A shared word that has no effect on a case is left out of it. Raises UserError if that is so in
    all cases, and for an own word without effect.
    """
    idle: dict[str, str] = {}
    used: set[str] = set()
    for name, own in found:
        words = {k: placed(k, v, name) for k, v in shared.items()} | own
        given = {k for k, v in words.items() if k in columns and v != columns[k].default}
        volumes = is_volume(words["img1"]) or is_volume(words["img2"])
        useless = no_effect(VOLUME_PAIR if volumes else ONE_PAIR, words["task"], given)
        if named := sorted(useless.keys() & own.keys()):
            raise UserError(f"{name}: {named[0]} {useless[named[0]]}")
        idle |= useless
        used |= shared.keys() - own.keys() - useless.keys()
        yield name, words | {k: columns[k].default for k in useless}
    if unused := sorted(idle.keys() - used):
        raise UserError(f"--{unused[0]} {idle[unused[0]]}")


def case_of(out: Path, name: str, words: dict[str, Any]) -> Case:
    """The case of a name, by all its words; its files lie in `out`."""
    words = {k: v.absolute() if isinstance(v, Path) else v for k, v in words.items()}
    if Path(words["register"]).is_file():  # else it is a word
        words["register"] = Path(words["register"]).absolute()
    volumes = is_volume(words["img1"]) or is_volume(words["img2"])
    words["out"] = out / f"{name}{'.nii.gz' if volumes else '.png'}"
    if volumes:
        request = volume_request(words | {"mosaic": out / f"{name}_mosaic.png"})
    else:
        request = image_request_from(Pair(name, words["img1"], words["img2"]), words)
    trained = Trained(words["weights"], words["size"], words["aff"])
    runtime = Runtime(words["DEVICE"], words["threads"])
    return Case(name, request, trained, runtime, out / RECORDS / f"{name}.json")


def volume_request(words: dict[str, Any]) -> "VolumeRequest":
    """The request of a pair of volumes; UserError if their packages are not installed."""
    with installed("volumes need"):
        from volumes.requests import request_from
    return request_from(words)


# --- checking them ---------------------------------------------------------------------------


def check_cases(cases: list[Case]) -> None:
    """UserError for two cases of one name, and for files that may not be written, see `Plan`."""
    owners: dict[str, Case] = {}
    for case in cases:
        if case.name.lower() in owners:
            raise UserError(f"two cases are called {case.name}, a column `name` tells them apart")
        owners[case.name.lower()] = case
    writers: dict[str, Case] = {}
    plans = [case.request.plan() for case in cases]
    for case, plan in zip(cases, plans, strict=True):
        for output in plan.outputs:
            other = writers.setdefault(str(output.path).lower(), case)
            if other is not case:
                raise UserError(
                    f"{output.path} would be written by {other.name} and by {case.name}"
                )
    check_plans(plans)
