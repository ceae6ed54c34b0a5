"""Values that a reader takes for the truth: SUV, HU, frames over time, and whose they are.

Expected SUV factors are worked out by hand from QIBA's rule: the weight in g over the dose,
decayed to the time that the values are corrected to. Where a comment says so, z-rad 26.9.0 (PyPI)
gives the same for the same header; it is not needed here.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import injected, write_enhanced, write_series
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from scipy.spatial.transform import Rotation
from test_volumes_register import registration_object
from volume_files import affine_of, numbered

from cli import UserError
from images import read_uint8
from studies.report import article, row_of
from volumes.decay import NUCLIDES, nuclide_of
from volumes.dicom import read_dicom
from volumes.durations import beside
from volumes.grid import RAS_LPS, Volume
from volumes.intensity import mri_scaling, scaling_of, units_doubt
from volumes.io import read_volume
from volumes.register import disagreement
from volumes.requests import Source, VolumeRequest, Writing
from volumes.suv import suv_factor
from volumes.transforms import matrix_from, read_transform
from volumes.varying import Choice

HALF_LIFE = 6586.2  # s, fluorine-18
SIEMENS = (0x0071, "SIEMENS MED PT", 0x22)
GE = (0x0009, "GEMS_PETD_01", 0x0D)


# --- SUV -------------------------------------------------------------------------------------


def pet(series, acquisition, injection="090000", own=None, **fields) -> Dataset:
    """70 kg and 400 MBq of fluorine-18; `own` is a private block and its time."""
    ds = Dataset()
    injected(ds)
    ds.Modality, ds.PatientWeight = "PT", "70"
    ds.SeriesTime, ds.AcquisitionTime = series, acquisition
    drug = ds.RadiopharmaceuticalInformationSequence[0]
    drug.RadiopharmaceuticalStartTime = injection
    if own:
        (group, creator, element), moment = own
        ds.private_block(group, creator, create=True).add_new(element, "DT", moment)
    for name, value in fields.items():
        setattr(drug if name.startswith("Radio") else ds, name, value)
    return ds


def by_hand(seconds: float) -> float:
    """g over Bq, the dose decayed for so many seconds."""
    return 70e3 / (400e6 * 2 ** (-seconds / HALF_LIFE))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        # z-rad gives 2.5561143e-4, 3.7335545e-4, 2.5561143e-4, 3.7335545e-4 and 2.4730772e-4
        (pet("130000", "105000", own=(SIEMENS, "20200131100000.000000")), 3600),
        (pet("104500", "110000", own=(GE, "20200131110000.00")), 7200),
        (
            pet(  # injected at 8:00 UTC, so at 9:00 by the scanner's clock
                "130000",
                "105000",
                own=(SIEMENS, "20200131100000"),
                RadiopharmaceuticalStartDateTime="20200131080000+0000",
                TimezoneOffsetFromUTC="+0100",
            ),
            3600,
        ),
        (
            pet(
                "104500",
                "110000",
                own=(GE, "20200131110000"),
                RadiopharmaceuticalStartDateTime="20200131090000",
            ),
            7200,
        ),
        (pet("130000", "001000", "231013.8", own=(SIEMENS, "20200131000500")), 3286.2),
        # a private time in another zone, as bytes of implicit VR, with only a clock; the scan's
        # date removed; a date of injection whose clock is in the other field
        (
            pet(
                "130000",
                "105000",
                own=(SIEMENS, "20200131090000+0000"),
                TimezoneOffsetFromUTC="+0100",
            ),
            3600,
        ),
        (pet("130000", "105000", own=(SIEMENS, b"20200131100000.000000 ")), 3600),
        (pet("130000", "105000", own=(GE, "100000")), 3600),
        (pet("130000", "100000", SeriesDate="", AcquisitionDate=""), 3600),
        (pet("100000", "100000", RadiopharmaceuticalStartDateTime="20200131"), 3600),
        # one that began before the injection, as a scan over time does
        (pet("085950", "085950"), -10),
        # DICOM's own field, in an enhanced file
        (pet("130000", "105000", DecayCorrectionDateTime="20200131100000"), 3600),
    ],
)
def test_suv_is_for_the_time_that_the_scanner_names(header, seconds):
    assert suv_factor([header])[0] == pytest.approx(by_hand(seconds), rel=1e-6)


def test_who_made_a_private_time_is_asked():
    """Another maker's field of the same number is none."""
    other = (0x0071, "SOMEONE ELSE", 0x22)
    factor, _ = suv_factor([pet("105000", "105000", own=(other, "20200131100000"))])
    assert factor == pytest.approx(by_hand(6600), rel=1e-6)
    header = pet("130000", "105000", own=(SIEMENS, "20200131100000"))
    del header[0x00710010]
    assert suv_factor([header])[0] == pytest.approx(by_hand(6600), rel=1e-6)
    header.Manufacturer = "SIEMENS"  # the creator's name alone was removed
    assert suv_factor([header])[0] == pytest.approx(by_hand(3600), rel=1e-6)


