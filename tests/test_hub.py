"""torch.hub finds the entry point and gets a model that fuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from args_setting import ALL_TASKS, ROOT
from network import ASFEFusion
from phantom import phantom_pair
from weights import load_weights, save_weights, shipped_path

CALL = """
import sys, torch
sys.modules |= dict.fromkeys(("cv2", "PIL", "scipy", "torchvision"))  # hubconf.py needs none
model = torch.hub.load(sys.argv[1], "asfe_fusion", task="SPECT-MRI", source="local")
image = torch.linspace(0, 1, 32 * 40).reshape(32, 40)
print(model.training, tuple(model.fuse(image, image).shape))
"""


def test_from_another_folder_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-c", CALL, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False (32, 40)\n", done.stderr


@pytest.mark.parametrize("task", ALL_TASKS)
def test_each_task_has_its_weights(task):
    model = torch.hub.load(ROOT, "asfe_fusion", task=task, source="local")
    kind = "CT-MRI" if task == "all" else task
    pair = [image if image.ndim == 2 else image[..., 1] for image in phantom_pair(kind, 64)]
    expected, _ = load_weights(shipped_path("compact", task))
    assert np.allclose(model.fuse(*pair), expected.fuse(*pair), atol=1e-5)


def test_own_weights_and_what_is_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    save_weights(ASFEFusion("compact"), path, {})

    def load(**settings):
        return torch.hub.load(ROOT, "asfe_fusion", source="local", **settings)

    own, model = load(weights=path).state_dict(), load_weights(path)[0]
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    for settings, message in (
        ({"task": "CT-PET"}, "task is 'CT-PET', expected one of CT-MRI"),
        ({"size": "large"}, "size is 'large', expected one of"),
        ({"size": "paper"}, "no such file"),
        ({"size": "paper", "weights": path}, "are of size compact"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**settings)


AMONG_OTHERS = """
import pickle, sys, torch, {first}
load = lambda: torch.hub.load(sys.argv[1], "asfe_fusion", source="local")
model = load()
import network, dataset, losses, metrics, weights, cli
assert all(m.MINE for m in (network, dataset, losses, metrics, weights, cli))
assert type(load()) is type(model), "a second call brings the same classes"
image = torch.rand(32, 40)
assert torch.equal(pickle.loads(pickle.dumps(model)).fuse(image, image), model.fuse(image, image))
print(type(model).__module__, sorted(n for n in sys.modules if n.endswith("args_setting")))
"""


@pytest.mark.parametrize("first", ["network, weights", "os"])
def test_modules_of_the_caller_and_ours_do_not_meet(tmp_path, first):
    """Whether the caller's of the same names come before or after."""
    for name in ("network", "dataset", "losses", "metrics", "weights", "cli"):
        (tmp_path / f"{name}.py").write_text("MINE = True")
    command = [sys.executable, "-c", AMONG_OTHERS.format(first=first), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "asfe_fusion.network ['asfe_fusion.args_setting']\n", done.stderr
