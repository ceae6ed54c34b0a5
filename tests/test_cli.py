"""Flags, one-line errors, and the set-up of a process."""

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import args_setting
from args_setting import ROOT, TASKS, VERSION, CommonArgs, TestArgs, TrainArgs, setting
from cli import (
    CASES,
    MODES,
    USES,
    UserError,
    check_classify,
    check_metrics,
    check_mode,
    check_training,
    make_parser,
    parse_args,
    pick_device,
    run_script,
    say,
    visible,
    without_effect,
)

COMMANDS = (TrainArgs, TestArgs, args_setting.DataArgs, args_setting.MetricArgs)
COMMANDS += (args_setting.ExportArgs, args_setting.AppArgs)


# --- settings --------------------------------------------------------------------------------


def test_every_default_names_its_source():
    for cls in COMMANDS:
        for field in fields(cls):
            assert field.metadata["source"] in ("paper", "published code", "ours"), field.name


def test_published_flags_keep_their_names():
    argv = "--DEVICE cpu --epoch 3 --lr 0.1 --batch_size 2 --patch_size 64 --task SPECT-MRI"
    args = parse_args(TrainArgs, argv.split())
    assert (args.DEVICE, args.epoch, args.lr) == ("cpu", 3, 0.1)
    assert (args.batch_size, args.patch_size, args.task) == (2, 64, "SPECT-MRI")


def test_an_edited_default_counts_and_a_flag_wins(capsys):
    @dataclass(frozen=True)
    class Edited(CommonArgs):
        task: str = setting("PET-MRI", "x", choices=tuple(TASKS))
        size: str = setting("small", "x", choices=("paper", "compact"))

    args = parse_args(Edited, ["--size", "paper"])
    assert args.task == "PET-MRI" and args.size == "paper"
    assert parse_args(Edited, ["--size", "paper", "--task", "CT-MRI"]).task == "CT-MRI"
    with pytest.raises(SystemExit) as stop:  # an edited default outside of the choices
        parse_args(Edited, [])
    assert stop.value.code == 2
    assert "size is 'small', expected one of paper, compact" in capsys.readouterr().err


def test_task_size_and_data_folder_are_edited_once_for_all(tmp_path):
    text = (ROOT / "args_setting.py").read_text()
    edits = {'"CT-MRI", "fusion task': '"PET-MRI", "fusion task'}
    edits |= {'setting("compact"': 'setting("paper"', 'ROOT / "HMIFDatasets"': 'ROOT / "Mine"'}
    for before, after in edits.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (tmp_path / "edited.py").write_text(text)
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    expected = {"task": "PET-MRI", "size": "paper", "data_dir": tmp_path / "Mine"}
    seen = set()
    for cls in COMMANDS:
        settings = getattr(edited, cls.__name__)()
        for name in expected.keys() & {f.name for f in fields(settings)}:
            assert getattr(settings, name) == expected[name], (cls, name)
            seen.add((cls.__name__, name))
    assert {("MetricArgs", "task"), ("ExportArgs", "size"), ("DataArgs", "data_dir")} <= seen


def test_spelling_with_hyphens_works_too():
    assert parse_args(TestArgs, ["--skip-unmatched"]).skip_unmatched
    assert not parse_args(TestArgs, ["--no-skip-unmatched"]).skip_unmatched
    assert parse_args(TestArgs, ["--contact-rows", "2"]).contact_rows == 2