def test_without_it_the_earliest_counts_and_the_other_is_named():
    factor, line = suv_factor([pet("130000", t) for t in ("110500", "105000", "105500")])
    assert factor == pytest.approx(by_hand(6600), rel=1e-6)
    # 13:00 is 7800 s after 10:50: 2 ** (7800 / 6586.2) = 2.27
    assert line == (
        "SUV is for the first acquisition's time; the series' time is 130 minutes after it and "
        "would make it 2.27 times as high"
    )
    factor, line = suv_factor([pet("103000", "105000")])
    assert factor == pytest.approx(by_hand(5400), rel=1e-6)
    assert "SUV is for the series' time; the first acquisition's time is 20 minutes after" in line
    assert suv_factor([pet("105000", "105059")])[1] == ""


def test_a_note_on_the_time_reaches_the_volume(tmp_path):
    def late(ds, k):
        injected(ds)
        ds.SeriesTime = "020000"
        ds.private_block(*SIEMENS[:2], create=True).add_new(SIEMENS[2], "DT", "20200131010000")

    write_series(tmp_path, numbered(), affine_of("identity"), "PT", change=late)
    volume = read_dicom(tmp_path)
    assert volume.suv == pytest.approx(77.5e3 / 200e6, rel=1e-6)
    assert any(note.startswith("SUV is for the scanner's own start") for note in volume.notes)


def coded(value, scheme="SCT", meaning="") -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"RadionuclideTotalDose": "200"}, "dose is not between"),  # MBq
        ({"RadionuclideTotalDose": "2e12"}, "dose is not between"),
        ({"PatientWeight": "70000"}, "weight is not between"),  # g
        ({"PatientWeight": "0.2"}, "weight is not between"),
        ({"RadionuclideHalfLife": "109.8"}, "do not fit"),  # minutes
        (
            {"RadionuclideHalfLife": "1223", "RadionuclideCodeSequence": coded("77004003")},
            "half-life is not that of F-18",
        ),
        (
            {"RadionuclideHalfLife": "4062", "RadionuclideCodeSequence": coded("C-111A1", "SRT")},
            "half-life is not that of F-18",
        ),
        (
            {"RadionuclideCodeSequence": coded("1", "99LOCAL", "^68^Gallium")},
            "half-life is not that of Ga-68",
        ),
        ({"AcquisitionTime": "163000", "SeriesTime": "163000"}, "do not fit"),  # 4.1 half-lives
        ({"AcquisitionTime": "000000"}, "exactly midnight"),
        ({"SeriesTime": "000000.000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartTime": "000000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartDateTime": "20200131000000"}, "exactly midnight"),
        ({"RadiopharmaceuticalStartDateTime": "20190101090000"}, "do not fit"),
        ({"RadiopharmaceuticalStartTime": "105500"}, "do not fit"),  # after the scan
        ({"RadionuclideHalfLife": "282280"}, "no date of injection"),  # zirconium-89
        ({"DecayCorrection": "NONE"}, "neither START nor ADMIN"),
        ({"CorrectedImage": ["DECY", "RAN"]}, "not corrected for attenuation and decay"),
        ({"CorrectedImage": ["DECAY", "NORM"]}, "not corrected for attenuation"),
        ({"RadiopharmaceuticalStartTime": "", "SeriesTime": ""}, "no time of injection"),
    ],
)
def test_what_cannot_be_has_no_suv(fields, reason):
    factor, why = suv_factor([pet("100000", "100000", **fields)])
    assert factor is None and reason in why
    assert "70" not in why.replace("70000", ""), "no weight of a patient"


def test_what_can_be_just_has():
    at_most = {"RadionuclideTotalDose": "1e5", "PatientWeight": "0.5"}
    assert suv_factor([pet("100000", "100000", **at_most)])[0] > 0
    near = {"RadionuclideHalfLife": "6200", "RadionuclideCodeSequence": coded("77004003")}
    assert suv_factor([pet("100000", "100000", **near)])[0] > 0
    unknown = {"RadionuclideCodeSequence": coded("1", "99LOCAL", "something")}
    assert suv_factor([pet("100000", "100000", **unknown)])[0] > 0
    zirconium = {
        "RadionuclideHalfLife": "282280",
        "RadiopharmaceuticalStartDateTime": "20200127100000",
    }
    factor, _ = suv_factor([pet("100000", "100000", **zirconium)])
    assert factor == pytest.approx(70e3 / (400e6 * 2 ** (-4 * 86400 / 282280)), rel=1e-6)


