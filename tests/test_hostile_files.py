"""Every kind of file that we read, mutated: it is read, or refused by our own error.

All are read in a process of its own (hostile_reader.py), which may die without harm. None may take
more than the seconds and megabytes that limits.py promises, and a third must get as far as pixels.
300 files are tried, always the same; 2,000 others are marked slow, and ASFE_HOSTILE=9000 tries so
many at random. The last test prints how many were tried, and which distinct faults they showed.
"""

import gzip
import io
import json
import os
import struct
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

import nibabel as nib  # noqa: E402
import SimpleITK as sitk  # noqa: E402, N813
from dicom_files import new_dataset, sample, write_enhanced, write_series  # noqa: E402
from hostile_files import affine_text, deflated, mat, meta, zip_of  # noqa: E402
from hostile_process import Reader  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from volume_files import affine_of, numbered, write  # noqa: E402

import limits  # noqa: E402
from args_setting import ModelSize  # noqa: E402
from dataset import PEOPLE  # noqa: E402
from network import ASFEFusion  # noqa: E402
from weights import save_weights  # noqa: E402

NORMAL, MANY = 300, 2000  # files in all
AT_RANDOM = int(os.environ.get("ASFE_HOSTILE", 0))
TINY = ModelSize((2,) * 5, 2, (2, 2, 2, 2), dim=4, heads=2, experts=2, slots=2)
SHAPE = (20, 18, 16)  # voxels
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (b"-1", b"0", b"99999999", b"1e999", b"nan", b"\0", b"\n", b"\xff\xfe", b'"', b"{" * 2000)

tried: Counter[str] = Counter()
outcomes: Counter[str] = Counter()
reached: Counter[bool] = Counter()  # pixels, of the kinds that have some
faults: set[tuple[str, str]] = set()


class Kind(NamedTuple):
    """A kind of file: how a good one is made, what of it is mutated, and how it is read."""

    name: str  # of the file
    make: Callable[[Path], bytes]  # the part to mutate of a good file; may use the folder
    reader: str  # one of hostile_reader.READERS
    whole: Callable[[bytes], bytes] = lambda part: part  # the file with that part
    has_pixels: bool = True


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


def mgh(folder: Path) -> bytes:
    nib.MGHImage(numbered(SHAPE), affine_of("identity")).to_filename(folder / "good.mgh")
    return (folder / "good.mgh").read_bytes()


def pages(folder: Path) -> bytes:
    """A TIFF of two pages; the second is read."""
    first, second = (Image.fromarray(numbered((24, 20 + 4 * k)).astype("u1")) for k in range(2))
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=[second], compression="tiff_lzw")
    return file.getvalue()


def registration(folder: Path) -> bytes:
    """A DICOM registration of one frame of reference with itself."""
    ds = new_dataset("REG", "1.2.840.10008.5.1.4.1.1.66.1", 1, 1)
    step, matrices, item = Dataset(), Dataset(), Dataset()
    step.FrameOfReferenceTransformationMatrix = [str(float(v)) for v in np.eye(4).ravel()]
    matrices.MatrixSequence = [step]
    item.FrameOfReferenceUID, item.MatrixRegistrationSequence = "1.2.3", [matrices]
    ds.FrameOfReferenceUID, ds.RegistrationSequence = "1.2.4", [item]
    ds.save_as(folder / "reg.dcm", enforce_file_format=True)
    return (folder / "reg.dcm").read_bytes()


def tfm(folder: Path) -> bytes:
    sitk.WriteTransform(sitk.Euler3DTransform(), str(folder / "good.tfm"))
    return (folder / "good.tfm").read_bytes()


def zipped(folder: Path) -> bytes:
    """A zip of a series."""
    files = write_series(folder / "zip", numbered(SHAPE), affine_of("identity"))
    return zip_of({file.name: file.read_bytes() for file in files})


def whole_zip(part: bytes) -> bytes:
    """A zip of one DICOM file."""
    return zip_of({"a.dcm": part})


