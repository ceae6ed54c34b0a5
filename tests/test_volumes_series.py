"""DICOM as it comes: what varies in a series, uneven slices, copies, frames over time."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, decimal, injected, sample, write_enhanced, write_series
from pydicom.uid import ImplicitVRLittleEndian
from volume_files import SHAPE, affine_of, numbered

from cli import UserError
from volumes.dicom import read_dicom
from volumes.grid import RAS_LPS
from volumes.io import read_volume
from volumes.series import check_patients
from volumes.suv import suv_factor
from volumes.varying import Choice

DATA, AFFINE = numbered(), affine_of("identity")


def read(path, where="", time=""):
    return read_dicom(path, choice=Choice(where, time))


def several(folder, changes, data=DATA):
    """One series with the data + n for each n-th of `changes`, which edit a data set."""
    for n, change in enumerate(changes):
        paths = write_series(folder, data + n, AFFINE, change=lambda ds, k, c=change: c(ds))
        for path in paths:
            path.rename(path.with_name(f"{n}{path.name[2:]}"))
    return folder


def having(**fields):
    def change(ds):
        for name, value in fields.items():
            setattr(ds, name, value)

    return change


def at_depths(folder, depths, modality="CT", thickness=None, affine=AFFINE):
    """Slices of a volume that is 10 times its depth everywhere, at these depths in mm."""
    data = np.zeros((24, 28, len(depths)), np.int16) + np.rint(10 * np.array(depths)).astype(int)

    def change(ds, k):
        lps = RAS_LPS @ affine @ [0, 0, 0, 1]
        along = (RAS_LPS @ affine)[:3, 2]
        ds.ImagePositionPatient = decimal(lps[:3] + along / abs(along[2]) * depths[k])
        if thickness is None:
            del ds.SliceThickness
        else:
            ds.SliceThickness = str(thickness[k])

    write_series(folder, data, affine, modality, change=change)
    return folder


# --- several images at one place -------------------------------------------------------------


def test_echoes_are_named_and_chosen(call, brighter, tmp_path):
    folder = several(tmp_path / "d", [having(EchoTime="20"), having(EchoTime="80")])
    with pytest.raises(UserError, match=r"EchoTime is 20 or 80; choose by --where EchoTime=20$"):
        read(folder)
    volume = read(folder, "EchoTime=80.0")
    assert np.array_equal(volume.data, DATA + 1)
    assert volume.notes == ["EchoTime 80.0: 20 of 40 images"]
    with pytest.raises(UserError, match="no image with EchoTime=50; EchoTime is 20 or 80"):
        read(folder, "EchoTime=50")
    with pytest.raises(UserError, match="expected FIELD=VALUE, FIELD of EchoTime"):
        read(folder, "Echo=80")
    ct = write_series(tmp_path / "ct", DATA, AFFINE, "CT")[0].parent
    argv = ["--img1", ct, "--img2", folder, "--out", tmp_path / "f.nii", "--where", "EchoTime=80"]
    argv += ["--window", "2000,4000"]  # what is drawn is not in HU
    code, stdout, err = call(*argv)
    assert code == 0 and "img2: EchoTime 80: 20 of 40 images" in stdout, err


def test_magnitude_and_phase_of_two_b_values(tmp_path):
    kinds = [(b, part) for b in (0, 1000) for part in "MP"]
    changes = [having(DiffusionBValue=float(b), ImageType=["ORIGINAL", "PRIMARY", p, "ND"])
               for b, p in kinds]  # fmt: skip
    folder = several(tmp_path, changes)
    with pytest.raises(UserError) as error:
        read(folder)
    assert "DiffusionBValue is 0.0 or 1000.0; ImageType is M or P" in str(error.value)
    assert "choose by --where DiffusionBValue=0.0,ImageType=…" in str(error.value)
    volume = read(folder, "DiffusionBValue=1000,ImageType=m")
    assert np.array_equal(volume.data, DATA + kinds.index((1000, "M")))


def test_points_in_time(tmp_path):
    times = ("100500", "100000", "101000")
    folder = several(tmp_path, [having(AcquisitionTime=t) for t in times])
    with pytest.raises(UserError, match="3 points in time, by AcquisitionTime; choose by --frame"):
        read(folder)
    for number, n in ((1, 1), (2, 0), (3, 2)):  # in the order of time, not of files
        volume = read(folder, time=str(number))
        assert np.array_equal(volume.data, DATA + n)
        assert volume.notes == [f"point {number} of 3 in time, by AcquisitionTime"]
    assert np.allclose(read(folder, time="mean").data, DATA + 1)
    assert np.array_equal(read(folder, time="sum").data, DATA * 3.0 + 3)
    for frame in ("4", "0", "median"):
        with pytest.raises(UserError, match=f"but --frame is '{frame}'; choose by --frame 1 to 3"):
            read(folder, time=frame)


def test_a_sum_over_time_has_no_suv(tmp_path):
    def at(time):
        def change(ds):
            injected(ds)
            ds.FrameReferenceTime = time

        return change

    write = [at(1000), at(2000)]
    for n, change in enumerate(write):
        for path in write_series(tmp_path, DATA, AFFINE, "PT", change=lambda d, k, c=change: c(d)):
            path.rename(path.with_name(f"{n}{path.name[2:]}"))
    assert read(tmp_path, time="mean").suv
    volume = read(tmp_path, time="sum")
    assert volume.suv is None and "summed" in volume.no_suv and volume.unit == "Bq/ml"


def test_images_that_nothing_tells_apart_are_refused(tmp_path):
    folder = several(tmp_path, [having(), having()])
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.InstanceNumber
        ds.save_as(path)
    with pytest.raises(UserError, match=r"20 positions occur twice.*no field of their headers"):
        read(folder, time="1")


@pytest.mark.parametrize("form", ("nii.gz", "mgz"))
def test_frames_of_a_4d_file(tmp_path, form):
    data = np.stack([DATA, DATA + 2, DATA + 10], -1).astype(np.float32)
    kind = nib.Nifti1Image if form == "nii.gz" else nib.MGHImage
    path = tmp_path / f"a.{form}"
    kind(data, AFFINE).to_filename(path)
    with pytest.raises(UserError, match=r"is 4-D \(3 volumes\); choose by --frame 1 to 3"):
        read_volume(path)
    for frame, expected in (("2", DATA + 2.0), ("mean", DATA + 4.0), ("sum", DATA * 3.0 + 12)):
        volume = read_volume(path, choice=Choice(time=frame))
        assert np.allclose(volume.data, expected) and np.allclose(volume.affine, AFFINE)
        assert (len(volume.notes) == 1 and "3 volumes" in volume.notes[0]) or frame == "2"


# --- slices ----------------------------------------------------------------------------------


def test_two_slice_distances_become_even(tmp_path):
    """A head CT of 2.5 and then 5 mm; where it is even already, slices stay as they are."""
    depths = [*np.arange(0, 25, 2.5), *np.arange(25, 101, 5.0)]
    volume = read(at_depths(tmp_path, depths))
    assert volume.spacing[2] == pytest.approx(2.5) and volume.data.shape == (24, 28, 41)
    assert np.allclose(volume.data[3, 4], 25 * np.arange(41), atol=0.51)
    assert "2.50 to 5.00 mm apart, interpolated to 2.50 mm (26 slices became 41)" in volume.notes[0]
    assert np.allclose(volume.affine[:3, 3], AFFINE[:3, 3])
    for name, affine in (("oblique", affine_of("oblique")), ("tilt", AFFINE @ sheared())):
        volume = read(at_depths(tmp_path / name, depths[::-1], affine=affine))
        step = affine[:3, 2] / abs(affine[2, 2]) * 2.5
        assert np.allclose(volume.affine[:3, 2], step, atol=1e-4), name
        assert np.allclose(volume.affine[:3, 3], affine[:3, 3], atol=1e-4), name


def sheared():
    shear = np.eye(4)
    shear[1, 2] = 0.5
    return shear


def test_thick_slices_are_no_gap_but_a_missing_one_is(tmp_path):
    depths, thickness = [0, 3, 6, 9, 12, 18, 24], [3, 3, 3, 3, 3, 6, 6]
    assert read(at_depths(tmp_path / "a", depths, thickness=thickness)).data.shape[2] == 9
    with pytest.raises(UserError, match=r"2 slices missing in 2 gaps: 6\.00 mm from IM0004"):
        read(at_depths(tmp_path / "b", depths, thickness=[3] * 7))
    with pytest.raises(UserError, match=r"1 slices missing in 1 gaps: 5\.00 mm"):
        read(at_depths(tmp_path / "c", [0, 2.5, 5, 10, 12.5, 15]))


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path):
    depths = np.round(np.arange(60) * 0.625, 1)
    volume = read(at_depths(tmp_path, depths))
    assert not volume.notes and volume.spacing[2] == pytest.approx(0.625, abs=0.01)


def test_the_largest_stack_is_taken(tmp_path):
    def scout(ds, k):
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    write_series(tmp_path, DATA, AFFINE)
    for path in write_series(tmp_path / "s", DATA[..., :2], AFFINE, change=scout):
        path.rename(path.with_suffix(".scout"))
    volume = read(tmp_path)
    assert np.array_equal(volume.data, DATA)
    assert volume.notes == [
        "2 images with other orientations left out (IM0000.scout), as a localiser's"
    ]


# --- files -----------------------------------------------------------------------------------


def test_copies_count_once(tmp_path):
    for path in write_series(tmp_path, DATA, AFFINE)[3:5]:
        path.with_suffix(".copy").write_bytes(path.read_bytes())
    volume = read(tmp_path)
    assert np.array_equal(volume.data, DATA)
    assert volume.notes == ["2 files are copies of others, counted once"]


def test_one_uid_for_all_slices_is_no_copy(tmp_path):
    write_series(tmp_path, DATA, AFFINE, change=lambda ds, k: setattr(ds, "SOPInstanceUID", "1.2"))
    assert np.array_equal(read(tmp_path).data, DATA)


@pytest.mark.parametrize("syntax", (None, ImplicitVRLittleEndian))
def test_files_without_preamble_and_meta_information(tmp_path, syntax):
    for path in write_series(tmp_path, DATA, AFFINE, "CT", slope=2, intercept=-7):
        ds = pydicom.dcmread(path)
        implicit = syntax is not None
        ds.preamble, ds.file_meta = None, pydicom.dataset.FileMetaDataset()
        ds.save_as(path, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert path.read_bytes()[:2] == b"\x08\x00"
    volume = read(tmp_path)
    assert np.array_equal(volume.data, DATA * 2.0 - 7) and np.allclose(volume.affine, AFFINE)


@pytest.mark.parametrize("name", ("JPGExtended", "JPEG2000", "MR_small_jpeg_ls_lossless"))
def test_compressed_files_need_only_the_requirements(name):
    pytest.importorskip("pylibjpeg", reason="needs requirements-volumes.txt as it is now")
    from volumes.dicom import _decoded

    pixels = next(_decoded(sample(f"{name}.dcm")))
    assert np.ptp(pixels) > 200
    if name.startswith("MR_small"):
        assert np.array_equal(pixels, pydicom.dcmread(sample("MR_small.dcm")).pixel_array)


def test_a_missing_plugin_is_named(monkeypatch):
    class Absent:
        is_available = False

    monkeypatch.setattr("volumes.dicom.get_decoder", lambda syntax: Absent)
    with pytest.raises(UserError, match="pip install pylibjpeg pylibjpeg-libjpeg"):
        read(sample("MR_small_jpeg_ls_lossless.dcm"))


def test_a_mosaic_is_refused(tmp_path):
    write_series(tmp_path, DATA[..., :1], AFFINE,
        change=lambda ds, k: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    )  # fmt: skip
    with pytest.raises(UserError, match=r"a Siemens mosaic.*dcm2niix"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("TOMO", "raw views of a SPECT"), ("RECON GATED TOMO", "gated slices"), ("DYNAMIC", "time")],
)
def test_frames_of_nuclear_medicine_that_are_no_slices(tmp_path, kind, words):
    [path] = write_series(tmp_path, DATA[:, :, :1], AFFINE, "NM")
    ds = pydicom.dcmread(path)
    ds.NumberOfFrames, ds.ImageType = SHAPE[2], ["ORIGINAL", "PRIMARY", kind, "EMISSION"]
    ds.PixelData = np.ascontiguousarray(DATA.T).tobytes()
    ds.save_as(path)
    with pytest.raises(UserError, match=rf"its frames are .*{words}.*expected reconstructed"):
        read(path)


def test_the_list_tells_series_apart_and_nobody(tmp_path):
    flair = having(EchoTime="90", RepetitionTime="9000", InversionTime="2500",
        ImageType=["ORIGINAL", "PRIMARY", "M"], ContrastBolusAgent=SECRET)  # fmt: skip
    several(tmp_path / "a", [flair])
    write_enhanced(tmp_path / "e.dcm", DATA, affine_of("permuted"))
    with pytest.raises(UserError) as error:
        read(tmp_path)
    text = str(error.value)
    assert "MR axial, 20 images of 28x24, 1.25x1.5x3 mm, TE 90 TR 9000 TI 2500" in text
    assert "ORIGINAL PRIMARY M, contrast yes" in text and "MR coronal, 20 images" in text
    assert SECRET not in text and "1.2." not in text


def test_two_patients_are_not_fused(call, brighter, tmp_path):
    def other(ds, k=0):
        ds.PatientID, ds.PatientBirthDate = "other", "19991231"

    ct = write_series(tmp_path / "ct", DATA, AFFINE, "CT")[0].parent
    mr = write_series(tmp_path / "mr", DATA, AFFINE, "MR", change=other)[0].parent
    code, stdout, err = call("--img1", ct, "--img2", mr, "--out", tmp_path / "f.nii", "--force")
    assert code == 2 and "img1 and img2 are of two patients" in err
    for secret in (SECRET, "19991231", "19010203", "other;"):
        assert secret not in stdout + err
    for path in list(mr.iterdir())[:4]:
        ds = pydicom.dcmread(path)
        ds.PatientID, ds.PatientBirthDate = SECRET, "19010203"
        ds.save_as(path)
    with pytest.raises(UserError, match="images of two patients in one series"):
        read(mr)
    check_patients(("A", "19010203"), ("B", "19010203"))  # IDs of two hospitals
    check_patients(("A", ""), ("B", "19010203"))
    check_patients(("A", "19010203"), None)


# --- SUV and the two places of a NIfTI file ---------------------------------------------------


def pet(**fields):
    ds = pydicom.Dataset()
    injected(ds)
    ds.Modality = "PT"
    for name, value in fields.items():
        setattr(ds, name, value)
    return ds


def test_suv_by_something_else_than_body_weight():
    assert suv_factor([pet(Units="GML", SUVType="BW")]) == (1, "")
    for kind, words in (("LBM", "lean mass"), ("BSA", "body surface"), ("IBW", "ideal weight")):
        factor, why = suv_factor([pet(Units="GML", SUVType=kind)])
        assert factor is None and words in why


def test_counts_of_philips():
    def counts(creator="Philips PET Private Group", **factors):
        ds = pet(Units="CNTS")
        block = ds.private_block(0x7053, creator, create=True)
        for name, value in factors.items():
            block.add_new({"suv": 0x00, "activity": 0x09}[name], "DS", value)
        return suv_factor([ds])

    assert counts(suv="0.0004", activity="2") == (0.0004, "")
    expected = 77.5e3 / (400e6 / 2)
    assert counts(suv="0", activity="2")[0] == pytest.approx(2 * expected, rel=1e-6)
    assert counts()[0] is None and counts("Someone", suv="0.0004")[0] is None


def test_sform_or_qform(tmp_path):
    wrong = AFFINE.copy()
    wrong[:3, 3] += [0, 0, 40]
    image = nib.Nifti1Image(DATA, AFFINE)
    image.set_sform(wrong, 2)
    image.set_qform(AFFINE, 1)
    image.to_filename(tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert np.allclose(volume.affine, wrong) and volume.code == 2
    [note] = volume.notes
    middle = (AFFINE @ np.append((np.array(SHAPE) - 1) / 2, 1))[:3]
    places = [", ".join(f"{v:.1f}" for v in middle + np.array([0, 0, z])) for z in (40, 0)]
    assert f"({places[0]}) mm by the sform, ({places[1]}) by the qform" in note
    assert "--affine qform takes the other" in note
    volume = read_volume(tmp_path / "a.nii", choice=Choice(affine="qform"))
    assert np.allclose(volume.affine, AFFINE) and volume.code == 1
    assert "the qform counts, --affine sform" in volume.notes[0]


def test_pairs_of_files_and_mgz(tmp_path):
    nib.Nifti1Pair(DATA, AFFINE).to_filename(tmp_path / "p.img")
    for name in ("p.img", "p.hdr"):
        volume = read_volume(tmp_path / name)
        assert np.array_equal(volume.data, DATA) and np.allclose(volume.affine, AFFINE)
    nib.MGHImage(DATA.astype(np.float32), AFFINE).to_filename(tmp_path / "m.mgz")
    volume = read_volume(tmp_path / "m.mgz")
    assert np.array_equal(volume.data, DATA) and np.allclose(volume.affine, AFFINE, atol=1e-4)
    assert volume.placed
    nib.AnalyzeImage(DATA, None).to_filename(tmp_path / "a.img")
    assert not read_volume(tmp_path / "a.img").placed, "Analyze does not tell left from right"


# --- real series -----------------------------------------------------------------------------


def test_real_series(shared):
    folder = shared / "clinical" / "dicom"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not here")
    volume = read(folder / "ct_tilt_two_slice_distances")
    assert volume.data.shape == (512, 512, 37) and "interpolated to 4.00 mm" in volume.notes[0]
    with pytest.raises(UserError, match=r"Siemens mosaic.*dcm2niix"):
        read(folder / "mr_one_mosaic")
    with pytest.raises(UserError, match="ImageType is FIELD_MAP or M"):
        read(folder / "mr_fieldmap_enhanced")
    assert read(folder / "mr_fieldmap_enhanced", "ImageType=M").data.max() == pytest.approx(2548.19)
    with pytest.raises(UserError, match="1 slices missing"):
        read(folder / "mr_uneven")
    for name in ("mr_enhanced_hyperfine", "mr_enhanced_philips", "mr_enhanced_siemens"):
        assert read(folder / name).data.shape[2] == 8


def test_a_choice_that_chooses_nothing_is_told(call, brighter, heads, tmp_path):
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    argv += ["--register", "off", "--force", "space"]
    code, out, err = call(*argv, "--where", "EchoTime=80", "--frame", 2, "--affine", "qform")
    assert code == 0, err
    for line in (
        "--where EchoTime=80 has no effect: neither source has images that it tells apart",
        "--frame 2 has no effect: neither source has several points in time",
        "--affine qform has no effect: neither source is a NIfTI file with two places",
    ):
        assert line in out
    assert "has no effect" not in call(*argv)[1]
    image = nib.load(heads["mri"])
    several = nib.Nifti1Image(np.stack([image.get_fdata()] * 2, -1), image.affine)
    several.set_qform(image.affine + np.diag([0, 0, 0.5, 0]), 1)
    several.set_sform(image.affine, 1)
    several.to_filename(tmp_path / "two.nii")
    argv[3] = tmp_path / "two.nii"
    code, out, err = call(*argv, "--frame", 2, "--affine", "qform")
    assert code == 0 and "has no effect" not in out, err