def test_files_of_a_series_agree_on_dose_and_time():
    own = [(GE, f"202001311{n}0000") for n in (0, 1)]
    differing = [pet("100000", "100000", own=time) for time in own]
    assert "decayed to several times" in suv_factor(differing)[1]
    weights = [pet("100000", "100000", PatientWeight=w) for w in ("70", "71")]
    assert "differ in weight" in suv_factor(weights)[1]
    two = pet("100000", "100000")
    two.RadiopharmaceuticalInformationSequence = [Dataset(), Dataset()]
    assert "several injections" in suv_factor([two])[1]


def test_administration_needs_no_time():
    factor, line = suv_factor([pet("", "", "", DecayCorrection="ADMIN")])
    assert factor == pytest.approx(70e3 / 400e6) and not line


def test_nuclides_by_code_and_by_name():
    for keyword, code in codes.cid4020.concepts.items():
        drug = Dataset()
        drug.RadionuclideCodeSequence = coded(code.value, code.scheme_designator)
        assert nuclide_of(drug) in NUCLIDES, keyword
        drug.RadionuclideCodeSequence = coded("", "", code.meaning)
        assert nuclide_of(drug).replace(" ", "") == keyword.strip("_"), keyword
    for meaning in ("F-18", "18F", "F18", "Fluor-18", "^18^Fluorine"):
        drug.RadionuclideCodeSequence = coded("", "", meaning)
        assert nuclide_of(drug) == "18 Fluorine", meaning
    assert nuclide_of(pydicom.Dataset()) == ""


# --- frames over time ------------------------------------------------------------------------

SHAPE = (16, 18, 5)
PLACE = np.diag([4.0, 4.0, 6.0, 1.0])


def over_time(folder, values, seconds=None, modality="PT", **fields):
    """A series of frames that hold one value each, the n-th for so many seconds."""
    for n, value in enumerate(values):

        def at(ds, k, n=n):
            injected(ds)
            ds.FrameReferenceTime = 1000.0 * n
            if seconds:
                ds.ActualFrameDuration = str(int(1000 * seconds[n]))
            for name, content in fields.items():
                setattr(ds, name, content)

        data = np.full(SHAPE, value, np.int16)
        for path in write_series(folder, data, PLACE, modality, change=at):
            path.rename(path.with_name(f"{n}{path.name[2:]}"))
    return folder


def test_a_mean_over_time_weighs_frames_by_their_durations(tmp_path):
    """100 for 15 s and 10 for 240 s: (100 * 15 + 10 * 240) / 255 = 15.29."""
    choice = Choice(time="mean")
    volume = read_dicom(over_time(tmp_path / "a", (100, 10), (15, 240)), choice=choice)
    assert np.allclose(volume.data, 3900 / 255, rtol=1e-5)
    assert "weighted by their durations, 15 to 240 s" in volume.notes[0]
    equal = read_dicom(over_time(tmp_path / "b", (100, 10), (60, 60)), choice=choice)
    assert np.allclose(equal.data, 55) and "all of one duration" in equal.notes[0]
    unknown = read_dicom(over_time(tmp_path / "c", (100, 10)), choice=choice)
    assert np.allclose(unknown.data, 55) and "unweighted" in unknown.notes[0]
    half = read_dicom(over_time(tmp_path / "d", (100, 10), (15, 0)), choice=choice)
    assert np.allclose(half.data, 55) and "unweighted" in half.notes[0]
    counts = over_time(tmp_path / "e", (100, 10), (15, 240), Units="CNTS")
    volume = read_dicom(counts, choice=choice)
    assert np.allclose(volume.data, 55) and "unweighted, as they are counts" in volume.notes[0]


@pytest.mark.parametrize(
    ("content", "mean"),
    [
        ({"FrameDuration": [15, 240.0]}, 3900 / 255),
        ({"FrameDuration": [60, 60]}, 55),
        ({"FrameDuration": [15]}, 55),
        ({"FrameDuration": [15, -1]}, 55),
        ({"FrameDuration": [15, "240"]}, 55),
        ({"FrameDuration": None}, 55),
        ([15, 240], 55),
        (None, 55),
    ],
)
def test_the_sidecar_of_a_4d_file_tells_durations(tmp_path, content, mean):
    data = np.stack([np.full(SHAPE, 100.0), np.full(SHAPE, 10.0)], -1).astype(np.float32)
    nib.Nifti1Image(data, PLACE).to_filename(tmp_path / "a_pet.nii.gz")
    if content is not None:
        (tmp_path / "a_pet.json").write_text(json.dumps(content))
    volume = read_volume(tmp_path / "a_pet.nii.gz", choice=Choice(time="mean"))
    assert np.allclose(volume.data, mean, rtol=1e-5)
    told = content == {"FrameDuration": [60, 60]}
    words = "all of one" if told else "unweighted" if mean == 55 else "weighted by"
    assert words in volume.notes[0] and "2 volumes" in volume.notes[0]


