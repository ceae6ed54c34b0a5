"""The derived DICOM series. dicom-validator needs the standard's text from the network, so the
attributes of the IOD are checked against highdicom's tables of the standard."""

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, write_series
from volume_files import SHAPE, affine_of, numbered

from volumes.dicom import read_dicom

highdicom = pytest.importorskip("highdicom", reason="needs requirements-volumes.txt")


@pytest.fixture
def pair(tmp_path):
    def make(kind="oblique"):
        for name, modality in (("ct", "CT"), ("mr", "MR")):
            write_series(tmp_path / name, numbered(), affine_of(kind), modality)
        argv = ["--img1", tmp_path / "ct", "--img2", tmp_path / "mr", "--out", tmp_path / "f.nii"]
        return [*argv, "--dicom", tmp_path / "out", "--window", "2000,4000"]

    return make


def missing_of_the_iod(ds) -> set[str]:
    """Type 1 and 2 attributes of the secondary capture IOD's mandatory modules, if absent.

    Also those of type 1 that are empty.
    """
    tables = Path(highdicom.__file__).parent / "_standard"
    iods = json.loads((tables / "sop_class_iod_map.json").read_text())
    modules = json.loads((tables / "iod_module_map.json").read_text())[iods[ds.SOPClassUID]]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    missing = set()
    for module in modules:
        for a in attributes[module["key"]] if module["usage"] == "M" else ():
            if a["path"] or a["type"] not in ("1", "2"):
                continue
            if a["keyword"] not in ds or (a["type"] == "1" and ds[a["keyword"]].is_empty):
                missing.add(a["keyword"])
    return missing


@pytest.mark.parametrize("kind", ("oblique", "flipped", "permuted"))
def test_the_series_lies_where_its_source_does(call, brighter, tmp_path, pair, kind):
    code, _, err = call(*pair(kind))
    assert code == 0, err
    files = sorted((tmp_path / "out").iterdir())
    headers = [pydicom.dcmread(path) for path in files]
    for ds in headers:
        assert not missing_of_the_iod(ds)
        assert list(ds.ImageType) == ["DERIVED", "SECONDARY"] and ds.BurnedInAnnotation == "NO"
        assert ds.SeriesDescription == "fused, not for diagnosis"
        assert ds.FrameOfReferenceUID == "1.2.3" and ds.SeriesInstanceUID != "1.2.4"
        assert SECRET not in str(ds) and "19010203" not in str(ds)
    assert len({ds.SOPInstanceUID for ds in headers}) == len(headers)
    back = read_dicom(tmp_path / "out")
    source = read_dicom(tmp_path / "ct")
    to_source = np.linalg.inv(source.affine) @ back.affine
    rng = np.random.default_rng(0)
    for index in rng.integers(0, back.data.shape, (20, 3)):  # each voxel at its patient position
        i, j, k = np.rint(to_source[:3] @ [*index, 1]).astype(int)
        expected = min(source.data[i, j, k] / 4000, 1) * 32767
        assert back.data[tuple(index)] >= expected - 9 and 0 <= min(i, j, k)
    assert back.data.size == np.prod(SHAPE)


def test_the_patient_only_where_asked_for(call, brighter, tmp_path, pair):
    argv = pair()
    code, _, err = call(*argv, "--keep-patient")
    assert code == 0, err
    ds = pydicom.dcmread(next((tmp_path / "out").iterdir()))
    assert ds.PatientName == SECRET and ds.PatientBirthDate == "19010203"
    assert "head of" not in str(ds)
    code, _, err = call(*argv)
    assert code == 2 and "is not an empty folder, choose another --dicom" in err
    code, _, err = call(*argv[:-4], "--keep-patient")
    assert code == 2 and "--keep-patient is for --dicom" in err


def test_colour_is_written_as_rgb(call, brighter, tmp_path, pair):
    argv = pair()
    write_series(tmp_path / "pt", numbered(), affine_of("oblique"), "PT")
    argv[1] = tmp_path / "pt"
    code, _, err = call("--task", "PET-MRI", "--axis", "coronal", *argv)
    assert code == 0, err
    ds = pydicom.dcmread(next((tmp_path / "out").iterdir()))
    assert list(ds.PatientOrientation) == ["L", "F"]
    assert ds.PhotometricInterpretation == "RGB" and ds.pixel_array.shape[2] == 3
    assert not missing_of_the_iod(ds)
