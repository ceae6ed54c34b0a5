"""test_asfe.py on images: what it writes, and one line with exit code 2 for bad input."""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from task_files import files, write_task

from args_setting import ALL_TASKS, ROOT, TASKS
from dataset import match_pairs, task_pairs
from evaluation import sheets
from evaluation.findings import by_kind, measure_findings
from fusing import ImageRequest, fuse_images
from images import read_luma8, to_uint8, write_png
from inference import optimise
from phantom import phantom_pair
from weights import load_weights, save_weights, shipped_path


def test_fuses_a_test_split(call, weights, tmp_path):
    data = write_task(tmp_path / "data", "PET-MRI", "test", {"b": 64, "a": 64, "c": 80, "d": 64})
    argv = ["--task", "PET-MRI", "--data_dir", data, "--weights", weights, "--batch_size", 2]
    out = tmp_path / "out"
    code, stdout, _ = call(*argv, "--out", out)
    assert code == 0 and "4 pairs" in stdout
    names = {"a.png", "b.png", "c.png", "d.png"}
    assert files(tmp_path) - files(data.parent / "data") >= {f"out/{n}" for n in names}
    assert files(out) == names
    # batches do not change a pair, and neither does going alone
    model, _ = load_weights(weights)
    for name, side in (("a", 64), ("c", 80)):
        pet, mri = phantom_pair("PET-MRI", side)
        fused = cv2.imread(str(out / f"{name}.png"))[..., ::-1]
        assert fused.shape == pet.shape and fused.dtype == np.uint8
        exact = pet.astype(np.float32) / 255 @ np.array([0.299, 0.587, 0.114], np.float32)
        luma = model.fuse(exact, mri).numpy()
        expected = to_uint8(luma, pet / np.float32(255) - exact[..., None])
        assert np.abs(fused.astype(int) - expected).max() <= 1


def test_only_some_cases_of_the_test_split(call, weights, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"2001": 32, "2002": 32, "16001": 32})
    argv = ["--data_dir", data, "--weights", weights, "--out", tmp_path / "out"]
    assert call(*argv, "--cases", 2)[0] == 0
    assert files(tmp_path / "out") == {"2001.png", "2002.png"}
    code, _, err = call(*argv, "--cases", 2, 3)
    assert code == 2 and "cases has ['3'], which the test split of CT-MRI lacks" in err


def test_batches_keep_to_their_size_and_to_one_image_size(tmp_path):
    sides = {"a": 32, "b": 32, "c": 32, "d": 48, "e": 48, "f": 32}
    folder = write_task(tmp_path, "CT-MRI", "test", sides) / "CT-MRI" / "test"
    seen = []

    class Mean:
        def fuse(self, luma1, luma2, stretch):
            seen.append(luma1.shape)
            return torch.from_numpy((luma1 + luma2) / 2)

    pairs = match_pairs(folder / "CT", folder / "MRI")
    requests = [ImageRequest(pair, tmp_path / f"{pair.name}.png") for pair in pairs]
    fused = {f.request.pair.name: f for f in fuse_images(requests, Mean(), 2)}
    assert list(fused) == list(sides)
    assert [(n, side) for n, _, side, _ in seen] == [(2, 32), (1, 32), (2, 48), (1, 32)]
    assert all(f.image.shape == (sides[name],) * 2 for name, f in fused.items())


def test_contact_sheet_shows_sources_and_result(call, weights, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"a": 64, "b": 48, "c": 64})
    argv = ["--data_dir", data, "--weights", weights, "--out", tmp_path / "out"]
    assert call(*argv, "--contact_rows", 2)[0] == 0
    sheet = cv2.imread(str(tmp_path / "out_contact_sheet.png"))
    cell, gap, header = sheets.CELL, sheets.GAP, sheets.HEADER
    assert sheet.shape == (header + 2 * (cell + gap), 3 * (cell + gap) + gap, 3)
    ct = cv2.resize(phantom_pair("CT-MRI", 64)[0], (cell, cell), interpolation=cv2.INTER_NEAREST)
    shown = sheet[header : header + cell - 30, gap : gap + cell, 0]  # above the name
    assert np.array_equal(shown, ct[:-30])
    (tmp_path / "out_contact_sheet.png").unlink()
    assert call(*argv, "--contact_rows", 0)[0] == 0
    assert not (tmp_path / "out_contact_sheet.png").exists()