def test_a_damaged_sidecar_is_no_reason_to_stop(tmp_path):
    (tmp_path / "a.json").write_text("{")
    assert beside(tmp_path / "a.json") == []
    (tmp_path / "b.json").write_text("[" * 100000)
    assert beside(tmp_path / "b.json") == []


def test_a_sum_of_concentrations_is_named_for_what_it_is(tmp_path):
    volume = read_dicom(over_time(tmp_path / "a", (100, 10)), choice=Choice(time="sum"))
    assert np.allclose(volume.data, 110) and volume.suv is None
    assert "sum of 2 points in time" in volume.notes[0]
    assert "of concentrations, 2 times their unweighted mean" in volume.notes[0]
    scaling = scaling_of(volume, "PET", "wide", 15)
    assert scaling.method["unit"] == "summed Bq/ml"
    counts = over_time(tmp_path / "b", (100, 10), Units="CNTS")
    scaling = scaling_of(read_dicom(counts, choice=Choice(time="sum")), "PET", "wide", 15)
    assert scaling.method["unit"] == "counts"


# --- one series is one thing -----------------------------------------------------------------


def one_slice_differs(folder, which, count=5, **fields):
    def change(ds, k):
        injected(ds)
        if k in which:
            for name, value in fields.items():
                setattr(ds, name, value)

    write_series(folder, numbered((16, 18, count)), PLACE, "PT", change=change)
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"FrameOfReferenceUID": "1.2.99"}, "frames of reference"),
        ({"Modality": "CT"}, "modalities"),
        ({"Units": "CNTS"}, "units"),
    ],
)
def test_a_slice_of_another_kind_is_left_out_with_a_line(tmp_path, fields, words):
    volume = read_dicom(one_slice_differs(tmp_path / "end", [4], **fields))
    assert volume.data.shape[2] == 4
    assert volume.notes[0] == f"1 images with other {words} left out (IM0004)"
    with pytest.raises(UserError, match=rf"1 slices missing.*other {words} left out \(IM0002"):
        read_dicom(one_slice_differs(tmp_path / "middle", [2], **fields))
    with pytest.raises(UserError, match=rf"mixed {words} in one series"):
        read_dicom(one_slice_differs(tmp_path / "many", [0, 1], count=4, **fields))


@pytest.mark.parametrize("slope", ("0", "0.0"))
def test_a_slope_of_zero_is_refused(tmp_path, slope):
    with pytest.raises(UserError, match="IM0003: its rescale slope is 0"):
        read_dicom(one_slice_differs(tmp_path, [3], RescaleSlope=slope))
    path = write_enhanced(tmp_path / "e.dcm", numbered(SHAPE), PLACE)
    ds = pydicom.dcmread(path)
    group = ds.PerFrameFunctionalGroupsSequence[1]
    group.PixelValueTransformationSequence[0].RescaleSlope = slope
    ds.save_as(path)
    with pytest.raises(UserError, match="its rescale slope is 0"):
        read_dicom(path)


# --- single slices, nuclear medicine, real world values --------------------------------------


def test_a_single_slice_of_an_enhanced_file_has_its_thickness(tmp_path):
    path = write_enhanced(tmp_path / "e.dcm", numbered((16, 18, 1)), PLACE)
    ds = pydicom.dcmread(path)
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness = "5"
    ds.save_as(path)
    assert read_dicom(path).spacing[2] == pytest.approx(5)
    del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness
    ds.save_as(path)
    volume = read_dicom(path)
    assert volume.spacing[2] == pytest.approx(1)
    assert "the thickness of its slice is not told, taken as 1 mm" in volume.notes


def nuclear(folder, data, vector=None, change=None):
    """A reconstructed SPECT in one file, its frames as SliceVector says."""
    [path] = write_series(folder, data[:, :, :1], PLACE, "NM")
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames, ds.SpacingBetweenSlices = data.shape[2], "6"
    ds.PixelData = np.ascontiguousarray(data.T).tobytes()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
    if vector is not None:
        ds.FrameIncrementPointer, ds.SliceVector = 0x00540080, vector
    if change:
        change(ds)
    ds.save_as(path)
    return path


def test_frames_of_nuclear_medicine_are_where_their_slice_vector_says(tmp_path):
    data = numbered(SHAPE)
    mixed = data[:, :, [0, 2, 4, 1, 3]]
    volume = read_dicom(nuclear(tmp_path / "a", mixed, [1, 3, 5, 2, 4]))
    assert np.array_equal(volume.data, data) and volume.spacing[2] == pytest.approx(6)
    plain = read_dicom(nuclear(tmp_path / "b", data))
    assert np.array_equal(plain.data, data) and np.allclose(plain.affine, volume.affine)
    backwards = read_dicom(
        nuclear(tmp_path / "c", data, change=lambda ds: setattr(ds, "SpacingBetweenSlices", "-6"))
    )
    assert np.array_equal(backwards.data, data[:, :, ::-1])
    with pytest.raises(UserError, match="does not say where its image lies"):
        read_dicom(nuclear(tmp_path / "d", data, [1, 2, 3]))


