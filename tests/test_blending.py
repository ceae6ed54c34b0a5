"""The presentation state that blends the untouched sources, and its spatial registration.

Landmarks go from one source to the other by the registration alone, as a viewer would take them.
The fixture of dciodvfy is in conftest.py, see test_volumes_derived.py.
"""

import json
import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import SECRET, write_enhanced, write_series
from test_volumes_derived import missing_of_the_iod
from test_volumes_register import a_move, registration_object
from volume_files import SHAPE, affine_of, numbered

from volumes.dicom import read_dicom
from volumes.grid import RAS_LPS
from volumes.pictures import colours

pytest.importorskip("highdicom", reason="needs requirements-volumes.txt")

PLACES = np.array([[4.0, 26.0, -6.0], [-3.0, 33.0, -12.0], [0.0, 30.0, 20.0]])  # mm, LPS
KINDS = {"presentation": "AdvancedBlendingSoftcopyPresentationState",
    "registration": "SpatialRegistration"}  # fmt: skip


@pytest.fixture
def pair(tmp_path):
    """Write both sources and return the arguments: each in its frame, series and study."""

    def make(modality="PT", frames=("1.2.31", "1.2.32"), change=None):
        for name, kind, frame, n in zip(
            ("one", "two"), (modality, "MR"), frames, (1, 2), strict=True
        ):

            def own(ds, k, n=n):
                ds.StudyInstanceUID = f"1.2.4{n}"
                ds.PatientID = "same"
                if change:
                    change(ds, k, n)

            write_series(
                tmp_path / name,
                numbered(),
                affine_of("oblique"),
                kind,
                frame=frame,
                series=f"1.2.5{n}",
                change=own,
            )
        argv = ["--task", {"CT": "CT-MRI", "PT": "PET-MRI", "NM": "SPECT-MRI"}[modality]]
        argv += ["--img1", tmp_path / "one", "--img2", tmp_path / "two"]
        argv += ["--out", tmp_path / "f.nii", "--dicom", tmp_path / "out"]
        return [*argv, *(("--window", "2000,4000") if modality == "CT" else ())]

    return make


UNMOVED = ("--register", "off", "--force", "space")


def made(folder):
    """The presentation state, and the registration or None."""
    names = ("presentation.dcm", "registration.dcm")
    return [pydicom.dcmread(folder / n) if (folder / n).exists() else None for n in names]


def carried(registration, points, image_from, image_to):
    """Points (N, 3), LPS, from the space of one image to that of another, through the registration.

    Each item maps its images to one space.
    """
    matrices = {}
    for item in registration.RegistrationSequence:
        (step,) = item.MatrixRegistrationSequence[0].MatrixSequence
        matrix = np.array(step.FrameOfReferenceTransformationMatrix, float).reshape(4, 4)
        for image in item.ReferencedImageSequence:
            matrices[image.ReferencedSOPInstanceUID] = matrix
    there = np.linalg.inv(matrices[image_to]) @ matrices[image_from]
    return points @ there[:3, :3].T + there[:3, 3]


def first_image(folder):
    return pydicom.dcmread(sorted(folder.iterdir())[0])


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("grid", ("1", "2"))
@pytest.mark.parametrize("frames", (("1.2.31", "1.2.32"), ("1.2.3", "1.2.3")))
def test_a_landmark_goes_both_ways(call, tmp_path, pair, grid, frames):
    """Also where both are in one frame of reference, and one was moved all the same."""
    move = a_move((6, -8, 10), (3, -2, 2), (0, 30, -10))
    lps = RAS_LPS @ move @ RAS_LPS
    argv = pair("CT", frames)
    one, two = (first_image(tmp_path / name) for name in ("one", "two"))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    sitk.WriteTransform(transform, str(tmp_path / "t.tfm"))
    argv += ["--grid", grid, "--register", tmp_path / "t.tfm", "--force", "overlap,registration"]
    code, out, err = call(*argv)
    assert code == 0, err
    assert "presentation.dcm blends the untouched sources" in out
    state, registration = made(tmp_path / "out")
    ids = one.SOPInstanceUID, two.SOPInstanceUID
    there = PLACES @ lps[:3, :3].T + lps[:3, 3]
    assert np.allclose(carried(registration, PLACES, *ids), there, atol=0.01)
    assert np.allclose(carried(registration, there, *ids[::-1]), PLACES, atol=0.01)
    assert np.abs(there - PLACES).max() > 3, "the test can fail"
    shown = {"1": one, "2": two}[grid]
    assert registration.FrameOfReferenceUID == state.FrameOfReferenceUID
    assert state.FrameOfReferenceUID == shown.FrameOfReferenceUID
    for item, image in zip(registration.RegistrationSequence, (one, two), strict=True):
        assert item.FrameOfReferenceUID == image.FrameOfReferenceUID
        (step,) = item.MatrixRegistrationSequence[0].MatrixSequence
        assert step.FrameOfReferenceTransformationMatrixType == "RIGID"
    shutil.copy(tmp_path / "out" / "registration.dcm", tmp_path / "r.dcm")
    argv[argv.index(tmp_path / "t.tfm")] = tmp_path / "r.dcm"  # our own reader takes it the same
    first = (tmp_path / "f.nii").read_bytes()
    code, _, err = call(*argv)
    assert code == 0, err
    values = (np.frombuffer(b[352:], np.int16) for b in (first, (tmp_path / "f.nii").read_bytes()))
    assert np.abs(np.subtract(*[v.astype(int) for v in values])).max() <= 40, "of 32767"