def test_fuses_one_pair_and_two_folders(call, weights, tmp_path):
    data = write_task(tmp_path, "CT-MRI", "test", {"a": 50}) / "CT-MRI" / "test"
    pair = ["--img1", data / "CT/a.png", "--img2", data / "MRI/a.png", "--weights", weights]
    assert call(*pair, "--out", tmp_path / "new" / "one.png")[0] == 0
    folders = ["--dir1", data / "CT", "--dir2", data / "MRI", "--weights", weights]
    assert call(*folders, "--out", tmp_path / "many")[0] == 0
    one = cv2.imread(str(tmp_path / "new" / "one.png"), cv2.IMREAD_UNCHANGED)
    assert one.shape == (50, 50)
    assert np.array_equal(one, cv2.imread(str(tmp_path / "many" / "a.png"), cv2.IMREAD_UNCHANGED))


def test_stretch_and_aff_reach_the_network(call, weights, tmp_path):
    data = write_task(tmp_path, "CT-MRI", "test", {"a": 64}) / "CT-MRI" / "test"
    pair = ["--img1", data / "CT/a.png", "--img2", data / "MRI/a.png", "--weights", weights]
    results = {}
    for name, extra in {
        "plain": [],
        "stretch": ["--stretch"],
        "aff": ["--aff", "published"],
    }.items():
        assert call(*pair, *extra, "--out", tmp_path / f"{name}.png")[0] == 0
        results[name] = read_luma8(tmp_path / f"{name}.png")
    assert results["stretch"].min() == 0 and results["stretch"].max() == 255
    assert not np.array_equal(results["plain"], results["aff"])


def test_metrics_of_what_was_written(call, weights, tmp_path):
    data = write_task(tmp_path / "data", "PET-MRI", "test", {"a": 64, "b": 64})
    argv = ["--task", "PET-MRI", "--data_dir", data, "--weights", weights]
    code, out, _ = call(*argv, "--out", tmp_path / "out", "--metrics")
    assert code == 0
    table = out[out.index("contact sheet") :]
    assert "ASFE-Fusion" in table and "max" in table and "mean" in table and "Qabf" in table
    # also when the folder holds another image of that name, and for a single pair
    cv2.imwrite(str(tmp_path / "out" / "a.jpg"), np.zeros((64, 64), np.uint8))
    again = call(*argv, "--out", tmp_path / "out", "--metrics")[1]
    assert again[again.index("ASFE-Fusion") :] == out[out.index("ASFE-Fusion") :]
    source = data / "PET-MRI" / "test"
    pair = ["--img1", source / "PET/a.png", "--img2", source / "MRI/a.png", "--weights", weights]
    assert "Qabf" in call(*pair, "--out", tmp_path / "a.png", "--metrics")[1]


def test_a_source_is_never_overwritten(call, weights, tmp_path):
    data = write_task(tmp_path, "CT-MRI", "test", {"a": 64}) / "CT-MRI" / "test"
    before = (data / "CT/a.png").read_bytes(), (data / "MRI/a.png").read_bytes()
    folders = ["--dir1", data / "CT", "--dir2", data / "MRI", "--weights", weights]
    pair = ["--img1", data / "CT/a.png", "--img2", data / "MRI/a.png", "--weights", weights]
    for argv in ([*folders, "--out", data / "MRI/../CT"], [*pair, "--out", data / "MRI/a.png"]):
        code, _, err = call(*argv)
        assert code == 2 and "would be overwritten" in err and err.count("\n") == 1
    assert before == ((data / "CT/a.png").read_bytes(), (data / "MRI/a.png").read_bytes())


def test_a_stray_file_can_be_skipped(call, weights, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"a": 64, "b": 64})
    (data / "CT-MRI" / "test" / "MRI" / "b.png").unlink()
    argv = ["--data_dir", data, "--weights", weights, "--out", tmp_path / "out"]
    code, _, err = call(*argv)
    assert code == 2 and err.count("\n") == 1
    assert "b is in" in err and "--skip-unmatched" in err and not (tmp_path / "out").exists()
    assert call(*argv, "--skip-unmatched")[0] == 0
    assert files(tmp_path / "out") == {"a.png"}


