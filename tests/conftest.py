"""What several test files share. `shared` is the folder of real data and golden vectors."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import test_asfe
from args_setting import TestArgs, parse_args, run_script
from network import ASFEFusion, save_weights

SHARED = Path(os.environ.get("ASFE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not here")
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.fixture
def brighter(monkeypatch):
    """The brighter source in place of the network."""
    from volume_files import Brighter

    monkeypatch.setattr(test_asfe, "load_model", lambda *_: Brighter())


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
