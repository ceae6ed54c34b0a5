"""Training: it learns, resumes bit for bit, survives a kill, and is the same in two processes."""

import csv
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from task_files import files, write_task
from torch import nn

import train_asfe
from args_setting import ROOT, TrainArgs
from checkpoints import Run, load_checkpoint, stages_of
from cli import parse_args
from dataset import TrainPairs, task_pairs
from evaluation.floors import CEILINGS, FLOORS, shortfall
from losses import fusion_loss
from network import ASFEFusion
from phantom import phantom_pair
from weights import load_weights

STEM = "compact_CT-MRI"


@pytest.fixture
def call(in_process):
    """Run train_asfe.py in this process: exit code, stdout, stderr."""
    return lambda *argv: in_process(train_asfe, lambda: parse_args(TrainArgs), *argv)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three patients of four slices each."""
    names = {f"{case}{slice_:03d}": 64 for case in (1, 2, 3) for slice_ in range(4)}
    return write_task(tmp_path_factory.mktemp("data"), "CT-MRI", "train", names)


def settings(data: Path, save_dir: Path, *extra) -> list[str]:
    argv = ["--data_dir", data, "--save_dir", save_dir, "--threads", 1]
    if "--stages" not in extra:  # which name patch and batch themselves
        argv += ["--patch_size", 32, "--batch_size", 4]
    return [str(a) for a in [*argv, *extra]]


def rows(save_dir: Path, stem: str = STEM) -> list[dict[str, str]]:
    with (save_dir / f"{stem}.csv").open() as file:
        return list(csv.DictReader(file))


def states(save_dir: Path) -> dict:
    return torch.load(save_dir / f"{STEM}_last.pt", weights_only=True)["state"]


def equal(a, b) -> bool:
    """Nested states are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- the run ---------------------------------------------------------------------------------


def test_a_short_training_corrects_the_blend(call, data, tmp_path):
    """Less than a minute on phantoms. An untrained network nearly gives the blend, which leaves
    little to gain: two sources that differ keep structure and information up."""
    argv = settings(data, tmp_path, "--epoch", 8, "--warmup", 2, "--lr", 0.003, "--val", 0)
    code, out, err = call(*argv)
    assert code == 0, err
    path = tmp_path / f"{STEM}.safetensors"
    assert f"weights: {path}" in out
    torch.manual_seed(3407)
    untrained = ASFEFusion("compact").train()
    images = torch.stack(TrainPairs(task_pairs(data, "CT-MRI", "train"), 32).images)
    img1, img2 = (images[:8].float() / 255).split(1, 1)
    model, metadata = load_weights(path)
    with torch.no_grad():
        before, terms = fusion_loss(untrained(img1, img2), img1, img2)
        after, after_terms = fusion_loss(model(img1, img2), img1, img2)
    assert after < 0.9 * before
    assert after_terms["content"] < terms["content"]
    assert set(metadata["metrics"]) == {"train"}
    assert metadata["metrics"]["train"].keys() >= {"SSIM", "VIF", "Qabf", "kept", "shortfall"}
    assert metadata["task"] == "CT-MRI" and metadata["epochs"] == 8
    assert metadata["settings"]["lr"] == 0.003 and metadata["settings"]["seed"] == 3407
    assert str(tmp_path) not in str(metadata), "no path of a machine in the weights"
    assert torch.isfinite(model.fuse(*phantom_pair("CT-MRI", 64))).all()
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_run_writes(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 3, "--val_every", 2)
    assert call(*argv)[0] == 0
    endings = (".safetensors", "_last.pt", ".csv", "_curve.png")
    written = files(tmp_path)
    assert {f"{STEM}{e}" for e in endings} <= written
    events = [name for name in written if "tfevents" in name]
    assert len(events) == 1 and len(written) == len(endings) + 1
    table = rows(tmp_path)
    assert [row["epoch"] for row in table] == ["1", "2", "3"]
    assert all(float(row["pairs_per_s"]) > 0 and float(row["lr"]) > 0 for row in table)
    assert [bool(row["val_SSIM"]) for row in table] == [False, True, True]
    metadata = load_weights(tmp_path / f"{STEM}.safetensors")[1]
    best = min((r for r in table if r["val_SSIM"]), key=lambda r: float(r["val_shortfall"]))
    assert metadata["metrics"]["val"]["SSIM"] == float(best["val_SSIM"])
    assert metadata["epochs"] == int(best["epoch"]) and metadata["validation_pairs"] == 4
    # TensorBoard's own reader finds the values of the table, and a picture
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str((tmp_path / events[0]).parent)).Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(
        [float(row["loss"]) for row in table], rel=1e-5
    )
    assert {"val/SSIM", "lr", "pairs/per_s", "gradient"} <= set(board.Tags()["scalars"])
    assert len(board.Images("img1, img2, fused")) == 2


