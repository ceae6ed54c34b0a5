"""Volumes from DICOM: order, values, SUV, and nothing of the patient passed on."""

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import SECRET, injected, new_dataset, sample, write_enhanced, write_series
from volume_files import SHAPE, SPACING, affine_of, numbered

from cli import UserError
from volumes.dicom import read_dicom
from volumes.grid import RAS_LPS
from volumes.suv import suv_factor


def test_slices_shuffled_on_disk_give_the_same_volume(tmp_path):
    data, affine = numbered(), affine_of("oblique")
    write_series(tmp_path / "a", data, affine)
    order = np.random.default_rng(2).permutation(SHAPE[2])
    write_series(tmp_path / "b", data, affine, order=order)
    (tmp_path / "b" / "more").mkdir()
    (tmp_path / "b" / "IM0003").rename(tmp_path / "b" / "more" / "x.dcm")
    one, other = read_dicom(tmp_path / "a"), read_dicom(tmp_path / "b")
    assert np.array_equal(one.data, other.data) and np.array_equal(one.affine, other.affine)
    assert np.array_equal(one.data, data) and np.allclose(one.affine, affine, atol=1e-6)


def test_rescaling_is_per_slice(tmp_path):
    def per_slice(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = k + 1, -1024 + k

    data = numbered()
    write_series(tmp_path, data, affine_of("flipped"), "CT", change=per_slice)
    k = np.arange(SHAPE[2])
    assert np.array_equal(read_dicom(tmp_path).data, data * (k + 1.0) - 1024 + k)


def dark(ds, k):
    """The smallest value is displayed white."""
    ds.PhotometricInterpretation, ds.PixelRepresentation, ds.BitsStored = "MONOCHROME1", 0, 12
    ds.HighBit = 11


def test_monochrome1_is_inverted_where_values_are_no_measure(tmp_path):
    data = numbered()
    write_series(tmp_path / "mr", data, affine_of("identity"), "MR", change=dark)
    volume = read_dicom(tmp_path / "mr")
    assert np.array_equal(volume.data, data.max() - data) and "inverted" in volume.notes[0]

    def per_slice(ds, k):
        dark(ds, k)
        ds.RescaleSlope, ds.RescaleIntercept = k + 1, 7 * k

    write_series(tmp_path / "slopes", data, affine_of("identity"), "MR", change=per_slice)
    k = np.arange(SHAPE[2])
    rescaled = data * (k + 1.0) + 7 * k  # inverted after it, by one constant for all slices
    expected = rescaled.min() + rescaled.max() - rescaled
    assert np.array_equal(read_dicom(tmp_path / "slopes").data, expected)


@pytest.mark.parametrize("modality", ("CT", "PT", "NM"))
def test_monochrome1_keeps_values_that_are_a_measure(tmp_path, modality):
    data = numbered()

    def change(ds, k):
        if modality == "PT":
            injected(ds, k)
        dark(ds, k)

    how = {"slope": 2.0, "intercept": -1024.0, "change": change}
    write_series(tmp_path / "1", data, affine_of("identity"), modality, **how)
    volume = read_dicom(tmp_path / "1")
    assert np.array_equal(volume.data, data * 2.0 - 1024) and "kept" in volume.notes[0]
    assert (volume.suv is not None) == (modality == "PT")


def test_monochrome1_and_2_are_mixed_only_where_values_are_a_measure(tmp_path):
    def mixed(ds, k):
        if k > 5:
            dark(ds, k)

    data = numbered()
    write_series(tmp_path / "ct", data, affine_of("identity"), "CT", change=mixed)
    assert np.array_equal(read_dicom(tmp_path / "ct").data, data)
    write_series(tmp_path / "mr", data, affine_of("identity"), "MR", change=mixed)
    with pytest.raises(UserError, match="mixed MONOCHROME1 and MONOCHROME2"):
        read_dicom(tmp_path / "mr")


@pytest.mark.parametrize("kind", ("identity", "oblique"))
def test_enhanced_multi_frame(tmp_path, kind):
    data, affine = numbered() % 100, affine_of(kind)
    order = np.random.default_rng(3).permutation(SHAPE[2])
    path = write_enhanced(tmp_path / "e.dcm", data, affine, order=order)
    volume = read_dicom(path)
    assert np.array_equal(volume.data, data * np.arange(1.0, SHAPE[2] + 1))
    assert np.allclose(volume.affine, affine, atol=1e-6) and volume.modality == "MR"


def test_nuclear_medicine_frames_are_slices_only_in_a_reconstruction(tmp_path):
    data, affine = numbered(), affine_of("identity")
    [path] = write_series(tmp_path, data[:, :, :1], affine, "NM")
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames, ds.SpacingBetweenSlices = SHAPE[2], str(SPACING[2])
    ds.PixelData = np.ascontiguousarray(data.T).tobytes()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"]
    detector = pydicom.Dataset()
    detector.ImagePositionPatient = ds.ImagePositionPatient
    detector.ImageOrientationPatient = ds.ImageOrientationPatient
    del ds.ImagePositionPatient, ds.ImageOrientationPatient
    ds.DetectorInformationSequence = [detector]
    ds.save_as(path)
    volume = read_dicom(path)
    assert np.array_equal(volume.data, data) and np.allclose(volume.affine, affine, atol=1e-6)
    ds.ImageType[2] = "DYNAMIC"
    ds.save_as(path)
    with pytest.raises(UserError, match="frames over time"):
        read_dicom(path)


def test_samples_of_pydicom():
    plain = read_dicom(sample("MR_small.dcm"))
    assert plain.data.shape == (64, 64, 1) and plain.data.max() == 2145
    for name in ("RLE", "jp2klossless", "bigendian", "implicit", "expb"):
        assert np.array_equal(read_dicom(sample(f"MR_small_{name}.dcm")).data, plain.data), name
    ct = read_dicom(sample("CT_small.dcm"))
    assert (ct.data.min(), ct.data.max()) == (-896, 1167) and ct.modality == "CT"
    ds = pydicom.dcmread(sample("CT_small.dcm"))
    row, column = 3, 5  # column first in our index, and LPS against RAS
    position = np.array(ds.ImagePositionPatient) + 0.661468 * np.array([column, row, 0])
    assert np.allclose((ct.affine @ [column, row, 0, 1])[:3], position * [-1, -1, 1])
    assert ct.data[column, row, 0] == ds.pixel_array[row, column] - 1024
    series = read_dicom(sample("dicomdirtests/98892001/CT5N"))
    assert series.data.shape == (16, 16, 5) and series.spacing == pytest.approx([0.488, 0.488, 2.5],
        abs=1e-3)  # fmt: skip
    # ITK reads the same series on its own: same voxels at the same positions
    reader = sitk.ImageSeriesReader()
    folder = str(sample("dicomdirtests/98892001/CT5N"))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    image = reader.Execute()
    assert np.array_equal(sitk.GetArrayFromImage(image).T, series.data)
    lps = RAS_LPS @ series.affine
    assert np.allclose(image.TransformIndexToPhysicalPoint((7, 3, 4)), (lps @ [7, 3, 4, 1])[:3])


def test_a_series_is_chosen_by_number_or_uid(call, brighter, tmp_path):
    affine = affine_of("identity")
    write_series(tmp_path / "d", numbered(), affine, "CT", series="1.2.10")
    for path in (tmp_path / "d").iterdir():
        path.rename(path.with_name(f"ct{path.name}"))
    write_series(tmp_path / "d", numbered() + 1, affine, "MR", series="1.2.11")
    pair = ["--img1", tmp_path / "d", "--img2", tmp_path / "d", "--out", tmp_path / "f.nii.gz"]
    pair += ["--window", "2000,4000"]  # what is drawn is not in HU
    code, _, err = call(*pair)
    assert code == 2 and "--series1" in err
    assert "1: CT axial, 20 images of 28x24, 1.25x1.5x3 mm, contrast no; 2: MR" in err
    assert SECRET not in err and "1.2.11" not in err
    code, _, err = call(*pair, "--series1", 1)
    assert code == 2 and "--series2" in err
    assert call(*pair, "--series1", "1", "--series2", "2")[0] == 0
    assert call(*pair, "--series1", "1.2.10", "--series2", "1.2.11")[0] == 0
    code, _, err = call(*pair, "--series1", "3", "--series2", "2")
    assert code == 2 and "no series '3'" in err


def test_nothing_of_the_patient_is_passed_on(call, brighter, tmp_path):
    affine = affine_of("oblique")
    write_series(tmp_path / "pet", numbered(), affine, "PT", change=injected)
    write_series(tmp_path / "mr", numbered(), affine, "MR")
    out = tmp_path / "out"
    argv = ["--task", "PET-MRI", "--img1", tmp_path / "pet", "--img2", tmp_path / "mr"]
    argv += ["--out", out / "f.nii", "--colour", "hot", "--png", out, "--mosaic", out / "m.png"]
    code, stdout, err = call(*argv)
    assert code == 0, err
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"f.nii", "f_colour.nii", "f.json", "m.png", "axial_0000.png"} <= set(written)
    for text in (stdout + err, *(data.decode("latin1") for data in written.values())):
        for secret in (SECRET, "Doe", "19010203", "1.2.3", "1.2.4", str(tmp_path), "77.5"):
            if text != stdout + err or secret != str(tmp_path):  # the screen names the outputs
                assert secret not in text


