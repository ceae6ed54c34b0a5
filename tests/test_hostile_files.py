"""Every kind of file that we read, mutated: it is read, or refused by our own error.

Each reading must stay under 2 GB and 10 s. ASFE_HOSTILE=1000 tries so many files of each kind, at
random; without it a few that are always the same, quick enough for CI. The last test prints how
many were tried, and how many distinct faults they showed.
"""

import gzip
import io
import json
import os
import resource
import struct
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

hypothesis = pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")
pytest.importorskip("nibabel", reason="needs requirements-volumes.txt")

from dicom_files import sample, write_enhanced, write_series  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from volume_files import affine_of, numbered, write  # noqa: E402

from args_setting import ModelSize  # noqa: E402
from cli import UserError  # noqa: E402
from dataset import PEOPLE, people  # noqa: E402
from images import read_image, read_luma8  # noqa: E402
from network import ASFEFusion  # noqa: E402
from volumes.io import read_volume  # noqa: E402
from weights import load_weights, save_weights  # noqa: E402

MEMORY, SECONDS = 2**31, 10
MANY = int(os.environ.get("ASFE_HOSTILE", 0))  # files of each kind; 0: a few, always the same
FEW = 40
TINY = ModelSize((2,) * 5, 2, (2, 2, 2, 2), dim=4, heads=2, experts=2, slots=2)
SHAPE = (6, 5, 4)  # voxels
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (b"-1", b"0", b"99999999", b"1e999", b"nan", b"\0", b"\n", b"\xff\xfe", b'"', b"{" * 2000)

tried: Counter[str] = Counter()
refused: Counter[str] = Counter()
faults: set[tuple[str, str]] = set()


class Kind(NamedTuple):
    """A kind of file: how a good one is made, what of it is mutated, and how it is read."""

    name: str  # of the file
    make: Callable[[Path], bytes]  # the part to mutate of a good file; may use the folder
    read: Callable[[Path], object]
    whole: Callable[[bytes], bytes] = lambda part: part  # the file with that part
    cost: int = 1  # how much slower than others it is read


# --- good files ------------------------------------------------------------------------------


def picture(form: str, bits: int = 8, **how) -> Callable[[Path], bytes]:
    """A drawn image in a format of Pillow, grey of 16 bits, or RGB."""

    def make(folder: Path) -> bytes:
        y, x = np.mgrid[:24, :20]
        grey = (x * y * (100 if bits == 16 else 1) % (2**bits - 1)).astype(f"uint{bits}")
        image = Image.fromarray(grey if bits == 16 else np.dstack([grey, grey[::-1], grey]))
        file = io.BytesIO()
        image.save(file, form, **how)
        return file.getvalue()

    return make


def volume(form: str) -> Callable[[Path], bytes]:
    """A small volume of a format."""

    def make(folder: Path) -> bytes:
        return write(folder / "v", numbered(SHAPE), affine_of("identity"), form).read_bytes()

    return make


def one_slice(folder: Path) -> bytes:
    return write_series(folder / "series", numbered(SHAPE), affine_of("identity"))[0].read_bytes()


def enhanced(folder: Path) -> bytes:
    path = write_enhanced(folder / "v.dcm", numbered(SHAPE), affine_of("identity"))
    return path.read_bytes()


def tiny_weights(folder: Path) -> bytes:
    """Our weights of a network of next to nothing."""
    torch.manual_seed(0)
    save_weights(ASFEFusion(TINY).eval(), folder / "w.safetensors", {"task": "CT-MRI"})
    return (folder / "w.safetensors").read_bytes()


def published_pickle(folder: Path) -> bytes:
    """The pickle inside of a checkpoint in PyTorch's format."""
    torch.save({"module.encoder.inlayer.weight": torch.zeros(64, 1, 1, 1)}, folder / "a.pth")
    with zipfile.ZipFile(folder / "a.pth") as archive:
        return archive.read("a/data.pkl")


# --- whole files around a mutated part -------------------------------------------------------


def sound_png(data: bytes) -> bytes:
    """A PNG with checksums that hold, so that what is wrong with it reaches the decoder."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def sound_header(text: bytes) -> bytes:
    """Safetensors with a header of this text and its right length."""
    return struct.pack("<Q", len(text)) + text + bytes(4096)


def header_text(folder: Path) -> bytes:
    """The header of tiny weights."""
    data = tiny_weights(folder)
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def sound_metadata(text: bytes) -> bytes:
    """Safetensors whose metadata are this text."""
    text = text.decode("utf-8", "replace")
    return sound_header(json.dumps({"__metadata__": {"asfe": text}}).encode())


def metadata_text(folder: Path) -> bytes:
    return json.loads(header_text(folder))["__metadata__"]["asfe"].encode()


def archive_of(pickled: bytes) -> bytes:
    """A checkpoint in PyTorch's format with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(256))
        archive.writestr("a/version", "3\n")
    return file.getvalue()