def mha_header(folder: Path) -> bytes:
    return meta(folder).partition(b"LOCAL\n")[0]


def nrrd_header(folder: Path) -> bytes:
    return volume("nrrd")(folder).partition(b"\n\n")[0]


def with_voxels(end: bytes) -> Callable[[bytes], bytes]:
    return lambda header: header + end + numbered(SHAPE).astype("<i2").tobytes(order="F")


def checkpoint(folder: Path) -> bytes:
    """The pickle inside of something like a checkpoint of a training."""
    done = {"stages": [[64, 4, 1, False]], "progress": {"epoch": 1, "rows": [{"seconds": 1.0}]}}
    torch.save({"state": {"model": {}}, "settings": {"task": "all"}, "run": done}, folder / "c.pt")
    with zipfile.ZipFile(folder / "c.pt") as archive:
        return archive.read("c/data.pkl")


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


KINDS = {
    "PNG": Kind("a.png", picture("PNG"), "picture"),
    "PNG, checksums hold": Kind("a.png", picture("PNG"), "picture", sound_png),
    "PNG, 16 bits": Kind("a.png", picture("PNG", 16), "picture", sound_png),
    "JPEG": Kind("a.jpg", picture("JPEG"), "picture"),
    "JPEG, progressive": Kind("a.jpg", picture("JPEG", progressive=True), "picture"),
    "TIFF": Kind("a.tif", picture("TIFF"), "picture"),
    "TIFF, packed": Kind("a.tif", picture("TIFF", compression="tiff_lzw"), "picture"),
    "TIFF, 16 bits": Kind("a.tif", picture("TIFF", 16), "picture"),
    "TIFF, pages": Kind("a.tif", pages, "picture"),
    "BMP": Kind("a.bmp", picture("BMP"), "picture"),
    "NIfTI": Kind("v.nii", volume("nii"), "volume"),
    "NIfTI, header": Kind("v.nii", lambda f: volume("nii")(f)[:352], "volume", with_voxels(b"")),
    "NIfTI, packed": Kind("v.nii.gz", volume("nii"), "upload", gzip.compress),
    "NIfTI, damaged pack": Kind("v.nii.gz", volume("nii.gz"), "volume"),
    "MGH": Kind("v.mgh", mgh, "volume"),
    "MGH, packed": Kind("v.mgz", mgh, "upload", gzip.compress),
    "MetaImage": Kind("v.mha", volume("mha"), "volume"),
    "MetaImage, header": Kind("v.mha", mha_header, "volume", with_voxels(b"LOCAL\n")),
    "NRRD": Kind("v.nrrd", volume("nrrd"), "volume"),
    "NRRD, header": Kind("v.nrrd", nrrd_header, "volume", with_voxels(b"\n\n")),
    "DICOM": Kind("v.dcm", one_slice, "volume"),
    "DICOM, enhanced": Kind("v.dcm", enhanced, "volume"),
    "DICOM, RLE": Kind("v.dcm", lambda _: sample("MR_small_RLE.dcm").read_bytes(), "volume"),
    "DICOM, deflated": Kind("v.dcm", one_slice, "upload", lambda part: deflated_or_not(part)),
    "DICOM, damaged pack": Kind("v.dcm", lambda f: deflated(one_slice(f)), "volume"),
    "zip": Kind("v.zip", zipped, "upload"),
    "zip of DICOM": Kind("v.zip", one_slice, "upload", whole_zip),
    "registration": Kind("r.dcm", registration, "registration", has_pixels=False),
    "transform": Kind("t.tfm", tfm, "transform", has_pixels=False),
    "transform, affine": Kind(
        "t.txt", lambda _: affine_text("1 0 0 0 1 0 0 0 1 9 9 9"), "transform", has_pixels=False
    ),
    "transform of MATLAB": Kind("t.mat", mat, "transform", has_pixels=False),
    "safetensors": Kind("w.safetensors", tiny_weights, "weights", has_pixels=False),
    "safetensors, header": Kind(
        "w.safetensors", header_text, "weights", sound_header, has_pixels=False
    ),
    "safetensors, metadata": Kind(
        "w.safetensors", metadata_text, "weights", sound_metadata, has_pixels=False
    ),
    "pth": Kind("a.pth", lambda f: archive_of(published_pickle(f)), "weights", has_pixels=False),
    "pth, pickle": Kind("a.pth", published_pickle, "weights", archive_of, has_pixels=False),
    "checkpoint": Kind("a.pt", checkpoint, "checkpoint", archive_of, has_pixels=False),
    "people": Kind(PEOPLE.name, lambda _: PEOPLE.read_bytes(), "people", has_pixels=False),
    "table": Kind("t.csv", lambda _: b"img1,img2,name\na,b,c\n" * 3, "table", has_pixels=False),
}


