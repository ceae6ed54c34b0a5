"""The tab for volumes of app.py, without a browser: what it makes, and what it refuses."""

import struct
import zipfile
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pytest
from dicom_files import SECRET, write_series
from near_child import NearChild
from scipy.spatial.transform import Rotation
from volume_files import Brighter, affine_of, numbered

from args_setting import TASKS
from cli import UserError
from images import write_png

gradio = pytest.importorskip("gradio", reason="needs requirements-app.txt")

import app  # noqa: E402
import limits  # noqa: E402
from fusing import FORCED  # noqa: E402
from volumes import fuse_volumes, request_from, uploads  # noqa: E402
from volumes.grid import AXES  # noqa: E402
from volumes.requests import WAYS_OF_VOLUMES, Levels  # noqa: E402
from webpage import shared, volume_clicks, volume_tab  # noqa: E402
from webpage.tab import Place  # noqa: E402

MORE = {name: "" for name in ("series1", "series2", "where", "frame")}
MORE |= {"window": "wide", "affine": "sform", "nan_to_zero": False, "force": []}


@pytest.fixture
def tab(tmp_path, monkeypatch) -> volume_tab.VolumePage:
    (tmp_path / "uploads").mkdir()
    monkeypatch.setattr(volume_clicks, "NETWORKS", dict.fromkeys(TASKS, Brighter()))
    place = Place(tmp_path / "uploads", 10, pytest.fail)
    most = shared.VolumeLimits(4, 1e6)
    return volume_tab.VolumePage(gradio, place, most, (NearChild(), NearChild()))


def fuse(tab, file1, file2, task="CT-MRI", size=volume_tab.QUICK, register="auto", **more):
    """Lines of progress, the folder of the views, status, report, files to save, a picture."""
    lines = []
    words = volume_tab.words_of(task, size, register, MORE | more)
    made = tab.fuse(file1 and str(file1), file2 and str(file2), words,
                    lambda _, desc: lines.append(desc))  # fmt: skip
    return lines, Path(made.views), *made[1:-1]


def refused(tab, file1, file2, **how) -> str:
    """What the visitor reads; nothing stays of the run."""
    with pytest.raises(gradio.Error) as error:
        fuse(tab, file1, file2, **how)
    folder = tab.place.folder
    assert not error.value.print_exception and str(folder.parent) not in error.value.message
    assert not list(folder.iterdir())
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("tmp")]
    return error.value.message


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{SECRET}/{file.name}")
    return path


@pytest.fixture
def series(tmp_path):
    """Zips of a CT and an MRI of one frame of reference: `series(change)` changes the MRI."""

    def make(change=None) -> tuple[Path, Path]:
        for name, modality in (("ct", "CT"), ("mr", "MR")):
            how = change if name == "mr" else None
            below = -1024.0 if name == "ct" else 0.0  # HU, with air
            how = {"change": how, "intercept": below}
            write_series(tmp_path / name, numbered(), affine_of("oblique"), modality, **how)
        return tuple(zipped(tmp_path / n, tmp_path / f"{n}.zip") for n in ("ct", "mr"))

    return make


