"""The benchmarks run on small input and measure what they say; speed itself is not tested."""

import sys

import numpy as np
import pytest
import torch
from networks import NARROW, relative_error
from task_files import write_task

from args_setting import ROOT, TASKS
from cli import UserError
from dataset import task_pairs
from evaluation.compare import read_samples
from images import read_luma8, write_png
from network import ASFEFusion
from phantom import phantom_pair
from weights import load_weights, save_weights

pytest.importorskip("sewar", reason="needs requirements-dev.txt")
sys.path.append(str(ROOT / "benchmarks"))
import ablation
import brightness
import left_out
import loss_on_pixels
import metric_times
import page
import published
import speed
import startup
import study_speed
import volume_memory

SCRIPTS = ablation, brightness, left_out, loss_on_pixels, metric_times, page, published, speed
SCRIPTS += startup, study_speed, volume_memory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two pairs of each task for training and for tests; their means in the folder mean/."""
    root = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_task(root, task, "train", {"1001": 64, "2001": 64})
        write_task(root, task, "test", {"1001": 64, "2001": 64})
        (root / "mean" / task).mkdir(parents=True)
        for name, *paths, _ in task_pairs(root, task, "test"):
            mean = sum(read_luma8(path) / 2 for path in paths)
            write_png(root / "mean" / task / f"{name}.png", np.rint(mean).astype(np.uint8))
    return root


@pytest.fixture
def run(in_process):
    """What a benchmark prints."""

    def call(script, *argv) -> str:
        argv = [str(word) for word in argv]
        code, out, err = in_process(script, lambda: script.parse(argv), *argv)
        assert code == 0, err
        return out

    return call


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_command_is_in_the_docstring_and_a_wrong_flag_is_one_line(script, in_process):
    code, _, err = in_process(script, lambda: script.parse(["--repeats", "0"]))
    assert code == 2 and err.startswith(f"{script.__name__}.py: error: ") and err.count("\n") == 1
    assert f"\n    python benchmarks/{script.__name__}.py" in script.__doc__


def test_speed_measures_processes_that_take_turns(run, monkeypatch):
    """Another checkout's and the exported file, each in a process of its own."""
    pytest.importorskip("onnxruntime", reason="needs requirements-onnx.txt")
    measured = []
    show = speed.show
    monkeypatch.setattr(speed, "show", lambda what, rows: (measured.append(rows), show(what, rows)))
    monkeypatch.setattr(speed, "matrix_rate", lambda: 1e11)
    flags = ["--sizes", "compact", "--side", 32, "--repeats", 2, "--threads", 1, "--onnx"]
    names = ["before, optimised", "ONNX Runtime"]
    run(speed, *flags, "--against", speed.ROOT, "--versions", *names)
    [rows] = measured
    assert list(rows) == names
    for row in rows.values():
        assert len(row.seconds) == 2 and min(row.seconds) > 0 and len(row.floors) == 2
        assert 0 < row.start_gb <= row.peak_gb


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "docs"], "expected a checkout"),
        (["--onnx", "--train"], "without --train"),
        (["--onnx", "--parts"], "without --onnx"),
        (["--against", ".", "--DEVICE", "cuda"], "is for a CPU"),
        (["--versions", "fast"], "no version ['fast']"),
    ],
)
def test_speed_says_in_one_line_what_it_cannot_compare(in_process, flags, message):
    code, _, err = in_process(speed, lambda: speed.parse(flags), *flags)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", speed.PARTS | speed.FUSING)
def test_every_version_is_the_same_function(name, monkeypatch):
    version = (speed.PARTS | speed.FUSING)[name]
    monkeypatch.setattr(speed.inference, "FASTER", dict(speed.inference.FASTER))
    kept = []
    monkeypatch.setattr(speed.cli, "keep_freed_memory", lambda: kept.append(1))
    fused = speed.build("compact", version, speed.parse(["--side", "32", "--batch", "1"]))()
    torch.manual_seed(0)
    model = ASFEFusion("compact").eval()
    with torch.no_grad():
        assert relative_error(fused, model(*torch.rand(2, 1, 1, 32, 32))) < 1e-5
    left = {kind.__name__ for kind in speed.inference.FASTER.values()}
    assert not left & set(version.left_out)
    assert len(kept) == (version.settings and "keep_freed_memory" not in version.left_out)