def test_what_is_left_out_is_named(call, brighter, tmp_path):
    data = write_task(tmp_path / "data", "CT-MRI", "test", {"a": 32, "b": 32, "c": 32})
    source = data / "CT-MRI" / "test"
    (source / "MRI" / "b.png").unlink()
    (source / "CT" / "c.png").unlink()
    (source / "CT" / "._a.png").write_bytes(b"kept by macOS")
    (source / "CT" / "folder.png").mkdir()
    argv = ["--dir1", source / "CT", "--dir2", source / "MRI", "--out", tmp_path / "out"]
    code, out, err = call(*argv, "--skip-unmatched")
    assert code == 0 and "left out, without a partner: b, c\n" in out, err
    assert files(tmp_path / "out") == {"a.png"}


def test_one_folder_is_not_two(call, weights, tmp_path):
    folder = write_task(tmp_path, "CT-MRI", "test", {"a": 32}) / "CT-MRI" / "test" / "CT"
    (tmp_path / "link").symlink_to(folder)
    for other in (folder, folder / ".." / "CT", tmp_path / "link"):
        argv = ["--dir1", folder, "--dir2", other, "--out", tmp_path / "out"]
        code, _, err = call(*argv, "--weights", weights)
        assert code == 2 and "is given for both sources" in err and err.count("\n") == 1


def test_out_does_not_lie_inside_a_source(call, weights, tmp_path):
    source = write_task(tmp_path, "CT-MRI", "test", {"a": 32}) / "CT-MRI" / "test"
    folders = ["--dir1", source / "CT", "--dir2", source / "MRI", "--weights", weights]
    split = ["--data_dir", tmp_path, "--weights", weights]
    (tmp_path / "link").symlink_to(source / "MRI")
    before = files(tmp_path)
    for out in (source / "MRI" / "fused", tmp_path / "link" / "fused"):
        for argv in (folders, split):
            code, _, err = call(*argv, "--out", out)
            assert code == 2 and "inside of the source folder" in err and err.count("\n") == 1
    assert files(tmp_path) == before


def test_a_loop_of_links_and_too_long_a_name_are_one_line(call, weights, tmp_path):
    source = write_task(tmp_path, "CT-MRI", "test", {"a": 32}) / "CT-MRI" / "test"
    argv = ["--dir1", source / "CT", "--dir2", source / "MRI", "--weights", weights]
    code, _, err = call(*argv, "--out", tmp_path / ("a" * 250))  # and _contact_sheet.png
    assert code == 2 and "File name too long" in err and err.count("\n") == 1
    assert call(*argv, "--out", tmp_path / ("a" * 250), "--contact_rows", 0)[0] == 0
    for name in ("CT", "MRI"):
        (source / name / "b.png").symlink_to("b.png")
    code, _, err = call(*argv, "--out", tmp_path / "out")
    assert code == 2 and "symbolic links" in err and "b.png" in err and err.count("\n") == 1
    (tmp_path / "loop").symlink_to("loop")
    code, _, err = call(*argv[:4], "--weights", weights, "--out", tmp_path / "loop" / "out")
    assert code == 2 and err.count("\n") == 1


def test_the_weights_are_named(call, tmp_path):
    for name, image in zip("ab", phantom_pair("PET-MRI", 32), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    argv = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "b.png", "--out", tmp_path / "o.png"]
    path = ROOT / "model_pre" / "compact_PET-MRI.safetensors"
    _, metadata = load_weights(path)
    line = f"weights: {path} (compact, PET-MRI, {metadata['date']})\n"
    code, out, _ = call(*argv, "--task", "PET-MRI")
    assert code == 0 and line in out and "note:" not in out
    own, learned = tmp_path / "own.safetensors", {**metadata, "task": "PET-MRI"}
    save_weights(load_weights(path)[0], own, learned)
    code, out, _ = call(*argv, "--weights", own, "--task", "SPECT-MRI")
    assert code == 0 and f"weights: {own} (compact, PET-MRI, " in out
    assert "note: these weights learned PET-MRI, but the task is SPECT-MRI\n" in out