def test_slices_that_a_vector_names_twice_are_chosen(tmp_path):
    """1 to 5 twice is 5 slices, two of each, and not 10."""
    twice = np.concatenate([numbered(SHAPE), numbered(SHAPE) + 7], 2)
    path = nuclear(tmp_path / "a", twice, [*range(1, 6)] * 2)
    with pytest.raises(UserError, match=r"5 positions occur twice.*choose by --frame 1 to 2"):
        read_dicom(path)
    volume = read_dicom(path, choice=Choice(time="2"))
    assert np.array_equal(volume.data, numbered(SHAPE) + 7)

    def windows(ds):
        ds.EnergyWindowVector = [1] * 5 + [2] * 5

    path = nuclear(tmp_path / "b", twice, [*range(1, 6)] * 2, windows)
    with pytest.raises(UserError, match="choose by --where EnergyWindowVector=1"):
        read_dicom(path)
    volume = read_dicom(path, choice=Choice("EnergyWindowVector=1"))
    assert np.array_equal(volume.data, numbered(SHAPE))


def without_place(ds):
    del ds.ImagePositionPatient, ds.ImageOrientationPatient


def test_nuclear_medicine_without_a_place_needs_force(call, brighter, tmp_path):
    path = nuclear(tmp_path / "nm", numbered((20, 22, 18)), change=without_place)
    mri = tmp_path / "mri.nii"
    nib.Nifti1Image(numbered((20, 22, 18)), read_dicom(path).affine).to_filename(mri)
    argv = ["--task", "SPECT-MRI", "--img1", path, "--img2", mri, "--out", tmp_path / "f.nii"]
    argv += ["--register", "off"]
    code, _, err = call(*argv)
    assert code == 2 and "img1 does not say where it is" in err and "--force place" in err
    code, stdout, err = call(*argv, "--force", "place")
    assert code == 0 and "forced (place)" in stdout, err


def mapping(unit, slope=0.5, intercept=0.0):
    item = Dataset()
    item.RealWorldValueFirstValueMapped, item.RealWorldValueLastValueMapped = 0, 4000
    item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, intercept
    item.MeasurementUnitsCodeSequence = coded(unit, "UCUM")
    return item


def test_real_world_values_count_where_the_others_are_counts(tmp_path):
    data = numbered(SHAPE)

    def having(*items):
        return lambda ds: setattr(ds, "RealWorldValueMappingSequence", list(items))

    volume = read_dicom(nuclear(tmp_path / "a", data, change=having(mapping("kBq/ml", 0.25, 2))))
    assert np.allclose(volume.data, data * 250.0 + 2000) and volume.unit == "Bq/ml"
    assert "values in Bq/ml by its RealWorldValueMapping" in volume.notes
    both = having(mapping("Bq/ml", 3), mapping("{SUVbw}g/ml", 0.5))
    volume = read_dicom(nuclear(tmp_path / "b", data, change=both))
    assert np.allclose(volume.data, data * 0.5) and volume.unit == "SUV"
    for name, items in (("c", [mapping("[arb'U]")]), ("d", [mapping("Bq/ml")] * 2)):
        volume = read_dicom(nuclear(tmp_path / name, data, change=having(*items)))
        assert np.array_equal(volume.data, data) and volume.unit == "counts"
        assert any("its RealWorldValueMapping was not used" in note for note in volume.notes)

    def pet(ds, k):
        injected(ds)
        del ds.Units
        ds.RealWorldValueMappingSequence = [mapping("Bq/ml", 2)]

    write_series(tmp_path / "pet", data, PLACE, "PT", change=pet)
    volume = read_dicom(tmp_path / "pet")
    assert np.allclose(volume.data, data * 2.0) and volume.unit == "Bq/ml"
    assert volume.suv == pytest.approx(77.5e3 / 200e6, rel=1e-6)

    def known(ds, k):
        pet(ds, k)
        ds.Units = "BQML"

    write_series(tmp_path / "known", data, PLACE, "PT", change=known)
    assert np.array_equal(read_dicom(tmp_path / "known").data, data)


# --- two people ------------------------------------------------------------------------------

PEOPLE = {"PatientID": "other", "PatientBirthDate": "19991231", "PatientSex": "M"}