def test_resumed_epochs_equal_uninterrupted_ones_bit_for_bit(call, data, tmp_path):
    argv = ["--epoch", 4, "--val_every", 2, "--warmup", 2, "--accumulate", 2]
    assert call(*settings(data, tmp_path / "once", *argv))[0] == 0
    short = settings(data, tmp_path / "twice", *argv, "--minutes", 1e-9)  # an epoch each
    assert "1 epochs of 4 (--resume goes on)" in call(*short)[1]
    for _ in range(2):
        assert call(*short, "--resume")[0] == 0
    assert not equal(states(tmp_path / "once"), states(tmp_path / "twice"))
    assert call(*short[:-2], "--resume")[0] == 0
    assert equal(states(tmp_path / "once"), states(tmp_path / "twice"))
    once, twice = (rows(tmp_path / name) for name in ("once", "twice"))
    for row in (*once, *twice):
        del row["seconds"], row["pairs_per_s"]
    assert once == twice
    models = [load_weights(tmp_path / n / f"{STEM}.safetensors")[0] for n in ("once", "twice")]
    assert equal(*(model.state_dict() for model in models))


def test_checkpoints_come_every_so_many_epochs_and_at_the_end(call, data, tmp_path, monkeypatch):
    saved = []
    save = train_asfe.save_checkpoint
    monkeypatch.setattr(
        train_asfe, "save_checkpoint", lambda *all: (saved.append(all[-1].epoch), save(*all))
    )
    argv = settings(data, tmp_path, "--epoch", 4, "--val_every", 9, "--save_every", 2)
    assert call(*argv, "--minutes", 1e-9)[0] == 0
    assert saved == [1], "a run that stops can go on"
    assert call(*argv, "--resume", "--save_every", 3)[0] == 0
    assert saved == [1, 3, 4, 4], "before the last validation and after it"


def test_a_checkpoint_is_there_before_a_validation_that_fails(call, data, tmp_path, monkeypatch):
    def fail(*_):
        raise train_asfe.UserError("statistics are not finite")

    monkeypatch.setattr(train_asfe, "validate", fail)
    argv = settings(data, tmp_path, "--epoch", 2, "--val_every", 1)
    assert call(*argv)[0] == 2
    monkeypatch.undo()
    code, out, err = call(*argv, "--resume")
    assert code == 0 and "2 epochs" in out, err
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


def test_without_a_validation_no_weights_file_is_named(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 3, "--val_every", 3, "--minutes", 1e-9)
    code, out, _ = call(*argv)
    assert code == 0 and "weights: none yet, they come with the first validation" in out
    assert not (tmp_path / f"{STEM}.safetensors").exists()


def test_stages_are_one_run_whose_rest_may_change(call, data, tmp_path):
    """64 pixels, then frozen: cut in between and made longer, it ends as in one go."""
    stages = ["32x4x2", "64x2x1:frozen"]
    argv = settings(data, tmp_path / "once", "--val_every", 9, "--cooldown", 0, "--stages", *stages)
    assert call(*argv)[0] == 0
    argv[3] = str(tmp_path / "twice")
    assert "1 epochs of 3" in call(*argv[:-2], "32x4x3", "--minutes", 1e-9)[1]
    code, _, err = call(*argv[:-2], "16x4x3", "--resume")
    assert code == 2 and "the first 1 epochs were 32x4x1" in err and err.count("\n") == 1
    assert call(*argv, "--resume")[0] == 0
    assert equal(states(tmp_path / "once"), states(tmp_path / "twice"))
    assert len(rows(tmp_path / "twice")) == 3