def test_device_is_spelled_either_way():
    assert parse_args(TestArgs, ["--device", "cuda"]).DEVICE == "cuda"
    assert parse_args(TestArgs, ["--DEVICE", "mps"]).DEVICE == "mps"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--patch", "3"], "there is no flag --patch, is --patch_size meant?"),
        (["--patch=3"], "is --patch_size meant?"),
        (["--val-c", "3"], "is --val_cases meant?"),
        (["--pacth_size", "3"], "is --patch_size meant?"),
        (["--save", "x"], "is --save_dir or --save_every meant?"),
        (["--qqq"], "there is no flag --qqq, see --help"),
        (["--lr", "1", "more"], "unrecognized arguments: more"),
    ],
)
def test_an_unknown_flag_names_the_one_it_could_be(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(TrainArgs, argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


# --- flags without effect ---------------------------------------------------------------------

# For each command: what is given to be in a mode, and where each setting counts, written down here
# a second time on purpose.
GIVEN = {
    "the test split": {},
    "two folders": {"dir1": "a", "dir2": "b", "out": "c"},
    "one pair of images": {"img1": "a.png", "img2": "b.png", "out": "c.png"},
    "volumes": {"img1": "a.nii", "img2": "b.nii", "out": "c.nii"},
    "the demo": {"demo": True},
}
COUNTS = {  # of test_asfe.py: the first letters of the modes, and of the tasks where not all
    "DEVICE size threads weights aff out": "t2ovd",
    "task": "t2ov",
    "data_dir cases": "t",
    "skip_unmatched contact_rows": "t2",
    "batch_size": "t2v",
    "levels page": "t2o",
    "stretch metrics": "t2od",
    "register": "ov",
    "series1 series2 where frame affine axis tile nan_to_zero grid force": "v",
    "png mosaic dicom moved transform labels": "v",
    "window": "v CT",
    "suv": "v PET",
    "colour rgb via": "v PET SPECT",
}
LETTERS = dict(zip("t2ovd", MODES, strict=True))


def another(field) -> object:
    """A value that is not the setting's default."""
    if field.metadata.get("choices"):
        return next(c for c in field.metadata["choices"] if c != field.default)
    if isinstance(field.default, bool | int | float):
        return not field.default if isinstance(field.default, bool) else field.default + 1
    return (1,) if isinstance(field.default, tuple) else "1"


def settings_of(cls, given: dict):
    paths = {name for name, hint in get_type_hints(cls).items() if "Path" in str(hint)}
    return cls(**{k: args_setting.Path(v) if k in paths else v for k, v in given.items()})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", [*TASKS, "all"])
def test_every_flag_of_every_mode_counts_or_is_refused(mode, task):
    """All flags of test_asfe.py, one by one, with every mode and task."""
    counts = {n: text.split() for names, text in COUNTS.items() for n in names.split()}
    alone = {
        "keep_patient": "dicom",
        "overlap": "tile",
        "labels_of": "labels",
        "case_pattern": "cases",
    }
    for field in fields(TestArgs):
        if field.name in ("img1", "img2", "dir1", "dir2", "demo", *alone):
            continue
        modes, *tasks = counts[field.name]
        given = {"task": task} | GIVEN[mode]
        if mode == "the demo" and field.name != "task":
            given.pop("task")
        given.setdefault(field.name, another(field))
        expected = mode in {LETTERS[letter] for letter in modes}
        expected &= not tasks or task.removesuffix("-MRI") in tasks
        expected |= field.name == "task" and given["task"] == field.default
        args = settings_of(TestArgs, given)
        if expected:
            assert check_mode(args) == mode, field.name
        else:
            with pytest.raises(UserError, match=f"--{field.name} is for "):
                check_mode(args)


def test_a_flag_beside_another_counts_only_with_it():
    volumes, pair = GIVEN["volumes"], GIVEN["one pair of images"]
    for base, name, value, other, others_value in (
        (volumes, "keep_patient", True, "dicom", "folder"),
        (volumes, "overlap", 32, "tile", 128),
        (volumes, "labels_of", "1", "labels", "seg.nii"),
        ({}, "case_pattern", "(.+)_.*", "cases", ("1",)),
        (pair, "force", "all", "register", "rigid"),
    ):
        with pytest.raises(UserError, match=f"--{name} is for --{other}, which is not given"):
            check_mode(settings_of(TestArgs, base | {name: value}))
        check_mode(settings_of(TestArgs, base | {name: value, other: others_value}))


@pytest.mark.parametrize(
    ("cls", "check", "given", "message"),
    [
        ("MetricArgs", check_metrics, {}, "give --fused or --findings"),
        *(
            ("MetricArgs", check_metrics, {"findings": True, name: value}, f"--{name} is for --fu")
            for name, value in {
                "fused": ("a",),
                "metrics": ("SSIM",),
                "jobs": 2,
                "rank": True,
                "between": ("a", "b"),
                "json": "a",
                "markdown": "a",
                "latex": "a",
            }.items()
        ),
        *(
            ("MetricArgs", check_metrics, {"fused": ("a",), name: value}, f"--{name} is for --fi")
            for name, value in {"method": ("a=b",), "weights": "a", "size": "paper"}.items()
        ),
        *(
            (
                "MetricArgs",
                check_metrics,
                {"fused": ("a",), "dir1": "a", "dir2": "b", name: value},
                f"--{name} has no effect with --dir1",
            )
            for name, value in {
                "task": "PET-MRI",
                "split": "train",
                "cases": ("1",),
                "data_dir": "a",
            }.items()
        ),
        ("MetricArgs", check_metrics, {"fused": ("a",), "seed": 1}, "--seed is for --between"),
        ("MetricArgs", check_metrics, {"fused": ("a",), "maps": "b"}, "is for --one_source"),
        (
            "MetricArgs",
            check_metrics,
            {"fused": ("a",), "one_source": True, "rank": True},
            "--rank",
        ),
        ("MetricArgs", check_metrics, {"fused": ("a",), "one_source": True, "maps": "b"}, ""),
        ("MetricArgs", check_metrics, {"findings": True, "seed": 1, "plot": "a", "csv": "b"}, ""),
        ("MetricArgs", check_metrics, {"findings": True, "task": "PET-MRI", "dir1": "a"}, ""),
        ("MetricArgs", check_metrics, {"fused": ("a",), "between": ("a", "b"), "seed": 1}, ""),
        ("ClassifyArgs", check_classify, {}, "give --labels or --exploratory or --leakage"),
        ("ClassifyArgs", check_classify, {"leakage": True, "exploratory": True}, "not both"),
        ("ClassifyArgs", check_classify, {"leakage": True, "fused": "a"}, "--fused is for --lab"),
        ("ClassifyArgs", check_classify, {"leakage": True, "features": "radiomic"}, "--features"),
        ("ClassifyArgs", check_classify, {"exploratory": True, "folds": 3}, "--folds is for"),
        ("ClassifyArgs", check_classify, {"labels": "a", "plot": "b"}, "--plot is for --leakage"),
        ("ClassifyArgs", check_classify, {"labels": "a", "data_dir": "b"}, "--data_dir is for"),
        ("ClassifyArgs", check_classify, {"labels": "a", "fused": "b", "folds": 3}, ""),
        ("ClassifyArgs", check_classify, {"leakage": True, "plot": "b", "data_dir": "c"}, ""),
        ("TrainArgs", check_training, {"val": 0.2, "val_cases": ("1",)}, "no effect with --val_c"),
        ("TrainArgs", check_training, {"resume": True, "overwrite": True}, "with --resume"),
        ("TrainArgs", check_training, {"stages": ("64x8x1",), "epoch": 3}, "with --stages"),
        ("TrainArgs", check_training, {"val_cases": ("1",)}, ""),
    ],
)
def test_flags_of_other_commands(cls, check, given, message):
    args = settings_of(getattr(args_setting, cls), given)
    if message:
        with pytest.raises(UserError, match=message):
            check(args)
    else:
        check(args)


def test_the_table_of_uses_knows_every_setting_it_names():
    """Each row is of settings that the command has, and --help tells what it says."""
    for cls, uses in USES.items():
        names = {f.name for f in fields(cls)}
        text = " ".join(make_parser(cls).format_help().split())
        for use in uses:
            if cls is not args_setting.StudyArgs:  # whose cases have more than its flags
                assert set(use.names.split()) <= names, use
            for other in filter(None, (use.beside, use.without)):
                assert f"with --{other}" in text or f"without --{other}" in text
    help_of_suv = " ".join(make_parser(args_setting.StudyArgs).format_help().split())
    assert "(for volumes, PET-MRI; default 15.0)" in help_of_suv
    named = {n for use in USES[TestArgs] for n in use.names.split()}
    always = {"DEVICE", "size", "threads", "weights", "aff", "out"}
    always |= {"img1", "img2", "dir1", "dir2", "demo"}
    assert named | always == {f.name for f in fields(TestArgs)} and not named & always


def test_what_counts_for_one_case_of_a_study_is_told_apart():
    given = {"suv", "window", "overlap"}
    for task, idle in (("CT-MRI", {"suv", "overlap"}), ("PET-MRI", {"window", "overlap"})):
        assert without_effect(TestArgs, "volumes", task, given).keys() == idle
    assert without_effect(TestArgs, CASES[0], "CT-MRI", given).keys() == given


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe ↓ 头 naïve é", "Größe ↓ 头 naïve é"),
        ("\033[31mred\033[0m", r"\x1b[31mred\x1b[0m"),
        ("a\rb\nc\td\x00\x7f\x9b1m", r"a\rb\nc\td\x00\x7f\x9b1m"),
        ("gnp.\u202efdp\u2066\u200b\ufeff", r"gnp.\u202efdp\u2066\u200b\ufeff"),
        ("undecodable \udcff", r"undecodable \udcff"),
        ("line\u2028end", r"line\u2028end"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_text(text, shown, capsys):
    assert visible(text) == shown and visible(shown) == shown
    say(text, args_setting.Path(text))
    assert capsys.readouterr().out == f"{shown}\n{shown}\n"


def test_an_error_shows_escapes_of_a_file_as_text(capsys):
    def main(args):
        raise UserError("SeriesDescription is '\033]0;title\007\033[2J'")

    with pytest.raises(SystemExit):
        run_script(main, None)
    err = capsys.readouterr().err
    assert r"'\x1b]0;title\x07\x1b[2J'" in err and "\033" not in err


@pytest.mark.parametrize("error", [UserError("a is 1,\nexpected 2"), OSError("disk is full")])
def test_what_the_user_can_mend_is_one_line(error, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main, None)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and " ".join(str(error).split()) in err


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_of_ours_keeps_its_traceback(error):
    def main(args):
        raise error

    with pytest.raises(type(error), match="a bug"):
        run_script(main, None)


SCRIPTS = [path for path in ROOT.glob("*.py") if "\n    run_script(main" in path.read_text()]
SLOW = {"torch", "numpy", "cv2", "PIL", "scipy", "skimage", "matplotlib", "tqdm", "safetensors"}
SLOW |= {"nibabel", "pydicom", "SimpleITK", "gradio", "dask", "distributed", "onnx", "onnxruntime"}
LOADED = """
import runpy, sys
sys.path[:0], sys.argv = [sys.argv[1]], [f"{sys.argv[1]}/{sys.argv[2]}.py", *sys.argv[3:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("LOADED", *sys.modules)
"""


@pytest.mark.parametrize(
    ("scripts", "argv", "message"),
    [
        ([path.stem for path in SCRIPTS], "--help", ""),
        ([path.stem for path in SCRIPTS], "--nope", "there is no flag --nope, see --help"),
        (["test_asfe"], "--img1 a.png", "--img1 and --img2 come together, only one was given"),
        (["test_asfe"], "--img1 a.png --img2 b.png --out c.png", "a.png: no such file or folder"),
        (["test_asfe"], "--demo --axis axial", "--axis is for volumes, but this fuses the demo"),
        (["test_asfe", "train_asfe", "export_onnx"], "--DEVICE", "expected one argument"),
        (["test_asfe", "export_onnx"], "--weights gone.pth", "gone.pth: no such file"),
        (["train_asfe"], "--init gone.pth", "gone.pth: no such file"),
        (["metrics"], "", "give --fused or --findings"),
        (["metrics", "study", "classify_asfe"], "--dir1 gone", "--dir1 and --dir2 come together"),
        (["metrics", "study"], "--dir1 gone --dir2 gone", "gone: no such folder"),
        (["classify_asfe"], "", "give --labels or --exploratory or --leakage"),
        (["study"], "--bids . --mosaic m.png", "--mosaic is for one pair"),
        (["app"], "--weights_dir gone", "gone: no such folder"),
    ],
)
def test_flags_come_before_what_loads_slowly(scripts, argv, message, tmp_path):
    """Of every command: --help, and what is wrong with its flags in one line."""
    for script in scripts:
        command = [sys.executable, "-c", LOADED, str(ROOT), script, *argv.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == (2 if message else 0), done.stderr
        assert message in done.stderr and done.stderr.count("\n") == bool(message)
        text, _, loaded = done.stdout.rpartition("LOADED ")
        assert ("usage: " in text) == (not message)
        assert not {name for name in loaded.split() if name.split(".")[0] in SLOW}, script


FROZEN = """
import gc, sys
from args_setting import DataArgs
from cli import command_line, run_script
args = command_line(DataArgs, "")
import torch
print(gc.isenabled(), gc.get_freeze_count() > 0)
run_script(lambda args: print(gc.isenabled(), gc.get_freeze_count() > 0), args)
"""


def test_no_garbage_is_looked_for_in_what_is_imported():
    command = [sys.executable, "-c", FROZEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\nTrue True\n"


PRINTED = """
from cli import parse_args, run_script
from args_setting import DataArgs
def main(args):
    print("SSIM ↑ 1.5 × 2 … é")
    raise OSError("Größe ↓")
run_script(main, parse_args(DataArgs, [], "↑ metrics"))
"""


@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [
        ("utf-8", "SSIM ↑ 1.5 × 2 … é", "Größe ↓"),
        ("cp1252", "SSIM ^ 1.5 × 2 … é", "Größe v"),
        ("ascii", r"SSIM ^ 1.5 x 2 ... \xe9", r"Gr\xf6\xdfe v"),
    ],
)
def test_a_terminal_without_a_character_gets_another(encoding, out, err):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", PRINTED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 2
    assert done.stdout.decode(encoding).strip() == out
    assert done.stderr.decode(encoding).strip().endswith(err)


# --- the process -----------------------------------------------------------------------------


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "meta", "xpu"):
        with pytest.raises(UserError, match="expected auto, cpu"):
            pick_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no such device"):
            pick_device("cuda")


SUBNORMAL = """
import cli, torch
from args_setting import TestArgs
if {setup}:
    cli.setup_runtime(TestArgs(DEVICE="cpu", threads=2))
torch.set_num_threads(2)
a = torch.full((1024, 1024), 1e-20)
print(int((a @ a).count_nonzero()))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86")
@pytest.mark.parametrize("setup", [True, False])
def test_subnormal_numbers_are_zero_in_every_thread(setup):
    """After `setup_runtime`; the library's default keeps them."""
    command = [sys.executable, "-c", SUBNORMAL.format(setup=setup)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) == (0 if setup else 2**20)


KEPT = """
import cli, concurrent.futures, resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [torch.ones(2**22) for _ in range(6)]  # 16 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if {kept}:
    cli.keep_freed_memory()
with concurrent.futures.ThreadPoolExecutor(1) as thread:
    for run in (lambda f: f(), lambda f: thread.submit(f).result()):
        run(faults)
        print(*sorted(run(faults) for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_is_kept():
    """Maps that were freed come back without page faults, also in a thread; by default not."""
    counts = []
    for kept in (True, False):
        command = [sys.executable, "-c", KEPT.format(kept=kept)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        counts.append([[int(n) for n in line.split()] for line in done.stdout.splitlines()])
    for kept, returned in zip(*counts, strict=True):
        # at best, as a small thing in a gap may cost a map its old address once; of up to 24576
        assert kept[0] < 100
        assert kept[0] < returned[-1]


# --- the version -----------------------------------------------------------------------------


def said_version(capsys, cls, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_args(cls, list(argv))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_version_names_the_weights_that_would_be_loaded(capsys, tmp_path):
    """Wherever the flag stands; of a command without weights it is one line."""

    def told(path: Path) -> str:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"weights {path.name}: SHA-256 {digest}\n"

    first, folder = f"ASFE-Fusion {VERSION}\n", ROOT / "model_pre"
    assert said_version(capsys, args_setting.DataArgs, "--version") == first
    pet = folder / "compact_PET-MRI.safetensors"
    for argv in (["--version", "--task", "PET-MRI"], ["--task", "PET-MRI", "--version"]):
        assert said_version(capsys, TestArgs, *argv) == first + told(pet)
    own = tmp_path / "own.safetensors"
    assert "own.safetensors: not there" in said_version(
        capsys, TestArgs, "--version", "--weights", str(own)
    )
    own.write_bytes(b"anything")
    for cls in (TestArgs, args_setting.StudyArgs, args_setting.MetricArgs):
        lines = said_version(capsys, cls, "--version", "--weights", str(own))
        assert lines == first + told(own)
    lines = said_version(capsys, args_setting.AppArgs, "--version", "--weights-dir", str(tmp_path))
    assert lines == first + told(own)


def test_the_version_needs_no_torch(tmp_path):
    code = "import runpy, sys; sys.argv = ['test_asfe.py', '--version']\ntry:\n"
    code += "    runpy.run_path('test_asfe.py', run_name='__main__')\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ASFE-Fusion "), done.stderr
