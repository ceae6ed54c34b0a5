"""benchmarks/gpu.sh: its pieces' plumbing on a CPU, with phantoms and tiny settings.

The scripts run in forks of this process, which has loaded PyTorch already. With ASFE_SLOW in the
environment more pieces run so, and then all as `gpu.sh --dry-run` runs them (minutes).
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import matplotlib.figure  # noqa: F401  (loaded before the forks)
import pytest
import torch

import metrics_report  # noqa: F401
import train_asfe
from args_setting import ROOT, SIZES, MetricArgs, TestArgs, TrainArgs, parse_args
from network import ASFEFusion, save_weights

_path = sys.path[:]
sys.path.append(str(ROOT / "benchmarks"))
import attention  # noqa: E402
import gpu  # noqa: E402
import piece  # noqa: E402
import throughput  # noqa: E402
import train_step  # noqa: E402
import training  # noqa: E402
import validate  # noqa: E402

sys.path[:] = [*_path, str(ROOT / "benchmarks")]  # behind: it has a metrics.py, too


def run_as_script(words: list[str], log: str) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    cv2.setNumThreads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


class Fork:
    """What gpu.py uses of subprocess.Popen, without a new interpreter."""

    def __init__(self, command: list[str], stdout=None, **_):
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=run_as_script, args=(command[1:], stdout.name))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("script", timeout)
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    kill = terminate


@pytest.fixture
def forks(monkeypatch):
    """Scripts run in forks, and `compact` is a narrow network there."""
    widths = {"channels": (8,) * 5, "tail": 8, "dim": 16, "heads": 2, "experts": 2, "slots": 4}
    monkeypatch.setitem(SIZES, "compact", replace(SIZES["compact"], **widths))
    monkeypatch.setattr(piece.subprocess, "Popen", Fork)


@pytest.fixture
def call(in_process, monkeypatch, tmp_path):
    """Run gpu.py on a CPU: exit code, stdout, stderr."""
    monkeypatch.setattr(gpu, "exit_on_sigterm", lambda: None)  # this process is pytest's
    given = ["--dry-run", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    return lambda *argv: in_process(gpu, gpu.parse, *given, *argv)


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())["pieces"]


# --- the driver ------------------------------------------------------------------------------


def test_pieces_are_done_once_and_go_on_after_a_failure(call, monkeypatch, tmp_path):
    calls = []

    def good(running):
        calls.append("good")
        (running.folder / "fused").mkdir()
        (running.folder / "fused" / "a.png").write_bytes(b"x")
        return {"ms": 1.0}

    def bad(running):
        calls.append("bad")
        if calls.count("bad") == 1:
            (running.folder / piece.FIGURES).write_text('{"ms": 2.0}')
            raise piece.StoppedError("3 of 9 epochs are trained")
        return {}

    monkeypatch.setattr(gpu, "pieces", lambda: {"bad": bad, "good": good})
    code, _, err = call()
    assert code == 2 and "bad: 3 of 9 epochs" in err and "not done: bad; the same" in err
    assert calls == ["bad", "good"], "a piece that fails does not stop the others"
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["unfinished"] == {"bad": {"ms": 2.0}}, "what was measured is not lost"
    found = results(tmp_path)["good"]
    assert found["figures"] == {"ms": 1.0} and found["dry_run"] is True
    assert {"machine", "DEVICE"} <= found["about"].keys() and found["date"]
    assert zipfile.ZipFile(tmp_path / "out" / "fused.zip").namelist() == ["good/fused/a.png"]
    assert call()[0] == 0 and calls == ["bad", "good", "bad"]
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["unfinished"]
    assert call()[0] == 0 and len(calls) == 3
    # another machine, which has only the results
    (tmp_path / "work").rename(tmp_path / "lost")
    earlier = tmp_path / "out" / "results.json"
    assert call("--earlier", earlier)[0] == 0 and len(calls) == 3
    assert results(tmp_path).keys() == {"bad", "good"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paper"], r"no piece ['paper'], expected some of golden, attention"),
        (["--DEVICE", "gpu"], "DEVICE is 'gpu', expected"),
        (["--minutes", "long"], "invalid float value"),
        (["--earlier", "FILE"], "not a results.json"),
        (["golden", "--golden", "FOLDER"], "has no expected.npz"),
    ],
)
def test_bad_input_is_named(call, tmp_path, argv, message):
    (tmp_path / "file").write_text("[]")
    names = {"FILE": tmp_path / "file", "FOLDER": tmp_path}
    code, _, err = call(*(names.get(word, word) for word in argv))
    assert code == 2 and message in err and "Traceback" not in err


def test_missing_packages_and_no_cuda_are_one_line(call, monkeypatch):
    with pytest.raises(
        ValueError, match="not installed: no_such_package; see requirements-dev.txt"
    ):
        gpu.check_packages(("torch", "no_such_package"))
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    code, _, err = call("attention")
    assert code == 2 and "PyTorch is 2.5.1+cu121, expected 2.6 or newer" in err
    monkeypatch.undo()
    if not torch.cuda.is_available():
        command = [ROOT / "benchmarks" / "gpu.sh", "--help"]
        env = os.environ | {"PYTHON": sys.executable, "OUT": "elsewhere"}
        assert os.access(command[0], os.X_OK) and "PIECE" in gpu.__doc__
        assert subprocess.run(["bash", "-n", command[0]], env=env).returncode == 0


def test_zips_keep_to_their_size(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for path in files:
        path.write_bytes(os.urandom(100))
    gpu.write_zips(tmp_path, "fused", files[:2], tmp_path, largest=250)
    assert {p.name for p in tmp_path.glob("*.zip")} == {"fused.zip"}
    gpu.write_zips(tmp_path, "fused", files, tmp_path, largest=250)
    zips = sorted(tmp_path.glob("*.zip"))
    assert [p.name for p in zips] == ["fused-1.zip", "fused-2.zip", "fused-3.zip"]
    names = [name for path in zips for name in zipfile.ZipFile(path).namelist()]
    assert names == [path.name for path in files]


def test_a_piece_that_takes_too_long_is_stopped(tmp_path):
    (tmp_path / "logs").mkdir()
    args = gpu.parse(["--work", str(tmp_path), "--limit", "0"])
    started = time.time()
    with pytest.raises(piece.StoppedError, match="was not done in time"):
        piece.Piece("x", args).call("-c", "import time; time.sleep(60)")
    assert time.time() - started < 30


# --- the trainings ---------------------------------------------------------------------------


def test_epochs_fit_the_time():
    assert training.epochs_in(400, 20, 2, 3, 2000) == {"epochs": 175, "val_every": 18}
    assert training.epochs_in(400, 20, 0.01, 0, 2000) == {"epochs": 2000, "val_every": 200}
    assert training.epochs_in(1, 20, 2, 3, 2000) == {"epochs": 2, "val_every": 1}


@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch, killed):
    """With a script in the trainer's place that gets two epochs further in each call."""
    spec = training.TRAININGS["paper-CT-MRI"]
    running = piece.Piece("paper-CT-MRI", gpu.parse(["--work", str(tmp_path), "--dry-run"]))
    running.folder.mkdir()
    stem = running.folder / "compact_CT-MRI"
    last = running.folder / "compact_CT-MRI_last.pt"
    calls = []

    def two_epochs(self, *words):
        calls.append(words)
        rows = [f"{i},0.5,9.0\n" for i in range(1, 2 * len(calls) + 1)]
        stem.with_name("compact_CT-MRI.csv").write_text(
            "epoch,seconds,pairs_per_s\n" + "".join(rows)
        )
        last.touch()

    monkeypatch.setattr(piece.Piece, "call", two_epochs)
    monkeypatch.setattr(training, "weights_metadata", lambda path: {"of": path.name})
    plan = {"epochs": 4, "val_every": 2, "runs_s": [None] if killed else []}
    (running.folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(piece.StoppedError, match="2 of 4 epochs are trained"):
        training.train(running, spec, "compact", stem)
    assert "--resume" not in calls[0] and last.exists()
    plan, found = training.train(running, spec, "compact", stem)
    assert "--resume" in calls[1] and not last.exists(), "gigabytes in the published size"
    assert found["epochs"] == 4 and found["steps_s"] == 2.0
    assert found["wall_s"] == (None if killed else sum(plan["runs_s"])), "only what was measured"
    assert training.train(running, spec, "compact", stem)[1] == found and len(calls) == 2


@pytest.mark.parametrize("name", training.TRAININGS)
@pytest.mark.parametrize("dry", [False, True])
def test_every_flag_of_a_training_exists(name, dry, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "published_start", lambda *_: tmp_path / "start.safetensors")
    argv = ["--work", str(tmp_path), "--train_args", "--compile --workers 2"]
    running = piece.Piece(name, gpu.parse([*argv, *(["--dry-run"] if dry else [])]))
    spec = training.TRAININGS[name]
    words = training.command(running, spec, spec.size, tmp_path)
    settings = parse_args(TrainArgs, [str(w) for w in words[1:]] + ["--epoch", "9"])
    assert settings.size == spec.size and settings.task == spec.task and settings.compile
    assert settings.patch_size == (32 if dry else 256 if spec.size == "paper" else 128)
    assert settings.recipe == ("paper" if name == "published" else "detail")
    assert bool(settings.init) == (name == "published")


def test_published_arithmetic_is_trained(tmp_path, monkeypatch):
    args = gpu.parse(["--work", str(tmp_path), "--dry-run"])
    running = piece.Piece("published", args)
    running.folder.mkdir()
    path = training.published_start(running, "compact")
    settings = TrainArgs(init=path, patch_size=32)
    assert train_asfe.make_model(settings, torch.device("cpu")).aff == "published"


def test_the_scripts_take_their_flags(tmp_path):
    """What gpu.py calls on a GPU, but for the time that it takes."""
    for script in (attention, train_step, throughput):
        assert script.parse(["--DEVICE", "cuda", "--json", "x.json"]).json == Path("x.json")
    assert validate.parse(["--weights", "a", "b", "--task", "PET-MRI"]).task == "PET-MRI"
    assert parse_args(TestArgs, ["--task", "CT-MRI", "--stretch"]).stretch
    words = ["--fused", "ours=a", "clip=b", "--rank", "--json", "m.json"]
    assert parse_args(MetricArgs, words).fused == ["ours=a", "clip=b"]


def test_shipped_weights_that_do_not_fit_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "ROOT", tmp_path)
    (tmp_path / "model_pre").mkdir()
    task = training.TRAININGS["compact-CT-MRI"]
    assert training.shipped_weights(task) is None
    assert "not compared: weights" in capsys.readouterr().out
    path = tmp_path / "model_pre" / "compact_CT-MRI.safetensors"
    save_weights(ASFEFusion("compact").eval(), path, {})
    assert training.shipped_weights(task) == path


