"""limits.py: what a file may cost, what the system grants, and that no reader goes around it."""

import ast
import io
import logging
import os
import resource
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nibabel", reason="needs requirements-volumes.txt")
import hostile_files as bad
import SimpleITK as sitk  # noqa: N813
from hostile_process import Reader
from volume_files import affine_of, numbered, write

import images
import limits
from args_setting import ROOT, SIZES, ModelSize
from cli import UserError
from network import ASFEFusion
from volumes.grid import Volume, cubic, low_passed, resample, straightened
from volumes.io import read_volume

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does"
)

# --- each file that once filled or stopped a machine -----------------------------------------

WORST: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "scans.jpg": ("picture", "over 64 scans", lambda _: bad.many_scans()),
    "page.tif": ("picture", "6000x6000 pixels", lambda _: bad.second_page()),
    "exif.png": ("picture", "tags that are longer", lambda _: bad.png_with_exif()),
    "exif.jpg": ("picture", "tags that are longer", lambda _: bad.jpeg_with_exif()),
    "tags.tif": ("picture", "tags that are longer", lambda _: bad.heavy_tags()),
    "pages.tif": ("picture", "over 1000 pages", lambda _: bad.many_pages()),
    "tile.tif": ("picture", "60000x60000 pixels", lambda _: bad.huge_tile()),
    "a.nii.gz": ("volume", "header would end after", bad.extended),
    "b.nii.gz": ("volume", "hardly any is not empty", bad.empty_volume((1000, 1000, 500))),
    "c.nii.gz": ("upload", "header would end after", bad.extended),
    "a.mgz": ("volume", "more than its", bad.mgz),
    "far.nii": ("volume", "1e+05 x 1e+05 x 1e+05 mm apart",
                bad.with_affine(lambda affine: np.diag([1e5, 1e5, 1e5, 1]))),
    "negative.mha": ("volume", "NDims is -1", lambda f: bad.meta(f, NDims="-1")),
    "many.mha": ("volume", "NDims is 1000", lambda f: bad.meta(f, NDims="1000")),
    "matrix.mha": ("volume", "numbers, expected 9",
                   lambda f: bad.meta(f, TransformMatrix="1 " * 90)),
    "channels.mha": ("volume", "RGB or vectors",
                     lambda f: bad.meta(f, ElementNumberOfChannels="2000000000")),
    "spline.tfm": ("transform", "a deforming transform", lambda _: bad.spline()),
    "short.tfm": ("transform", "no transform of ITK", lambda _: bad.affine_text("1 2")),
    "before.dcm": ("volume", "unpacks to more", lambda f: bad.deflated_bomb(f, before=True)),
    "after.dcm": ("upload", "unpacks to more", bad.deflated_bomb),
    "black.dcm": ("volume", "hardly any is not empty", bad.deflated_pixels),
    "items.dcm": ("volume", "does not say where", bad.many_items),
    "fields.zip": ("upload", "fields in its headers",
                   lambda _: bad.zip_of({str(n): bad.many_fields() for n in range(50)})),
    "scans.dcm": ("volume", "over 64 scans",
                  lambda f: bad.jpeg_in_dicom(f, bad.many_scans(side=bad.SHAPE[:2]))),
    "size.dcm": ("volume", "differ in size",
                 lambda f: bad.jpeg_in_dicom(f, bad.saved(Image.new("L", (5000, 5000)), "JPEG"))),
    "cell.csv": ("table", "field larger than", lambda _: b"img1,img2\n" + b"a" * 200_000 + b",b\n"),
    "nul.csv": ("table", "no text", lambda _: b"img1,img2\n\0,b\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def reader():
    process = Reader()
    yield process
    process.close()


@needs_proc
@pytest.mark.parametrize("name", WORST)
def test_the_worst_files_are_refused_at_little_cost(reader, tmp_path, name):
    kind, message, make = WORST[name]
    path = tmp_path / name
    path.write_bytes(make(tmp_path))
    assert path.stat().st_size < 2 * 2**20
    found = reader(kind, path)
    assert found["outcome"] == "refused" and message in found["said"], found
    assert "\n" not in found["said"]
    assert found["seconds"] < limits.SECONDS and found["megabytes"] < limits.MEGABYTES, found


@needs_proc
def test_good_files_of_the_same_kinds_are_read(reader, tmp_path):
    good = {
        "a.jpg": ("picture", lambda _: bad.many_scans(8)),
        "a.tif": ("picture", lambda _: bad.second_page(1000)),
        "a.nii.gz": ("volume", bad.many_extensions),
        "b.nii.gz": ("volume", bad.empty_volume((320, 320, 320))),
        "a.mha": ("volume", bad.meta),
        "a.mat": ("transform", bad.mat),
        "a.tfm": ("transform", lambda _: bad.affine_text("1 0 0 0 1 0 0 0 1 0 0 0")),
        "a.dcm": ("volume", lambda f: bad.deflated(bad.one_slice(f))),
        "b.dcm": ("volume", lambda f: bad.jpeg_in_dicom(
            f, bad.saved(Image.new("L", bad.SHAPE[:2]), "JPEG"))),
    }  # fmt: skip
    for name, (kind, make) in good.items():
        (tmp_path / name).write_bytes(make(tmp_path))
        found = reader(kind, tmp_path / name)
        assert found["outcome"] == "read", (name, found)
        assert found["seconds"] < limits.SECONDS and found["megabytes"] < limits.MEGABYTES, name


def test_a_deflated_slice_is_the_plain_one(tmp_path):
    plain = bad.one_slice(tmp_path)
    (tmp_path / "a.dcm").write_bytes(plain)
    (tmp_path / "b.dcm").write_bytes(bad.deflated(plain))
    a, b = (read_volume(tmp_path / name) for name in ("a.dcm", "b.dcm"))
    assert np.array_equal(a.data, b.data) and np.array_equal(a.affine, b.affine)
    assert a.frame_of_reference == b.frame_of_reference and a.modality == b.modality == "MR"


def test_frames_of_a_packed_file_are_those_of_the_plain_one(tmp_path):
    import nibabel as nib

    from volumes.varying import Choice

    data = np.random.default_rng(0).integers(0, 999, (6, 5, 4, 3), dtype=np.int16)
    for name in ("a.nii", "a.nii.gz"):
        nib.Nifti1Image(data, np.eye(4)).to_filename(tmp_path / name)
        for frame in ("2", "mean", "sum"):
            found = read_volume(tmp_path / name, choice=Choice(time=frame)).data
            want = {"2": data[..., 1], "mean": data.mean(3), "sum": data.sum(3)}[frame]
            assert np.allclose(found, want)


# --- grids -----------------------------------------------------------------------------------


def test_every_grid_that_is_made_has_a_limit():
    coarse = Volume(np.zeros((64, 64, 64), np.float32), np.diag([30.0, 30, 30, 1]))
    with pytest.raises(UserError, match=r"2 mm would have 960x960x960 voxels, .* 268 million; .*3"):
        cubic(coarse, 2.0)
    assert cubic(coarse, 3.3).data.size < limits.GRID_VOXELS, "the way out is one"
    sheared = np.eye(4)
    sheared[0, 2] = sheared[1, 2] = 60.0
    with pytest.raises(UserError, match=r"sheared; at right angles it would have .* voxels"):
        straightened(Volume(coarse.data, sheared))
    with pytest.raises(UserError, match="expected at most 1074 million"):
        resample(coarse, (10**6, 10**6, 10**6), np.eye(4))


def test_a_low_pass_is_never_long():
    fine = Volume(np.zeros((8, 8, 8), np.float32), np.eye(4))
    with pytest.raises(UserError, match="100 times as long, expected at most 64"):
        low_passed(fine, np.diag([100.0, 100, 100, 1]))
    low_passed(fine, np.diag([20.0, 20, 20, 1]))


@pytest.mark.parametrize("side", [0.001, 101.0])
def test_implausible_voxels_are_refused(tmp_path, side):
    affine = affine_of("identity")
    affine[:3, 2] *= side / np.linalg.norm(affine[:3, 2])
    for form in ("nii", "mha", "nrrd", "dicom"):
        path = write(tmp_path / f"v {side}", numbered(), affine, form)
        with pytest.raises(
            UserError, match=r"mm apart, expected 0\.01 to 100 mm|one position|twice"
        ):
            read_volume(path)


def test_sizes_are_counted_exactly(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match="more than its 100 bytes"):
        limits.check_claim(path, (2**32, 2**32), 1, packed=False)  # 0 in 64 bits
    with pytest.raises(UserError, match="more than its 100 bytes"):
        limits.check_claim(path, np.array([2**31 - 1] * 3, np.int32), 1, packed=True)


# --- one room --------------------------------------------------------------------------------

OPENERS = {  # what opens a file from outside, and where that is done: after a question to limits.py
    "Image.open": {"images.py"},
    "cv2.imdecode": {"images.py"},
    "cv2.imdecodemulti": {"images.py"},
    "cv2.imread": {"onnx_example.py"},  # which stands alone, to be copied
    "pydicom.dcmread": {"volumes/dicom.py"},
    "read_dataset": {"volumes/dicom.py"},
    "nib.load": set(),
    "kind.from_file_map": {"volumes/io.py"},
    "sitk.ReadImage": set(),
    "sitk.ImageFileReader": {"volumes/io.py"},
    "sitk.ReadTransform": {"volumes/transforms.py"},
    "zipfile.ZipFile": {"volumes/uploads.py", "weights.py"},
    "gzip.open": set(),
    "torch.load": {"weights.py"},
    "safe_open": {"weights.py"},
}


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_no_reader_goes_around_the_limits():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.split("/")[0] in (".venv", "tests", "benchmarks", "docs", "shared", "result"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = calls(tree) & OPENERS.keys()
        wrong = {opener for opener in found if name not in OPENERS[opener]}
        assert not wrong, f"{name} opens files by itself: {wrong}"
        if found and name != "onnx_example.py":
            asks = {call for call in calls(tree) if call.startswith("limits.")}
            assert asks, f"{name} opens files and asks limits.py nothing"


# --- reading is quiet, importing changes nothing ---------------------------------------------


def libtiff_handlers() -> list:
    """What libtiff has for errors and warnings; asked by setting it, and back."""
    import ctypes

    found = []
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        setter = getattr(ctypes.CDLL(Image.core.__file__), name)
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
        found.append(setter(None))
        setter(found[-1])
    return found


def test_reading_leaves_the_libraries_as_they_were(tmp_path):
    before = cv2.utils.logging.getLogLevel(), list(warnings.filters), libtiff_handlers()
    assert before[0] != cv2.utils.logging.LOG_LEVEL_SILENT and all(before[2])
    display = sitk.ProcessObject.GetGlobalWarningDisplay()
    assert display
    for name in ("a.tif", "a.mha"):
        (tmp_path / name).write_bytes(b"II*\0\x08\0\0\0\xff")
        with pytest.raises(UserError):
            (read_volume if name == "a.mha" else images.read_image)(tmp_path / name)
    with pytest.raises(ZeroDivisionError), images.quiet_decoders, images.quiet_decoders:
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_SILENT
        assert not any(libtiff_handlers())
        raise ZeroDivisionError
    after = cv2.utils.logging.getLogLevel(), list(warnings.filters), libtiff_handlers()
    assert after == before and sitk.ProcessObject.GetGlobalWarningDisplay() == display
    assert not logging.getLogger("PIL").disabled


# --- what the system grants ------------------------------------------------------------------


def machine(root: Path, group: str, files: dict[str, str], available: int = 8) -> Path:
    """A file system that tells of cgroups, and of a machine with 16 GB."""
    files |= {
        "proc/self/cgroup": group,
        "proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable:    {available * 2**20} kB\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


GB = 2**30
V1 = "5:memory:/job\n4:cpu,cpuacct:/job\n0::/\n"


@pytest.mark.parametrize(
    ("group", "files", "granted", "free"),
    [
        ("0::/\n", {}, 16, 8),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max"}, 16, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": f"{4 * GB}",
                       "sys/fs/cgroup/a/b/memory.current": f"{3 * GB}",
                       "sys/fs/cgroup/a/b/memory.stat": f"anon 5\ninactive_file {GB}"}, 4, 2),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": f"{3 * GB}",  # the folder around it counts
                       "sys/fs/cgroup/a/b/memory.max": "max",
                       "sys/fs/cgroup/a/memory.current": f"{2 * GB}"}, 3, 1),
        (V1, {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GB}",
              "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GB}",
              "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 2, 1),
        (V1, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}",  # in a container
              "sys/fs/cgroup/memory/memory.usage_in_bytes": "0"}, 2, 2),
    ],
)  # fmt: skip
def test_memory_is_what_the_cgroup_grants(tmp_path, group, files, granted, free):
    root = machine(tmp_path, group, dict(files))
    assert limits.granted_memory(root) == granted * GB
    assert limits.free_bytes(root) == free * GB


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000"}, 8),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "350000 100000"}, 3),
        ("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),
        (V1, {"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "200000",
              "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1",
              "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_cores_are_what_the_cgroup_grants(tmp_path, monkeypatch, group, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert limits.granted_cores(machine(tmp_path, group, dict(files))) == cores


def test_a_system_that_tells_nothing_grants_what_it_has(tmp_path):
    assert limits.granted_memory(tmp_path) >= limits.free_bytes(tmp_path) > 2**40
    assert limits.granted_cores(tmp_path) >= 1


def test_the_limit_of_addresses_counts(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**45, old[1]))
        assert limits.granted_memory(tmp_path) == 2**45 >= limits.free_bytes(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_the_share_of_a_worker_counts(tmp_path, monkeypatch):
    """Less what it holds already."""
    files = {"proc/self/statm": f"9 {GB // os.sysconf('SC_PAGE_SIZE')} 0"}
    root = machine(tmp_path, "0::/\n", files)
    assert limits.free_bytes(root) == 8 * GB
    monkeypatch.setattr(limits.Share, "most", 3 * GB)
    assert limits.free_bytes(root) == 2 * GB


def test_the_need_of_a_pair_is_known_before():
    compact, paper = (limits.needed_bytes(1024**2, SIZES[name]) for name in ("compact", "paper"))
    assert GB / 2 < compact < 2 * GB < 4 * GB < paper < 8 * GB
    other = limits.needed_bytes(1024**2, ModelSize(channels=(8, 8, 8, 8, 8)))
    assert 0 < other < paper


def test_a_volume_that_does_not_fit_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "free_bytes", lambda: GB // 10)
    path = tmp_path / "a.nii.gz"
    nib.Nifti1Image(np.zeros((256, 256, 512), np.int16), np.eye(4)).to_filename(path)
    with pytest.raises(UserError, match=r"256x256x512 voxels, which need about 134 MB .* 107 MB"):
        read_volume(path)
    with pytest.raises(UserError, match="a grid of 1 mm would have 300x300x300 voxels, which need"):
        limits.check_grid("a grid of 1 mm would have", (300, 300, 300), "take cubes of 2 mm")
    limits.check_grid("a grid of 1 mm would have", (100, 100, 100), "take cubes of 2 mm")


# --- small parts -----------------------------------------------------------------------------


def test_scans_of_a_jpeg_are_counted_between_other_segments():
    data = bad.saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
    scans = sum(marker == limits.SCAN for marker, *_ in limits.segments(data))
    assert scans == data.count(b"\xff\xda") > 3
    hidden = data[:2] + b"\xff\xfe\x00\x06\xff\xda\xff\xda" + data[2:]  # in a comment
    assert sum(marker == limits.SCAN for marker, *_ in limits.segments(hidden)) == scans
    limits.check_jpeg(Path("a.jpg"), data + b"\xff\xda" * 100)  # after its end


def test_a_table_is_text_of_a_bounded_length(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfimg1,img2\n")
    assert limits.read_table(path) == "img1,img2\n"
    monkeypatch.setattr(limits, "TABLE_BYTES", 4)
    with pytest.raises(UserError, match="too large for a table, expected at most 4 bytes"):
        limits.read_table(path)


def test_inflating_stops_at_the_limit():
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(10**7)) + packer.flush()
    file = limits.Inflated(io.BytesIO(packed), Path("a"), 10**6)
    assert file.read(100) == bytes(100) and len(file.known) < 3 * 10**6
    file.seek(5 * 10**6)
    with pytest.raises(limits.TooMuchError, match="unpacks to more"):
        file.read(8)


def test_a_picture_far_into_an_animation_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(bad.animation())
    with pytest.raises(UserError, match="picture 4000 is too far on"):
        images.decode(path, images.Reading(page=4000))


def test_a_tiff_that_is_cut_is_left_to_its_reader():
    page = bad.saved(Image.new("L", (32, 32)), "TIFF")
    for length in range(4, len(page), 7):
        limits.check_tags(Path("a.tif"), page[:length])
    with pytest.raises(UserError, match="over 1000 pages"):
        limits.check_tags(Path("a.tif"), bad.many_pages())
    assert struct.calcsize("<HHI4s") == 12


def test_weights_and_checkpoints_of_the_paper_size_are_taken():
    """A checkpoint has the network, its moving average, and two moments of AdamW, as float32."""
    with torch.device("meta"):
        network = ASFEFusion("paper")
    floats = 4 * sum(value.numel() for value in network.state_dict().values())
    assert floats < limits.WEIGHTS_BYTES
    assert 4 * floats < limits.CHECKPOINT_BYTES