def pair_of(folder, **other) -> list:
    """Arguments for a CT and an MRI on one grid, the latter of somebody with these fields."""

    def ours(ds, k):
        ds.PatientSex = "F"

    def theirs(ds, k):
        ours(ds, k)
        for name, value in other.items():
            setattr(ds, name, value)

    data, place = numbered((20, 22, 18)), np.diag([4.0, 4.0, 6.0, 1.0])
    write_series(folder / "ct", data, place, "CT", change=ours)
    write_series(folder / "mr", data, place, "MR", change=theirs)
    argv = ["--img1", folder / "ct", "--img2", folder / "mr", "--out", folder / "f.nii"]
    return [*argv, "--window", "2000,4000", "--register", "off"]


@pytest.mark.parametrize(
    ("fields", "stops"),
    [
        (("PatientID",), False),
        (("PatientBirthDate",), False),
        (("PatientSex",), False),
        (("PatientID", "PatientBirthDate"), True),
        (("PatientID", "PatientSex"), True),
        (("PatientBirthDate", "PatientSex"), False),
        ((), None),
    ],
)
def test_people_who_differ_are_a_line_or_stop(call, brighter, tmp_path, fields, stops):
    argv = pair_of(tmp_path, **{name: PEOPLE[name] for name in fields})
    code, stdout, err = call(*argv)
    assert code == (2 if stops else 0), err
    assert ("img1 and img2 differ in the patient's" in stdout) == (stops is False)
    if stops:
        assert "img1 and img2 are of two patients: ID and" in err and "--force patient" in err
        assert call(*argv, "--force")[0] == 2, "not by all, as it would be overlooked"
        code, stdout, err = call(*argv, "--force", "patient")
        assert code == 0 and "forced (patient): img1 and img2 are of two patients" in stdout, err
    told = (stdout + err).replace(str(tmp_path), "")
    for secret in ("other", "19991231", "19010203", "Doe"):
        assert secret not in told


def test_blanks_around_an_id_and_missing_fields_do_not_count(call, brighter, tmp_path):
    argv = pair_of(tmp_path, PatientID=" id doe^jane ", PatientBirthDate="", PatientSex="")
    code, stdout, err = call(*argv)
    assert code == 0 and "differ" not in stdout, err


# --- HU --------------------------------------------------------------------------------------


