"""What other programs read: the moved source in its own unit, and labels that come along."""

import json

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_files import injected, write_series
from volume_files import SHAPE, affine_of, numbered, value_at

from volumes.exports import AS_STORED

SHIFT = np.array([3.0, -4.0, 6.0])  # mm, of the drawn move
FACTOR = 77500 / (400e6 / 2)  # of `injected`: g over Bq, a half-life after the injection


@pytest.fixture
def moved_by(tmp_path):
    """A file of ITK that moves points of source 1 by SHIFT, in LPS."""
    lps = SHIFT * [-1, -1, 1]
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3DTransform_double_3_3\n"
    text += f"Parameters: 0 0 0 {lps[0]} {lps[1]} {lps[2]}\nFixedParameters: 0 0 0 0\n"
    (tmp_path / "t.tfm").write_text(text)
    return tmp_path / "t.tfm"


def ramp(affine: np.ndarray) -> np.ndarray:
    """(I, J, K) int16 that grows linearly with the position: a resampled value is known."""
    index = np.stack([*np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), np.ones(SHAPE)], -1)
    xyz = index @ affine.T
    return np.rint(1000 + 10 * xyz[..., 0] + 4 * xyz[..., 1] + 7 * xyz[..., 2]).astype(np.int16)


def ramp_at(xyz: np.ndarray) -> float:
    return 1000 + 10 * xyz[0] + 4 * xyz[1] + 7 * xyz[2]


@pytest.mark.parametrize(
    "kind",
    [
        ("PET-MRI", "PT", "SUV", FACTOR),
        ("SPECT-MRI", "NM", "counts", 1.0),
        ("CT-MRI", "CT", "HU", 1.0),
    ],
)
@pytest.mark.usefixtures("brighter")
def test_a_moved_value_is_right_in_its_own_unit(call, tmp_path, moved_by, kind):
    """Source 1 moves by a known shift onto an oblique grid of the MRI."""
    task, modality, unit, factor = kind
    place, grid = affine_of("identity"), affine_of("oblique")
    change = injected if modality == "PT" else None
    write_series(tmp_path / "s1", ramp(place), place, modality, change=change)
    nib.Nifti1Image(numbered(), grid).to_filename(tmp_path / "mri.nii")
    argv = ["--task", task, "--img1", tmp_path / "s1", "--img2", tmp_path / "mri.nii"]
    argv += ["--grid", "2", "--register", moved_by, "--force", "all"]
    argv += ["--out", tmp_path / "f.nii", "--moved", tmp_path / "o.nii.gz"]
    code, out, err = call(*argv)
    assert code == 0 and "moved source: " in out, err
    image = nib.load(tmp_path / "o.nii.gz")
    assert image.get_data_dtype() == np.float32 and np.allclose(image.affine, grid, atol=1e-4)
    voxel = np.array(SHAPE) // 2
    there = (grid @ [*voxel, 1])[:3]
    expected = factor * ramp_at(there - SHIFT)  # the point of source 1 that the shift brings there
    assert image.get_fdata()[tuple(voxel)] == pytest.approx(expected, rel=2e-3)
    assert value_at(tmp_path / "o.nii.gz", there) == pytest.approx(expected, rel=2e-3)
    told = json.loads((tmp_path / "f.json").read_text())
    assert told["moved_source"]["unit"] == unit and told["moved_source"]["source"] == 1
    assert told["moved_source"]["factor_from_file"] == pytest.approx(factor)
    assert "o.nii.gz" in told["files"]
    assert image.header["intent_name"].item().decode() == unit
    assert unit in image.header["descrip"].item().decode()


def test_without_an_suv_scale_a_pet_stays_in_its_files_unit(call, brighter, tmp_path):
    """As the colour bar does; and an MRI that moves has no unit."""
    write_series(tmp_path / "pt", ramp(np.eye(4)), affine_of("identity"), "PT", change=injected)
    nib.Nifti1Image(numbered(), affine_of("identity")).to_filename(tmp_path / "mri.nii")
    argv = ["--task", "PET-MRI", "--img1", tmp_path / "pt", "--img2", tmp_path / "mri.nii"]
    argv += ["--register", "off", "--force", "all", "--suv", "0", "--out", tmp_path / "f.nii"]
    for grid, unit, source in (("2", "Bq/ml", ramp(np.eye(4))), ("1", AS_STORED, numbered())):
        code, _, err = call(*argv, "--grid", grid, "--moved", tmp_path / "o.nii")
        assert code == 0, err
        assert json.loads((tmp_path / "f.json").read_text())["moved_source"]["unit"] == unit
        assert np.array_equal(nib.load(tmp_path / "o.nii").get_fdata(), source)