@pytest.mark.slow
def test_the_paper_size_trains_validates_saves_resumes_and_fuses(call, tmp_path):
    """Two steps of it, in two runs. Its running variances exceed what float16 can hold."""
    names = {name: 128 for name in ("1000", "1001", "1002", "1003", "2000")}
    data = write_task(tmp_path / "data", "CT-MRI", "train", names)
    argv = settings(data, tmp_path / "run", "--size", "paper", "--epoch", 2, "--val_every", 1)
    argv[argv.index("--patch_size") + 1] = "128"
    code, out, err = call(*argv, "--minutes", 1e-9)
    assert code == 0 and "1 epochs of 2" in out, err
    code, out, err = call(*argv, "--resume")
    assert code == 0 and "2 epochs" in out, err
    assert all(float(row["val_SSIM"]) > 0 for row in rows(tmp_path / "run", "paper_CT-MRI"))
    model, metadata = load_weights(tmp_path / "run" / "paper_CT-MRI.safetensors")
    assert metadata["size"] == "paper"
    assert torch.isfinite(model.fuse(*phantom_pair("CT-MRI", 128))).all()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_during_a_save_goes_on(call, data, tmp_path, number):
    """A child stops itself halfway through writing its second checkpoint."""
    argv = settings(data, tmp_path, "--epoch", 3, "--val_every", 9)
    child = f"""
import signal, torch, train_asfe
from args_setting import TrainArgs
from cli import parse_args, run_script
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
whole, calls = torch.save, []
def half(state, file):
    calls.append(1)
    if len(calls) == 2:
        file.write(b"half of it")
        file.flush()
        signal.raise_signal({int(number)})  # at once, in this thread
    whole(state, file)
torch.save = half
run_script(train_asfe.main, parse_args(TrainArgs, {argv!r}))
"""
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (-number, 130) and "Traceback" not in done.stderr, done.stderr
    code, out, err = call(*argv, "--resume")
    assert code == 0 and "3 epochs" in out, err
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]
    load_weights(tmp_path / f"{STEM}.safetensors")


def test_early_stopping(call, data, tmp_path, monkeypatch):
    never_better = dict.fromkeys((*train_asfe.METRICS, "shortfall"), 1.0)
    monkeypatch.setattr(train_asfe, "validate", lambda *_: never_better)
    argv = settings(data, tmp_path, "--epoch", 9, "--val_every", 1, "--patience", 2)
    assert "3 epochs of 9" in call(*argv)[1]
    assert load_weights(tmp_path / f"{STEM}.safetensors")[1]["epochs"] == 1


def test_validation_takes_the_worse_source_and_the_mean_of_tasks():
    """The stand-in keeps source 1 only, so what only source 2 shows is lost."""
    model = SimpleNamespace(fuse=lambda img1, img2: img1 / 255)
    images = torch.from_numpy(np.stack(phantom_pair("CT-MRI", 96)))
    chosen = [("CT-MRI", images), ("PET-MRI", images.flip(0))]
    both = train_asfe.validate(chosen, train_asfe.fuse_all(model, chosen))
    ct, pet = (train_asfe.validate([one], train_asfe.fuse_all(model, [one])) for one in chosen)
    assert ct["kept"] < 0.2 and ct["foreign"] < 0.05
    for name in both:
        assert both[name] == pytest.approx((ct[name] + pet[name]) / 2, abs=2e-4), name
    assert ct["shortfall"] == pytest.approx(shortfall("CT-MRI", ct), abs=1e-3)


def test_shortfall_is_what_lacks_of_floors_and_exceeds_ceilings():
    good = FLOORS["PET-MRI"] | CEILINGS["PET-MRI"]
    assert shortfall("PET-MRI", good) == 0
    assert shortfall("PET-MRI", good | {"SSIM": 0.9, "foreign": 0}) == 0, "no credit beyond"
    worse = {"kept": good["kept"] - 0.1, "brighter": good["brighter"] + 0.05}
    assert shortfall("PET-MRI", good | worse) == pytest.approx(0.15)
    assert shortfall("PET-MRI", good | {"rise": good["rise"] + 51}) == pytest.approx(0.2)
    assert shortfall("PET-MRI", good | {"rise": float("nan")}) == 0