def deflated_or_not(part: bytes) -> bytes:
    """The part compressed as DICOM does it, where its beginning still allows it."""
    try:
        return deflated(part)
    except (ValueError, struct.error):
        return part


# --- mutations -------------------------------------------------------------------------------

PLACE = st.one_of(st.integers(0, 999), st.integers(0, 99)).map(lambda n: n / 1000)  # headers first
NUMBER = st.builds(
    lambda value, form: struct.pack(form, value % 2 ** (8 * struct.calcsize(form))),
    st.sampled_from(NUMBERS),
    st.sampled_from(("B", "<H", ">H", "<I", ">I", "<Q")),
)
PIECE = st.one_of(NUMBER, NUMBER, st.sampled_from(WORDS), st.binary(max_size=8))
HOW = st.sampled_from(("over", "over", "over", "insert", "remove", "cut", "twice"))
MUTATIONS = st.lists(st.tuples(HOW, PLACE, PIECE), min_size=1, max_size=3)


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


@pytest.fixture(scope="module")
def read():
    """Read a file in the other process; anything but "read" and "refused" at little cost fails."""
    reader = Reader()

    def attempt(kind: str, path: Path) -> None:
        found = reader(KINDS[kind].reader, path)
        tried[kind] += 1
        outcomes[found["outcome"]] += 1
        reached[found["pixels"]] += KINDS[kind].has_pixels
        costly = [
            f"{name}: {found[name]:.1f}"
            for name, most in (("seconds", limits.SECONDS), ("megabytes", limits.MEGABYTES))
            if found[name] >= most
        ]
        if found["outcome"] not in ("read", "refused") or costly:
            faults.add((kind, found["said"][:90] or costly[0]))
            pytest.fail(f"{path.name}: {found}")
        assert found["outcome"] == "read" or found["said"].strip()

    yield attempt
    reader.close()


def try_kind(read: Callable[[str, Path], None], folder: Path, kind: str, count: int) -> None:
    """A good file of a kind, and `count` that were mutated."""
    file = KINDS[kind]
    part = file.make(folder)
    path = folder / "mutated" / file.name
    path.parent.mkdir()
    path.write_bytes(file.whole(part))
    read(kind, path)

    @settings(
        max_examples=AT_RANDOM // len(KINDS) or count,
        derandomize=not AT_RANDOM,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(MUTATIONS)
    def change(mutations):
        path.write_bytes(file.whole(mutated(part, mutations)))
        read(kind, path)

    change()


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does"
)


@needs_proc
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused(read, tmp_path, kind):
    try_kind(read, tmp_path, kind, -(-NORMAL // len(KINDS)))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_are_read_or_refused(read, tmp_path, kind):
    try_kind(read, tmp_path, kind, -(-MANY // len(KINDS)))


@needs_proc
def test_a_third_gets_as_far_as_pixels(capsys):
    with capsys.disabled():
        print(
            f"\nhostile files: {tried.total()} tried of {len(tried)} kinds, {dict(outcomes)}, "
            f"{reached[True]} of {reached.total()} got to pixels, {len(faults)} distinct faults"
        )
        for kind, fault in sorted(faults):
            print(f"  {kind}: {fault}")
    assert reached[True] >= reached.total() / 3
