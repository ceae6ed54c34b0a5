"""Colour tables and their lightness, the bar, the RGB volume, and the usual scales of tracers."""

import json
import runpy
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, injected, write_series
from volume_files import affine_of, numbered

from args_setting import ROOT, TestArgs
from volumes.grid import Volume
from volumes.intensity import scaling_of
from volumes.io import read_volume
from volumes.pictures import COLOURS, PALETTES, TABLES, colours, fall, with_bar
from volumes.requests import writing_from
from volumes.tracers import TRACERS, named
from volumes.varying import Choice

TASKS = ("PET-MRI", "SPECT-MRI")


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB, written down a second time: IEC 61966-2-1 and CIE 15, white D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126729, 0.7151522, 0.0721750]
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


@pytest.mark.parametrize("name", TABLES)
def test_the_fall_of_each_table_is_what_it_is(name):
    steps = np.diff(lightness(colours(name)))
    assert fall(name) == pytest.approx(np.abs(steps[steps < -0.01]).sum(), abs=0.05)
    assert colours(name).shape == (256, 3) and 0 <= colours(name).min() <= colours(name).max() <= 1


def test_defaults_rise_and_others_are_known():
    for task in TASKS:
        writing = writing_from({"task": task, "out": "f.nii"})
        steps = np.diff(lightness(colours(writing.colour)))
        assert fall(writing.colour) == 0 and steps.min() > -0.01 and steps.max() > 0
    assert {name for name in TABLES if not fall(name)} == {"warm", "hot", "inferno", "hot-iron"}
    assert round(fall("pet-20-step")) == 68
    (field,) = (f for f in TestArgs.__dataclass_fields__.values() if f.name == "colour")
    assert set(field.metadata["choices"]) == {"auto", "none", *TABLES}


@pytest.mark.parametrize("name", PALETTES)
def test_the_tables_of_dicom_are_those_of_the_standard(name):
    """pydicom has the standard's files; the tables are 8 bits, and nothing fades."""
    file = f"{name.replace('-', '')}.dcm"
    ds = pydicom.dcmread(ROOT.joinpath(pydicom.__path__[0], "data", "palettes", file))
    for i, channel in enumerate(("Red", "Green", "Blue")):
        data = np.frombuffer(ds[f"{channel}PaletteColorLookupTableData"].value, np.uint8)
        assert np.array_equal(np.rint(colours(name)[:, i] * 255), data)


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("name", ["pet-20-step", "jet", "hot-iron", "auto"])
def test_a_table_that_falls_is_told(call, heads, tmp_path, name):
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    code, out, err = call(*argv, "--out", tmp_path / "f.nii", "--colour", name)
    assert code == 0, err
    falls = name in ("pet-20-step", "jet")
    line = f"--colour {name}: its lightness falls by {fall(name):.0f}" if falls else "lightness"
    assert out.count(line) == falls, out


def test_the_page_has_the_rows_of_its_script():
    rows = runpy.run_path(str(ROOT / "docs" / "colours.py"))["rows"]()
    text = (ROOT / "docs" / "outputs.md").read_text(encoding="utf-8")
    assert len(rows) == len(TABLES) + 2 and "\n".join(rows) in text


# --- the bar ---------------------------------------------------------------------------------


def bar_of(monkeypatch, peak, suv, height=90):
    """The bar for a PET up to `peak` SUV on a scale up to `suv`, and the texts in it."""
    drawn = []
    monkeypatch.setattr("volumes.pictures.write_text", lambda image, text, at: drawn.append(text))
    volume = Volume(np.linspace(0, peak, 24).reshape(2, 3, 4), np.eye(4), suv=1.0)
    scaling = scaling_of(volume, "PET", "wide", suv)
    out = with_bar(np.zeros((height, 40, 3), np.uint8), "warm", scaling)
    return out[:, 40:], drawn


def test_the_bar_tells_the_share_that_the_data_use(monkeypatch):
    bar, drawn = bar_of(monkeypatch, 6, 15)
    assert "used 40%" in drawn
    marks = np.flatnonzero((bar[:, 1] == 255).all(1))
    assert list(marks) == [round(0.6 * 89)], "one mark, at 40 % of the height"
    assert not any("used" in text for text in bar_of(monkeypatch, 15, 15)[1])
    assert not any("used" in text for text in bar_of(monkeypatch, 40, 15)[1])
    assert not any("used" in text for text in bar_of(monkeypatch, 6, 0)[1]), "to the maximum"
    bar, drawn = bar_of(monkeypatch, 6, 15, height=40)
    assert drawn == ["15", "SUV", "0"] and (bar[:, 1] == 255).all(1).sum() == 1


# --- RGB -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("suffix", (".nii", ".nii.gz"))
def test_an_rgb_volume_that_get_fdata_reads(call, heads, tmp_path, suffix):
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"], "--out"]
    assert call(*argv, tmp_path / f"a{suffix}")[0] == 0
    code, _, err = call(*argv, tmp_path / f"b{suffix}", "--rgb", "axis")
    assert code == 0, err
    plain, axis = (nib.load(tmp_path / f"{name}_colour{suffix}") for name in "ab")
    assert plain.get_data_dtype().names == ("R", "G", "B"), "the default stays NIfTI's type"
    with pytest.raises(TypeError):
        plain.get_fdata()
    values = axis.get_fdata()
    assert values.shape == (*plain.shape, 3) and axis.get_data_dtype() == np.uint8
    rgb = np.asarray(plain.dataobj)
    assert np.array_equal(values, np.stack([rgb[name] for name in "RGB"], -1))
    assert np.ptp(values, axis=-1).max() > 100, "there is colour in it"
    assert np.array_equal(axis.affine, plain.affine)
    for n in range(3):  # our own reader takes a channel
        channel = read_volume(tmp_path / f"b_colour{suffix}", choice=Choice(time=str(n + 1)))
        assert np.array_equal(channel.data, values[..., n])
        assert np.allclose(channel.affine, axis.affine)