def test_all_trains_on_the_three_tasks(call, tmp_path):
    for task in ("CT-MRI", "PET-MRI", "SPECT-MRI"):
        names = {f"{case}{task[0]}01": 32 for case in (1, 2)}
        write_task(tmp_path / "data", task, "train", names)
    argv = settings(tmp_path / "data", tmp_path / "save", "--task", "all", "--epoch", 1)
    assert call(*argv, "--val", 0)[0] == 0
    metadata = load_weights(tmp_path / "save" / "compact_all.safetensors")[1]
    assert metadata["task"] == "all"
    # and one of the tasks goes on from there
    init = tmp_path / "save" / "compact_all.safetensors"
    argv = settings(tmp_path / "data", tmp_path / "save", "--epoch", 1, "--init", init)
    assert call(*argv, "--batch_size", 2, "--val", 0)[0] == 0
    metadata = load_weights(tmp_path / "save" / f"{STEM}.safetensors")[1]
    assert metadata["settings"]["init"] == "compact_all.safetensors"


def test_a_module_is_left_out_by_a_flag_and_the_weights_say_so(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 1, "--val", 0, "--aff", "published")
    argv += ["--without", "casf", "blend"]
    assert call(*argv)[0] == 0
    model, metadata = load_weights(tmp_path / f"{STEM}.safetensors")
    assert model.fusion[0].casf is None and model.size.head == "image" and model.aff == "published"
    assert metadata["settings"]["without"] == ["casf", "blend"]
    assert call(*argv, "--resume")[0] == 0
    code, _, err = call(*argv[:-1], "--resume")
    assert code == 2 and "without is ['casf'] and was ['casf', 'blend']" in err


def test_frozen_statistics_are_those_of_whole_images(call, weights, data, tmp_path):
    argv = settings(data, tmp_path, "--val", 0, "--init", weights, "--stages", "32x4x2:frozen")
    assert call(*argv)[0] == 0
    start = load_weights(weights)[0]
    after = load_weights(tmp_path / f"{STEM}.safetensors")[0].state_dict()
    assert not torch.equal(
        start.state_dict()["encoder.inlayer.weight"], after["encoder.inlayer.weight"]
    )
    train_asfe.recompute_batchnorm(
        start, TrainPairs(task_pairs(data, "CT-MRI", "train"), 32).images
    )
    expected = start.state_dict()
    statistics = [k for k in expected if k.endswith(("running_mean", "running_var"))]
    assert statistics and all(torch.equal(expected[k], after[k]) for k in statistics)


# --- several processes -----------------------------------------------------------------------


def test_two_processes_train_what_one_does(data, weights, tmp_path):
    """Real processes, joined by gloo: sharded batches and averaged gradients. BatchNorm keeps its
    statistics here; else each process on a CPU would normalise with those of its own part."""
    argv = ["--stages", "32x4x2:frozen", "--val_every", 2, "--warmup", 2, "--init", weights]
    one = [sys.executable, "train_asfe.py", *settings(data, tmp_path / "one", *argv)]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two += ["train_asfe.py", *settings(data, tmp_path / "two", *argv, "--accumulate", 2)]
    for command in (one, two):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "on a CPU: BatchNorm sees a process's part of a batch only" in done.stdout
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "content", "gradient", "structure", "one_source"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4), name


def test_synchronised_batchnorm_keeps_parameters_and_names():
    """What the optimiser, the moving average and a checkpoint of one process rely on."""
    model = ASFEFusion("compact")
    before = model.state_dict(keep_vars=True)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict(keep_vars=True)
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)
    assert len(train_asfe.batchnorms(model)) == 24


# --- the parts -------------------------------------------------------------------------------


