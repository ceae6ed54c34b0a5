"""A run of training keeps the earlier one, tells what it does, and keeps patients apart."""

from pathlib import Path

import pytest
from task_files import files, write_task

import train_asfe
from args_setting import TrainArgs
from checkpoints import curves
from cli import UserError, parse_args
from dataset import Pair, case_of, split_pairs, task_pairs

STEM = "compact_CT-MRI"


@pytest.fixture
def call(in_process):
    """Run train_asfe.py in this process: exit code, stdout, stderr."""
    return lambda *argv: in_process(train_asfe, lambda: parse_args(TrainArgs), *argv)


def settings(data: Path, save_dir: Path, *extra) -> list:
    argv = ["--data_dir", data, "--save_dir", save_dir, "--patch_size", 32, "--batch_size", 2]
    return [*argv, "--threads", 1, "--recipe", "paper", "--epoch", 1, *extra]


def test_a_run_tells_what_it_does_and_is_never_overwritten_unasked(call, tmp_path):
    names = {f"{case}00{i}": 48 for case in (1, 2, 3) for i in (1, 2)}
    data = write_task(tmp_path / "data", "CT-MRI", "train", names)
    argv = settings(data, tmp_path / "save")
    code, out, err = call(*argv)
    assert code == 0, err
    assert "CT-MRI, size compact, on cpu, 1 threads: 4 pairs to train on" in out
    assert "held out for validation: 2 pairs of 1 person, cases 1" in out
    assert "lacking of the floors on 2 validation pairs, weights saved" in out
    before = {p: p.read_bytes() for p in (tmp_path / "save").iterdir() if p.is_file()}
    code, _, err = call(*argv)
    assert code == 2 and err.count("\n") == 1 and f"{STEM}.safetensors" in err
    assert all(f"--{way}" in err for way in ("resume", "name", "save_dir", "overwrite"))
    assert {p: p.read_bytes() for p in (tmp_path / "save").iterdir() if p.is_file()} == before
    # the ways on
    code, _, err = call(*argv, "--lr", 0.5, "--resume")
    assert code == 2 and "lr is 0.5 and was 0.0015. To train on with these, begin a new run" in err
    weights = tmp_path / "save" / f"{STEM}.safetensors"
    assert f"--init {weights} --name NEW" in err
    code, out, err = call(*argv, "--init", weights, "--name", "NEW", "--val", 0)
    assert code == 0 and "nobody is held out" in out and "on some training pairs" in out, err
    assert {"NEW.safetensors", "NEW_last.pt", "NEW.csv"} <= files(tmp_path / "save")
    assert all(path.read_bytes() == data for path, data in before.items())
    assert call(*argv, "--overwrite")[0] == 0
    last = tmp_path / "save" / f"{STEM}_last.pt"
    assert last.read_bytes() != before[last]
    code, _, err = call(*argv, "--name", "a/b")
    assert code == 2 and "expected a name without folders" in err


# --- patients --------------------------------------------------------------------------------


def named(name: str) -> Pair:
    return Pair(name, Path(f"{name}.png"), Path(f"{name}.png"))


def test_a_case_is_what_the_pattern_says():
    assert case_of(named("16009")) == "16" and case_of(named("2001")) == "2"
    assert case_of(named("patient01_slice7"), r"(.+)_slice\d+") == "patient01"
    for name in ("patient01_slice7", "patient01_slice100", "p1_1000", "001", "16009 "):
        with pytest.raises(UserError, match="does not fit case_pattern"):
            case_of(named(name))
    for pattern in ("(", "abc", r"\d+", "*"):
        with pytest.raises(UserError, match="a regular expression with the case in brackets"):
            case_of(named("abc" if pattern == "abc" else "16009"), pattern)


def test_no_patient_is_in_two_sets(tmp_path):
    """By the guess of old, patient01 was `patient01_sli` and `patient01_slic`."""
    names = [f"patient0{case}_slice{i}" for case in (1, 2, 3) for i in (7, 9, 10, 11)]
    for task in ("CT-MRI", "PET-MRI", "SPECT-MRI"):
        write_task(tmp_path, task, "train", dict.fromkeys(names, 32))
    with pytest.raises(UserError, match=r"patient01_slice10\.png: its name does not fit"):
        split_pairs(TrainArgs(data_dir=tmp_path))
    for task in ("CT-MRI", "all"):  # in other tasks, too, patient01 is one person
        args = TrainArgs(task=task, data_dir=tmp_path, case_pattern=r"(.+)_slice\d+")
        train, val, *_ = split_pairs(args)
        held, kept = ({pair.name[:9] for pair in pairs} for pairs in (val, train))
        assert held == {"patient01"} and kept == {"patient02", "patient03"}
    train, val, *_ = split_pairs(TrainArgs(data_dir=tmp_path, val=0))  # names need not tell
    assert len(train) == 12 and not val


def test_cases_of_other_names_can_be_chosen(tmp_path):
    names = {"p1_s1": 32, "p1_s2": 32, "p2_s1": 32}
    data = write_task(tmp_path, "CT-MRI", "test", names)
    pairs = task_pairs(data, "CT-MRI", "test", cases=["p1"], case_pattern="(p.)_s.")
    assert [pair.name for pair in pairs] == ["p1_s1", "p1_s2"]


# --- curves ----------------------------------------------------------------------------------


def test_curves_of_one_validation_have_axes_and_titles():
    row = {"epoch": 1, "loss": 2.0, "content": 0.1, "val_loss": 1.9, "val_SSIM": 0.6}
    losses, measures = curves([row], ("SSIM",)).axes
    assert losses.get_title() and measures.get_title() == "metrics of validation images"
    for axes in (losses, measures):
        assert axes.get_xlim() == (0, 2) and axes.get_ylabel()
        assert all(line.get_marker() not in ("None", "") for line in axes.lines)
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())
    assert len(losses.lines) == 3 and len(measures.lines) == 1
    assert (
        curves([{"epoch": 3, "train_SSIM": 0.5}], ("SSIM",))
        .axes[1]
        .get_title()
        .endswith("training images")
    )