def read_picture(path: Path) -> None:
    read_image(path)
    read_luma8(path)


KINDS = {
    "PNG": Kind("a.png", picture("PNG"), read_picture),
    "PNG, checksums hold": Kind("a.png", picture("PNG"), read_picture, sound_png),
    "PNG, 16 bits": Kind("a.png", picture("PNG", 16), read_picture, sound_png),
    "JPEG": Kind("a.jpg", picture("JPEG"), read_picture),
    "TIFF": Kind("a.tif", picture("TIFF"), read_picture),
    "TIFF, packed": Kind("a.tif", picture("TIFF", compression="tiff_lzw"), read_picture),
    "TIFF, 16 bits": Kind("a.tif", picture("TIFF", 16), read_picture),
    "BMP": Kind("a.bmp", picture("BMP"), read_picture),
    "NIfTI": Kind("v.nii", volume("nii"), read_volume),
    "NIfTI, packed": Kind("v.nii.gz", volume("nii"), read_volume, gzip.compress),
    "NIfTI, damaged pack": Kind("v.nii.gz", volume("nii.gz"), read_volume),
    "MetaImage": Kind("v.mha", volume("mha"), read_volume),
    "NRRD": Kind("v.nrrd", volume("nrrd"), read_volume),
    "DICOM": Kind("v.dcm", one_slice, read_volume),
    "DICOM, enhanced": Kind("v.dcm", enhanced, read_volume),
    "DICOM, RLE": Kind("v.dcm", lambda _: sample("MR_small_RLE.dcm").read_bytes(), read_volume),
    "safetensors": Kind("w.safetensors", tiny_weights, load_weights, cost=4),
    "safetensors, header": Kind("w.safetensors", header_text, load_weights, sound_header, 4),
    "safetensors, metadata": Kind("w.safetensors", metadata_text, load_weights, sound_metadata, 4),
    "pth": Kind("a.pth", lambda f: archive_of(published_pickle(f)), load_weights, cost=4),
    "pth, pickle": Kind("a.pth", published_pickle, load_weights, archive_of, 4),
    "people": Kind(PEOPLE.name, lambda _: PEOPLE.read_bytes(), lambda path: people(path.parent)),
}


# --- mutations -------------------------------------------------------------------------------

PLACE = st.one_of(st.integers(0, 999), st.integers(0, 99)).map(lambda n: n / 1000)  # headers first
NUMBER = st.builds(
    lambda value, form: struct.pack(form, value % 2 ** (8 * struct.calcsize(form))),
    st.sampled_from(NUMBERS),
    st.sampled_from(("B", "<H", ">H", "<I", ">I", "<Q")),
)
PIECE = st.one_of(NUMBER, NUMBER, st.sampled_from(WORDS), st.binary(max_size=8))
HOW = st.sampled_from(("over", "over", "over", "insert", "remove", "cut", "twice"))
MUTATIONS = st.lists(st.tuples(HOW, PLACE, PIECE), min_size=1, max_size=4)


def mutated(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    """The data after each of (how, where as a fraction, what) in turn."""
    for how, place, piece in mutations:
        at = int(place * len(data))
        head, tail = data[:at], data[at:]
        data = {
            "over": head + piece + tail[len(piece) :],
            "insert": head + piece + tail,
            "remove": head + tail[max(len(piece), 1) :],
            "cut": head,
            "twice": head + tail[:64] + tail,
        }[how]
    return data


def attempt(kind: str, path: Path) -> None:
    """Read a file; any fault is noted and raised."""
    tried[kind] += 1
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(path)
    except UserError as error:
        refused[kind] += 1
        assert str(error).strip()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        faults.add((kind, f"{type(error).__name__} in {where.name}"))
        raise
    seconds = time.process_time() - start
    if seconds >= SECONDS:
        faults.add((kind, "time"))
        pytest.fail(f"read in {seconds:.1f} s of CPU")


@pytest.fixture
def little_memory():
    """Whoever asks for more than MEMORY gets a MemoryError."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused(little_memory, tmp_path, kind):
    file = KINDS[kind]
    part = file.make(tmp_path)
    path = tmp_path / "mutated" / file.name
    path.parent.mkdir()
    path.write_bytes(file.whole(part))
    attempt(kind, path)
    few = max(FEW // file.cost, 1)

    @settings(
        max_examples=MANY or few,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(MUTATIONS)
    def change(mutations):
        path.write_bytes(file.whole(mutated(part, mutations)))
        attempt(kind, path)

    change()


def test_the_figures_are_printed(capsys):
    with capsys.disabled():
        print(
            f"\nhostile files: {tried.total()} tried of {len(tried)} kinds, "
            f"{refused.total()} refused, {len(faults)} distinct faults"
        )
        for kind, fault in sorted(faults):
            print(f"  {kind}: {fault}")