def test_rgb_needs_colour(call, heads, tmp_path):
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    argv += ["--out", tmp_path / "f.nii", "--rgb", "axis"]
    code, _, err = call(*argv, "--colour", "none")
    assert code == 2 and "--rgb is for the RGB volume, which --colour none leaves out" in err
    argv[1] = "CT-MRI"
    code, _, err = call(*argv)
    assert code == 2 and "--rgb is for PET-MRI and SPECT-MRI" in err
    assert not list(tmp_path.iterdir())


# --- tracers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("FDG -- fluorodeoxyglucose", "FDG"),
        ("18F-FDG", "FDG"),
        ("Fluorodeoxyglucose F^18^", "FDG"),
        ("[18F]AV45", "florbetapir"),
        ("Amyvid", "florbetapir"),
        ("F18-AV-1451", "flortaucipir"),
        ("Florbetaben F^18^", "florbetaben"),
        ("VIZAMYL", "flutemetamol"),
        ("Solution", None),
        ("AV451", None),
        ("", None),
    ],
)
def test_names_of_tracers(text, name):
    found = named(text)
    assert (found and found.name) == name


@pytest.fixture
def pet(tmp_path):
    """Write a PET and an MRI; returns arguments. `change` edits the drug of the header."""

    def make(change):
        def own(ds, k):
            injected(ds, k)
            change(ds.RadiopharmaceuticalInformationSequence[0])

        for name, kind, edit in (("pt", "PT", own), ("mr", "MR", None)):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            write_series(tmp_path / name, numbered(), affine_of("oblique"), kind, change=edit)
        argv = ["--task", "PET-MRI", "--img1", tmp_path / "pt", "--img2", tmp_path / "mr"]
        return [*argv, "--out", tmp_path / "f.nii", "--register", "off"]

    return make


def coded(value, meaning=""):
    def change(drug):
        code = pydicom.Dataset()
        code.CodeValue, code.CodeMeaning, code.CodingSchemeDesignator = value, meaning, "SCT"
        drug.RadiopharmaceuticalCodeSequence = [code]

    return change


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("tracer", TRACERS, ids=lambda tracer: tracer.name)
def test_each_code_names_its_usual_scale(call, pet, tracer):
    for code in tracer.codes:
        _, out, err = call(*pet(coded(code)))
        assert f"img1: its tracer is {tracer.name}, " in out, err
        assert tracer.scale in out and out.count("its tracer") == 1


@pytest.mark.usefixtures("brighter")
def test_fdg_on_its_usual_scale_needs_no_line(call, pet):
    def change(drug):
        drug.Radiopharmaceutical = f"F18 FDG of {SECRET}"

    argv = pet(change)
    code, out, err = call(*argv)
    assert code == 0 and "tracer is FDG, usually shown from 0 to a SUV between 6 and 10" in out, err
    assert "--suv 6 to --suv 10" in out and SECRET not in out + err
    assert SECRET not in (argv[7].with_suffix(".json")).read_text()
    for suv in ("6", "10"):
        assert "its tracer" not in call(*argv, "--suv", suv)[1]
    assert "tracer is FDG" in call(*argv, "--suv", "10.5")[1]
    assert "there is no SUV here" in call(*argv, "--suv", "0")[1]
    assert "its tracer" not in call(*pet(coded("1234", "Something else")))[1]


@pytest.mark.usefixtures("brighter")
def test_a_damaged_drug_names_nothing(call, pet):
    def change(drug):
        drug.RadiopharmaceuticalCodeSequence = []
        drug.Radiopharmaceutical = ["a", "b"]

    code, out, err = call(*pet(change))
    assert code == 0 and "its tracer" not in out, err


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"TracerName": "18F-Florbetapir"}', "its tracer is florbetapir"),
        ('{"TracerName": 5}', None),
        ('["FDG"]', None),
        ("no JSON", None),
    ],
)
def test_bids_names_a_tracer(call, heads, tmp_path, text, line):
    path = tmp_path / "sub-1_pet.nii.gz"
    shutil.copy(heads["pet"], path)
    (tmp_path / "sub-1_pet.json").write_text(text)
    argv = ["--img1", path, "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    code, out, err = call("--task", "PET-MRI", *argv)
    assert code == 0, err
    assert (f"img1: {line}" in out) if line else ("its tracer" not in out)
    code, out, err = call("--task", "SPECT-MRI", *argv[:-1], tmp_path / "s.nii")
    assert code == 0 and "its tracer" not in out, "of PET only"


def test_the_sidecar_tells_the_share_that_is_used(call, brighter, pet, tmp_path):
    code, out, err = call(*pet(coded("35321007")), "--suv", "1000")
    assert code == 0, err
    share = json.loads((tmp_path / "f.json").read_text())["levels"]["source1"]["share_used"]
    assert 0 < share < 0.9 and f"PET: its values use {share:.0%} of that range, up to" in out
    assert COLOURS.keys() | PALETTES.keys() == set(TABLES)
