"""A smoke test on CUDA; it skips without."""

import sys

import numpy as np
import pytest
import torch
from task_files import write_task

import train_asfe
from args_setting import ROOT, TrainArgs
from cli import parse_args
from dataset import task_pairs
from images import read_luma8

sys.path.append(str(ROOT / "benchmarks"))
import speed

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    names = {f"{case}001": 64 for case in range(1, 9)}
    return write_task(tmp_path_factory.mktemp("data"), "CT-MRI", "train", names)


def test_train_an_epoch_and_fuse(in_process, call, data, tmp_path):
    argv = ["--data_dir", data, "--save_dir", tmp_path, "--DEVICE", DEVICE, "--size", "compact"]
    argv += ["--epoch", 1, "--patch_size", 32, "--batch_size", 4, "--val", 0]
    code, _, err = in_process(train_asfe, lambda: parse_args(TrainArgs), *argv)
    assert code == 0, err
    weights = tmp_path / "compact_CT-MRI.safetensors"
    pair = task_pairs(data, "CT-MRI", "train")[0]
    fused = {}
    for device in (DEVICE, "cpu"):
        out = tmp_path / f"{device}.png"
        argv = ["--img1", pair.path1, "--img2", pair.path2, "--out", out, "--DEVICE", device]
        code, _, err = call(*argv, "--size", "compact", "--weights", weights)
        assert code == 0, err
        fused[device] = read_luma8(out).astype(int)
    assert np.ptp(fused["cpu"]) > 50
    assert np.abs(fused[DEVICE] - fused["cpu"]).max() <= 2


@pytest.mark.parametrize("mode", [[], ["--train"]])
def test_speed(in_process, mode):
    argv = ["--DEVICE", DEVICE, "--sizes", "compact", "--side", "32", "--repeats", "1", *mode]
    code, out, err = in_process(speed, lambda: speed.parse(argv), *argv)
    assert code == 0, err
    assert out.count("\n| network.py") == (2 if mode else 1)
