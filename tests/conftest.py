"""What several test files share. `shared` is the folder of slices and scans of people."""

import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from networks import settled
from stated import GOLDEN

import test_asfe
from args_setting import ROOT, TestArgs
from cli import parse_args, run_script
from network import ASFEFusion
from weights import load_weights, save_weights

SHARED = Path(os.environ.get("ASFE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
THREADS, CV_THREADS = torch.get_num_threads(), cv2.getNumThreads()
ONE_THREAD = {  # of PyTorch, NumPy, OpenCV and SimpleITK
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}


def pytest_configure(config):
    """Where pytest-xdist fills the cores, each process has one thread, also those of commands."""
    if config.getoption("numprocesses", None):
        os.environ.update(ONE_THREAD)  # the workers start later and inherit it


def pytest_terminal_summary(terminalreporter):
    """What was not tested and what it needs, the largest number of tests first."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if not reasons:
        return
    terminalreporter.section("not tested")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4d} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not here")
    return SHARED


@pytest.fixture(autouse=True)
def same_start():
    """Each test starts from seed 0, in whole float32, and with the threads of the process.

    Commands that ran before in this process have set other ones.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(THREADS)
    cv2.setNumThreads(CV_THREADS)


@pytest.fixture
def in_process(monkeypatch, capsys):
    """Run a script's main in this process on what `parse()` makes of argv: exit code, stdout,
    stderr without the progress bar."""

    def run(script: ModuleType, parse: Callable, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, argv)])
        try:
            run_script(script.main, parse())
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def call(in_process):
    """Run test_asfe.py in this process; a file that runs another script has its own `call`."""
    return lambda *argv: in_process(test_asfe, lambda: parse_args(TestArgs), *argv)


def stand_in(monkeypatch, network) -> None:
    """Have test_asfe.py fuse with something else than a network of its weights."""
    monkeypatch.setattr(test_asfe, "load_model", lambda *_: network)
    monkeypatch.setattr(test_asfe, "optimise", lambda network: network)


@pytest.fixture
def brighter(monkeypatch):
    """The brighter source in place of the network."""
    from volume_files import Brighter

    stand_in(monkeypatch, Brighter())


@pytest.fixture
def dicom_errors():
    """The errors that dciodvfy has for a DICOM file, of the kind by which it should know it."""
    program = shutil.which("dciodvfy")
    if not program:
        reason = "needs dciodvfy (Debian: dicom3tools)"
        if os.environ.get("ASFE_DICOM") == "required":
            pytest.fail(f"ASFE_DICOM=required, but the test {reason}")
        pytest.skip(reason)

    def errors(path: Path, kind: str) -> list[str]:
        done = subprocess.run([program, "-new", path], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        assert kind in lines, "it knows the file by its class"
        return [line for line in lines if line.startswith("Error")]

    return errors


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A file of random weights, compact size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(ASFEFusion("compact").eval(), path, {"task": "CT-MRI"})
    return path


@pytest.fixture(scope="session")
def heads(tmp_path_factory) -> dict[str, Path]:
    """The MNI152 template as MRI, and a CT and a PET drawn from it, as NIfTI of 4 mm voxels."""
    from volume_files import draw_heads  # only tests of volumes need its packages

    return draw_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="session")
def published_file(tmp_path_factory) -> Path:
    """A checkpoint in the published format: their names, unused tensors, DataParallel's prefix."""
    golden = runpy.run_path(str(GOLDEN / "weights.py"))
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    blur = torch.outer(row, row) / 64
    arrays = golden["state_dict"](GOLDEN / "authors_keys.json")
    state = {
        f"module.{name}": blur.expand(array.shape).clone()
        if name.endswith("down_anti.filt")
        else torch.from_numpy(np.asarray(array))
        for name, array in arrays.items()
    }
    path = tmp_path_factory.mktemp("published") / "ASFE.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def published_model(published_file) -> ASFEFusion:
    """The published network with the golden weights."""
    model, metadata = load_weights(published_file)
    assert metadata["aff"] == model.aff == "published"
    return model


@pytest.fixture(scope="session")
def compact() -> ASFEFusion:
    """The compact size with random weights; one for all tests, so none may change it."""
    torch.manual_seed(1)
    return settled(ASFEFusion("compact"))


@pytest.fixture(scope="session")
def shipped() -> ASFEFusion:
    """The network with the weights that ship; one for all tests, so none may change it."""
    return load_weights(ROOT / "model_pre" / "compact_all.safetensors")[0]