def test_any_cut_of_a_dicom_file_is_one_line(call, brighter, heads, tmp_path):
    path = write_series(tmp_path / "d", numbered(), affine_of("identity"))[0]
    data = path.read_bytes()
    for size in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        try:
            read_dicom(path)
        except UserError as error:
            assert SECRET not in str(error)
        else:
            raise AssertionError(f"{size} of {len(data)} bytes were taken as a whole file")


def pet_header(**changes) -> pydicom.Dataset:
    ds = new_dataset("PT", "1.2.840.10008.5.1.4.1.1.128", 16, 16)
    injected(ds)
    for name, value in changes.items():
        owner = ds if name in ds else ds.RadiopharmaceuticalInformationSequence[0]
        setattr(owner, name, value)
    return ds


def test_suv():
    expected = 77.5e3 / (400e6 / 2)  # g over the dose after one half-life
    factor, why = suv_factor([pet_header()])
    assert factor == pytest.approx(expected, rel=1e-6) and not why
    dated = pet_header(RadiopharmaceuticalStartTime="")
    drug = dated.RadiopharmaceuticalInformationSequence[0]
    drug.RadiopharmaceuticalStartDateTime = "20200130231013.8+0100"
    assert suv_factor([dated])[0] == pytest.approx(expected, rel=1e-6)
    # a series made a day later: the first acquisition counts
    late = [pet_header(SeriesDate="20200201", AcquisitionTime=t) for t in ("011000", "010000")]
    assert suv_factor(late)[0] == pytest.approx(expected, rel=1e-6)
    assert suv_factor([pet_header(DecayCorrection="ADMIN")])[0] == pytest.approx(expected / 2)
    assert suv_factor([pet_header(Units="GML")])[0] == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"PatientWeight": None}, "no weight"),
        ({"PatientWeight": "0"}, "no weight"),
        ({"RadionuclideTotalDose": None}, "no injected dose"),
        ({"RadionuclideHalfLife": None}, "no half-life"),
        ({"DecayCorrection": "NONE"}, "decay correction"),
        ({"Units": "CNTS"}, "not Bq/ml"),
        ({"RadiopharmaceuticalStartTime": ""}, "no time"),
        ({"RadionuclideHalfLife": "60"}, "do not fit"),
        ({"RadiopharmaceuticalInformationSequence": []}, "no injected dose"),
        ({"Modality": "NM"}, "not a PET"),
    ],
)
def test_without_its_fields_there_is_no_suv(changes, why):
    factor, reason = suv_factor([pet_header(**changes)])
    assert factor is None and why in reason