def test_learning_rate_rises_is_level_and_falls():
    rates = [train_asfe.learning_rate(step, 100, 10, 0.3) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[:10] == sorted(rates[:10])
    assert set(rates[10:71]) == {1.0}
    assert rates[70:] == sorted(rates[70:], reverse=True) and rates[-1] < 0.01
    longer = [train_asfe.learning_rate(step, 200, 10, 0.3) for step in range(71)]
    assert longer == rates[:71], "a run can be made longer"
    assert train_asfe.learning_rate(99, 100, 0, 0) == 1


def test_moving_average_begins_as_a_mean_and_ends_at_its_decay():
    def after(decay: float, count: int) -> float:
        average = [torch.zeros(1)]
        train_asfe.moving_average(decay)(average, [torch.ones(1)], torch.tensor(count))
        return average[0].item()

    assert after(0.9, 1) == pytest.approx(9 / 11)
    assert after(0.9, 10**6) == pytest.approx(0.1)
    assert after(0.0, 10**6) == 1


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--recipe", "best"], "invalid choice: 'best'"),
        (["--loss_weights", "colour=2"], "loss weight 'colour=2', expected TERM=NUMBER"),
        (["--loss_weights", "gradient=-1"], "loss weight 'gradient=-1'"),
        (["--loss_weights", "gradient=1", "gradient=2"], "gradient has one already"),
        (["--patch_size", 128], "is 64x64, expected 128x128 or more"),
        (["--patch_size", 40], "expected a multiple of 16"),
        (["--batch_size", 13, "--val", 0], "batch_size is 13, but there are 12 pairs"),
        (["--accumulate", 3], "expected a multiple of 3"),
        (["--size", "paper", "--init", "WEIGHTS"], "are of size compact, expected size paper"),
        (["--init", "WEIGHTS", "--without", "aff"], "without changes the network"),
        (["--without", "encoder"], "invalid choice: 'encoder'"),
        (["--save_dir", "FILE/save"], "Not a directory"),
        (["--task", "PET-MRI"], "no such folder"),
        (["--task", "all"], "no such folder"),
        (["--epoch", "many"], "invalid int value"),
        (["--epoch", 0], "epoch is 0, expected at least 1"),
        (["--patch_size", -16], "patch_size is -16, expected at least 16"),
        (["--threads", -1], "threads is -1"),
        (["--lr", -1], "lr is -1.0"),
        (["--lr", "inf"], "lr is inf, expected a finite number"),
        (["--weight_decay", "nan"], "weight_decay is nan, expected a finite number"),
        (["--ema", 1], "ema is 1.0, expected less than 1"),
        (["--val", 0.9], "leaving a task nobody to train on"),
        (["--val_cases", 7], "val_cases has '7', expected some of 1, 2, 3"),
        (["--leave_out", 1, 2, 3], "keep no pairs to train on"),
        (["--val_cases", 1, 2, 3], "keep no pairs to train on"),
        (["--stages", "32x4x1:frozen"], "needs the statistics of trained weights"),
        (["--stages", "32x4"], "stage '32x4', expected PATCHxBATCHxEPOCHS"),
        (["--stages", "32x4x0"], "stage '32x4x0', expected PATCHxBATCHxEPOCHS"),
        (["--stages", "32x4x1", "40x4x1"], "patch_size is 40, expected a multiple of 16"),
        (["--cooldown", 2], "cooldown is 2.0, expected a share from 0 to 1"),
        (["--patience", 2, "--val", 0], "patience needs validation"),
        (["--precision", "fp16", "--DEVICE", "cpu"], "needs CUDA"),
        (["--resume"], "there is no run to resume"),
    ],
)
def test_bad_training_input_is_one_line(call, weights, data, tmp_path, extra, message):
    (tmp_path / "file").write_text("")
    extra = [str(e).replace("WEIGHTS", str(weights)).replace("FILE", str(tmp_path / "file"))
             for e in extra]  # fmt: skip
    code, _, err = call(*settings(data, tmp_path / "save", *extra))
    assert code == 2
    assert message in err and err.count("\n") == 1
    assert not files(tmp_path / "save") if "--resume" in extra else not (tmp_path / "save").exists()