def ct_of(change) -> np.ndarray:
    """A drawn head CT of 60x60x40 voxels in HU, after a change."""
    x, y, z = np.meshgrid(*[np.linspace(-1.3, 1.3, n) for n in (60, 60, 40)], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    hu = np.where(radius < 0.85, 35.0, np.where(radius < 1, 900.0, -1000.0))
    rng = np.random.default_rng(0)
    return change(hu + rng.normal(scale=20, size=hu.shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "window", "words"),
    [
        (lambda hu: hu, "wide", ""),
        (lambda hu: np.clip(hu, -1024, 3071), "brain", ""),
        (lambda hu: np.where(np.arange(60)[:, None, None] < 9, -3024, hu), "wide", ""),
        (lambda hu: hu + 1024, "wide", "near -1000 HU"),  # no intercept
        (lambda hu: np.maximum(hu, 0), "wide", "near -1000 HU"),
        (lambda hu: hu * 10, "wide", "near -1000 HU"),
        (lambda hu: hu - 32792, "wide", "0.0% of them lie in the window of -100 to 1000"),
        (lambda hu: hu / 1000, "wide", "near -1000 HU"),
        (lambda hu: np.clip(hu / 1000, -1, 1) * 0.1 - 200, "wide", "lie in the window"),
        (lambda hu: hu / 1000, "0.04,0.08", ""),
        (lambda hu: hu + 1024, "1064,80", ""),
        (lambda hu: hu, "5000,80", "0.0% of them lie in the window of 4960 to 5040"),
    ],
)
def test_a_ct_that_is_not_in_hu_is_told(change, window, words):
    doubt = units_doubt(ct_of(change), window)
    assert words in doubt and bool(words) == bool(doubt)
    if doubt:
        assert "--window LEVEL,WIDTH" in doubt and "--force units" in doubt


def test_a_ct_that_is_not_in_hu_stops(call, brighter, heads, tmp_path):
    image = nib.load(heads["ct"])
    wrong = tmp_path / "ct.nii.gz"
    nib.Nifti1Image(image.get_fdata().astype(np.float32) + 1024, image.affine).to_filename(wrong)
    argv = ["--img1", wrong, "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    argv += ["--register", "off"]
    code, _, err = call(*argv)
    assert code == 2 and err.count("\n") == 1 and "its values go from 24 to 1924" in err
    assert not (tmp_path / "f.nii").exists()
    assert call(*argv, "--window", "1064,80")[0] == 0
    code, stdout, err = call(*argv, "--force", "units")
    assert code == 0 and "img1: forced (units): its values go from" in stdout, err
    argv[1] = heads["pet"]
    argv += ["--task", "PET-MRI", "--via", wrong, "--register", "rigid"]
    code, _, err = call(*argv)
    assert code == 2 and "near -1000 HU" in err, "nor is the CT that came with a PET"


# --- one scale for one source ----------------------------------------------------------------


def test_the_scale_of_a_source_does_not_follow_the_grid(call, brighter, heads, tmp_path):
    levels = []
    for n, grid in enumerate(("1", "2", "7")):
        out = tmp_path / f"{n}.nii"
        argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
        code, _, err = call(*argv, "--out", out, "--register", "off", "--grid", grid)
        assert code == 0, err
        levels.append(json.loads(out.with_suffix(".json").read_text())["levels"])
    assert levels[0] == levels[1] == levels[2]
    mri = nib.load(heads["mri"]).get_fdata(dtype=np.float32)
    assert levels[0]["source2"]["high"] == mri_scaling(mri).high
    assert levels[0]["source1"]["high"] == nib.load(heads["pet"]).get_fdata().max()


# --- the CT that came with a PET -------------------------------------------------------------


def test_via_takes_the_ct_of_a_folder_and_never_an_mri(tmp_path):
    data = numbered(SHAPE)
    write_series(tmp_path / "v" / "ct", data, PLACE, "CT", series="1.2.70")
    write_series(tmp_path / "v" / "mr", data + 1, PLACE, "MR", series="1.2.71")
    assert np.array_equal(read_volume(tmp_path / "v", None, "--via").data, data)
    write_series(tmp_path / "v" / "ct2", data, PLACE, "CT", series="1.2.72")
    with pytest.raises(UserError) as error:
        read_volume(tmp_path / "v", None, "--via")
    text = str(error.value)
    assert "2 series are CT; give --via a folder that has the one alone" in text
    assert "(in ct)" in text and "(in ct2)" in text and "mr)" not in text
    assert np.array_equal(read_volume(tmp_path / "v" / "ct2", None, "--via").data, data)
    for path in (tmp_path / "v" / "ct").iterdir():
        path.unlink()
    write_series(tmp_path / "w" / "a", data, PLACE, "MR", series="1.2.73")
    write_series(tmp_path / "w" / "b", data, PLACE, "PT", series="1.2.74")
    with pytest.raises(UserError, match="2 series, and none is a CT; give --via a folder"):
        read_volume(tmp_path / "w", None, "--via")


def test_an_mri_is_no_companion_ct(call, brighter, heads, tmp_path):
    write_series(tmp_path / "mr", numbered(), affine_of("identity"), "MR")
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    argv += ["--out", tmp_path / "f.nii", "--register", "rigid", "--via"]
    code, _, err = call(*argv, tmp_path / "mr")
    assert code == 2 and "its modality is MR, PET-MRI expects CT as --via" in err


# --- transforms that do not place a head -----------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "words"),
    [
        (np.diag([-1.0, 1, 1]), "mirrors"),
        (np.diag([-1.0, -1, -1]), "mirrors"),
        (np.diag([3.0, 3, 3]), "stretches by 3 and 3"),
        (np.diag([1.0, 1, 0.7]), "stretches by 0.7 and 1"),
        (np.diag([1.0, 1.3, 1]), "stretches by 1 and 1.3"),
        (np.array([[1.0, 0.9, 0], [0, 1, 0], [0, 0, 1]]), "stretches by"),  # a shear
        (np.diag([1.24, 0.81, 1]), ""),
        (Rotation.from_euler("xyz", (170, 20, -30), degrees=True).as_matrix(), ""),
    ],
)
def test_a_linear_file_must_place_a_head(tmp_path, linear, words):
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation((3.0, 4.0, 5.0))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, (3, 4, 5)
    sitk.WriteTransform(transform, str(tmp_path / "t.tfm"))
    registration_object(tmp_path / "r.dcm", {"1.2.1": np.eye(4), "1.2.2": np.linalg.inv(matrix)})
    volumes = [
        Volume(np.zeros(SHAPE, np.float32), PLACE, frame_of_reference=f"1.2.{n}") for n in (1, 2)
    ]
    for name in ("t.tfm", "r.dcm"):
        if words:
            with pytest.raises(UserError, match=words):
                matrix_from(tmp_path / name, *volumes, "CT")
        else:
            found = RAS_LPS @ matrix_from(tmp_path / name, *volumes, "CT").matrix @ RAS_LPS
            assert np.allclose(found, matrix, atol=1e-6)


@pytest.mark.parametrize(("scale", "taken"), [(1.9, True), (0.55, True), (2.2, False), (-1, False)])
def test_a_linear_file_of_images_may_scale_more(tmp_path, scale, taken):
    transform = sitk.AffineTransform(2)
    transform.SetMatrix([scale, 0, 0, abs(scale)])
    sitk.WriteTransform(transform, str(tmp_path / "t.tfm"))
    if taken:
        assert read_transform(tmp_path / "t.tfm", 2)[0, 0] == pytest.approx(scale)
    else:
        with pytest.raises(UserError, match="its matrix"):
            read_transform(tmp_path / "t.tfm", 2)


def test_a_dicom_matrix_that_is_none_of_points_is_refused(tmp_path):
    odd = np.eye(4)
    odd[3] = [0, 0, 0.1, 1]
    registration_object(tmp_path / "r.dcm", {"1.2.1": np.eye(4), "1.2.2": odd})
    volumes = [
        Volume(np.zeros(SHAPE, np.float32), PLACE, frame_of_reference=f"1.2.{n}") for n in (1, 2)
    ]
    with pytest.raises(UserError, match="last row"):
        matrix_from(tmp_path / "r.dcm", *volumes, "CT")


# --- sentences that were not true ------------------------------------------------------------


def test_what_was_measured_to_lie_on_each_other_is_not_refused(call, brighter, heads, tmp_path):
    """Two volumes on one grid, of which one's NIfTI code names another space."""
    image = nib.load(heads["mri"])
    image = nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine)
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 4)
    image.to_filename(tmp_path / "mri.nii.gz")
    ct = nib.load(heads["ct"])
    ct = nib.Nifti1Image(ct.get_fdata(dtype=np.float32), ct.affine)
    ct.set_sform(ct.affine, 1)
    ct.set_qform(ct.affine, 1)
    ct.to_filename(tmp_path / "ct.nii.gz")
    argv = ["--img1", tmp_path / "ct.nii.gz", "--img2", tmp_path / "mri.nii.gz"]
    code, stdout, err = call(*argv, "--out", tmp_path / "f.nii.gz")
    assert code == 0 and "lie on each other" in stdout, err
    assert "img2 in MNI152 space, but they were measured to lie on each other" in stdout
    registration = json.loads((tmp_path / "f.json").read_text())["registration"]
    assert registration["moved_mm"] == 0 < registration["apart_mm"]
    code, _, err = call(*argv, "--out", tmp_path / "g.nii.gz", "--register", "off")
    assert code == 2 and "--force space" in err