def test_weights_that_saw_the_validation_patients_are_told_apart(tmp_path):
    training.draw_data(tmp_path)
    pairs = train_asfe.split_pairs(TrainArgs(data_dir=tmp_path))[1]
    cases = {train_asfe.case_of(pair) for pair in pairs}
    settings = {"val": 0.1, "val_cases": [], "init": None}
    ours = {"task": "CT-MRI", "settings": settings}
    assert validate.held_out(ours, "CT-MRI", tmp_path, cases)
    for other in ({}, ours | {"task": "PET-MRI"}, ours | {"settings": settings | {"val": 0}}):
        assert not validate.held_out(other, "CT-MRI", tmp_path, cases)
    other = ours | {"settings": settings | {"init": "x.safetensors"}}
    assert not validate.held_out(other, "CT-MRI", tmp_path, cases)


def test_a_training_from_end_to_end(call, forks, tmp_path, monkeypatch):
    shipped = tmp_path / "compact_CT-MRI.safetensors"
    save_weights(ASFEFusion("compact").eval(), shipped, {})
    monkeypatch.setattr(training, "shipped_weights", lambda _: shipped)
    code, out, err = call("compact-CT-MRI")
    logs = (tmp_path / "work" / "logs" / "compact-CT-MRI.log").read_text()
    assert code == 0 and "compact-CT-MRI: done" in out, err + logs
    found = results(tmp_path)["compact-CT-MRI"]
    plan, trained = found["figures"]["plan"], found["figures"]["training"]
    assert plan["epochs"] == trained["epochs"] == 2 and plan["epoch_s"] > 0
    assert trained["weights"]["settings"]["lr"] == 1e-3
    metrics = found["figures"]["test"]["metrics"]
    assert {"ours", "shipped", "max", "mean"} == metrics.keys()
    assert all(method["SSIM"] > 0 for method in metrics.values())
    new, old = found["figures"]["validation"]["weights"]
    assert new["held_out"] and not old["held_out"] and new["score"] != old["score"]
    assert any("train_asfe.py" in line and "--epoch 2" in line for line in found["commands"])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "logs.zip", "fused.zip", "compact_CT-MRI.safetensors"}
    assert all(p.stat().st_size < 2**24 for p in (tmp_path / "out").iterdir())
    fused = zipfile.ZipFile(tmp_path / "out" / "fused.zip").namelist()
    assert len([name for name in fused if "/ours/CT-MRI/" in name]) == training.DRAWN["test"]