def test_speed_in_one_process_takes_the_peak_of_the_allocator(monkeypatch):
    """As on a GPU, with training steps."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2.5e9)
    args = speed.parse(["--train", "--side", "32", "--batch", "2", "--repeats", "2"])
    rows = speed.measure_here("compact", speed.FUSING_ON_GPU, args)
    assert [(row.peak_gb, len(row.seconds)) for row in rows.values()] == [(2.5, 2)] * 2


def test_speed_counts_the_operations_of_the_direct_version():
    args = [speed.parse(["--side", side, "--batch", "1"]) for side in ("256", "200")]
    assert round(speed.count_operations("paper", args[0]) / 1e9) == 223
    with pytest.raises(UserError, match="side is 200, compact expects a multiple of 16"):
        speed.count_operations("compact", args[1])


def test_brightness_of_the_ct_itself(data):
    pairs = task_pairs(data, "CT-MRI", "test")
    samples = read_samples(pairs, {"ct": {pair.name: pair.path1 for pair in pairs}})
    found = brightness.brightness(samples, "ct")
    assert found.bone >= found.darkest >= 250
    assert found.grey == 0 and found.change < 0


def test_published_images_that_are_the_mean(data):
    for task in TASKS:
        found = published.veil(data / "mean" / task, task_pairs(data, task, "test"))
        assert found.startswith("correlation with the mean 1.0000, level on black 0.0;")


def test_ablation_trains_what_it_lacks_and_marks_what_the_seeds_do_not_explain(
    run, tmp_path, monkeypatch
):
    trained = []

    def values(path, args):  # casf has less SSIM with every seed, and Qabf with one of two
        name, seed = path
        trained.append(path)
        measures = dict.fromkeys(ablation.NAMES, 0.5)
        lost = {"whole": (0.0, 0.1), "casf": (0.2, 0.05)}.get(name, (0.1, 0.1))[seed - 1]
        return measures | {"SSIM": 0.8 if name == "whole" else 0.6, "Qabf": 0.5 - lost}

    monkeypatch.setattr(ablation, "pass_seconds", lambda names: dict.fromkeys(names, 0.2))
    monkeypatch.setattr(ablation, "train", lambda folder, name, seed, args: (name, seed))
    monkeypatch.setattr(ablation, "measure", values)
    flags = ["--runs", tmp_path, "--seeds", 1, 2, "--variants", "whole", "casf"]
    out = run(ablation, *flags)
    assert trained == [("whole", 1), ("casf", 1), ("whole", 2), ("casf", 2)]
    line = next(text for text in out.splitlines() if text.startswith("casf  "))
    assert "0.600 ±0.000*" in line and "0.375 ±0.075 " in line
    out = run(ablation, *flags, "blend", "blend and casf")
    assert len(trained) == 8, "nothing is trained twice"
    rows = [text for text in out.splitlines() if "±" in text]
    stars = {row[:15].strip(): row.count("*") for row in rows}
    assert stars == {"whole": 0, "casf": 1, "blend": 1, "blend and casf": 0}


def test_ablation_measures_people_left_out_and_trains_on_the_others(tmp_path, monkeypatch):
    for task in TASKS:
        case = {"CT-MRI": 2, "PET-MRI": 25, "SPECT-MRI": 3}[task]
        names = {f"{case}00{k}": 96 for k in range(1, 5)} | {"41001": 96}
        write_task(tmp_path / "data", task, "train", names)
    for name, cases in (("LEFT_OUT", ("2", "3")), ("SLICES", 1)):
        monkeypatch.setattr(ablation, name, cases)
    argv = "--runs", tmp_path / "runs", "--data_dir", tmp_path / "data", "--patch", 32, "--batch", 2
    args = ablation.parse([str(word) for word in (*argv, "--epochs", 1)])
    args.runs.mkdir()
    found = ablation.run("casf", 1, args)
    assert found["SSIM"] > 0 and found.keys() >= {"Qabf", "kept", "shortfall", "minutes"}
    model, metadata = load_weights(args.runs / "casf_1.safetensors")
    assert not model.size.casf and metadata["settings"]["leave_out"] == ["2", "3"]


def test_weights_are_measured_on_the_named_people_and_on_the_others(run, tmp_path):
    names = {"1000": 48, "1001": 48, "2000": 48, "3000": 48}
    data = write_task(tmp_path, "CT-MRI", "train", names)
    path = tmp_path / "w.safetensors"
    save_weights(ASFEFusion(NARROW), path, {"task": "CT-MRI"})
    out = run(left_out, path, "--task", "CT-MRI", "--cases", "CT:1", "--data_dir", data)
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("w ")]
    assert rows == [["w", "named", "2"], ["w", "others", "2"]]


def test_pixels_move_towards_less_loss(run, data):
    out = run(loss_on_pixels, "--data_dir", data, "--pairs", 1, "--steps", 3)
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(table) == 4 + len(loss_on_pixels.WEIGHTS)
    img1, img2 = torch.rand(2, 1, 1, 32, 32)
    best = loss_on_pixels.best_pixels(lambda fused, *_: (fused - img1).norm(), img1, img2, 100)
    assert (best - img1).norm() < 0.1 * (img2 - img1).norm()


def test_metric_times(data):
    folder = data / "mean" / "PET-MRI"
    triples = metric_times.stored_pairs(data, "PET-MRI", folder)
    assert len(triples) == 2 and np.array_equal(triples[0][0], read_luma8(folder / "1001.png"))
    metric_times.library_calls(*triples[0])
    assert min(metric_times.milliseconds(metric_times.metrics.ssim, triples)) >= 0


def test_volume_memory_lets_the_network_fuse_the_first_slices_only(tmp_path, monkeypatch):
    monkeypatch.setattr(volume_memory, "SIDE", 48)
    passes, fuse = [], ASFEFusion.fuse
    monkeypatch.setattr(ASFEFusion, "fuse", lambda *args: passes.append(1) or fuse(*args))
    volume_memory.draw(tmp_path, 24)
    volume_memory.fuse(tmp_path, 8)
    assert len(passes) == 2, "of six batches of four"
    assert (tmp_path / "fused.nii").is_file()


def test_study_speed_has_a_plain_loop_fuse_every_case(tmp_path):
    """Workers are tested elsewhere."""
    table = study_speed.draw(tmp_path, count=2, slices=1, side=32)
    clock, cpu = study_speed.seconds_of(table, 0)
    assert clock > 0 and cpu > 0


def test_the_parts_of_a_start_add_up(tmp_path):
    for path, image in zip(("1.png", "2.png"), phantom_pair("CT-MRI", 64), strict=True):
        write_png(tmp_path / path, image)
    flags = ["--img1", tmp_path / "1.png", "--img2", tmp_path / "2.png"]
    parts = startup.parts_of([*flags, "--out", tmp_path / "f.png"])
    expected = ("Python", "flags", "imports", "reading", "weights", "first pass", "writing", "exit")
    assert parts.keys() == {*expected, "other"}
    assert all(parts[name] > 0 for name in expected) and parts["imports"] > parts["flags"]


def test_startup_names_a_checkout_that_cannot_fuse(tmp_path, in_process):
    argv = ["--against", str(tmp_path), "--repeats", "1"]
    code, _, err = in_process(startup, lambda: startup.parse(argv), *argv)
    assert code == 2 and "No such file" in err and err.count("\n") == 1


def test_page_without_a_browser_is_one_line(in_process, monkeypatch):
    monkeypatch.setattr(page, "missing", lambda: "needs chromium")
    code, _, err = in_process(page, lambda: page.parse([]))
    assert code == 2 and err == "page.py: error: needs chromium\n"