@pytest.mark.usefixtures("brighter")
def test_one_frame_and_no_move_need_no_registration(call, tmp_path, pair):
    argv = pair("CT", ("1.2.3", "1.2.3"))
    code, _, err = call(*argv, "--register", "off")
    assert code == 0, err
    state, registration = made(tmp_path / "out")
    assert registration is None
    assert "ReferencedSpatialRegistrationSequence" not in str(state)
    code, _, err = call(*pair("CT"), *UNMOVED)  # two frames, said to be one
    assert code == 0, err
    state, registration = made(tmp_path / "out")
    ids = [first_image(tmp_path / name).SOPInstanceUID for name in ("one", "two")]
    assert np.allclose(carried(registration, PLACES, *ids), PLACES)
    code, _, err = call(*pair("CT", ("1.2.3", "1.2.3")), "--register", "off")
    assert code == 0 and made(tmp_path / "out")[1] is None, "of the earlier run, it is removed"


@pytest.mark.usefixtures("brighter")
def test_the_state_refers_to_the_untouched_sources(call, tmp_path, pair):
    argv = pair("CT")
    before = {p: p.read_bytes() for name in ("one", "two") for p in (tmp_path / name).iterdir()}
    code, _, err = call(*argv, *UNMOVED)
    assert code == 0, err
    assert before == {p: p.read_bytes() for p in before}
    state, registration = made(tmp_path / "out")
    assert "PixelData" not in state and state.Modality == "PR" and registration.Modality == "REG"
    for n, name in enumerate(("one", "two"), 1):
        item = state.AdvancedBlendingSequence[n - 1]
        images = {pydicom.dcmread(p).SOPInstanceUID for p in (tmp_path / name).iterdir()}
        named = {image.ReferencedSOPInstanceUID for image in item.ReferencedImageSequence}
        assert named == images and len(images) == SHAPE[2]
        assert item.StudyInstanceUID == f"1.2.4{n}" and item.SeriesInstanceUID == f"1.2.5{n}"
        others = state.StudiesContainingOtherReferencedInstancesSequence[n - 1]
        (series,) = others.ReferencedSeriesSequence
        assert others.StudyInstanceUID == f"1.2.4{n}" and series.SeriesInstanceUID == f"1.2.5{n}"
        listed = {image.ReferencedSOPInstanceUID for image in series.ReferencedInstanceSequence}
        assert listed == images
    display = [item.GeometryForDisplay for item in state.AdvancedBlendingSequence]
    assert sorted(display) == ["FALSE", "TRUE"]
    moved = state.AdvancedBlendingSequence[display.index("FALSE")]
    (study,) = moved.ReferencedSpatialRegistrationSequence
    (series,) = study.ReferencedSeriesSequence
    (instance,) = series.ReferencedSOPSequence
    assert instance.ReferencedSOPInstanceUID == registration.SOPInstanceUID
    assert instance.ReferencedSOPClassUID == registration.SOPClassUID
    assert series.SeriesInstanceUID == registration.SeriesInstanceUID
    assert study.StudyInstanceUID == registration.StudyInstanceUID == state.StudyInstanceUID
    for ds in (state, registration):
        assert not missing_of_the_iod(ds)
        assert ds.SeriesDescription == "sources blended in place, not for diagnosis"