def test_the_published_training_from_end_to_end(call, forks, tmp_path):
    code, _, err = call("published")
    assert code == 0, err + (tmp_path / "work" / "logs" / "published.log").read_text()
    figures = results(tmp_path)["published"]["figures"]
    assert figures["training"]["weights"]["aff"] == "published"
    assert figures["training"]["wall_s"] == figures["plan"]["runs_s"][0] > 0
    metrics = figures["test"]["metrics"]
    assert {"stretch", "clip", "max", "mean"} == metrics.keys()
    assert metrics["stretch"] != metrics["clip"]
    left = {path.name for path in (tmp_path / "work" / "published").iterdir()}
    assert {"compact_CT-MRI.safetensors", "fused", "metrics.json"} <= left
    assert not [
        name for name in left if name.endswith(".pt") or name.startswith(("start", "trial"))
    ]


SLOW = pytest.mark.skipif("ASFE_SLOW" not in os.environ, reason="slow; ASFE_SLOW=1 runs it")


@pytest.mark.parametrize(
    "name", ["attention", pytest.param("step", marks=SLOW), pytest.param("forward", marks=SLOW)]
)
def test_the_measuring_pieces(call, forks, tmp_path, name):
    code, _, err = call(name)
    logs = (tmp_path / "work" / "logs" / f"{name}.log").read_text()
    assert code == 0, err + logs
    figures = results(tmp_path)[name]["figures"]
    if name == "attention":
        for scale in figures["scales"].values():
            for uses in scale.values():
                for found in uses.values():
                    assert "refused" in found or found["error_output"] < 0.05
            assert "ms" in scale["library"]["both"] and "ms" in scale["shared"]["both"]
        return
    size = figures["sizes"]["compact"]
    if name == "step":
        assert size["TFLOP_of_a_step"] > 0 and size["moving_average_ms"] > 0
        assert size["steps"]["bf16"]["times_faster_than_direct"] > 0
        assert size["steps"]["bf16"]["peak_GB"] is None, "no figure that was not measured"
        assert 0 < size["steps"]["fp32"]["of_matrix_rate"]
    else:
        assert size["pairs"]["ours"]["batch 2, bf16"]["pairs_per_s"] > 0
        assert size["largest"]["ours fp32"]["side"] == 64
        assert size["volume"]["fp32"]["s"] > 0


@SLOW
def test_a_whole_dry_run(tmp_path):
    command = [ROOT / "benchmarks" / "gpu.sh", "--dry-run", "--work", tmp_path / "work"]
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    code = subprocess.run(command, env=env, cwd=tmp_path).returncode
    failed = set(gpu.pieces()) - results(tmp_path).keys()
    assert failed <= {"golden"} and code == (2 if failed else 0)  # golden needs ../shared
