"""What a run may write: outputs that meet something, what an earlier run left, and one decode."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_series
from task_files import files, write_task
from volume_files import SHAPE, Brighter, affine_of, numbered

import fusing
import images
import volumes
from args_setting import ROOT, VERSION, shipped_path
from cli import UserError
from dataset import Pair
from fusing import AHEAD, ImageRequest, fuse_images, listed_as
from images import part_of, write_png
from inference import optimise
from network import ASFEFusion
from phantom import phantom_pair
from volumes import fuse_volumes, request_from
from weights import load_weights, save_weights

OFF = ["--register", "off", "--force", "all"]


@pytest.fixture
def small(tmp_path) -> list:
    """Flags for two small volumes on one grid."""
    for name in ("ct", "mri"):
        image = nib.Nifti1Image(numbered(), affine_of("identity"))
        image.to_filename(tmp_path / f"{name}.nii")
    argv = ["--img1", tmp_path / "ct.nii", "--img2", tmp_path / "mri.nii", *OFF]
    return [*argv, "--out", tmp_path / "f.nii"]


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """How often each image file is decoded."""
    count, plain = Counter(), images.decode

    def decode(path, *how):
        count[Path(path).name] += 1
        return plain(path, *how)

    for module in (images, fusing):
        monkeypatch.setattr(module, "decode", decode)
    return count


# --- every decode once -----------------------------------------------------------------------


def test_each_source_of_a_folder_is_decoded_once(call, brighter, tmp_path, decoded):
    """Also with a contact sheet and metrics; and no fused image is read again."""
    data = write_task(tmp_path / "data", "PET-MRI", "test", {"a": 32, "b": 32})
    argv = ["--task", "PET-MRI", "--data_dir", data, "--out", tmp_path / "out", "--metrics"]
    code, out, err = call(*argv)
    assert code == 0 and "Qabf" in out, err
    assert decoded == {"a.png": 2, "b.png": 2}, "a PET and an MRI of each name"


def test_a_registered_image_does_not_go_through_a_file(call, brighter, tmp_path, decoded):
    ct, mri = phantom_pair("CT-MRI")
    write_png(tmp_path / "ct.png", ct)
    write_png(tmp_path / "mri.png", np.roll(mri, 4, 1).astype(np.uint16) * 257)
    argv = ["--img1", tmp_path / "ct.png", "--img2", tmp_path / "mri.png"]
    code, _, err = call(*argv, "--out", tmp_path / "f.png", "--register", "rigid", "--metrics")
    assert code == 0, err
    assert decoded == {"ct.png": 1, "mri.png": 1}
    moved = images.decode(tmp_path / "f_img2.png").values
    assert moved.dtype == np.uint16 and len(np.unique(moved)) > 300, "as many bits as it had"
    told = json.loads((tmp_path / "f.json").read_text())
    assert told["registration"]["applied"] and 3 < told["registration"]["moved_pixels"] < 5
    assert set(told["files"]) == {"f.png", "f_img2.png", "f.tfm", "f_registration.png", "f.json"}
    assert told["version"] == VERSION and told["weights_sha256"] is None, "of no file"


def test_a_network_knows_the_file_of_its_values(tmp_path):
    """Also the one that is optimised; a changed file has another hash."""
    path = shipped_path("compact", "CT-MRI")
    model, metadata = load_weights(path)
    assert model.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert optimise(model).weights_sha256 == model.weights_sha256
    model.decoder.outlayer.bias.data += 0.5
    save_weights(model, tmp_path / "w.safetensors", metadata)
    assert load_weights(tmp_path / "w.safetensors")[0].weights_sha256 != model.weights_sha256
    assert ASFEFusion("compact").weights_sha256 is None


def test_a_volume_is_read_once_also_to_show_it_before(tmp_path, monkeypatch):
    move = np.eye(4)
    move[0, 3] = 3
    (tmp_path / "t.tfm").write_bytes(volumes.outputs.transform_text(move, np.zeros(3)))
    for name in ("ct", "mri"):
        image = nib.Nifti1Image(numbered(), affine_of("identity"))
        image.to_filename(tmp_path / f"{name}.nii")
    words = {"task": "CT-MRI", "img1": tmp_path / "ct.nii", "img2": tmp_path / "mri.nii"}
    words |= {"out": tmp_path / "f.nii", "register": tmp_path / "t.tfm", "force": "all"}
    request, read = request_from(words), []
    plain = volumes.read_volume
    monkeypatch.setattr(volumes, "read_volume", lambda p, *a: read.append(p) or plain(p, *a))
    kept = fusing.replace(request.registering, keep_unmoved=True)
    done = fuse_volumes(fusing.replace(request, registering=kept), Brighter())
    assert read == [tmp_path / "ct.nii", tmp_path / "mri.nii"]
    assert np.array_equal(done.together.unmoved.data, plain(tmp_path / "mri.nii").data)
    assert not np.array_equal(done.together.source2.data, done.together.unmoved.data)
    assert done.read == (tmp_path / "ct.nii", tmp_path / "mri.nii", tmp_path / "t.tfm")


@pytest.mark.parametrize("wrong", ("size", "text", "pixels"))
def test_a_folder_too_large_for_memory_is_checked_by_its_headers(tmp_path, monkeypatch, wrong):
    """Damaged pixels then end the run where they are, in a line that names the file."""
    requests = []
    for name in "abc":
        pair = [tmp_path / f"{name}{i}.png" for i in (1, 2)]
        for path in pair:
            write_png(path, np.full((32, 32), 90, np.uint8))
        requests.append(ImageRequest(Pair(name, *pair), tmp_path / "out" / f"{name}.png"))
    bad = tmp_path / "c2.png"
    if wrong == "size":
        write_png(bad, np.zeros((32, 48), np.uint8))
    else:
        bad.write_bytes(b"hello" if wrong == "text" else bad.read_bytes()[:60])
    with pytest.raises(UserError, match=r"c2\.png"):
        list(fuse_images(requests, Brighter(), 1))
    assert not (tmp_path / "out").exists(), "all of it fits into memory"
    monkeypatch.setattr(fusing, "AHEAD", 2048)  # one pair
    with pytest.raises(UserError, match=r"c2\.png"):
        list(fuse_images(requests, Brighter(), 1))
    left = files(tmp_path / "out") if (tmp_path / "out").exists() else set()
    assert left == ({"a.png", "b.png"} if wrong == "pixels" else set())
    assert AHEAD >= 2**27


# --- outputs that meet -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mosaic f_registration.png --register check", "f_registration.png would be written tw"),
        ("--mosaic png/axial_0001.png --png png", "has a name that --png may need"),
        ("--png same --dicom same", "same would be written twice, as png and as dicom"),
        ("--mosaic other.png", "other.png is there, and no earlier run into"),
        ("--png full", "full/axial_0040.png is there, and no earlier run into"),
        ("--dicom full", "full/axial_0040.png is there, and no earlier run into"),
        ("--out g.nii", "g.nii is there, and no earlier run into"),
        ("--out h.nii", "h.json is there, and no earlier run into"),
        ("--mosaic ct.nii/m.png", "Not a directory"),
        ("--png other.png", "other.png is no folder, choose another --png"),
        ("--mosaic mri.nii", "expected a file name that ends in .png"),
    ],
)
@pytest.mark.usefixtures("brighter")
def test_outputs_that_meet_something_end_in_one_line(
    call, small, tmp_path, monkeypatch, flags, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("other.png", "full/axial_0040.png", "g.nii", "h.json"):
        (tmp_path / name).write_text("a picture of mine")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    code, _, err = call(*small, *flags.split())
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_what_an_earlier_run_wrote_is_replaced_or_goes(call, brighter, small, tmp_path):
    """A transform beside a result without one, slices of a larger volume, another picture."""
    (tmp_path / "t.tfm").write_bytes(volumes.outputs.transform_text(np.eye(4), np.zeros(3)))
    away = tmp_path.parent / f"{tmp_path.name}-away"
    more = ["--register", tmp_path / "t.tfm", "--png", away, "--mosaic", tmp_path / "m.png"]
    code, _, err = call(*small, *more)
    assert code == 0, err
    first = {"f.nii", "f.json", "f.tfm", "f_registration.png", "m.png"}
    sources = {"ct.nii", "mri.nii", "t.tfm"}
    assert files(tmp_path) == first | sources and len(files(away)) == SHAPE[2]
    (away / "notes.txt").write_text("of mine")
    code, _, err = call(*small, "--png", away, "--axis", "sagittal")
    assert code == 0, err
    assert files(tmp_path) == {"f.nii", "f.json"} | sources
    names = {f"sagittal_{n:04d}.png" for n in range(SHAPE[0])}
    assert files(away) == names | {"notes.txt"}, "only what was listed goes"
    listed = json.loads((tmp_path / "f.json").read_text())["files"]
    assert "f.nii" in listed and not any(away.name in name for name in listed), "no path is told"
    assert call(*small)[0] == 0, "and once more"


def test_a_source_is_never_removed(call, brighter, small, tmp_path):
    """Not even if the run that made it had the same name as this one."""
    assert call("--task", "PET-MRI", *small)[0] == 0
    colour = tmp_path / "f_colour.nii"
    assert colour.is_file()
    nib.Nifti1Image(numbered(), affine_of("identity")).to_filename(colour)
    before = colour.read_bytes()
    assert call(*small, "--img1", colour)[0] == 0
    assert colour.read_bytes() == before


def test_a_run_killed_while_files_get_their_names_can_go_on(call, brighter, small, tmp_path):
    """Its sidecar is complete under another name, and lists what is there."""
    more = ["--mosaic", tmp_path / "m.png"]
    assert call(*small, *more)[0] == 0
    (tmp_path / "f.json").rename(part_of(tmp_path / "f.json"))
    assert call(*small, *more)[0] == 0
    assert not list(tmp_path.glob("*.part"))


def test_older_sidecars_without_a_list_are_ours(call, brighter, small, tmp_path):
    assert call(*small)[0] == 0
    content = json.loads((tmp_path / "f.json").read_text())
    del content["files"]
    (tmp_path / "f.json").write_text(json.dumps(content))
    (tmp_path / "f.tfm").write_text("of that run")
    assert call(*small)[0] == 0
    assert not (tmp_path / "f.tfm").exists()


def test_a_list_cannot_name_files_of_others(call, brighter, small, tmp_path):
    assert call(*small)[0] == 0
    victim = tmp_path.parent / f"{tmp_path.name}.txt"
    victim.write_text("of mine")
    content = json.loads((tmp_path / "f.json").read_text())
    content["files"] += [str(victim), f"../{victim.name}", "sub/../../" + victim.name]
    (tmp_path / "f.json").write_text(json.dumps(content))
    assert call(*small)[0] == 0 and victim.read_text() == "of mine"


def test_an_image_registered_before_leaves_nothing_beside_the_new_one(call, brighter, tmp_path):
    for name, image in zip(("ct", "mri"), phantom_pair("CT-MRI"), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    argv = ["--img1", tmp_path / "ct.png", "--img2", tmp_path / "mri.png"]
    argv += ["--out", tmp_path / "f.png"]
    assert call(*argv, "--register", "rigid")[0] == 0
    assert len(files(tmp_path)) == 2 + 5
    assert call(*argv)[0] == 0
    assert files(tmp_path) == {"ct.png", "mri.png", "f.png"}
    (tmp_path / "f.tfm").write_text("of mine")
    code, _, err = call(*argv, "--register", "rigid")
    assert code == 2 and "f.tfm is there, and no earlier run into" in err
    assert call(*argv)[0] == 0 and (tmp_path / "f.tfm").read_text() == "of mine"


def test_an_own_transform_can_be_given_again(call, brighter, tmp_path):
    """It stays as it is, and still counts as this result's."""
    for name, image in zip(("ct", "mri"), phantom_pair("CT-MRI"), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    argv = ["--img1", tmp_path / "ct.png", "--img2", tmp_path / "mri.png"]
    argv += ["--out", tmp_path / "f.png", "--register"]
    assert call(*argv, "rigid")[0] == 0
    before = (tmp_path / "f.tfm").read_bytes()
    code, _, err = call(*argv, tmp_path / "f.tfm")
    assert code == 0 and (tmp_path / "f.tfm").read_bytes() == before, err
    assert "f.tfm" in json.loads((tmp_path / "f.json").read_text())["files"]
    assert call(*argv, "off")[0] == 0
    assert files(tmp_path) == {"ct.png", "mri.png", "f.png"}


def test_weights_that_fail_leave_no_file_of_a_registration(call, tmp_path, monkeypatch):
    """All files of a pair come together, after the network."""
    for name, image in zip(("ct", "mri"), phantom_pair("CT-MRI"), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    (tmp_path / "w.safetensors").write_bytes(b"none")
    argv = ["--img1", tmp_path / "ct.png", "--img2", tmp_path / "mri.png", "--register", "rigid"]
    argv += ["--out", tmp_path / "f.png", "--weights", tmp_path / "w.safetensors"]
    code, _, err = call(*argv)
    assert code == 2 and "damaged" in err
    assert files(tmp_path) == {"ct.png", "mri.png", "w.safetensors"}


def test_an_error_of_writing_names_the_file(tmp_path):
    def full(file):
        raise OSError(28, "No space left on device")

    writers = {tmp_path / "a": lambda file: file.write(b"a"), tmp_path / "b": full}
    with pytest.raises(OSError, match=r"No space.*b'"):
        images.write_together(writers)
    assert not files(tmp_path)


def test_a_list_is_of_paths_from_the_sidecar(tmp_path):
    side = tmp_path / "f.json"
    assert listed_as(tmp_path / "png" / "a.png", side) == "png/a.png"
    outside = listed_as(tmp_path.parent / "a.png", side)
    assert outside.startswith(fusing.OUTSIDE) and "a.png" not in outside


def test_a_dicom_series_is_replaced_whole(call, brighter, tmp_path):
    pytest.importorskip("highdicom", reason="needs requirements-volumes.txt")
    for name, modality in (("ct", "CT"), ("mr", "MR")):
        write_series(tmp_path / name, numbered(), affine_of("identity"), modality)
    argv = ["--img1", tmp_path / "ct", "--img2", tmp_path / "mr", *OFF, "--out", tmp_path / "f.nii"]
    argv += ["--dicom", tmp_path / "out"]
    for axis in ("sagittal", "axial"):
        code, _, err = call(*argv, "--axis", axis)
        assert code == 0, err
    names = {f"axial_{n:04d}.dcm" for n in range(1, SHAPE[2] + 1)}
    assert files(tmp_path / "out") == names


# --- from Python -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ("README.md", "docs/volumes.md"))
def test_the_example_in_python_runs(text, tmp_path, heads):
    """As printed, from the repository's folder, on the files that it names."""
    code = re.search(r"```python\n(.*?)```", (ROOT / text).read_text(), re.DOTALL)[1]
    for name, image in zip(("pet", "mri"), phantom_pair("PET-MRI", 32), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    for name in ("ct", "mri"):
        (tmp_path / f"{name}.nii.gz").write_bytes(heads[name].read_bytes())
    (tmp_path / "model_pre").symlink_to(ROOT / "model_pre")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"README.md": "fused.png", "docs/volumes.md": "fused.nii.gz"}[text] in files(tmp_path)
    assert done.stdout.count("\n") == 1, "nothing but what the example prints"
