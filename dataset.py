"""Image pairs, the training set with its splits by person, and the HMIF data set.

HMIF: registered CT-MRI, PET-MRI and SPECT-MRI slices of the Harvard Whole Brain Atlas (AANLIB), as
collected in github.com/xianming-gu/Havard-Medical-Image-Fusion-Datasets. As a script:
`python dataset.py --download` fetches and verifies it, `--check` says what is there.

Legend: H W pixels; luma and chroma as in images.py.
"""

import csv
import hashlib
import http.client
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import limits
from args_setting import CASE_PATTERN, TASKS, DataArgs, TrainArgs
from cli import UserError, command_line, file_hash, run_script, say, stem_of

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(DataArgs, __doc__)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import images
from images import Doubts, Pixels, Reading, is_image, to_uint8, write_bytes
from phantom import seed_of

HMIF_URL = (
    "https://raw.githubusercontent.com/xianming-gu/Havard-Medical-Image-Fusion-Datasets/"
    "HEAD/MyDatasets"
)
HMIF_SUMS = Path(__file__).with_name("HMIFDatasets") / "SHA256SUMS"
PEOPLE = HMIF_SUMS.with_name("people.csv")


class Pair(NamedTuple):
    """Two registered images of one slice."""

    name: str  # file name without its extension
    path1: Path  # CT, PET or SPECT
    path2: Path  # MRI
    readings: tuple[Reading, Reading] = (Reading(), Reading())


# --- pairs -----------------------------------------------------------------------------------


def match_pairs(
    dir1: Path, dir2: Path, skip_unmatched: bool = False, say: Callable[[str], None] = say
) -> list[Pair]:
    """Pairs of equal file name (without extension) of two folders of images, sorted by name.

    `say` gets a line on what is left out. Raises UserError as `match_files` does.
    """
    matched, unmatched = match_files(dir1, dir2, skip_unmatched)
    if unmatched:
        say(f"left out, without a partner: {', '.join(unmatched)}")
    return [Pair(name, *paths) for name, paths in matched.items()]