def test_a_known_shift_is_undone_and_shown(tab, heads, tmp_path, capsys):
    shift = np.eye(4)
    shift[:3, :3] = Rotation.from_euler("z", 6, degrees=True).as_matrix()
    shift[:3, 3] = (9, -6, 5)
    image = nib.load(heads["mri"])
    nib.Nifti1Image(image.get_fdata(dtype=np.float32), shift @ image.affine).to_filename(
        tmp_path / "mri.nii.gz"
    )
    lines, views, status, report, files, picture = fuse(tab, heads["ct"], tmp_path / "mri.nii.gz")
    assert any("registering" in line for line in lines), lines
    assert status.startswith("**ct.nii.gz with mri.nii.gz**, ") and "registered (rigid)" in report
    names = [Path(file).name for file in files]
    assert names == ["fused.nii.gz", "moved.nii.gz", "fused.tfm", "fused.json"]
    fused = nib.load(files[0])
    assert np.allclose(fused.header.get_zooms(), 2, atol=1e-3)
    assert cv2.imread(picture) is not None
    at = ("axial", fused.shape[2] // 2)
    seen = {s: volume_clicks.view(views, s, *at) for s in shared.SHOWN}
    side = volume_clicks.SIDE
    assert all(image.shape == (side, side, 3) for image in seen.values())
    # the checkerboard is as of two scans that lie on each other after, not before
    one, two = (np.load(views / f"scan {i}.npy").astype(float) for i in (1, 2))
    before = np.load(views / "before 2.npy").astype(float)
    bone = one > 180  # the drawn skull lies around the brain of the MRI
    assert two[bone].mean() < 0.7 * before[bone].mean()
    for how in volume_clicks.BOTH:
        pair = [volume_clicks.view(views, f"{how} {when}", *at) for when in ("before", "after")]
        assert (pair[0] != pair[1]).any()
    png = tab.look(views, "edges after", "coronal", 10**6)  # beyond the last: the last
    assert cv2.imread(png).shape == (volume_clicks.SIDE, volume_clicks.SIDE, 3)
    assert not capsys.readouterr().out, "no file is named in the log"


def test_the_full_size_is_what_the_script_writes(tab, series, tmp_path):
    *_, files, _ = fuse(tab, *series(), size=volume_tab.FULL)
    words = {"img1": tmp_path / "ct", "img2": tmp_path / "mr", "out": tmp_path / "f.nii.gz"}
    fuse_volumes(request_from(words | {"task": "CT-MRI"}), Brighter())
    assert Path(files[0]).read_bytes() == (tmp_path / "f.nii.gz").read_bytes()
    names = [Path(file).name for file in files]
    # one frame of reference, so there is no transform
    assert names == ["fused.nii.gz", "moved.nii.gz", "fused.json"]


def one_slice(folder: Path) -> tuple[Path, Path]:
    data = np.random.default_rng(0).integers(0, 1000, (40, 40, 1), dtype=np.int16)
    for name, lowest in (("ct", -1000), ("mri", 0)):
        nib.Nifti1Image(data + np.int16(lowest), np.eye(4)).to_filename(folder / f"{name}.nii.gz")
    return folder / "ct.nii.gz", folder / "mri.nii.gz"


def test_a_volume_of_one_slice_is_fused_and_seen(tab, tmp_path):
    words = volume_tab.words_of("CT-MRI", volume_tab.FULL, "off", MORE)
    made = tab.fuse(*map(str, one_slice(tmp_path)), words, lambda *_, **__: None)
    assert made.counts == [1, 40, 40]
    for axis in shared.PLANES:
        for shown in (*shared.SHOWN, "edges after", "checkerboard before"):
            assert cv2.imread(tab.look(made.views, shown, axis, 1)).shape[0] == volume_clicks.SIDE
            assert tab.look(made.views, shown, axis, 2), "the slider may point beyond the last"


def test_colour_for_pet_and_nothing_of_the_patient(tab, tmp_path, series):
    write_series(tmp_path / "pt", numbered(), affine_of("oblique"), "PT")
    pet = zipped(tmp_path / "pt", tmp_path / "pt.zip")
    lines, views, status, report, files, _ = fuse(tab, pet, series()[1], "PET-MRI", volume_tab.FULL)
    assert "fused_colour.nii.gz" in [Path(file).name for file in files]
    assert np.load(views / "fused.npy").shape[-1] == 3
    side = volume_clicks.SIDE
    image = volume_clicks.view(views, "fused", "axial", 2)
    assert image.shape[0] == side and image.shape[1] > side + 20, "with a bar of the colours"
    assert np.array_equal(image[:, side:], np.load(views / "bar.npy"))
    assert volume_clicks.view(views, "scan 1", "axial", 2).shape == (side, side, 3)
    assert SECRET not in status + report + str(lines)
    for path in tab.place.folder.rglob("*"):
        assert SECRET not in str(path)
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_before_is_shown_of_the_one_that_moved(tab, heads):
    """For PET the grid is the MRI's, so it is source 1 that is moved."""
    _, views, *_ = fuse(tab, heads["pet"], heads["mri"], "PET-MRI", register="rigid")
    assert (views / "before 1.npy").is_file() and not (views / "before 2.npy").is_file()
    shapes = {np.load(path).shape[:3] for path in views.glob("[bs][ec]*.npy")}
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "two scans are needed"),
        ("swept", "mri.nii.gz is gone, as files are kept for 10 minutes; choose it again"),
        ("png", "mri.png is an image, expected .nii, .nii.gz, .mgz, or a zip of DICOM; the tab"),
        ("empty", "mri.nii is empty, expected .nii"),
        ("text", "notes.txt: expected .nii, .nii.gz"),
        ("nrrd", "mri.nrrd: expected .nii, .nii.gz"),
        ("long", "mri.nii has 4.768 MB, expected at most 4 MB"),
        ("voxels", "mri.nii.gz has 2 million voxels, expected at most 1; crop it"),
        ("damaged", "mri.nii.gz: damaged or not NIfTI"),
        ("small", "slices are 8x8 pixels, expected at least 16x16"),
        ("4-D", "mri.nii.gz: is 4-D (3 volumes); choose by --frame 1 to 3, or --frame mean or "
         "sum (what begins with -- is a field under More)"),
    ],
)  # fmt: skip
def test_bad_uploads_get_a_sentence(tab, heads, tmp_path, kind, message):
    path = tmp_path / {"png": "mri.png", "text": "notes.txt", "nrrd": "mri.nrrd",
                       "long": "mri.nii", "empty": "mri.nii"}.get(kind, "mri.nii.gz")  # fmt: skip
    shape = {"voxels": (200, 100, 100), "small": (8, 8, 8), "4-D": (20, 20, 20, 3)}.get(kind)
    if kind == "png":
        write_png(path, np.zeros((64, 64), np.uint8))
    elif shape:
        data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
        nib.Nifti1Image(data, np.eye(4)).to_filename(path)
    elif kind not in ("absent", "swept"):
        path.write_bytes(bytes({"long": 5_000_000, "empty": 0}.get(kind, 100)))
    source = path if kind == "small" else heads["ct"]
    how = {"size": volume_tab.FULL, "register": "off"}
    how["force"] = ["space", "place", "overlap", "units"]
    said = refused(tab, source, None if kind == "absent" else path, **how)
    assert message in said


