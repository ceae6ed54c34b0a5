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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import limits
from args_setting import CASE_PATTERN, TASKS, DataArgs, TrainArgs
from cli import UserError, command_line, run_script

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


def match_pairs(dir1: Path, dir2: Path, skip_unmatched: bool = False) -> list[Pair]:
    """Pairs of equal file name (without extension) of two folders, sorted by name.

    Raises:
        UserError: a folder is missing, empty or given twice, a name occurs twice in a folder, or
            one has no partner (unless `skip_unmatched`, which prints what is left out).
    """
    if os.path.realpath(dir1) == os.path.realpath(dir2):
        raise UserError(f"{dir1} is given for both sources, expected two folders")
    files1, files2 = images_in(Path(dir1)), images_in(Path(dir2))
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
    if unmatched:
        print(f"left out, without a partner: {', '.join(unmatched)}")
    return [Pair(name, files1[name], files2[name]) for name in names]


def images_in(folder: Path) -> dict[str, Path]:
    """The images of a folder by file name without extension; UserError if none, or two of one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_image(path):
            if path.stem in files:
                raise UserError(f"{folder}: both {files[path.stem].name} and {path.name}")
            files[path.stem] = path
    if not files:
        raise UserError(f"{folder}: no images, expected {' '.join(images.EXTENSIONS)}")
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

    With `cases` those of these case numbers only; UserError if one is not in the split.
    """
    folder = Path(root) / task / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `python dataset.py --download` fetches it")
    pairs = match_pairs(folder / TASKS[task], folder / "MRI", skip_unmatched)
    case = {pair: case_of(pair, case_pattern) for pair in pairs if cases}
    if unknown := set(cases) - set(case.values()):
        raise UserError(f"cases has {sorted(unknown)}, which the {split} split of {task} lacks")
    return [pair for pair in pairs if not cases or case[pair] in cases]


def as_told(pairs: list[Pair], levels: Sequence[str], page: Sequence[int] = ()) -> list[Pair]:
    """The pairs as `--levels` and `--page` want them read, see `images.readings`."""
    told = images.readings(levels, page)
    return [pair._replace(readings=told) for pair in pairs]


def decode_pair(pair: Pair, doubts: Doubts | None = None) -> tuple[Pixels, Pixels]:
    """The pixels of both images, which `doubts` also gets; UserError if their sizes differ."""
    sources = tuple(map(images.decode, (pair.path1, pair.path2), pair.readings))
    sides = ["x".join(map(str, pixels.values.shape[:2])) for pixels in sources]
    if sides[0] != sides[1]:
        raise UserError(f"{pair.path1} is {sides[0]}, {pair.path2} is {sides[1]}, expected equal")
    for i in (0, 1) if doubts else ():
        doubts.add((pair.path1, pair.path2)[i], sources[i], i + 1, pair.readings[i])
    return sources


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Luma of both images, (H, W) in [0, 1], and the chroma to put back (source 1's, else 2's)."""
    (luma1, chroma1), (luma2, chroma2) = map(images.luma_and_chroma, decode_pair(pair))
    return luma1, luma2, chroma2 if chroma1 is None else chroma1


# --- training --------------------------------------------------------------------------------


class TrainPairs(torch.utils.data.Dataset):
    """Augmented crops of all pairs, which stay in memory as 8-bit luma.

    An item is (images, name): both sources as (2, patch, patch) float32 in [0, 1]. How it is cut
    follows from `seed`, `epoch` and its index alone: the same after a resume and in any process.
    `patch` and `epoch` may be set anew between epochs; `workers` processes cut the patches. Raises
    UserError for an image that is smaller than `smallest` pixels on a side.
    """

    def __init__(self, pairs: list[Pair], smallest: int, seed: int = 0, workers: int = 0):
        self.names = [pair.name for pair in pairs]
        self.tasks = [task_of(pair) for pair in pairs]
        self.images = []
        self.doubts = Doubts("all")  # of levels; of what modality they are, the user knows
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
    """(2, H, W) with another contrast and gamma of each source, and up to a pixel between them.

    So scanners differ, and so registered scans still lie apart. Each change is made half the time.
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