def match_files(
    dir1: Path,
    dir2: Path,
    skip_unmatched: bool = False,
    takes: Callable[[Path], bool] = is_image,
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Files of equal name (without the ending of their format) of two folders.

    Returns: by name, sorted, a file of each folder; and the names that one folder lacks.

    Args:
        skip_unmatched: leave these names out.
        takes: whether a file is one to pair.

    Raises:
        UserError: a folder is missing, empty or given twice, a name occurs twice in a folder, or
            one has no partner (unless `skip_unmatched`).
    """
    if os.path.realpath(dir1) == os.path.realpath(dir2):
        raise UserError(f"{dir1} is given for both sources, expected two folders")
    files1, files2 = files_in(Path(dir1), takes), files_in(Path(dir2), takes)
    unmatched = sorted(files1.keys() ^ files2.keys())
    if unmatched and not skip_unmatched:
        name = unmatched[0]
        holder, lacking = (dir1, dir2) if name in files1 else (dir2, dir1)
        others = f" (and {len(unmatched) - 1} others)" if len(unmatched) > 1 else ""
        raise UserError(
            f"{name}{others} is in {holder} but not in {lacking}; --skip-unmatched leaves it out"
        )
    names = sorted(files1.keys() & files2.keys())
    if not names:
        raise UserError(f"no file name occurs in both {dir1} and {dir2}")
    return {name: (files1[name], files2[name]) for name in names}, unmatched


def images_in(folder: Path) -> dict[str, Path]:
    """The images of a folder by file name without extension; UserError as `files_in`."""
    return files_in(folder, is_image)


def files_in(folder: Path, takes: Callable[[Path], bool]) -> dict[str, Path]:
    """The files of a folder that `takes` takes, by name without the ending of their format.

    Raises UserError if there is no such folder or file, or if two files have one name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if takes(path):
            name = stem_of(path)
            if name in files:
                raise UserError(f"{folder}: both {files[name].name} and {path.name}")
            files[name] = path
    if not files:
        kind = "images" if takes is is_image else "images or volumes"
        raise UserError(f"{folder}: no {kind}, expected {' '.join(images.EXTENSIONS)}")
    return files


def task_pairs(
    root: Path,
    task: str,
    split: str,
    skip_unmatched: bool = False,
    cases: Sequence[str] = (),
    case_pattern: str = CASE_PATTERN,
) -> list[Pair]:
    """Pairs of `<root>/<task>/<split>/<CT|PET|SPECT>` and `…/MRI`; split is train or test.

    With `cases` those of these cases only, as "41" or "PET:41"; UserError if one is not in the
    split.
    """
    folder = Path(root) / task / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `python dataset.py --download` fetches it")
    pairs = match_pairs(folder / TASKS[task], folder / "MRI", skip_unmatched)
    if not cases:
        return pairs
    case = {pair: case_of(pair, case_pattern) for pair in pairs}
    named = {text: task_and_case(text) for text in cases}
    lacking = [
        text
        for text, (other, number) in named.items()
        if other not in (None, task) or number not in case.values()
    ]
    if lacking:
        raise UserError(f"cases has {lacking}, which the {split} split of {task} lacks")
    wanted = {number for _, number in named.values()}
    return [pair for pair in pairs if case[pair] in wanted]


def as_told(pairs: list[Pair], levels: Sequence[str], page: Sequence[int] = ()) -> list[Pair]:
    """The pairs as `--levels` and `--page` want them read, see `images.readings`."""
    readings = images.readings(levels, page)
    return [pair._replace(readings=readings) for pair in pairs]


def decode_pair(pair: Pair, doubts: Doubts | None = None) -> tuple[Pixels, Pixels]:
    """The pixels of both images, which `doubts` also gets; UserError if their sizes differ."""
    sources = tuple(map(images.decode, (pair.path1, pair.path2), pair.readings))
    check_equal_sizes(pair, *(pixels.values.shape[:2] for pixels in sources))
    for i in (0, 1) if doubts else ():
        doubts.add((pair.path1, pair.path2)[i], sources[i], i + 1, pair.readings[i])
    return sources


def check_equal_sizes(pair: Pair, size1: tuple[int, int], size2: tuple[int, int]) -> None:
    """UserError if the images of a pair differ in size, given as height and width."""
    if size1 != size2:
        sides = [f"{height}x{width}" for height, width in (size1, size2)]
        raise UserError(f"{pair.path1} is {sides[0]}, {pair.path2} is {sides[1]}, expected equal")


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Luma of both images, (H, W) in [0, 1], and the chroma to put back (source 1's, else 2's)."""
    (luma1, chroma1), (luma2, chroma2) = map(images.luma_and_chroma, decode_pair(pair))
    return luma1, luma2, chroma2 if chroma1 is None else chroma1


# --- training --------------------------------------------------------------------------------


class TrainPairs(torch.utils.data.Dataset):
    """Augmented crops of all pairs, which stay in memory as 8-bit luma.

    An item is (images, name): both sources as (2, patch, patch) float32 in [0, 1]. How an item is
    cut and varied follows from `seed`, `epoch` and its index alone. So it is the same after a
    resume and in any process. `patch` and `epoch` may be set between epochs; `workers` processes
    cut the patches. Raises UserError for an image that is smaller than `smallest` pixels on a side.
    """

    def __init__(self, pairs: list[Pair], smallest: int, seed: int = 0, workers: int = 0):
        self.names = [pair.name for pair in pairs]
        self.tasks = [task_of(pair) for pair in pairs]
        self.images = []
        self.doubts = Doubts("all")  # about levels only, not about modalities
        for pair in pairs:
            sources = decode_pair(pair, self.doubts)
            lumas = [to_uint8(images.luma_and_chroma(pixels)[0]) for pixels in sources]
            if min(lumas[0].shape) < smallest:
                sides = "x".join(map(str, lumas[0].shape))
                raise UserError(f"{pair.path1} is {sides}, expected {smallest}x{smallest} or more")
            self.images.append(torch.from_numpy(np.stack(lumas)))  # (2, H, W)
        self.patch, self.seed, self.epoch, self.workers = smallest, seed, 0, workers

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """SHA-256 of the names and pixels of all pairs: what a resumed run must find again."""
        total = hashlib.sha256()
        for name, pair in zip(self.names, self.images, strict=True):
            total.update(f"{name} {tuple(pair.shape)}".encode())
            total.update(pair.numpy())
        return total.hexdigest()

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of((self.seed, self.epoch, i)) >> 1)
            return vary(augment(self.images[i], self.patch).float() / 255), self.names[i]

    def batches(self, size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """This epoch's batches of `size` pairs in random order, the remainder left out.

        Of each batch, a process takes every `world`-th pair from its `rank` on.
        """
        order = torch.Generator().manual_seed(seed_of((self.seed, self.epoch, -1)) >> 1)
        order = torch.randperm(len(self), generator=order).tolist()
        last = len(order) - size + 1
        return [order[i : i + size][rank::world] for i in range(0, last, size)]


def task_of(pair: Pair) -> str:
    """The task of a pair of the training set, by the folder of its source 1; "all" for another."""
    folder = pair.path1.parent.name
    return next((task for task, name in TASKS.items() if name == folder), "all")


def augment(images: Tensor, patch: int) -> Tensor:
    """One random crop, flip and turn by right angles of a (2, H, W), the same for both images.

    The crop's centre lies in the head where the border allows it: black teaches nothing.
    """
    inside = (images.amax(0) > 12).nonzero()  # (n, 2), rows and columns
    centre = inside[int(torch.randint(len(inside), ()))] if len(inside) else torch.zeros(2)
    corner = centre + torch.randint(-patch // 4, patch // 4 + 1, (2,)) - patch // 2
    top, left = (int(c.clamp(0, n - patch)) for c, n in zip(corner, images.shape[1:], strict=True))
    images = images[:, top : top + patch, left : left + patch]
    images = images.flip(2) if torch.rand(()) < 0.5 else images
    return images.rot90(int(torch.randint(4, ())), (1, 2))


def vary(images: Tensor) -> Tensor:
    """(2, H, W) with another contrast and gamma of each source, and a shift of up to a pixel.

    Contrast and gamma stand for other scanners, the shift for what a registration leaves. Each
    change is made half the time.
    """
    gamma = torch.where(torch.rand(2) < 0.5, torch.empty(2).uniform_(0.7, 1.4), 1.0)
    contrast = torch.where(torch.rand(2) < 0.5, torch.empty(2).uniform_(0.7, 1.0), 1.0)
    images = contrast[:, None, None] * images ** gamma[:, None, None]
    if torch.rand(()) < 0.5:
        for axis in (0, 1):
            shift = torch.empty(()).uniform_(-1, 1)
            moved = images[1].roll(int(torch.sign(shift)), axis)
            images[1] = torch.lerp(images[1], moved, shift.abs())
    return images


# --- splits by person ------------------------------------------------------------------------


class Who(NamedTuple):
    """Whose head a pair shows."""

    task: str  # of TASKS
    case: str  # the number of an examination, which counts within its task
    person: str


class Split(NamedTuple):
    """The pairs of a training run by what they are for. No person is in two of the lists."""

    train: list[Pair]
    val: list[Pair]  # validated on
    left_out: list[Pair]  # neither trained nor validated on
    who: dict[Pair, Who]  # of each pair; empty if nobody is held back: then names need not tell it


def case_of(pair: Pair, pattern: str = CASE_PATTERN) -> str:
    """The case of a pair: the first group of a regular expression that its whole name fits.

    In HMIF a name is a case number and a slice number of three digits. Raises UserError if the name
    does not fit, or the pattern is no expression with a group.
    """
    try:
        if (match := re.fullmatch(pattern, pair.name)) and match[1]:
            return match[1]
    except (re.error, IndexError):
        wanted = "a regular expression with the case in brackets"
        raise UserError(f"case_pattern is {pattern!r}, expected {wanted}") from None
    raise UserError(
        f"{pair.path1}: its name does not fit case_pattern, {pattern}, so the patient is unknown; "
        "give one with the case in brackets, as '(.+)_slice.+', or train by --val 0"
    )


def people(root: Path) -> dict[tuple[str, str], str]:
    """The person of each (task, case) that people.csv lists: that of the data folder, else ours.

    In the HMIF set, three cases of PET-MRI show one head, and two people are in two tasks. A case
    that is not listed is a person of its own.
    """
    path = Path(root) / PEOPLE.name
    path = path if path.is_file() else PEOPLE
    try:
        table = csv.DictReader(limits.read_table(path).splitlines())
        columns = ("task", "case", "person")
        rows = [[(row[name] or "").strip() for name in columns] for row in table]
    except (csv.Error, KeyError) as error:
        raise UserError(
            f"{path}: expected a table in UTF-8 with columns task, case and person ({error})"
        ) from None
    for task, case, person in rows:
        if task not in TASKS or not case or not person:
            raise UserError(
                f"{path}: a row has task {task!r}, case {case!r} and person {person!r}; expected "
                f"a task of {', '.join(TASKS)}, and neither of the others empty"
            )
    return {(task, case): person for task, case, person in rows}


def identify(
    pairs: dict[str, list[Pair]], root: Path, pattern: str = CASE_PATTERN
) -> dict[Pair, Who]:
    """Whose each pair is, of pairs by task; see `people` and `case_of`.

    With the pattern of HMIF, a number in two tasks is two people. With another `pattern`, it is the
    same person.
    """
    listed = people(root)
    found = {}
    for task, members in pairs.items():
        for pair in members:
            case = case_of(pair, pattern)
            alone = f"{task} {case}" if pattern == CASE_PATTERN else case
            found[pair] = Who(task, case, listed.get((task, case), alone))
    return found


def task_and_case(text: str) -> tuple[str | None, str]:
    """The task and the case that a setting names: "PET:41", "PET-MRI:41" or "41" (no task)."""
    name, colon, case = text.partition(":")
    for task, modality in TASKS.items():
        if colon and name.upper() in (task, modality):
            return task, case
    return None, text


def people_named(setting: str, cases: Sequence[str], who: Iterable[Who]) -> set[str]:
    """The people whose cases a setting names.

    Raises UserError for a case that is not there, and for one without a task that is a different
    person in another task.
    """
    known = sorted(set(who), key=_place)
    several = len({w.task for w in known}) > 1
    found = set()
    for text in cases:
        task, case = task_and_case(text)
        meant = [w for w in known if w.case == case and task in (None, w.task)]
        if not meant:
            raise UserError(
                f"{setting} has {text!r}, expected some of {case_names(known, several)}"
            )
        if len({w.person for w in meant}) > 1:
            choices = " or ".join(f"{TASKS[w.task]}:{case}" for w in meant)
            raise UserError(
                f"{setting} has {text!r}, which is a different person in each of "
                f"{len(meant)} tasks; expected {choices}"
            )
        found |= {w.person for w in meant}
    return found


def case_names(who: Iterable[Who], with_task: bool) -> str:
    """Cases as a setting takes them, those of one person side by side: "CT:21 = SPECT:21, CT:2"."""
    names: dict[str, list[str]] = {}  # by person
    for w in sorted(set(who), key=_place):
        names.setdefault(w.person, []).append(f"{TASKS[w.task]}:{w.case}" if with_task else w.case)
    return ", ".join(" = ".join(cases) for cases in names.values())


def _place(who: Who) -> tuple:
    """Where a case stands in a list: by task, then by its number."""
    return list(TASKS).index(who.task), len(who.case), who.case


def split_pairs(args: TrainArgs) -> Split:
    """The pairs to train and to validate on, and those that take no part.

    Raises UserError if a setting names a case that is not there or in doubt, or if nobody is left
    to train on.
    """
    tasks = TASKS if args.task == "all" else (args.task,)
    pairs = {t: as_told(task_pairs(args.data_dir, t, "train"), args.levels) for t in tasks}
    if not (args.val or args.val_cases or args.leave_out):  # then names need not tell who it is
        return Split([pair for members in pairs.values() for pair in members], [], [], {})
    who = identify(pairs, args.data_dir, args.case_pattern)
    left_out = people_named("leave_out", args.leave_out, who.values())
    held = people_named("val_cases", args.val_cases, who.values())
    if both := left_out & held:
        cases = case_names((w for w in who.values() if w.person in both), len(tasks) > 1)
        raise UserError(f"val_cases and leave_out both name the person of {cases}, expected one")
    if not args.val_cases:
        kept = [w for w in who.values() if w.person not in left_out]
        sizes = {task: Counter(w.person for w in kept if w.task == task) for task in tasks}
        held = validation_people(sizes, args.val)
    split = Split([], [], [], who)
    for pair, (_, _, person) in who.items():
        part = (
            split.left_out if person in left_out else split.val if person in held else split.train
        )
        part.append(pair)
    if not split.train:
        lines = "; ".join(split_lines(split))
        raise UserError(f"val_cases and leave_out keep no pairs to train on: {lines}")
    return split


def validation_people(sizes: dict[str, Counter], share: float) -> set[str]:
    """Who to validate on: people of each task until they have `share` of its pairs.

    First those who are in no other task, and those with the fewest pairs. Each task keeps somebody
    to train on, so one that shows a single person has no validation.

    Args:
        sizes: the pairs of each person by task.

    Raises:
        UserError: a task of several people cannot have the share.
    """
    tasks_of = Counter(person for counts in sizes.values() for person in counts)
    held: set[str] = set()

    def can_go(person: str) -> bool:
        return all(counts.keys() - held - {person} for counts in sizes.values() if person in counts)

    def share_of(counts: Counter) -> float:
        return sum(counts[person] for person in held) / max(1, counts.total())

    for counts in sizes.values():
        for person in sorted(counts, key=lambda p: (tasks_of[p], counts[p], p)):
            if share_of(counts) < share and can_go(person):
                held.add(person)
    for task, counts in sizes.items():
        if len(counts) > 1 and share_of(counts) < share:
            raise UserError(
                f"{task}: val is {share:g}, which its {len(counts)} people cannot give without "
                "leaving a task nobody to train on; give a smaller --val, name the people by "
                "--val_cases, or train without validation by --val 0"
            )
    return held


def split_lines(split: Split) -> list[str]:
    """The lines of a run on who is held out: the cases of each setting, and what a task lacks."""
    lines, present = [], {w.task for w in split.who.values()}
    if not present:
        return ["nobody is held out for validation"]
    for what, pairs in (("left out", split.left_out), ("held out for validation", split.val)):
        if pairs:
            shown = [split.who[pair] for pair in pairs]
            count = len({w.person for w in shown})
            lines.append(
                f"{what}: {len(pairs)} pairs of {count} {'person' if count == 1 else 'people'}, "
                f"cases {case_names(shown, len(present) > 1)}"
            )
    for task in (task for task in TASKS if task in present):
        trained, held = (
            {split.who[p].person for p in pairs if split.who[p].task == task}
            for pairs in (split.train, split.val)
        )
        if not trained:
            lines.append(f"{task}: nobody is left to train on")
        elif not held:
            why = " as it shows one person" if len(trained) == 1 else ""
            lines.append(f"{task}: nobody is held out for validation{why}")
    return lines


# --- the HMIF data set -----------------------------------------------------------------------


def hmif_sums() -> dict[str, str]:
    """SHA-256 of every file of the set, by its path below the data folder."""
    lines = HMIF_SUMS.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def download(root: Path, url: str = HMIF_URL) -> int:
    """Fetch what is absent or damaged, file by file; returns how many were fetched.

    A file is written only once its hash is right, so a stopped download goes on where it was.

    Raises:
        UserError: the server cannot be reached, or sends other bytes than the list expects.
    """
    sums = hmif_sums()
    wanted = [name for name, digest in sums.items() if _sha256(root / name) != digest]

    def fetch(name: str) -> None:
        try:
            with urllib.request.urlopen(f"{url}/{name}", timeout=60) as reply:
                data = reply.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"{url}/{name}: {error}; run the command again to go on") from None
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise UserError(f"{url}/{name}: not the bytes that {HMIF_SUMS.name} lists")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(root / name, data)

    pool = ThreadPoolExecutor(8)
    try:
        for _ in tqdm(pool.map(fetch, wanted), total=len(wanted), unit="file", desc="HMIF"):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return len(wanted)


def _sha256(path: Path) -> str | None:
    return file_hash(path) if path.is_file() else None


def check(root: Path) -> tuple[list[str], list[str]]:
    """Two lists of lines: what is there, by folder, and what is wrong.

    An image outside of the set's folders is never read. So it is named, but it is not wrong: the
    published collection has one.
    """
    sums, found, wrong = hmif_sums(), [], []
    listed: dict[str, set[str]] = {}
    for name in sums:
        listed.setdefault(str(Path(name).parent), set()).add(Path(name).name)
    for folder, names in listed.items():
        present = {p.name for p in (root / folder).glob("*") if not p.name.startswith("._")}
        found.append(f"{folder}: {len(present & names)} of {len(names)}")
        wrong += [f"{folder}/{name}: missing" for name in sorted(names - present)]
        wrong += [f"{folder}/{name}: not part of the set" for name in sorted(present - names)]
    for name, digest in sums.items():
        if _sha256(root / name) not in (None, digest):
            wrong.append(f"{name}: damaged, its hash differs")
    for path in sorted(p.relative_to(root) for p in root.rglob("*")):
        if is_image(root / path) and str(path.parent) not in listed:
            found.append(f"{path}: not part of the set, never read")
    return found, wrong


def main(args: DataArgs) -> None:
    if not args.download and not args.data_dir.is_dir():
        raise UserError(f"{args.data_dir}: no such folder; --download fills it")
    if args.download:
        say(f"{download(args.data_dir)} files fetched into {args.data_dir}")
    if not args.check:
        return
    found, wrong = check(args.data_dir)
    say(*found)
    if wrong:
        more = f" (and {len(wrong) - 20} more)" if len(wrong) > 20 else ""
        raise UserError(
            f"{len(wrong)} things wrong in {args.data_dir}: {'; '.join(wrong[:20])}{more}"
        )
    say(f"{args.data_dir}: all files present and verified")


if __name__ == "__main__":
    run_script(main, ARGS)