def test_an_earlier_moved_source_goes_and_a_wrong_name_is_refused(call, brighter, tmp_path):
    for name in ("ct", "mri"):
        nib.Nifti1Image(numbered(), affine_of("identity")).to_filename(tmp_path / f"{name}.nii")
    argv = ["--img1", tmp_path / "ct.nii", "--img2", tmp_path / "mri.nii", "--register", "off"]
    argv += ["--out", tmp_path / "f.nii", "--window", "2000,4000"]
    assert call(*argv, "--moved", tmp_path / "o.nii")[0] == 0
    assert call(*argv)[0] == 0 and not (tmp_path / "o.nii").exists()
    code, _, err = call(*argv, "--moved", tmp_path / "o.png")
    assert code == 2 and "--moved is" in err and "nii.gz or .nii" in err
    code, _, err = call(*argv, "--moved", tmp_path / "mri.nii")
    assert code == 2 and "mri.nii is a source" in err


# --- labels ----------------------------------------------------------------------------------


def ball(affine: np.ndarray, centre, shape=SHAPE, radius: float = 9.0) -> np.ndarray:
    """(I, J, K) bool: a ball about a position, mm RAS."""
    index = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], -1)
    return np.linalg.norm((index @ affine.T)[..., :3] - centre, axis=-1) < radius


def centroid(path, label: int) -> np.ndarray:
    """The middle of a label, mm RAS."""
    image = nib.load(path)
    index = np.argwhere(np.asarray(image.dataobj) == label)
    return nib.affines.apply_affine(image.affine, index).mean(0)


CENTRES = {7: np.array([4.0, 36, -12]), 2035: np.array([-6.0, 24, 4])}


def drawn_labels(affine: np.ndarray, shape=SHAPE) -> np.ndarray:
    labels = np.zeros(shape, np.int16)
    for label, centre in CENTRES.items():
        labels[ball(affine, centre, shape)] = label
    return labels


@pytest.fixture
def pair_of(tmp_path):
    """Flags for a CT and an MRI in NIfTI on two grids."""
    for name, kind in (("ct", "identity"), ("mri", "oblique")):
        nib.Nifti1Image(numbered(), affine_of(kind)).to_filename(tmp_path / f"{name}.nii")
    argv = ["--img1", tmp_path / "ct.nii", "--img2", tmp_path / "mri.nii", "--force", "all"]
    return [*argv, "--out", tmp_path / "f.nii.gz", "--labels", tmp_path / "seg.nii"]


@pytest.mark.parametrize("source", [(1, "identity"), (2, "oblique")])
@pytest.mark.parametrize("grid", ("1", "2"))
@pytest.mark.usefixtures("brighter")
def test_labels_of_either_source_land_right(call, tmp_path, moved_by, pair_of, source, grid):
    of, kind = source
    affine = affine_of(kind)
    image = nib.Nifti1Image(drawn_labels(affine), affine)
    image.to_filename(tmp_path / "seg.nii")
    code, out, err = call(*pair_of, "--register", moved_by, "--grid", grid)
    assert code == 0 and f"labels: 2, of img{of}, nearest neighbour" in out, err
    found = np.asarray(nib.load(tmp_path / "f_labels.nii.gz").dataobj)
    assert set(np.unique(found)) == {0, *CENTRES} and found.dtype == np.int16
    way = {(1, "1"): 0, (2, "2"): 0, (1, "2"): SHIFT, (2, "1"): -SHIFT}[of, grid]
    for label in CENTRES:
        expected = centroid(tmp_path / "seg.nii", label) + way
        assert np.linalg.norm(centroid(tmp_path / "f_labels.nii.gz", label) - expected) < 0.6
    told = json.loads((tmp_path / "f.json").read_text())
    assert "f_labels.nii.gz" in told["files"]


def test_labels_that_could_be_of_both_are_asked_about(call, brighter, tmp_path, moved_by, pair_of):
    """Another grid is of neither source; without a move it does not matter."""
    affine = affine_of("turned")
    nib.Nifti1Image(drawn_labels(affine), affine).to_filename(tmp_path / "seg.nii")
    code, _, err = call(*pair_of, "--register", moved_by)
    assert code == 2 and "that of neither source, --labels-of 1 or --labels-of 2" in err, err
    for of, way in ((1, SHIFT), (2, 0)):
        code, _, err = call(*pair_of, "--register", moved_by, "--labels-of", of, "--grid", "2")
        assert code == 0, err
        expected = centroid(tmp_path / "seg.nii", 7) + way
        assert np.linalg.norm(centroid(tmp_path / "f_labels.nii.gz", 7) - expected) < 0.8
    code, out, err = call(*pair_of, "--register", "off")
    assert code == 0 and "of both sources" in out, err