def test_slices_as_png_have_square_pixels(call, brighter, tmp_path):
    """20 x 18 voxels of 4 x 6 mm: a coronal slice is 18 * 6 / 4 = 27 pixels high."""
    data, place = numbered((20, 22, 18)), np.diag([4.0, 4.0, 6.0, 1.0])
    for name, modality in (("nm", "NM"), ("mr", "MR")):
        write_series(tmp_path / name, data, place, modality)
    argv = ["--task", "SPECT-MRI", "--img1", tmp_path / "nm", "--img2", tmp_path / "mr"]
    argv += ["--register", "off", "--colour", "none"]
    for axis, shape, told in (("coronal", (27, 20), True), ("axial", (22, 20), False)):
        out = tmp_path / axis
        more = ["--out", out / "f.nii", "--png", out / "png", "--axis", axis]
        code, stdout, err = call(*argv, *more)
        assert code == 0, err
        assert read_uint8(out / "png" / f"{axis}_0000.png").shape == shape
        assert ("so that pixels are square" in stdout) == told


def test_a_study_calls_only_a_move_moved(tmp_path):
    request = VolumeRequest(
        "CT-MRI", Source(Path("a.nii")), Source(Path("b.nii")), Writing(tmp_path / "f.nii.gz")
    )
    case = SimpleNamespace(name="c", request=request, record=tmp_path / "r.json")
    for applied, words in ((True, "moved 2.39 mm"), (False, "measured 2.39 mm apart, not moved")):
        found = {"applied": applied, "apart_mm": 2.39, "apart_pixels": None, "doubts": []}
        record = {"status": "done", "message": "", "seconds": 1.0, "found": found, "outputs": {}}
        row = row_of(case, record)
        assert (row["moved_mm"] == 2.39) == applied
        assert words in (f"moved {row['moved_mm']} mm" if applied else row["measured"])
        assert words in article(row, case, record, tmp_path)


def test_images_that_cannot_be_registered_do_not_speak_of_mm():
    class Found(NamedTuple):
        information: float
        transform: sitk.Transform

    away = sitk.Euler2DTransform()
    away.SetTranslation((20.0, 0.0))
    found = [Found(1.0, sitk.Euler2DTransform()), Found(1.0, away)]
    points = np.zeros((1, 2))
    [doubt] = disagreement(found[0], found, points, (2.0, "pixels"))
    assert doubt == "its starts disagree by 10.0 pixels, expected at most 1.5"
    [doubt] = disagreement(found[0], found, points)
    assert doubt == "its starts disagree by 20.0 mm, expected at most 3"
