"""What several test files share. `shared` is the folder of real data and golden vectors."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("ASFE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not here")
    return SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
