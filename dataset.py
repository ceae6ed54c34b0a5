"""Reading and writing of image pairs, colour, augmentation, and the HMIF data set.

HMIF: registered CT-MRI, PET-MRI and SPECT-MRI slices of the Harvard Whole Brain Atlas (AANLIB), as
collected in github.com/xianming-gu/Havard-Medical-Image-Fusion-Datasets. As a script:
`python dataset.py --download` fetches and verifies it, `--check` says what is there.

Legend: H W pixels. Luma is BT.601, in [0, 1]; chroma is what colour adds to it, RGB - luma.
"""

import hashlib
import io
import os
import tempfile
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from args_setting import TASKS, DataArgs, parse_args, run_script

HMIF_URL = (
    "https://raw.githubusercontent.com/xianming-gu/Havard-Medical-Image-Fusion-Datasets/"
    "HEAD/MyDatasets"
)
HMIF_SUMS = Path(__file__).with_name("HMIFDatasets") / "SHA256SUMS"
EXTENSIONS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
BT601 = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # R, G, B


class Pair(NamedTuple):
    """Two registered images of one slice."""

    name: str  # file name without its extension
    path1: Path  # CT, PET or SPECT
    path2: Path  # MRI


# --- images ----------------------------------------------------------------------------------


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Luma (H, W) float32 in [0, 1], and chroma (H, W, 3), None for grey.

    8 or 16 bits, PNG, TIFF, JPEG or BMP. Grey stored as three equal channels is grey.

    Raises:
        ValueError: no image, a damaged one, or another kind of pixel.
    """
    return _luma_and_chroma(_decode(Path(path)))


def _luma_and_chroma(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    scaled = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if pixels.ndim == 2:
        return scaled, None
    if np.ptp(pixels, axis=2).max() == 0:
        return np.ascontiguousarray(scaled[..., 0]), None
    luma = scaled @ BT601
    return luma, scaled - luma[..., None]


def _decode(path: Path) -> np.ndarray:
    """uint8 or uint16, (H, W) or (H, W, 3) in RGB order."""
    data = path.read_bytes()
    try:
        # Pillow refuses a truncated file, which OpenCV may fill up.
        with warnings.catch_warnings(), _silence():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(data)).verify()
            Image.open(io.BytesIO(data)).load()
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, SyntaxError, ValueError, cv2.error, Image.DecompressionBombError):
        pixels = None
    if pixels is None:
        raise ValueError(f"{path}: damaged or not an image, expected PNG, TIFF, JPEG or BMP")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: pixels are {pixels.dtype}, expected 8 or 16 bits")
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 4 and pixels[..., 3].min() < np.iinfo(pixels.dtype).max:
        raise ValueError(f"{path}: has transparent pixels, expected an opaque image")
    return pixels[..., 2::-1]


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches stderr: the C libraries below Pillow and OpenCV comment on files there."""
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def to_uint8(luma: np.ndarray, chroma: np.ndarray | None = None) -> np.ndarray:
    """(H, W) or, with chroma, (H, W, 3) RGB in 0..255: added, rounded and clipped once, here.

    Adding a source's chroma to a new luma is the YCbCr exchange of the luma. Where the sum leaves
    the range of 8 bits, the clip changes the stored luma.
    """
    image = luma if chroma is None else luma[..., None] + chroma
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def read_luma8(path: Path) -> np.ndarray:
    """Luma (H, W) of an image file in 8 bits, as the metrics take it; exact, halves round up."""
    pixels = _decode(Path(path))
    if pixels.dtype == np.uint16:
        return to_uint8(_luma_and_chroma(pixels)[0])
    if pixels.ndim == 2:
        return pixels
    return ((pixels.astype(np.int32) @ [299, 587, 114] + 500) // 1000).astype(np.uint8)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) RGB; beside `path` first, so there is never half a file."""
    image = image if image.ndim == 2 else image[..., ::-1]
    data = cv2.imencode(".png", image)[1].tobytes()
    write_bytes(path, data)


def writable_folder(path: Path) -> Path:
    """Make the folder and prove that a file can be written there; OSError if not.

    Processes that try the same folder at once, as torchrun's do, get a file each.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(prefix=".probe", suffix=".part", dir=path):
        return path


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a stopped run leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# --- pairs -----------------------------------------------------------------------------------


def match_pairs(dir1: Path, dir2: Path, skip_unmatched: bool = False) -> list[Pair]:
    """Pairs of equal file name (without extension) of two folders, sorted by name.

    Raises:
        ValueError: a folder is missing or empty, a name occurs twice in a folder, or one has no
            partner (unless `skip_unmatched`).
    """
    files1, files2 = images_in(Path(dir1)), images_in(Path(dir2))
    unmatched = sorted(files1.keys() ^ files2.keys())
    if unmatched and not skip_unmatched:
        name = unmatched[0]
        here, there = (dir1, dir2) if name in files1 else (dir2, dir1)
        others = f" (and {len(unmatched) - 1} others)" if len(unmatched) > 1 else ""
        raise ValueError(
            f"{name}{others} is in {here} but not in {there}; --skip-unmatched leaves it out"
        )
    names = sorted(files1.keys() & files2.keys())
    if not names:
        raise ValueError(f"no file name occurs in both {dir1} and {dir2}")
    return [Pair(name, files1[name], files2[name]) for name in names]


def images_in(folder: Path) -> dict[str, Path]:
    """The images of a folder by file name without extension; ValueError if none, or two of one."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS:
            if path.stem in files:
                raise ValueError(f"{folder}: both {files[path.stem].name} and {path.name}")
            files[path.stem] = path
    if not files:
        raise ValueError(f"{folder}: no images, expected {' '.join(EXTENSIONS)}")
    return files


def task_pairs(root: Path, task: str, split: str, skip_unmatched: bool = False) -> list[Pair]:
    """Pairs of `<root>/<task>/<split>/<CT|PET|SPECT>` and `…/MRI`; split is train or test."""
    folder = Path(root) / task / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; `python dataset.py --download` fetches it")
    return match_pairs(folder / TASKS[task], folder / "MRI", skip_unmatched)


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Luma of both images, (H, W) in [0, 1], and the chroma to put back (source 1's, else 2's)."""
    (luma1, chroma1), (luma2, chroma2) = read_image(pair.path1), read_image(pair.path2)
    if luma1.shape != luma2.shape:
        sides = [f"{h}x{w}" for h, w in (luma1.shape, luma2.shape)]
        raise ValueError(f"{pair.path1} is {sides[0]}, {pair.path2} is {sides[1]}, expected equal")
    return luma1, luma2, chroma2 if chroma1 is None else chroma1


# --- training --------------------------------------------------------------------------------


class TrainPairs(torch.utils.data.Dataset):
    """Augmented crops of all pairs, which stay in memory as 8-bit luma.

    An item is (img1, img2, name) with (1, patch, patch) float32 images in [0, 1]. How it is cut
    follows from seed, `epoch` and its index alone: the same after a resume and in any process.
    """

    def __init__(self, pairs: list[Pair], patch: int, seed: int = 0):
        self.names = [pair.name for pair in pairs]
        self.images = []
        for pair in pairs:
            lumas = [to_uint8(luma) for luma in read_pair(pair)[:2]]
            if min(lumas[0].shape) < patch:
                sides = "x".join(map(str, lumas[0].shape))
                raise ValueError(f"patch_size is {patch}, but {pair.path1} is only {sides}")
            self.images.append(torch.from_numpy(np.stack(lumas)))  # (2, H, W)
        self.augment = augmentation(patch)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, str]:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the default generator
            torch.default_generator.manual_seed(_seed(self.seed, self.epoch, i))
            img1, img2 = self.augment(self.images[i]).unsqueeze(1).float() / 255
        return img1, img2, self.names[i]

    def batches(self, size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """This epoch's batches of `size` pairs in random order, the remainder left out.

        Of each batch, a process takes every `world`-th pair from its `rank` on.
        """
        order = torch.Generator().manual_seed(_seed(self.seed, self.epoch, -1))
        order = torch.randperm(len(self), generator=order).tolist()
        last = len(order) - size + 1
        return [order[i : i + size][rank::world] for i in range(0, last, size)]


def _seed(*numbers: int) -> int:
    """One seed for a few numbers; unlike their sum, different for each."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def case_of(pair: Pair) -> str:
    """The patient: a file is named by the atlas case number and a slice number of three digits."""
    return pair.name[:-3]


def validation_cases(pairs: dict[str, list[Pair]], share: float) -> set[str]:
    """Patients to validate on: of each task the smallest ones, until they have `share` of it.

    Raises ValueError if a task would keep no patient to train on.
    """
    held: set[str] = set()
    for task, members in pairs.items():
        sizes = Counter(map(case_of, members))
        for case in sorted(sizes, key=lambda case: (sizes[case], case)):
            if sum(sizes[c] for c in held & sizes.keys()) >= share * len(members):
                break
            held.add(case)
        if sizes and held >= sizes.keys():
            raise ValueError(
                f"{task}: val is {share:g}, which leaves none of the {len(sizes)} patients to "
                "train on; --val 0 trains without validation"
            )
    return held


def augmentation(patch: int) -> v2.Transform:
    """One random crop, flip and turn by right angles, the same for both images of a (2, H, W)."""
    turns = [v2.Lambda(partial(torch.rot90, k=k, dims=(-2, -1))) for k in range(4)]
    return v2.Compose([v2.RandomCrop(patch), v2.RandomHorizontalFlip(), v2.RandomChoice(turns)])


# --- the HMIF data set -----------------------------------------------------------------------


def hmif_sums() -> dict[str, str]:
    """SHA-256 of every file of the set, by its path below the data folder."""
    lines = HMIF_SUMS.read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def download(root: Path, url: str = HMIF_URL) -> int:
    """Fetch what is absent or damaged, file by file; returns how many were fetched.

    A file is written only once its hash is right, so a stopped download goes on where it was.

    Raises:
        ValueError: the server cannot be reached, or sends other bytes than the list expects.
    """
    sums = hmif_sums()
    wanted = [name for name, digest in sums.items() if _sha256(root / name) != digest]

    def fetch(name: str) -> None:
        try:
            with urllib.request.urlopen(f"{url}/{name}", timeout=60) as reply:
                data = reply.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"{url}/{name}: {error}; run the command again to go on") from None
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise ValueError(f"{url}/{name}: not the bytes that {HMIF_SUMS.name} lists")
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
        there = {p.name for p in (root / folder).glob("*")}
        found.append(f"{folder}: {len(there & names)} of {len(names)}")
        wrong += [f"{folder}/{name}: missing" for name in sorted(names - there)]
        wrong += [f"{folder}/{name}: not part of the set" for name in sorted(there - names)]
    for name, digest in sums.items():
        if (root / name).is_file() and _sha256(root / name) != digest:
            wrong.append(f"{name}: damaged, its hash differs")
    for path in sorted(p.relative_to(root) for p in root.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and str(path.parent) not in listed:
            found.append(f"{path}: not part of the set, never read")
    return found, wrong


def main(args: DataArgs) -> None:
    if not args.download and not args.data_dir.is_dir():
        raise ValueError(f"{args.data_dir}: no such folder; --download fills it")
    if args.download:
        print(f"{download(args.data_dir)} files fetched into {args.data_dir}")
    if not args.check:
        return
    found, wrong = check(args.data_dir)
    print("\n".join(found))
    if wrong:
        more = f" (and {len(wrong) - 20} more)" if len(wrong) > 20 else ""
        raise ValueError(
            f"{len(wrong)} things wrong in {args.data_dir}: {'; '.join(wrong[:20])}{more}"
        )
    print(f"{args.data_dir}: all files present and verified")


if __name__ == "__main__":
    run_script(main, parse_args(DataArgs, description=__doc__))