def test_values_that_are_no_labels_are_refused(call, brighter, tmp_path, pair_of):
    affine = affine_of("identity")
    nib.Nifti1Image(numbered() / np.float32(7), affine).to_filename(tmp_path / "seg.nii")
    code, _, err = call(*pair_of, "--register", "off")
    assert code == 2 and "expected whole numbers" in err and not (tmp_path / "f.nii.gz").exists()
    (tmp_path / "seg.nii").unlink()
    code, _, err = call(*pair_of, "--register", "off")
    assert code == 2 and "--labels is" in err and "no such file" in err


def test_a_label_too_small_for_the_grid_is_named(call, brighter, tmp_path, pair_of):
    labels = np.zeros(SHAPE, np.uint8)
    labels[11, 13, 9], labels[2:9, 3:9, 3:9] = 5, 6
    nib.Nifti1Image(labels, affine_of("identity")).to_filename(tmp_path / "seg.nii")
    code, out, err = call(*pair_of, "--register", "off", "--grid", "1.9")
    assert code == 0, err
    found = set(np.unique(np.asarray(nib.load(tmp_path / "f_labels.nii.gz").dataobj)))
    assert (5 in found) != ("labels without a voxel on the grid of the result: 5" in out)
    assert 6 in found


def write_seg(path, files, labels: np.ndarray):
    """A DICOM segmentation of a series, by highdicom, of labels (I, J, K) 1 and 2."""
    seg = pytest.importorskip("highdicom", reason="needs requirements-volumes.txt").seg
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.sr import CodedConcept

    code = CodedConcept("85756007", "SCT", "Tissue")
    how = AlgorithmIdentificationSequence("drawn", code, "1")
    segments = [seg.SegmentDescription(n, f"s{n}", code, code, "AUTOMATIC", how) for n in (1, 2)]
    sources = [pydicom.dcmread(file) for file in files]
    for ds in sources:
        ds.StudyInstanceUID, ds.PatientSex, ds.StudyDate, ds.StudyTime = "1.2.9", "", "", ""
        ds.AccessionNumber = ds.StudyID = ds.ReferringPhysicianName = ""
    pixels = np.ascontiguousarray(labels.transpose(2, 1, 0)).astype(np.uint8)
    made = seg.Segmentation(
        sources, pixels, "BINARY", segments, "1.2.7", 3, "1.2.8", 1, "m", "n", "1", "s"
    )
    made.save_as(path)


@pytest.mark.parametrize("of", (1, 2))
@pytest.mark.usefixtures("brighter")
def test_a_dicom_segmentation_comes_along(call, tmp_path, moved_by, of):
    """By highdicom; its frame of reference and its grid tell which source it is of."""
    kinds = {"CT": "identity", "MR": "oblique"}
    made = {
        m: write_series(tmp_path / m, numbered(), affine_of(k), m, frame=f"1.2.3.{m == 'MR':d}")
        for m, k in kinds.items()
    }
    modality = ("CT", "MR")[of - 1]
    affine = affine_of(kinds[modality])
    labels = np.zeros(SHAPE, np.uint8)
    for label, centre in zip((1, 2), CENTRES.values(), strict=True):
        labels[ball(affine, centre)] = label
    write_seg(tmp_path / "seg.dcm", made[modality], labels)
    nib.Nifti1Image(labels, affine).to_filename(tmp_path / "same.nii")
    argv = ["--img1", tmp_path / "CT", "--img2", tmp_path / "MR", "--force", "all"]
    argv += ["--register", moved_by, "--grid", 3 - of, "--labels", tmp_path / "seg.dcm"]
    code, out, err = call(*argv, "--out", tmp_path / "f.nii.gz")
    assert code == 0 and f"labels: 2, of img{of}" in out, err
    for label in (1, 2):
        expected = centroid(tmp_path / "same.nii", label) + (SHIFT if of == 1 else -SHIFT)
        assert np.linalg.norm(centroid(tmp_path / "f_labels.nii.gz", label) - expected) < 0.6