def test_a_constant_image_works(call, weights, tmp_path):
    for level in (0, 255):
        write_png(tmp_path / "flat.png", np.full((40, 40), level, np.uint8))
        pair = ["--img1", tmp_path / "flat.png", "--img2", tmp_path / "flat.png"]
        out = tmp_path / "out.png"
        for extra in ([], ["--stretch"]):
            assert call(*pair, "--weights", weights, *extra, "--out", out)[0] == 0
            assert read_luma8(out).shape == (40, 40)
        if level == 0:  # the head multiplies the sources
            assert not read_luma8(out).any()


class Inputs:
    """A test split of two pairs, from which something is taken away, and how to fuse it."""

    def __init__(self, folder: Path, weights: Path):
        self.folder, self.weights, self.out = folder, weights, folder / "out"
        self.data = write_task(folder / "data", "CT-MRI", "test", {"a": 64, "b": 64})
        self.ct, self.mri = (self.data / "CT-MRI" / "test" / kind for kind in ("CT", "MRI"))

    def split(self, *flags) -> list:
        return ["--data_dir", self.data, "--weights", self.weights, "--out", self.out, *flags]

    def folders(self, *flags) -> list:
        return ["--dir1", self.ct, "--dir2", self.mri, "--out", self.out, *flags]

    def pair(self, *flags) -> list:
        return ["--img1", self.ct / "a.png", "--img2", self.mri / "a.png", *flags]

    def pair_to_png(self, *flags) -> list:
        return self.pair("--out", self.folder / "o.png", *flags)


def empty_folder(on: Inputs) -> list:
    (on.folder / "none").mkdir()
    return on.folders("--weights", on.weights, "--dir2", on.folder / "none")


def unmatched(on: Inputs) -> list:
    (on.ct / "b.png").rename(on.ct / "z.png")
    return on.split()


def two_sizes(on: Inputs) -> list:
    write_png(on.ct / "b.png", phantom_pair("CT-MRI", 48)[0])
    return on.split()


def too_small(on: Inputs) -> list:
    write_task(on.data, "CT-MRI", "test", {"b": 12})
    return on.split()


def truncated(on: Inputs) -> list:
    (on.mri / "b.png").write_bytes((on.mri / "b.png").read_bytes()[:300])
    return on.split()


def text(on: Inputs) -> list:
    (on.mri / "b.png").write_text("hello")
    return on.split()


def empty_weights(on: Inputs) -> list:
    (on.folder / "w.safetensors").write_bytes(b"")
    return on.split("--weights", on.folder / "w.safetensors")


def out_below_a_file(on: Inputs) -> list:
    (on.folder / "file").write_text("")
    return on.split("--out", on.folder / "file" / "out")


BROKEN = {  # what is done to the inputs, with the arguments then; and what the message says
    "missing folder": (lambda on: on.split("--data_dir", on.folder / "no"), "no such folder"),
    "empty folder": (empty_folder, "no images"),
    "unmatched": (unmatched, "b (and 1 others) is in"),
    "two sizes": (two_sizes, "48x48"),
    "too small": (too_small, "12x12, expected at least 16x16"),
    "truncated": (truncated, "damaged"),
    "text": (text, "b.png: damaged or not an image"),
    "empty weights": (empty_weights, "damaged"),
    "other size": (
        lambda on: on.split("--size", "paper"),
        "are of size compact, expected size paper",
    ),
    "no paper weights": (
        lambda on: ["--data_dir", on.data, "--size", "paper"],
        "no weights of size paper",
    ),
    "unknown task": (lambda on: on.split("--task", "CT-PET"), "invalid choice: 'CT-PET'"),
    "all": (lambda on: on.split("--task", "all"), "task all has no test split"),
    "unwritable": (out_below_a_file, "Not a directory"),
    "half a pair": (lambda on: on.split("--img1", on.ct / "a.png"), "--img1 with --img2"),
    "no out": (lambda on: on.pair(), "need --out"),
    "out is no png": (
        lambda on: on.pair("--weights", on.weights, "--out", on.folder / "out.jpg"),
        "ends in .png",
    ),
    "batch": (
        lambda on: on.split("--batch_size", "0"),
        "batch_size is 0, expected at least 1",
    ),
    "threads": (lambda on: on.split("--threads", "-1"), "threads is -1, expected at least 0"),
    "rows": (lambda on: on.split("--contact_rows", "-1"), "contact_rows is -1"),
    "cases of a pair": (
        lambda on: on.pair_to_png("--cases", "2"),
        "--cases is for the test split, but this fuses one pair",
    ),
    "unmatched in a pair": (
        lambda on: on.pair_to_png("--skip-unmatched"),
        "--skip_unmatched is for the test split and two folders",
    ),
    "cases of folders": (
        lambda on: on.folders("--cases", "2"),
        "--cases is for the test split, but this fuses two",
    ),
    "cases of the demo": (
        lambda on: ["--demo", "--out", on.out, "--cases", "2"],
        "this fuses the demo",
    ),
}
if not torch.cuda.is_available():
    BROKEN["cuda"] = (lambda on: on.split("--DEVICE", "cuda"), "no such device")