def shown_by(state, n, stored, slope, intercept, image):
    """What a viewer makes of a stored value of an image of input n: its index in the palette."""
    item = state.AdvancedBlendingSequence[n]
    for window in item.SoftcopyVOILUTSequence:
        images = window.get("ReferencedImageSequence")
        if images is None or image in [i.ReferencedSOPInstanceUID for i in images]:
            assert window.VOILUTFunction == "LINEAR_EXACT"
            low = float(window.WindowCenter) - float(window.WindowWidth) / 2
            return (stored * slope + intercept - low) / float(window.WindowWidth) * 255
    raise AssertionError("no window for this image")


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("colour", ("warm", "none"))
def test_windows_and_colours_are_those_of_the_result(call, tmp_path, pair, colour):
    """A PET whose slices differ in their slope: black to white is 0 to the highest value."""

    def slopes(ds, k, n):
        if n == 1:
            ds.RescaleSlope, ds.RescaleIntercept = f"{0.5 + k}", "0"

    code, _, err = call(*pair("PT", change=slopes), *UNMOVED, "--colour", colour)
    assert code == 0, err
    state, _ = made(tmp_path / "out")
    highest = read_dicom(tmp_path / "one").data.max()
    for path in sorted((tmp_path / "one").iterdir()):
        ds = pydicom.dcmread(path)
        slope = float(ds.RescaleSlope)
        for value in (0, highest / 2, highest):
            seen = shown_by(state, 0, value / slope, slope, 0, ds.SOPInstanceUID)
            assert seen == pytest.approx(255 * value / highest, abs=0.01)
    (table,) = state.AdvancedBlendingSequence[0].PaletteColorLookupTableSequence
    names = ("Red", "Green", "Blue")
    table = [getattr(table, f"{name}PaletteColorLookupTableData") for name in names]
    table = np.stack([np.frombuffer(data, "<u2") for data in table], 1) / 65535
    grey = np.linspace(0, 1, 256)[:, None].repeat(3, 1)
    assert np.allclose(table, grey if colour == "none" else colours(colour), atol=1e-4)


@pytest.mark.usefixtures("brighter")
def test_a_real_world_mapping_moves_the_window(call, tmp_path, pair):
    """Our values are Bq/ml by the mapping; a viewer's are those of the rescale slope."""

    def mapped(ds, k, n):
        if n == 1:
            code, item = pydicom.Dataset(), pydicom.Dataset()
            code.CodeValue = "Bq/ml"
            item.MeasurementUnitsCodeSequence = [code]
            item.RealWorldValueSlope, item.RealWorldValueIntercept = 10.0 + k, 0.0
            ds.RealWorldValueMappingSequence = [item]
            ds.Units, ds.RescaleSlope = "CNTS", "2"

    code, _, err = call(*pair("PT", change=mapped), *UNMOVED)
    assert code == 0, err
    state, _ = made(tmp_path / "out")
    highest = read_dicom(tmp_path / "one").data.max()
    for path in sorted((tmp_path / "one").iterdir())[::5]:
        ds = pydicom.dcmread(path)
        factor = float(ds.RealWorldValueMappingSequence[0].RealWorldValueSlope)
        seen = shown_by(state, 0, highest / factor, 2, 0, ds.SOPInstanceUID)
        assert seen == pytest.approx(255, abs=0.01)


@pytest.mark.usefixtures("brighter")
def test_frames_of_a_file_are_named(call, tmp_path, pair):
    argv = pair("CT")
    shutil.rmtree(tmp_path / "two")
    path = write_enhanced(tmp_path / "two.dcm", numbered(), affine_of("oblique"))
    ds = pydicom.dcmread(path)
    ds.StudyInstanceUID, ds.PatientID = "1.2.42", "same"
    ds.save_as(path)
    argv[argv.index(tmp_path / "two")] = path
    code, _, err = call(*argv, *UNMOVED)
    assert code == 0, err
    state, registration = made(tmp_path / "out")
    (image,) = state.AdvancedBlendingSequence[1].ReferencedImageSequence
    assert list(image.ReferencedFrameNumber) == list(range(1, SHAPE[2] + 1))
    (image,) = registration.RegistrationSequence[1].ReferencedImageSequence
    assert image.ReferencedSOPInstanceUID == ds.SOPInstanceUID
    windows = state.AdvancedBlendingSequence[1].SoftcopyVOILUTSequence
    assert len(windows) == 1, "frames differ in their slope, and a window counts after it"


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("nifti", "img2 is no DICOM"),
        ("no study", "the images of img1 have no valid UIDs"),
        ("MONOCHROME1", "img2 is stored inverted (MONOCHROME1)"),
        ("times", "img2 is not one of its points in time, but all of them together"),
        ("no frame", "img2 has no frame of reference"),
    ],
)
def test_a_line_says_why_there_is_none(call, heads, tmp_path, pair, change, words):
    def edit(ds, k, n):
        if change == "no study" and n == 1:
            del ds.StudyInstanceUID
        if change == "MONOCHROME1" and n == 2:
            ds.PhotometricInterpretation = change
        if change == "no frame" and n == 2:
            del ds.FrameOfReferenceUID
        if change == "times" and n == 2:
            ds.AcquisitionTime, ds.FrameReferenceTime = "100000", "0"

    argv = pair("CT", change=edit)
    if change == "nifti":
        argv[argv.index(tmp_path / "two")] = heads["mri"]
        argv += ["--grid", "1"]
    if change == "times":
        for path in list((tmp_path / "two").iterdir()):
            ds = pydicom.dcmread(path)
            ds.AcquisitionTime, ds.FrameReferenceTime = "110000", "9"
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            ds.save_as(path.with_name(f"{path.name}b"))
        argv += ["--frame", "mean"]
    code, out, err = call(*argv, "--register", "off", "--force", "space,overlap")
    assert code == 0, err
    line = f"--dicom: no presentation state that blends the sources, as {words}"
    assert out.count("presentation") == out.count(line) == 1, out
    assert made(tmp_path / "out") == [None, None]
    assert len(list((tmp_path / "out").iterdir())) > 10, "the slices are there"