def case_of(pair: Pair, pattern: str = CASE_PATTERN) -> str:
    """The case of a pair: the first group of a regular expression that its whole name fits.

    In HMIF a name is a case number and a slice number of three digits. Raises UserError if the name
    does not fit, or the pattern is no expression with a group.
    """
    try:
        if (found := re.fullmatch(pattern, pair.name)) and found[1]:
            return found[1]
    except (re.error, IndexError):
        wanted = "a regular expression with the case in brackets"
        raise UserError(f"case_pattern is {pattern!r}, expected {wanted}") from None
    raise UserError(
        f"{pair.path1}: its name does not fit case_pattern, {pattern}, so the patient is unknown; "
        "give one with the case in brackets, as '(.+)_slice.+', or train by --val 0"
    )


def people(root: Path) -> dict[tuple[str, str], str]:
    """The person of each (task, case) that people.csv lists: that of the data folder, else ours.

    Of the HMIF set three cases of PET-MRI are one head, and two people are in two tasks. A case
    that is not listed is a person of its own.
    """
    path = Path(root) / PEOPLE.name
    path = path if path.is_file() else PEOPLE
    try:
        table = csv.DictReader(limits.read_table(path).splitlines())
        rows = [(row["task"], row["case"], row["person"]) for row in table]
    except (csv.Error, KeyError) as error:
        raise UserError(
            f"{path}: expected a table in UTF-8 with columns task, case and person ({error})"
        ) from None
    return {(task, case): person for task, case, person in rows}


def split_pairs(args: TrainArgs) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs; no person is in both.

    In HMIF each task has its own numbers. With another `case_pattern`, a case is one in all tasks.
    """
    tasks = TASKS if args.task == "all" else (args.task,)
    pairs = {t: as_told(task_pairs(args.data_dir, t, "train"), args.levels) for t in tasks}
    if not (args.val or args.val_cases or args.leave_out):  # then names need not tell who it is
        return sum(pairs.values(), []), []
    listed = people(args.data_dir)
    own = args.case_pattern != CASE_PATTERN
    task_of = {pair: task for task, members in pairs.items() for pair in members}
    case = {p: case_of(p, args.case_pattern) for p in task_of}
    alone = {p: case[p] if own else f"{task} {case[p]}" for p, task in task_of.items()}
    person = {p: listed.get((task, case[p]), alone[p]) for p, task in task_of.items()}
    named = {}  # setting -> the people whose cases it names
    for name in ("val_cases", "leave_out"):
        cases = set(getattr(args, name))
        if unknown := cases - set(case.values()):
            expected = sorted(set(case.values()))
            raise UserError(f"{name} has {sorted(unknown)}, expected some of {expected}")
        named[name] = {who for pair, who in person.items() if case[pair] in cases}
    sizes = {
        task: Counter(person[p] for p in members if person[p] not in named["leave_out"])
        for task, members in pairs.items()
    }
    held = named["val_cases"] or validation_people(sizes, args.val)
    kept = [pair for pair, who in person.items() if who not in named["leave_out"]]
    train = [pair for pair in kept if person[pair] not in held]
    if not train:
        raise UserError("val_cases and leave_out keep no pairs to train on")
    return train, [pair for pair in kept if person[pair] in held]


def validation_people(sizes: dict[str, Counter], share: float) -> set[str]:
    """Who to validate on: of each task those with the fewest pairs, until they have `share` of it.

    `sizes` has the pairs of each person by task. A task that shows one person keeps it for
    training. Raises UserError if a task of several would keep nobody.
    """
    held: set[str] = set()
    for task, counts in sizes.items():
        if len(counts) == 1:
            continue
        for who in sorted(counts, key=lambda who: (counts[who], who)):
            if sum(counts[w] for w in held & counts.keys()) >= share * counts.total():
                break
            held.add(who)
        if counts and held >= counts.keys():
            raise UserError(
                f"{task}: val is {share:g}, which leaves none of the {len(counts)} people to "
                "train on; --val 0 trains without validation"
            )
    return held


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
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def check(root: Path) -> tuple[list[str], list[str]]:
    """What is there, a line for each folder, and a line for each thing that is wrong.

    An image outside of the set's folders is never read, so it is named but not wrong: the
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
        print(f"{download(args.data_dir)} files fetched into {args.data_dir}")
    if not args.check:
        return
    found, wrong = check(args.data_dir)
    print("\n".join(found))
    if wrong:
        more = f" (and {len(wrong) - 20} more)" if len(wrong) > 20 else ""
        raise UserError(
            f"{len(wrong)} things wrong in {args.data_dir}: {'; '.join(wrong[:20])}{more}"
        )
    print(f"{args.data_dir}: all files present and verified")


if __name__ == "__main__":
    run_script(main, ARGS)