if Path("/proc/self").is_dir():
    BROKEN["unwritable folder"] = (
        lambda on: on.split("--out", "/proc/self"),
        "cannot write into this folder",
    )


@pytest.mark.parametrize("kind", BROKEN)
def test_bad_input_is_one_line_and_writes_nothing(call, weights, tmp_path, kind):
    spoil, message = BROKEN[kind]
    argv = spoil(Inputs(tmp_path, weights))
    before = files(tmp_path)
    code, _, err = call(*argv)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert files(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(call, tmp_path):
    torch.save({"outlayer.weight": torch.zeros(1)}, tmp_path / "w.pth")
    write_png(tmp_path / "a.png", phantom_pair("CT-MRI", 32)[0])
    pair = ["--img1", tmp_path / "a.png", "--img2", tmp_path / "a.png", "--out", tmp_path / "o.png"]
    code, _, err = call(*pair, "--weights", tmp_path / "w.pth", "--size", "paper")
    assert code == 2 and "has shape" in err


@pytest.mark.parametrize("task", ALL_TASKS)
def test_shipped_weights_say_what_they_are(task):
    path = shipped_path("compact", task)
    assert path.name == f"compact_{task}.safetensors"
    data = path.read_bytes()
    assert len(data) <= 10e6
    listed = (path.parent / "SHA256SUMS").read_text().splitlines()
    assert f"{hashlib.sha256(data).hexdigest()}  {path.name}" in listed
    model, metadata = load_weights(path)
    assert metadata["task"] == task and metadata["size"] == "compact"
    assert metadata["settings"]["task"] == task and metadata["epochs"] >= 1
    assert metadata["metrics"]
    assert load_file(path)["encoder.inlayer.weight"].dtype == torch.float16
    # trained weights keep what both sources show
    for kind in TASKS if task == "all" else (task,):
        source1, mri = phantom_pair(kind)
        luma = source1 if source1.ndim == 2 else cv2.cvtColor(source1, cv2.COLOR_RGB2GRAY)
        fused = model.fuse(luma, mri)
        brighter = np.maximum(luma, mri) / 255
        assert np.corrcoef(fused.numpy().ravel(), brighter.ravel())[0, 1] > 0.95
        assert fused[:12].max() < 0.05, "the background is black"


@pytest.mark.parametrize("task", TASKS)
def test_shipped_weights_keep_findings(shared, task):
    """Over 0.6 of every kind, and of the worst kind more than the maximum does.

    On slices of the training split.
    """
    model = optimise(load_weights(shipped_path("compact", task))[0])
    pairs = task_pairs(shared / "HMIFDatasets", task, "train")[::150]
    kept = {
        name: by_kind(measure_findings(method, pairs, 3407, name), task)
        for name, method in (("ours", lambda a, b: model.fuse(a, b).numpy()), ("max", np.maximum))
    }
    worst = {name: min(shares.mean() for shares in kinds.values()) for name, kinds in kept.items()}
    assert worst["ours"] > max(0.6, worst["max"])


def test_demo_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "test_asfe.py", "--demo", "--out", tmp_path / "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "contact_sheet.png" in done.stdout
    expected = {f"{t}_{m}.png" for t, s in TASKS.items() for m in (s, "MRI", "fused")}
    assert files(tmp_path / "demo") == {*expected, "contact_sheet.png"}