def test_a_run_resumes_only_as_it_was(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 1, "--val_every", 9)
    assert call(*argv)[0] == 0
    code, _, err = call(*argv, "--resume", "--lr", 0.5, "--leave_out", 3)
    assert code == 2 and err.count("\n") == 1
    assert "lr is 0.5 and was 0.0015" in err and "leave_out is ['3'] and was []" in err
    assert call(*argv, "--resume", "--workers", 0)[0] == 0
    path = tmp_path / f"{STEM}_last.pt"
    other = parse_args(TrainArgs, [*argv, "--size", "paper"])
    with pytest.raises(ValueError, match="size is 'paper' and was 'compact'"):
        load_checkpoint(Run(other, stages_of(other), tmp_path / STEM, 0), None)
    whole = path.read_bytes()
    older = io.BytesIO()
    torch.save({"state": {}, "settings": {}, "run": {"epoch": 1, "best": 2.0}}, older)
    for damaged in (b"", b"no checkpoint", whole[: len(whole) // 2], older.getvalue()):
        path.write_bytes(damaged)
        code, _, err = call(*argv, "--resume")
        assert code == 2 and "damaged, or not a checkpoint" in err and err.count("\n") == 1


def test_a_run_does_not_go_on_with_other_pairs(call, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    argv = settings(folder, tmp_path / "save", "--epoch", 2, "--val_every", 9)
    assert call(*argv, "--minutes", 1e-9)[0] == 0
    task = folder / "CT-MRI" / "train"
    shutil.copy(task / "CT" / "3000.png", task / "CT" / "3001.png")  # of a person who is trained on
    shutil.copy(task / "CT" / "1000.png", task / "MRI" / "3001.png")
    code, _, err = call(*argv, "--resume")
    assert code == 2 and "the pairs to train on are others than they were" in err


def test_the_order_of_loss_weights_means_nothing(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 1, "--val_every", 9)
    first, second = ["content=1", "gradient=60"], ["gradient=60", "content=1"]
    assert call(*argv, "--loss_weights", *first)[0] == 0
    assert call(*argv, "--resume", "--loss_weights", *second)[0] == 0
    code, _, err = call(*argv, "--resume", "--loss_weights", "content=1", "gradient=61")
    assert code == 2 and "loss_weights is" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_keeps_the_earlier_checkpoint(call, data, tmp_path):
    argv = settings(data, tmp_path, "--epoch", 3, "--val_every", 9)
    assert call(*argv, "--minutes", 1e-9)[0] == 0
    path = tmp_path / f"{STEM}_last.pt"
    before = path.read_bytes()
    (tmp_path / f"{STEM}_last.pt.part").symlink_to("/dev/full")  # what is written there
    code, _, err = call(*argv, "--resume")
    assert code == 2 and f"No space left on device: '{path}'" in err and "Traceback" not in err
    assert path.read_bytes() == before and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_bf16_only_where_the_card_has_it(native, monkeypatch):
    """An emulated one, as on cards before Ampere, is slower than float32."""

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = torch.bfloat16 if native else None
    assert train_asfe.set_precision("auto", torch.device("cuda")) is expected
    assert train_asfe.set_precision("auto", torch.device("cpu")) is None


class Diverging(nn.Module):
    """Sound weights, but the loss of the third step is not a number."""

    multiple = 16

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.steps = 0

    def forward(self, img1, img2):
        self.steps += 1
        return self.scale * img1 * (torch.nan if self.steps == 3 else 1)


def test_a_loss_that_is_not_finite_stops_and_names_the_pairs(
    call,
    data,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(train_asfe, "ASFEFusion", lambda size, aff: Diverging())
    monkeypatch.setattr(train_asfe, "save_weights", lambda model, path, *_: path.touch())
    argv = settings(data, tmp_path, "--epoch", 2, "--val", 0)
    code, _, err = call(*argv)
    pairs = TrainPairs(task_pairs(data, "CT-MRI", "train"), 32, seed=3407)
    names = [pairs.names[i] for i in pairs.batches(4)[2]]
    assert code == 2 and f"loss is nan in epoch 1, pairs {names}" in err
    assert f"averaged weights before this step are in {tmp_path / STEM}_stopped" in err
    assert (tmp_path / f"{STEM}_stopped.safetensors").exists()
    assert not (tmp_path / f"{STEM}_last.pt").exists(), "no checkpoint of half an epoch"


def test_out_of_memory_names_the_settings(call, data, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(ASFEFusion, "forward", full)
    code, _, err = call(*settings(data, tmp_path))
    assert code == 2 and "raise --accumulate, or lower the patch" in err
    assert err.strip().splitlines()[-1].startswith("train_asfe.py: error: out of memory")