@pytest.mark.usefixtures("brighter")
def test_nobody_unless_asked_for(call, tmp_path, pair):
    argv = pair("CT")
    code, _, err = call(*argv, *UNMOVED, "--grid", "2")
    assert code == 0, err
    for ds in made(tmp_path / "out"):
        assert SECRET not in str(ds) and "19010203" not in str(ds) and not ds.PatientID
        assert ds.StudyInstanceUID not in ("1.2.41", "1.2.42")
    slice_of = pydicom.dcmread(next((tmp_path / "out").glob("axial*")))
    assert slice_of.StudyInstanceUID == ds.StudyInstanceUID, "one new study for all"
    code, _, err = call(*argv, *UNMOVED, "--grid", "2", "--keep-patient")
    assert code == 0, err
    for ds in made(tmp_path / "out"):
        assert ds.PatientName == SECRET and ds.PatientID == "same"
        assert ds.StudyInstanceUID == "1.2.42" and "head of" not in str(ds)
    state, registration = made(tmp_path / "out")
    own = {series.SeriesInstanceUID for series in state.ReferencedSeriesSequence}
    assert own == {"1.2.52", registration.SeriesInstanceUID}
    (other,) = state.StudiesContainingOtherReferencedInstancesSequence
    assert other.StudyInstanceUID == "1.2.41"


@pytest.mark.usefixtures("brighter")
@pytest.mark.parametrize("keep", [(), ("--keep-patient",)])
@pytest.mark.parametrize("modality", ("CT", "PT", "NM"))
def test_a_validator_finds_no_error(call, tmp_path, pair, dicom_errors, modality, keep):
    code, _, err = call(*pair(modality), *UNMOVED, *keep)
    assert code == 0, err
    for name, kind in KINDS.items():
        path = tmp_path / "out" / f"{name}.dcm"
        assert dicom_errors(path, kind) == []
        ds = pydicom.dcmread(path)
        del ds.ContentLabel  # the test can fail
        ds.save_as(tmp_path / "wrong.dcm")
        assert any("ContentLabel" in line for line in dicom_errors(tmp_path / "wrong.dcm", kind))


@pytest.mark.usefixtures("brighter")
def test_a_registration_of_parts_of_a_frame_is_not_taken_by_its_frame(call, tmp_path, pair):
    """Two ways for one frame of reference, and no image tells which is meant."""
    argv = pair("CT", ("1.2.3", "1.2.3"))
    path = registration_object(tmp_path / "r.dcm", {"1.2.3": np.eye(4)})
    ds = pydicom.dcmread(path)
    ds.RegistrationSequence.append(pydicom.dcmread(path).RegistrationSequence[0])
    step = ds.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence[-1]
    step.FrameOfReferenceTransformationMatrix[3] = 5
    ds.save_as(path)
    code, _, err = call(*argv, "--register", path)
    assert code == 2 and "does not register the frame of reference of img1" in err, err


@pytest.mark.usefixtures("brighter")
def test_the_sidecar_lists_both(call, tmp_path, pair):
    assert call(*pair("CT"), *UNMOVED)[0] == 0
    listed = json.loads((tmp_path / "f.json").read_text())["files"]
    assert {"out/presentation.dcm", "out/registration.dcm"} < set(listed)
