"""Registration: that it finds known moves, moves marks rightly, and refuses what it cannot tell."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import write_series
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation
from volume_files import KINDS, SHAPE, affine_of, blob, value_at, write

import volumes.pair
from images import read_uint8, write_png
from phantom import phantom_pair
from volumes.grid import RAS_LPS, Volume, cubic, onto_grid
from volumes.intensity import head
from volumes.io import read_nifti
from volumes.register import Registration, check, moved_by, rigid
from volumes.transforms import read_transform, transform_text


def a_move(degrees=(7, -9, 11), shift=(9, -12, 14), centre=(0, 0, 0)) -> np.ndarray:
    """A turn about a centre and a shift in mm: (4, 4), RAS."""
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    move[:3, 3] = np.array(centre) + shift - move[:3, :3] @ centre
    return move


def error(volume: Volume, found: np.ndarray, true: np.ndarray) -> float:
    """Mean distance over the head, in mm, of where two matrices put it."""
    points = moved_by(np.argwhere(head(volume.data)), volume.affine)
    return np.linalg.norm(moved_by(points, found) - moved_by(points, true), axis=1).mean()


def stored(volume: Volume, kind: str) -> Volume:
    """The same volume with its voxels stored in another order; its points stay."""
    codes = {"flipped": "LPS", "permuted": "SAL"}.get(kind)
    if codes is None:
        return volume
    image = nib.Nifti1Image(volume.data, volume.affine)
    ornt = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    image = image.as_reoriented(ornt)
    return replace(volume, data=np.asarray(image.dataobj), affine=image.affine)


def save(path: Path, volume: Volume, code: int = 1) -> Path:
    image = nib.Nifti1Image(np.ascontiguousarray(volume.data), volume.affine)
    image.set_sform(volume.affine, code)
    image.set_qform(volume.affine, code)
    image.to_filename(path)
    return path


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "order"), [("ct", "flipped"), ("pet", "permuted")])
def test_a_move_is_found_and_found_again(heads, kind, order):
    """Whatever the order of the voxels; and the same input gives the same transform."""
    source, mri = read_nifti(heads[kind]), read_nifti(heads["mri"])
    move = a_move(centre=(0, -20, 10))
    pair = stored(source, order), replace(mri, affine=move @ mri.affine)
    found = rigid(*pair, kind.upper())
    assert not found.doubts and found.after > found.before
    assert error(mri, found.matrix, move) < 2
    points = moved_by(np.argwhere(head(mri.data)), mri.affine)
    way = np.linalg.norm(moved_by(points, move) - points, axis=1).mean()
    assert found.moved_mm == pytest.approx(way, abs=2)
    assert np.array_equal(rigid(*pair, kind.upper()).matrix, found.matrix)
    measured = check(*pair, kind.upper())
    assert measured.moved_mm == pytest.approx(way, abs=3)


@pytest.mark.parametrize(("kind", "mm"), [("T2", 1.5), ("CT", 2.5), ("PET", 2.5), ("SPECT", 3.0)])
def test_templates_are_registered_on_a_smaller_grid(shared, kind, mm):
    folder = shared / "clinical" / "nifti"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not here")
    name = "CT_approximate_HU" if kind == "CT" else kind
    volumes = [read_nifti(folder / f"{n}.nii.gz") for n in (name, "T1")]
    source, t1 = (
        replace(grid, data=onto_grid(v, grid).data)
        for v, grid in ((v, cubic(v, 4.0)) for v in volumes)
    )
    move = a_move((-11, 6, 8), (10, 14, -12))
    found = rigid(source, replace(t1, affine=move @ t1.affine), kind)
    assert not found.doubts
    assert error(t1, found.matrix, move) <= mm


# --- what cannot be trusted ------------------------------------------------------------------


def ball(centre=0.0) -> Volume:
    affine = affine_of("identity")
    index = np.stack([*np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), np.ones(SHAPE)], -1)
    xyz = (index @ affine.T)[..., :3] - [centre, 30, -10]
    return Volume(np.clip(14 - np.linalg.norm(xyz, axis=-1), 0, 3).astype(np.float32), affine)


def test_what_cannot_be_registered_is_in_doubt():
    noise = replace(ball(), data=np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    air = replace(ball(), data=np.zeros(SHAPE, np.float32))
    assert rigid(noise, ball(), "PET").doubts
    assert rigid(air, ball(), "PET").doubts == ["one of them shows no head"]
    far = ball()
    far.affine[0, 3] += 500
    assert check(ball(), far, "PET").doubts == ["they do not overlap"]


def fake(monkeypatch, way="rigid", doubts=(), move=None, distance=20.0) -> list:
    """Have volumes.pair find a given move; the list gets the kind of what was registered."""
    seen = []

    def find(source1, source2, kind):
        seen.append((source1, kind))
        matrix = np.eye(4) if move is None else move
        return Registration(matrix, np.zeros(3), distance, 0.1, 0.5, 1.0, [*doubts])

    monkeypatch.setattr(volumes.pair, way, find)
    return seen


def test_doubt_stops_a_run_and_force_goes_on(call, brighter, heads, tmp_path, monkeypatch):
    fake(monkeypatch, doubts=["its starts disagree by 18.0 mm, expected at most 3"])
    out = tmp_path / "out" / "f.nii.gz"
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", out, "--register", "rigid"]
    code, _, err = call(*argv, "--force", "overlap")
    assert code == 2 and err.count("\n") == 1 and "starts disagree by 18.0 mm" in err
    assert "--force registration" in err and not out.parent.exists()
    code, stdout, err = call(*argv, "--force", "registration")
    assert code == 0 and "forced (registration): its starts disagree" in stdout, err


# --- what is registered ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "same_place", "ways"),
    [
        (("1.2.3", "1.2.3"), False, ["check"]),
        (("1.2.3", "1.2.4"), False, ["rigid"]),
        (("1.2.3", "1.2.4"), True, ["check", "rigid"]),  # on one grid, but off by what was measured
        (None, False, ["rigid"]),
    ],
)
@pytest.mark.usefixtures("brighter")
def test_auto_checks_one_frame_and_registers_others(
    call, tmp_path, monkeypatch, frames, same_place, ways
):
    seen = {way: fake(monkeypatch, way) for way in ("check", "rigid")}
    affine = affine_of("identity")
    away = affine if same_place else a_move((0, 0, 0), (1, 0, 0)) @ affine
    paths = []
    for name, modality, place in (("a", "CT", affine), ("b", "MR", away)):
        data = blob(place, [(0, 30, -10)])
        data = 2 * data - 1000 if modality == "CT" else data  # in HU, with air around it
        if frames is None:
            paths.append(write(tmp_path / name, data, place, "nii"))
        else:
            write_series(tmp_path / name, data, place, modality, frame=frames[len(paths)])
            paths.append(tmp_path / name)
    out = tmp_path / "f.nii.gz"
    code, stdout, err = call("--img1", paths[0], "--img2", paths[1], "--out", out)
    assert code == 0, err
    assert [way for way in ("check", "rigid") if seen[way]] == ways
    method = json.loads((tmp_path / "f.json").read_text())["registration"]
    assert method["applied"] == (ways[-1] == "rigid") == (tmp_path / "f.tfm").exists()
    assert (tmp_path / "f_registration.png").exists(), "moved, or 20 mm off"
    assert ("warning: img2 seems to lie 20.0 mm off" in stdout) == (ways == ["check"])


def test_a_good_check_leaves_no_file(call, brighter, heads, tmp_path):
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii.gz"]
    code, stdout, err = call(*argv)
    assert code == 0 and "lie on each other, measured to" in stdout, err
    assert {p.name for p in tmp_path.iterdir()} == {"f.nii.gz", "f.json"}


def test_a_companion_ct_is_registered_in_place_of_the_pet(
    call, brighter, heads, tmp_path, monkeypatch
):
    seen = fake(monkeypatch)
    argv = ["--task", "PET-MRI", "--img1", heads["pet"], "--img2", heads["mri"]]
    argv += ["--out", tmp_path / "f.nii.gz", "--register", "rigid"]
    code, stdout, err = call(*argv, "--via", heads["ct"])
    assert code == 0 and "through the CT of --via" in stdout, err
    (source, kind), ct = seen[0], read_nifti(heads["ct"])
    assert kind == "CT" and np.array_equal(source.data, ct.data)
    code, _, err = call(*argv, "--via", heads["ct"], "--register", "off")
    assert code == 2 and "--via is for a registration" in err
    code, _, err = call(*argv, "--via", heads["ct"], "--task", "CT-MRI")
    assert code == 2 and "--via is for PET-MRI and SPECT-MRI" in err
    target = tmp_path / "f.nii.gz"
    assert "is a source" in call(*argv, "--via", target)[2]


# --- marks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ("1", "2", "1.6"))
@pytest.mark.parametrize(
    "kinds", [*zip(KINDS, KINDS[2:] + KINDS[:2], strict=True)], ids=lambda k: "-".join(k)
)
def test_marks_stay_right_through_a_transform_and_both_grids(call, brighter, tmp_path, kinds, grid):
    """One place in source 1, another in source 2 where the transform has put it."""
    move = a_move((6, -8, 10), (3, -2, 2), (0, 30, -10))
    places = np.array([[3.0, 27.0, -8.0], [-4.0, 34.0, -13.0]])  # in source 1's space
    affine1, affine2 = map(affine_of, kinds)
    img1 = write(tmp_path / "a", blob(affine1, places[:1]) - 1000, affine1, "nii.gz", "CT")
    img2 = write(tmp_path / "b", blob(affine2, moved_by(places[1:], move)), affine2, "mha")
    (tmp_path / "t.tfm").write_bytes(transform_text(move, np.array([0, 30, -10])))
    out = tmp_path / "f.nii.gz"
    how = ["--register", tmp_path / "t.tfm", "--grid", grid, "--force", "overlap"]
    code, _, err = call("--img1", img1, "--img2", img2, "--out", out, "--window=-500,1000", *how)
    assert code == 0, err
    expected = moved_by(places, move) if grid == "2" else places
    for place in expected:
        assert value_at(out, place) > 0.7
    fused = nib.load(out)
    bright = np.argwhere(fused.get_fdata() > 0.8)
    nearest = [np.linalg.norm(moved_by(bright, fused.affine) - p, axis=1) for p in expected]
    assert len(bright) and np.min(nearest, axis=0).max() < 6, "and nowhere else"
    if grid == "1.6":
        assert np.allclose(fused.header.get_zooms(), 1.6)
    else:
        source = read_nifti(img1) if grid == "1" else None
        shape = source.data.shape if source else SHAPE
        assert fused.shape == shape


@pytest.mark.parametrize("grid", ("1", "2"))
def test_a_registered_run_end_to_end(call, brighter, heads, tmp_path, grid):
    """The files it leaves agree with each other, and with ITK."""
    ct, mri = read_nifti(heads["ct"]), read_nifti(heads["mri"])
    move = a_move(centre=(0, -20, 10))
    ct = stored(ct, "flipped")
    img1, img2 = tmp_path / "ct.nii.gz", tmp_path / "mri.nii.gz"
    save(img1, ct, 2)
    save(img2, replace(mri, affine=move @ mri.affine))
    out = tmp_path / "f.nii.gz"
    argv = ["--img1", img1, "--img2", img2, "--out", out, "--grid", grid]
    code, stdout, err = call(*argv)
    assert code == 0 and "registered (rigid): img2 moves by" in stdout, err
    content = json.loads((tmp_path / "f.json").read_text())
    method = content["registration"]
    matrix = np.array(method["matrix_ras_mm"])
    assert error(mri, matrix, move) < 2 and content["grid"]["of"] == f"source {grid}"
    assert method["mutual_information"]["after"] > method["mutual_information"]["before"]
    lps = read_transform(tmp_path / "f.tfm")
    assert np.allclose(RAS_LPS @ lps @ RAS_LPS, matrix, atol=1e-6)
    centre = (RAS_LPS[:3, :3] @ method["centre_ras_mm"]).tolist()
    assert np.allclose(
        sitk.Euler3DTransform(sitk.ReadTransform(str(tmp_path / "f.tfm"))).GetCenter(), centre
    )
    picture = cv2.imread(str(tmp_path / "f_registration.png"))
    rows = np.array_split(picture.astype(float), 4)
    assert picture.std() > 20 and np.abs(rows[0][:200] - rows[2][:200]).mean() > 5
    giver = nib.load(img1 if grid == "1" else img2)
    fused = nib.load(out)
    assert fused.shape == giver.shape and np.allclose(fused.affine, giver.affine, atol=1e-4)
    # the head of the result lies where that of the source of the grid lies
    place = ct.affine if grid == "1" else move @ ct.affine
    point = moved_by(np.argwhere(ct.data > 500)[::500], place)
    assert np.mean([value_at(out, p) > 0.5 for p in point]) > 0.9
    # the file gives the same once more
    again = tmp_path / "g.nii.gz"
    argv[argv.index(out)] = again
    assert call(*argv, "--register", tmp_path / "f.tfm")[0] == 0
    assert np.abs(nib.load(again).get_fdata() - fused.get_fdata()).max() < 0.02


# --- files of transforms ---------------------------------------------------------------------


def registration_object(path: Path, moves: dict[str, np.ndarray]) -> Path:
    """A DICOM spatial registration: from each frame of reference to the first, by a matrix (LPS).

    Each matrix is written as two: a turn and a shift, and what is then left to do.
    """
    first = a_move((0, 0, 40), (50, 0, 0), (0, 0, 0))
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.66.1", generate_uid()
    ds.Modality, ds.FrameOfReferenceUID = "REG", next(iter(moves))
    ds.RegistrationSequence = []
    for frame, matrix in moves.items():
        item, outer = pydicom.Dataset(), pydicom.Dataset()
        item.MatrixSequence = []
        for part in (first, matrix @ np.linalg.inv(first)):
            step = pydicom.Dataset()
            step.FrameOfReferenceTransformationMatrixType = "RIGID"
            step.FrameOfReferenceTransformationMatrix = [f"{v:.12g}" for v in part.ravel()]
            item.MatrixSequence.append(step)
        outer.FrameOfReferenceUID, outer.MatrixRegistrationSequence = frame, [item]
        ds.RegistrationSequence.append(outer)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("first", (1, 2))
def test_a_dicom_registration_moves_a_mark(call, brighter, tmp_path, first):
    """Whichever of the two frames is the registered one."""
    move = a_move((6, -8, 10), (3, -2, 2), (0, 30, -10))
    place = np.array([[-3.0, 33.0, -12.0]])
    affine = affine_of("identity")
    write_series(tmp_path / "ct", blob(affine, [(4, 26, -6)]) - 1000, affine, "CT", frame="1.2.1")
    write_series(tmp_path / "mr", blob(affine, moved_by(place, move)), affine, "MR", frame="1.2.2")
    to_first = RAS_LPS @ np.linalg.inv(move) @ RAS_LPS
    frames = {"1.2.1": np.eye(4), "1.2.2": to_first}
    if first == 2:
        frames = {"1.2.2": np.eye(4), "1.2.1": np.linalg.inv(to_first)}
    argv = ["--img1", tmp_path / "ct", "--img2", tmp_path / "mr", "--out", tmp_path / "f.nii"]
    argv += ["--window=-500,1000", "--register"]
    code, _, err = call(*argv, registration_object(tmp_path / "r.dcm", frames))
    assert code == 0, err
    assert value_at(tmp_path / "f.nii", place[0]) > 0.7
    frames = {"9.9": np.eye(4)}
    code, _, err = call(*argv, registration_object(tmp_path / "s.dcm", frames))
    assert code == 2 and "does not register the frame of reference of img" in err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.tfm", None, "expected auto, off, check, rigid, or a file"),
        ("text.tfm", b"hello", "no transform of ITK"),
        ("flat.tfm", "2-D", "expected a linear one in 3-D"),
        ("flatter.tfm", "singular", "has no inverse"),
    ],
)
@pytest.mark.usefixtures("brighter")
def test_a_bad_transform_is_one_line(call, heads, tmp_path, name, content, words):
    path = tmp_path / name
    if content == "2-D":
        sitk.WriteTransform(sitk.Euler2DTransform(), str(path))
    elif content == "singular":
        sitk.WriteTransform(sitk.AffineTransform(3), str(path))
        path.write_text(path.read_text().replace("Parameters: 1 0", "Parameters: 0 0", 1))
    elif content:
        path.write_bytes(content)
    argv = ["--img1", heads["ct"], "--img2", heads["mri"], "--out", tmp_path / "f.nii"]
    code, _, err = call(*argv, "--register", path)
    assert code == 2 and err.count("\n") == 1 and words in err, err


# --- images ----------------------------------------------------------------------------------


def turned_pair(folder: Path, degrees=9.0, shift=(12, -7)) -> tuple[Path, Path, np.ndarray]:
    """A drawn CT and its MRI turned and shifted, in a larger image; and how (2, 3)."""
    ct, mri = phantom_pair("CT-MRI")
    how = cv2.getRotationMatrix2D((128, 128), degrees, 1)
    how[:, 2] += shift
    write_png(folder / "ct.png", ct)
    write_png(folder / "mri.png", cv2.warpAffine(mri, how, (300, 280)))
    return folder / "ct.png", folder / "mri.png", how


def test_two_images_are_registered(call, brighter, tmp_path):
    ct, mri, how = turned_pair(tmp_path)
    out = tmp_path / "f.png"
    argv = ["--img1", ct, "--img2", mri, "--out", out]
    code, _, err = call(*argv)
    assert code == 2 and "expected equal" in err, "images are not registered unasked"
    code, stdout, err = call(*argv, "--register", "rigid")
    assert code == 0 and "pixels off: moved" in stdout, err
    found = read_transform(tmp_path / "f.tfm", 2)[:2]
    points = np.array([*itertools.product((60, 128, 200), repeat=2)], float)
    there = [points @ m[:, :2].T + m[:, 2] for m in (found, how)]
    assert np.linalg.norm(there[0] - there[1], axis=1).mean() < 0.5
    moved, true = read_uint8(tmp_path / "f_img2.png"), phantom_pair("CT-MRI")[1]
    assert moved.shape == true.shape and np.abs(moved.astype(int) - true).mean() < 4
    assert read_uint8(out).shape == true.shape and (tmp_path / "f_registration.png").exists()
    names = {path.name for path in tmp_path.iterdir()}
    code, stdout, _ = call(*argv, "--register", "check")
    assert code == 2, "measured only, and still not of one size"
    assert {path.name for path in tmp_path.iterdir()} == names
    assert call(*argv, "--register", tmp_path / "f.tfm")[0] == 0


def test_images_without_content_are_refused(call, brighter, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (2, 128, 128)).astype(np.uint8)
    for name, image in zip("ab", noise, strict=True):
        write_png(tmp_path / f"{name}.png", image)
    argv = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "b.png", "--register", "rigid"]
    code, _, err = call(*argv, "--out", tmp_path / "out" / "f.png")
    assert code == 2 and "cannot be trusted" in err and not (tmp_path / "out").exists()
