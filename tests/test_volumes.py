"""Runs on volumes: intensities, and the files that are written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from dicom_files import injected, write_series
from volume_files import SHAPE, Brighter, affine_of

import images
from args_setting import ROOT
from cli import UserError
from volumes import fuse_volumes, request_from
from volumes.grid import Volume, slices
from volumes.intensity import (
    STORED_ONE,
    WINDOWS,
    ct_scaling,
    head,
    mri_scaling,
    scaling_of,
)
from volumes.io import Header, stream_nifti
from volumes.pictures import CELL, GAP, colour_slice, colour_table, colours, mosaic, with_bar
from volumes.requests import Slicing


def test_axis_reaches_the_run(call, brighter, heads, tmp_path):
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    argv += ["--png", tmp_path / "png"]
    shape = nib.load(heads["ct"]).shape
    assert call(*argv, "--axis", "sagittal")[0] == 0
    pictures = sorted((tmp_path / "png").iterdir())
    assert len(pictures) == shape[0] and pictures[0].name == "sagittal_0000.png"
    assert cv2.imread(str(pictures[0]), cv2.IMREAD_UNCHANGED).shape == (shape[2], shape[1])
    assert json.loads((tmp_path / "f.json").read_text())["slices"] == "sagittal"


def test_the_first_source_is_the_first_of_the_network(heads, tmp_path):
    class First(Brighter):
        def fuse(self, img1, img2):
            return torch.from_numpy(img1)

    ct = np.clip((nib.load(heads["ct"]).get_fdata() + 100) / 1100, 0, 1)
    for tile in (0, 32):
        sources = {"img1": heads["ct"], "img2": heads["mri"], "out": tmp_path / "f.nii"}
        how = {"task": "CT-MRI", "tile": tile, "overlap": 16}
        fuse_volumes(request_from(sources | how), First())
        assert np.allclose(nib.load(tmp_path / "f.nii").get_fdata(), ct, atol=1e-4)


def test_the_function_returns_what_it_writes_and_says_what_it_does(heads, tmp_path):
    said = []
    out = tmp_path / "f.nii.gz"
    words = {"task": "CT-MRI", "img1": heads["ct"], "img2": heads["mri"], "out": out}
    steps = []
    fused = fuse_volumes(
        request_from(words), Brighter(), said.append, lambda *count: steps.append(count)
    )
    written = nib.load(out)
    assert fused.luma.dtype == np.int16 and fused.luma.shape == written.shape
    assert np.allclose(fused.luma * fused.scale, written.get_fdata(), atol=1e-6)
    assert np.array_equal(fused.affine, written.affine)
    assert fused.code == written.header["sform_code"]
    assert np.array_equal(fused.stack, slices(fused.luma, fused.affine, "axial"))
    assert fused.files == {"grey": (out,), "sidecar": (tmp_path / "f.json",)}
    assert said == list(fused.report) and steps[-1] == (written.shape[2],) * 2
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["report"] == said and content["files"] == ["f.json", "f.nii.gz"]
    assert fused.coverage == (1, 1) and list(content["coverage"].values()) == [1, 1]
    assert 0 <= fused.apart_mm < 3 and not fused.registered.applied and not fused.doubts
    assert fused.moved_mm == content["registration"]["moved_mm"] == 0
    assert fused.apart_mm == content["registration"]["apart_mm"]
    assert set(fused.read) == {heads["ct"], heads["mri"]}
    with pytest.raises(UserError, match="need img1, img2 and out"):
        request_from(words | {"img2": None})


def test_windows():
    scale = ct_scaling("40,80")
    assert scale.apply(np.array([-50.0, 0, 20, 40, 80, 900])).tolist() == [0, 0, 0.25, 0.5, 1, 1]
    assert ct_scaling("brain")[:2] == scale[:2] == (0, 80)
    wide = ct_scaling("wide").apply(np.array([-1000.0, 0, 25, 40, 700, 950]))
    assert (np.diff(wide) > 0.01).all() and wide[0] == 0, "brain and bone are both kept"
    for window in (
        "0,1e40",
        "1e39,1e39",
        "40,1e-46",
        "40",
        "40,0",
        "40,-5",
        "nan,80",
        "lung",
        "1,2,3",
        "",
    ):
        with pytest.raises(UserError, match="expected LEVEL,WIDTH"):
            ct_scaling(window)
    assert set(WINDOWS) == {"wide", "brain", "bone", "subdural"}


def test_mri_percentiles_are_those_of_the_head(heads):
    data = nib.load(heads["mri"]).get_fdata(dtype=np.float32)
    inside = data > 0
    scale = mri_scaling(data)
    assert scale.high == pytest.approx(np.percentile(data[inside], 99.5), rel=0.02)
    wide = np.pad(data, 20)  # more air does not change it
    assert mri_scaling(wide)[:2] == pytest.approx(scale[:2], rel=0.02)
    assert np.percentile(wide, 99.5) < 0.97 * scale.high
    ball = np.zeros((40, 40, 40), np.float32)
    ball[8:32, 8:32, 8:32] = 10
    ball[15:25, 15:25, 15:25] = 0  # a ventricle
    ball[1, 1, 1] = 50  # noise
    found = head(ball)
    assert found[20, 20, 20] and found.sum() == 24**3
    with pytest.raises(UserError, match="all voxels are 3"):
        mri_scaling(np.full((20, 20, 20), 3, np.float32))
    with pytest.raises(UserError, match="no voxel is above 0"):
        scaling_of(Volume(-ball, np.eye(4)), "SPECT", "wide", 15)


def test_pet_is_scaled_by_suv_or_maximum(call, brighter, tmp_path):
    affine = affine_of("identity")
    data = np.zeros(SHAPE, np.int16)
    data[10:14, 10:14, 10] = 20000
    for name, change in (("suv", injected), ("max", None)):
        write_series(tmp_path / name, data, affine, "PT", change=change)
        write_series(tmp_path / "mr", np.eye(SHAPE[0], SHAPE[1])[..., None] + 0 * data, affine)
        argv = ["--task", "PET-MRI", "--img1", tmp_path / name, "--img2", tmp_path / "mr"]
        code, stdout, err = call(*argv, "--out", tmp_path / f"{name}.nii", "--suv", 10)
        assert code == 0, err
        value = nib.load(tmp_path / f"{name}.nii").get_fdata()[11, 12, 10]
        method = json.loads((tmp_path / f"{name}.json").read_text())["levels"]["source1"]
        text = bytes(nib.load(tmp_path / f"{name}.nii").header["descrip"]).decode()
        if name == "suv":
            assert value == pytest.approx(20000 * 77.5e3 / 200e6 / 10, abs=1e-4)
            assert method["method"].startswith("SUV") and "0..10 SUV" in text
        else:
            assert (
                value == pytest.approx(1) and method["method"] == "maximum" and "max 2e+04" in text
            )
            assert "no SUV (its units are not Bq/ml)" in stdout


def test_colour_png_and_mosaic(call, brighter, heads, tmp_path):
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    argv += ["--out", tmp_path / "f.nii.gz", "--png", tmp_path / "png"]
    argv += ["--mosaic", tmp_path / "m.png", "--colour", "rainbow"]
    code, _, err = call(*argv)
    assert code == 0, err
    grey, colour = nib.load(tmp_path / "f.nii.gz"), nib.load(tmp_path / "f_colour.nii.gz")
    assert np.array_equal(grey.affine, colour.affine) and grey.shape == colour.shape
    rgb = np.asarray(colour.dataobj)
    rgb = np.stack([rgb[c] for c in "RGB"], -1)
    luma = grey.get_fdata()
    assert luma.min() >= 0 and luma.max() == pytest.approx(1, abs=1e-4)
    inside = (rgb.min(-1) > 0) & (rgb.max(-1) < 255)  # where nothing was clipped
    assert inside.sum() > 1000
    assert np.abs(rgb[inside] @ [0.299, 0.587, 0.114] / 255 - luma[inside]).max() < 0.01
    assert (np.ptp(rgb[inside].astype(int), -1) > 60).any(), "it has colour"
    pet = nib.load(heads["pet"]).get_fdata()
    assert (rgb[pet == 0].max(-1) == rgb[pet == 0].min(-1)).all(), "no uptake has no colour"
    # ITK sees RGB at the same positions
    image = sitk.ReadImage(str(tmp_path / "f_colour.nii.gz"))
    assert image.GetNumberOfComponentsPerPixel() == 3
    assert image.GetPixel(20, 25, 22) == tuple(int(v) for v in rgb[20, 25, 22])
    k = 22
    picture = cv2.imread(str(tmp_path / "png" / f"axial_{k:04d}.png"))[..., ::-1]
    bar, picture = picture[:, rgb.shape[0] :], picture[:, : rgb.shape[0]]
    assert bar.std() > 20, "the bar of its colours"
    # RAS storage: rows run from the front, columns from the patient's right
    expected = rgb[::-1, ::-1, k].transpose(1, 0, 2)
    if grey.affine[0, 0] > 0:
        assert np.array_equal(picture, expected)
    sheet = cv2.imread(str(tmp_path / "m.png"))
    assert sheet.std() > 20 and sheet.shape[1] > 600


def test_pet_and_spect_are_coloured_unless_grey_is_asked_for(call, brighter, heads, tmp_path):
    argv = ["--task", "SPECT-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    assert call(*argv, "--out", tmp_path / "a.nii", "--mosaic", tmp_path / "a.png")[0] == 0
    sheet = cv2.imread(str(tmp_path / "a.png"))
    assert json.loads((tmp_path / "a.json").read_text())["colour"] == "warm"
    assert (tmp_path / "a_colour.nii").exists()
    argv += ["--colour", "none", "--out", tmp_path / "b.nii", "--mosaic", tmp_path / "b.png"]
    assert call(*argv)[0] == 0
    assert not (tmp_path / "b_colour.nii").exists()
    grey = cv2.imread(str(tmp_path / "b.png"))
    assert grey.shape[0] == sheet.shape[0] and grey.shape[1] < sheet.shape[1], "no bar"
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "c.nii"]
    assert call(*argv)[0] == 0 and not (tmp_path / "c_colour.nii").exists()


def test_the_default_table_has_no_white_at_its_top():
    warm, hot = colours("warm"), colours("hot")
    assert np.ptp(warm[-1]) > 0.9 and np.ptp(hot[-1]) == 0
    assert np.ptp(warm[40:], axis=1).min() > 0.3 and warm[0].max() == 0
    fused = colour_slice(np.full((1, 2), 0.8), np.array([[0.0, 1.0]]), colour_table("warm"))
    assert np.ptp(fused[0, 0]) == 0, "a bright MRI stays grey"
    assert np.ptp(fused[0, 1].astype(int)) > 100, "a high uptake on it does not"


@pytest.mark.parametrize(
    ("unit", "suv", "label"), [("Bq/ml", 15, "SUV"), ("Bq/ml", 0, "Bq/ml"), ("", 0, "as stored")]
)
def test_the_bar_has_the_unit(monkeypatch, unit, suv, label):
    volume = Volume(np.arange(24.0).reshape(2, 3, 4) * 1000, np.eye(4), suv=1e-3, unit=unit)
    drawn = []
    monkeypatch.setattr("volumes.pictures.write_text", lambda image, text, at: drawn.append(text))
    image = np.full((90, 70, 3), 9, np.uint8)
    out = with_bar(image, "warm", scaling_of(volume, "PET", "wide", suv))
    high = suv or 23000
    assert drawn == [f"{high:.3g}", label, f"{high / 2:.3g}", "0"]
    assert np.array_equal(out[:, :70], image)
    bar = out[:, 70 + 7].astype(int)  # yellow at the top, black at the bottom
    assert bar[0].min() < 20 and bar[0, :2].min() > 235 and bar[-1].max() == 0
    assert with_bar(image, None, None) is image


def test_a_mosaic_shows_slices_in_proportion():
    stack = np.zeros((40, 30, 60), np.int16)
    stack[10:30] = STORED_ONE
    sheet = mosaic(stack, [f"S {n}" for n in range(40)], "axial", (2.0, 1.0))
    # cells of 60 mm by 60 mm
    assert sheet.shape == (4 * (CELL + GAP) - GAP, 6 * (CELL + GAP) - GAP, 3)
    assert sheet[20, 20].min() > 250 and sheet[-20, -20].max() == 0, "20 of 24 cells"
    tall = mosaic(stack, ["S"] * 40, "axial", (4.0, 1.0))
    assert tall.shape == (4 * (CELL + GAP) - GAP, 6 * (CELL // 2 + GAP) - GAP, 3)
    assert mosaic(stack * 0, ["S"] * 40, "axial", (1, 1)).max() > 0  # only its text


def test_the_sidecar_says_what_was_done(call, brighter, heads, tmp_path):
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    assert call(*argv, "--window", "subdural")[0] == 0
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["levels"]["source1"] == {
        "method": "window", "level": 75, "width": 215, "unit": "HU"
    }  # fmt: skip
    assert content["levels"]["source2"]["percentiles"] == [0.5, 99.5]
    affine = nib.load(tmp_path / "f.nii").affine
    assert np.allclose(content["grid"]["affine_ras_mm"], affine)
    text = bytes(nib.load(tmp_path / "f.nii").header["descrip"]).decode()
    assert "CT -32.5..182.5 HU" in text and "MRI 0.5-99.5 %" in text
    assert str(tmp_path) not in json.dumps(content)


def test_the_space_of_a_template_is_kept(call, brighter, heads, tmp_path):
    for name in ("ct", "mri"):
        image = nib.load(heads[name])
        image.set_sform(image.affine, 4)
        image.to_filename(tmp_path / f"{name}.nii")
    out = tmp_path / "f.nii"
    assert call("--img1", tmp_path / "ct.nii", "--img2", tmp_path / "mri.nii", "--out", out)[0] == 0
    header = nib.load(out).header
    assert header["sform_code"] == header["qform_code"] == 4


def test_a_stopped_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.nii.gz"

    def write(text):
        with images.whole_file(path) as file:
            stream_nifti(file, np.ones(SHAPE, np.int16), Header(np.eye(4), 1, text), True)

    write("first")
    before = path.read_bytes()
    write("first")
    assert path.read_bytes() == before, "the same volume gives the same bytes"

    def stop(self, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        write("second")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.nii.gz"]


@pytest.mark.parametrize("name", ("f.nii", "f.nii.gz"))
@pytest.mark.parametrize("older", (False, True), ids=("new", "over an older run"))
def test_a_full_disk_leaves_no_volume_without_its_sidecar(
    heads, tmp_path, monkeypatch, name, older
):
    """Nor the reverse, nor a part of a file, whichever write is the first to fail."""
    words = {"task": "PET-MRI", "img1": heads["pet"], "img2": heads["mri"], "colour": "hot"}
    words["register"] = "off"
    request = request_from(words | {"out": tmp_path / name})
    if older:
        fuse_volumes(replace(request, slicing=Slicing("sagittal")), Brighter())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sync = os.fsync
    for good in range(3):  # files that still fit
        synced = []

        def full(file, synced=synced, good=good):
            if len(synced) == good:
                raise OSError(errno.ENOSPC, "No space left on device")
            synced.append(file)
            sync(file)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            fuse_volumes(request, Brighter())
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "fsync", sync)
    fuse_volumes(request, Brighter())
    suffix = name[1:]
    assert {p.name for p in tmp_path.iterdir()} == {name, f"f_colour{suffix}", "f.json"}


@pytest.mark.parametrize(
    "names",  # of source and output, and what the output would hit
    [
        ("ct.nii.gz", "ct.nii", "ct.json is the sidecar of"),
        ("ct.nii", "ct.nii.gz", "ct.json is the sidecar of"),
        ("ct.nii.gz", "ct.nii.gz", "ct.nii.gz is a source"),
        ("ct_colour.nii", "ct.nii", "ct_colour.nii is a source"),
        ("link/ct.nii.gz", "link/ct.nii", "ct.json is the sidecar of"),
        ("link/ct.nii.gz", "key.nii", "key.json is the sidecar of"),  # of the link's target
        ("hard.nii", "other/ct.nii", "ct.nii is a source"),
    ],
)
@pytest.mark.parametrize("described", (True, False))
@pytest.mark.usefixtures("brighter")
def test_sources_and_their_sidecars_stay(call, heads, tmp_path, names, described):
    source, out, hit = names
    for folder in ("link", "other"):
        (tmp_path / folder).mkdir()
    source = tmp_path / source
    image = nib.load(heads["pet"])
    if source.parent == tmp_path:
        image.to_filename(source)
    else:
        image.to_filename(tmp_path / "key.nii.gz")
        source.symlink_to(tmp_path / "key.nii.gz")
    if source.name == "hard.nii":
        (tmp_path / out).hardlink_to(source)
    if described:
        for path in (source, tmp_path / "key"):
            path.with_name(f"{path.name.split('.')[0]}.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    argv = ["--task", "PET-MRI", "--img1", source, "--img2", heads["mri"], "--colour", "hot"]
    code, _, err = call(*argv, "--out", tmp_path / out)
    assert code == 2 and err.count("\n") == 1, err
    assert hit in err and "choose another --out" in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    argv[argv.index("--img1")], argv[argv.index("--img2")] = "--img2", "--img1"
    assert hit in call(*argv, "--out", tmp_path / out)[2], "source 2 stays as well"


def test_a_folder_in_the_way_is_named_before_the_run(call, brighter, heads, tmp_path):
    (tmp_path / "f.json").mkdir()
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    code, _, err = call(*argv)
    assert code == 2 and "f.json is a folder, choose another --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_leaves_no_volume(heads, weights, tmp_path):
    out = tmp_path / "f.nii.gz"
    command = [sys.executable, ROOT / "test_asfe.py", "--img1", heads["ct"], "--img2", heads["mri"]]
    command += ["--out", out, "--weights", weights, "--threads", "1", "--png", tmp_path / "png"]
    run = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    while "slice/s" not in seen and run.poll() is None:  # it is fusing
        seen += os.read(run.stderr.fileno(), 4096).decode()
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert not out.exists() and not (tmp_path / "f.json").exists()


def test_without_its_packages_a_volume_names_the_file_that_installs_them(tmp_path):
    """And test_asfe.py itself needs none of them."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['nibabel', 'pydicom', 'SimpleITK']));"
        "import test_asfe as t, args_setting, cli; sys.argv[0] = 'test_asfe.py';"
        "cli.run_script(t.main, cli.parse_args(args_setting.TestArgs))"
    )
    argv = ["--img1", "a.nii", "--img2", "a.nii", "--out", "f.nii"]
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install -r requirements-volumes.txt" in done.stderr
