"""Nothing of a patient comes out where it must not, whatever flag touches DICOM.

A planted name, number and dates are searched in what a run prints, warns, logs and writes.
"""

import logging
import shutil
import subprocess
import warnings

import numpy as np
import pydicom
import pytest
from dicom_files import write_series
from test_volumes_register import registration_object
from volume_files import affine_of, numbered

highdicom = pytest.importorskip("highdicom", reason="needs requirements-volumes.txt")

NAME, NUMBER, BIRTH, VISIT = "Onewordname", "PATID7734", "19391103", "20170329"
PLANTED = (NAME, NAME.upper(), NUMBER, BIRTH, VISIT, "Doktorwho", "Klinikum")


def planted(ds, k=0):
    """Fields that name somebody, some of them against the standard so that libraries complain."""
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = NAME, NUMBER, BIRTH
    ds.PatientSex, ds.StudyDate, ds.StudyTime, ds.StudyID = "F", VISIT, "101010", NUMBER
    ds.SeriesDate = ds.AcquisitionDate = VISIT
    ds.ReferringPhysicianName, ds.InstitutionName = "Doktorwho", "Klinikum"
    ds.AccessionNumber, ds.OtherPatientIDs = NUMBER, NUMBER
    ds.PatientComments = ds.ImageComments = f"{NAME} {NUMBER}"
    ds.StudyInstanceUID = "1.2.41"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.add_new(0x00080020, "DA", f"{VISIT}x{NAME}"[:16])  # no date


@pytest.fixture
def pair(tmp_path):
    def make(modality="CT", extra=()):
        for name, kind in (("one", modality), ("two", "MR"), *extra):
            frame = "1.2.32" if name == "two" else "1.2.31"
            write_series(
                tmp_path / name, numbered(), affine_of("oblique"), kind, frame=frame, change=planted
            )
        task = {"CT": "CT-MRI", "PT": "PET-MRI", "NM": "SPECT-MRI"}[modality]
        argv = ["--task", task, "--img1", tmp_path / "one", "--img2", tmp_path / "two"]
        argv += ["--out", tmp_path / "out" / "f.nii", "--register", "off", "--force", "space"]
        return [*argv, *(("--window", "2000,4000") if modality == "CT" else ())]

    return make


@pytest.fixture
def everything(call, tmp_path, caplog):
    """Run a command; returns its exit code and all that it said, warned, logged and wrote."""

    def run(*argv, named=()):
        caplog.set_level(logging.DEBUG)
        caplog.clear()  # what writing the sources had to say
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            code, stdout, err = call(*argv)
        said = stdout + err + caplog.text + "".join(str(w.message) for w in caught)
        said += "".join(str(record.getMessage()) for record in caplog.records)
        out = tmp_path / "out"
        files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
        for path in files:
            if path.parent.name not in named:
                said += path.read_bytes().decode("latin1") + path.name
        return code, said.replace(str(tmp_path), ""), files

    return run


def nobody_in(text):
    return not [secret for secret in PLANTED if secret in text]


@pytest.mark.parametrize("modality", ("CT", "PT", "NM"))
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--mosaic", "{}/out/m.png", "--png", "{}/out/png"),
        ("--dicom", "{}/out/dicom"),
        ("--frame", "2"),
        ("--where", "EchoTime=1"),
        ("--series1", "9"),
        ("--grid", "1.6"),
        ("--force",),
        ("--nan-to-zero",),
    ],
    ids=lambda more: more[0] if more else "plain",
)
def test_nobody_is_named(everything, brighter, pair, tmp_path, modality, more):
    argv = pair(modality)
    code, said, _ = everything(*argv, *(m.format(tmp_path) for m in more))
    assert code == (2 if "--series1" in more else 0) and nobody_in(said), said[-400:]


def test_only_the_series_is_named_where_it_is_asked_for(everything, brighter, pair, tmp_path):
    """A name of one word, which highdicom warns of with the name in it."""
    code, said, files = everything(
        *pair(), "--dicom", tmp_path / "out" / "dicom", "--keep-patient", named=("dicom",)
    )
    assert code == 0 and nobody_in(said), said[-400:]
    series = [path for path in files if path.parent.name == "dicom"]
    ds = pydicom.dcmread(series[0])
    assert ds.PatientName == NAME and ds.PatientID == NUMBER and ds.PatientBirthDate == BIRTH
    assert not ds.StudyDate, "what is no date by the standard is not passed on"


def test_a_companion_and_a_dicom_registration_name_nobody(everything, brighter, pair, tmp_path):
    argv = pair("PT", extra=(("via", "CT"),))
    moves = {"1.2.31": np.eye(4), "1.2.32": np.eye(4)}
    path = registration_object(tmp_path / "r.dcm", moves)
    ds = pydicom.dcmread(path)
    planted(ds)
    ds.save_as(path)
    argv[argv.index("off")] = path
    code, said, _ = everything(*argv)
    assert code == 0 and nobody_in(said), said[-400:]
    code, said, _ = everything(*argv, "--via", tmp_path / "via", "--force", "space,units")
    assert nobody_in(said), said[-400:]


def test_errors_name_nobody(everything, brighter, pair, tmp_path):
    """Two people, a series that mixes them, and damaged fields."""
    argv = pair()
    for n, path in enumerate(sorted((tmp_path / "two").iterdir())):
        ds = pydicom.dcmread(path)
        ds.PatientID, ds.PatientSex = f"{NUMBER}B", "M"
        ds.save_as(path)
        if n == 9:
            code, said, _ = everything(*argv)
            assert code == 2 and "two patients in one series" in said and nobody_in(said)
    code, said, _ = everything(*argv)
    assert code == 2 and "are of two patients" in said and nobody_in(said)
    position = str(pydicom.dcmread(path)["ImagePositionPatient"].value[0]).encode()
    path.write_bytes(path.read_bytes().replace(position, (NAME * 2)[: len(position)].encode()))
    code, said, _ = everything(*argv, "--force", "patient")
    assert code == 2 and nobody_in(said), said[-400:]


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 126", "Παπαδόπουλος^Γιώργος"),
        ("ISO_IR 100", "Müller^Jürgen"),
        ("ISO_IR 192", "Παπαδόπουλος^Γιώργος"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("", "Doe^Jane"),
        ("", "Onewordname"),
    ],
)
def test_names_of_all_people_survive(call, brighter, pair, tmp_path, charset, name):
    argv = pair()
    for path in (tmp_path / "one").iterdir():
        ds = pydicom.dcmread(path)
        ds.StudyDate = VISIT
        if charset:
            ds.SpecificCharacterSet = charset
        ds.PatientName = ds.ReferringPhysicianName = name
        ds.save_as(path)
    code, _, err = call(*argv, "--dicom", tmp_path / "out" / "d", "--keep-patient", "--grid", "1")
    assert code == 0, err
    for path in (tmp_path / "out" / "d").iterdir():
        ds = pydicom.dcmread(path)
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert str(ds.PatientName) == str(ds.ReferringPhysicianName) == name
        assert name.encode() in path.read_bytes()
    if program := shutil.which("dciodvfy"):  # it must be there in test_volumes_derived.py
        done = subprocess.run([program, "-new", path], capture_output=True)
        lines = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
        assert not [line for line in lines if line.startswith("Error")]