def test_an_upload_is_refused_at_once(tab, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tab.gr, "Warning", lambda text, **_: said.append(text))
    write_png(tmp_path / "<b>.png", np.zeros((64, 64), np.uint8))
    tab.check(str(tmp_path / "<b>.png"))
    tab.check(None)
    assert len(said) == 1 and said[0].startswith("&lt;b&gt;.png is an image, expected .nii")


def test_two_patients_are_not_fused_and_not_named(tab, series):
    def other(ds, k):
        ds.PatientID, ds.PatientBirthDate = "another", "19991231"

    said = refused(tab, *series(other))
    assert "two patients" in said and not any(w in said for w in (SECRET, "another", "1999"))


def test_two_series_in_a_zip_are_chosen_by_a_field(tab, series, tmp_path):
    ct, mr = series(lambda ds, k: setattr(ds, "SeriesInstanceUID", f"1.2.{k % 2}"))
    said = refused(tab, ct, mr)
    assert said.startswith("mr.zip: choose by --series2 one of 2 series: 1: MR")
    _, _, _, report, *_ = fuse(tab, ct, mr, series2="2", size=volume_tab.FULL)
    assert "img2: MRI" in report


# --- zips ------------------------------------------------------------------------------------


def zip_of(path: Path, entries: dict[str, bytes], how=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def end_changed(path: Path, at: int, value: bytes) -> None:
    """Change bytes of a zip's last record."""
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\5\6") + at
    content[end : end + len(value)] = value
    path.write_bytes(content)


NOTES = {"a/notes.txt": b"hello", "b": b""}  # no DICOM


def no_zip(path: Path) -> None:
    path.write_bytes(b"PK\3\4" + bytes(200))


def cut(path: Path) -> None:
    path.write_bytes(zip_of(path, NOTES).read_bytes()[:-30])


def bomb(path: Path) -> None:
    zip_of(path, {"0": bytes(40 * 2**20)})
    assert path.stat().st_size < 2**20


def liar(path: Path) -> None:
    """A bomb whose directory says 100 bytes."""
    bomb(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<L", 40 * 2**20), struct.pack("<L", 100)))


def large_directory(path: Path) -> None:
    end_changed(zip_of(path, NOTES), 12, struct.pack("<L", 2**31))


def encrypted(path: Path) -> None:
    content = bytearray(zip_of(path, NOTES).read_bytes())
    content[content.find(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)


def many_pixels(path: Path) -> None:
    def huge(ds, k):
        ds.Rows = ds.Columns = 65535
        ds.NumberOfFrames = 100_000

    folder = path.with_name("huge")
    write_series(folder, numbered(), affine_of("oblique"), "MR", change=huge)
    zipped(folder, path)


BAD_ZIPS = {  # how it is written, and what the visitor reads
    "no DICOM": (lambda path: zip_of(path, NOTES), "no DICOM image among its 2 files"),
    "nothing": (lambda path: zip_of(path, {}), "has 0 files, expected 1 to 20000"),
    "no zip": (no_zip, "damaged or not a zip"),
    "cut": (cut, "damaged or not a zip"),
    "NIfTI": (
        lambda path: zip_of(path, NOTES | {"x/t1.nii.gz": b"1"}),
        "holds a NIfTI or MGH file; give that file itself, without the zip",
    ),
    "bomb": (bomb, "is too large when unpacked; send one series"),
    "liar": (liar, "damaged or not a zip"),
    "many": (
        lambda path: zip_of(path, {str(i): b"" for i in range(limits.ENTRIES + 1)}),
        "has 20001 files, expected 1 to 20000",
    ),
    "directory": (large_directory, "has too many files"),
    "bzip2": (
        lambda path: zip_of(path, NOTES, zipfile.ZIP_BZIP2),
        "is packed in an unusual way",
    ),
    "encrypted": (encrypted, "is encrypted"),
    "pixels": (many_pixels, "has 8.59e+09 million voxels, expected at most 1"),
}


@pytest.mark.parametrize("kind", BAD_ZIPS)
def test_bad_zips_get_a_sentence(tab, heads, tmp_path, kind):
    write, message = BAD_ZIPS[kind]
    path = tmp_path / "mr.zip"
    write(path)
    said = refused(tab, heads["ct"], path)
    assert said.startswith("mr.zip") and message in said.removeprefix("mr.zip")


def test_names_in_a_zip_lead_nowhere(tab, tmp_path, series):
    write_series(tmp_path / "mr", numbered(), affine_of("oblique"))
    slices = {f"../../../{tmp_path}/{p.name}": p.read_bytes() for p in (tmp_path / "mr").iterdir()}
    zip_of(tmp_path / "up.zip", slices | {"/etc/asfe-was-here": b"no", "..": b"no"})
    known = set(tmp_path.rglob("*"))
    (tmp_path / "there").mkdir()
    uploads.unpack(tmp_path / "up.zip", tmp_path / "there", 1e9)
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert names == [f"{n:05}" for n in range(1, len(slices) + 3)]
    assert set(tmp_path.rglob("*")) - known == {tmp_path / "there", *(tmp_path / "there").iterdir()}
    assert not Path("/etc/asfe-was-here").exists()


def test_a_setting_that_is_not_on_the_page_is_refused():
    good = "CT-MRI", volume_tab.QUICK, "auto"
    for at, wrong in enumerate(("all", "1mm", "/etc/passwd")):
        with pytest.raises(UserError, match="none of those on the page"):
            volume_tab.words_of(*good[:at], wrong, *good[at + 1 :], MORE)
    assert volume_tab.words_of(*good, MORE | {"force": ["space"]})["force"] == "space"


def test_a_result_that_was_swept_is_named(tab, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tab.gr, "Warning", lambda text, **_: said.append(text))
    assert tab.look(tmp_path / "none", "fused", "axial", 1) is None
    assert said == ["the result is gone, as files are kept for 10 minutes; fuse again"]
    assert tab.look(None, "fused", "axial", 1) is None and len(said) == 1


def test_without_the_packages_the_tab_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "FOR_VOLUMES", ("nibabel", "no_such_package"))
    place = Place(tmp_path, 10, pytest.fail)
    weights = app.weights_in(app.AppArgs().weights_dir)
    page = app.Page(gradio, place, shared.ImageLimits(16, 200), weights, NearChild())
    blocks = app.build(page, {t: shared.example_paths(tmp_path, t) for t in TASKS}, None)
    texts = [str(block.value) for block in blocks.blocks.values() if hasattr(block, "value")]
    assert "Volumes need no_such_package: `pip install -r requirements-volumes.txt`" in texts


def test_the_page_offers_what_the_commands_take():
    assert AXES[::-1] == shared.PLANES and tuple(volume_clicks.BOTH) == shared.COMPARED
    assert WAYS_OF_VOLUMES == shared.WAYS and FORCED == shared.FORCED
    assert Levels.window == shared.WINDOW
