"""Methods compared: ranks and paired tests, tables and files, and the command line of metrics.py.

Warnings are errors throughout.
"""

import ast
import csv
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.stats
from drawn_images import textured
from task_files import write_task

import metrics
from args_setting import MetricArgs
from cli import UserError, parse_args
from dataset import match_pairs
from evaluation.colour import hue_shift
from evaluation.compare import (
    OPENCV_ON_ONE_THREAD,
    Comparison,
    compare_methods,
    differences,
    name_folders,
)
from evaluation.maps import Metric
from evaluation.one_source import one_source
from evaluation.tables import plot, print_table, table, to_csv, to_json
from evaluation.trivial import TRIVIAL
from images import read_luma8, write_png

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of libraries among themselves
]

ROOT = Path(__file__).resolve().parents[1]


def made_up(values: dict[str, list[list[float]]], names: list[str]) -> Comparison:
    images = [f"image{k}" for k in range(len(next(iter(values.values()))))]
    chosen = {name: metrics.METRICS[name] for name in names}
    return Comparison("made up", chosen, images, {m: np.array(v) for m, v in values.items()})


# --- ranks and paired tests ------------------------------------------------------------------


def test_mean_ranks_know_directions_and_ties():
    result = made_up(
        {
            "a": [[1.0, 9.0, 5.0], [3.0, 9.0, 5.0]],
            "b": [[3.0, 2.0, 5.0], [3.0, 2.0, 5.0]],
            "c": [[0.0, 1.0, 7.0], [1.0, 1.0, 7.0]],
        },
        ["EN", "QCV", "SSIM"],  # means: EN 2 3 0.5, QCV (lower is better) 9 2 1, SSIM 5 5 7
    )
    assert result.mean_ranks() == pytest.approx(
        {"a": (2 + 3 + 2.5) / 3, "b": (1 + 2 + 2.5) / 3, "c": (3 + 1 + 1) / 3}
    )


def test_empty_metrics_do_not_count_in_ranks():
    result = made_up({"a": [[1.0, math.nan]], "b": [[2.0, math.nan]]}, ["EN", "MS_SSIM"])
    assert result.mean_ranks() == {"a": 2.0, "b": 1.0}
    assert "MS_SSIM ↑" in table(result)


def test_differences_of_two_methods():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(24, 2)) + np.array([0.0, 1.0])
    b = rng.normal(size=(24, 2))
    result = made_up({"a": a.tolist(), "b": b.tolist()}, ["EN", "SSIM"])
    rows = differences(result, "a", "b", seed=1)
    assert rows == differences(result, "a", "b", seed=1)
    assert rows != differences(result, "a", "b", seed=2)
    p = [scipy.stats.wilcoxon(a[:, k], b[:, k]).pvalue for k in range(2)]
    assert [row.p for row in rows] == pytest.approx(p)
    assert sorted(row.p_holm for row in rows) == pytest.approx(
        sorted([min(1, 2 * min(p)), max(2 * min(p), max(p))])
    )
    for row, gap in zip(rows, (a - b).T, strict=True):
        assert row.mean == pytest.approx(gap.mean())
        half = 1.96 * gap.std() / math.sqrt(24)  # the normal approximation of the same interval
        assert (row.low, row.high) == pytest.approx((gap.mean() - half, gap.mean() + half), abs=0.1)
        assert row.low < gap.mean() < row.high
    opposite = differences(result, "b", "a", seed=1)
    assert opposite[1].mean == pytest.approx(-rows[1].mean)


def of_people(values: np.ndarray, people: list[str]) -> Comparison:
    result = made_up({"a": values.tolist(), "b": (0 * values).tolist()}, ["EN"])
    return result.with_people(dict(zip(result.images, people, strict=True)))


def test_intervals_and_tests_are_over_people():
    """Many images of a person are one observation: an interval does not shrink with them."""
    rng = np.random.default_rng(0)
    own = rng.normal(1, 1, 12)
    once = of_people(own[:, None], [str(k) for k in range(12)])
    often = of_people(np.repeat(own, 9)[:, None], [str(k) for k in range(12) for _ in range(9)])
    (row,), (copied,) = (differences(result, "a", "b", seed=1) for result in (once, often))
    limits = [(r.low, r.high) for r in (row, copied)]
    assert limits[0] == pytest.approx(limits[1], abs=0.03)
    assert copied.p == pytest.approx(row.p) == scipy.stats.wilcoxon(own).pvalue
    images = made_up({"a": often.values["a"].tolist(), "b": often.values["b"].tolist()}, ["EN"])
    (alone,) = differences(images, "a", "b", seed=1)  # as if each were another person
    assert alone.high - alone.low < 0.5 * (row.high - row.low) and alone.p < row.p


def test_means_of_a_person_and_images_without_a_value():
    values = np.array([[1.0], [3.0], [math.nan], [8.0]])
    result = of_people(values, ["x", "x", "y", "y"])
    assert result.mean("a") == 4
    assert result.means_by_person("a") == {"x": [2], "y": [8]}
    drawn = result.resampled("a", seed=0)[:, 0]
    assert set(np.unique(drawn)) == {2, 4, 8}  # x twice, both, y twice
    assert np.mean(drawn == 4) == pytest.approx(0.5, abs=0.03)
    assert np.array_equal(drawn, result.resampled("a", seed=0)[:, 0])
    rows = to_csv(result).splitlines()
    assert rows[0] == "method,person,image,EN" and rows[1] == "a,x,image0,1.0"
    assert rows[5:8] == ["a,x,mean,2.0", "a,y,mean,8.0", "a,all,mean,4.0"]


def test_one_person_has_no_interval():
    result = of_people(np.array([[1.0], [2.0]]), ["x", "x"])
    (row,) = differences(result, "a", "b", seed=1)
    assert (row.mean, row.p) == (1.5, 1) and math.isnan(row.low) and math.isnan(row.high)
    document = json.loads(to_json(result, False, [row], ("a", "b")))
    assert document["difference"]["metrics"][0]["low"] is None
    assert document["people"] == {"image0": "x", "image1": "x"}


def test_difference_of_equal_methods():
    values = [[1.0, math.inf], [2.0, math.inf]]
    (row,) = differences(made_up({"a": values, "b": values}, ["EN", "PSNR"]), "a", "b", 0)
    assert (row.metric, row.mean, row.low, row.high, row.p, row.p_holm) == ("EN", 0, 0, 0, 1, 1)


# --- tables and files ------------------------------------------------------------------------


class Terminal(StringIO):
    def isatty(self):
        return True


def test_table_marks_the_best_and_the_second(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = made_up({"a": [[1.0, 3.0]], "b": [[2.0, 2.0]], "c": [[3.0, 1.0]]}, ["EN", "QCV"])
    screen, page = Terminal(), StringIO()
    print_table(result, file=screen)
    en, qcv = screen.getvalue().splitlines()[2:4]
    assert en.split() == ["EN", "↑", "1.0000", "\033[4m2.0000\033[0m", "\033[1m3.0000\033[0m"]
    assert qcv.split() == ["QCV", "↓", "3.0000", "\033[4m2.0000\033[0m", "\033[1m1.0000\033[0m"]
    print_table(result, file=page)
    assert "\033" not in page.getvalue()


def test_narrow_terminal_shows_all_methods(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    page = StringIO()
    print_table(made_up({f"method{k}": [[float(k)]] for k in range(7)}, ["EN"]), file=page)
    assert all(f"method{k}" in page.getvalue() for k in range(7))
    assert max(map(len, page.getvalue().splitlines())) <= 40


def test_markdown_and_latex():
    result = made_up({"a|b": [[1.0, 0.00001]], "c_d": [[2.0, 2000.0]]}, ["MS_SSIM", "Nabf"])
    assert table(result, "markdown", rank=True).splitlines() == [
        r"| metric | a\|b | c_d |",
        "| :-- | --: | --: |",
        "| MS_SSIM ↑ | <ins>1.0000</ins> | **2.0000** |",
        "| Nabf ↓ | **1.00e-05** | <ins>2000.0</ins> |",
        "| mean rank ↓ | **1.50** | **1.50** |",
    ]
    latex = table(result, "latex")
    assert r"metric & a|b & c\_d \\" in latex
    assert r"MS\_SSIM $\uparrow$ & \underline{1.0000} & \textbf{2.0000} \\" in latex


def test_table_of_some_methods_is_marked_among_all():
    result = made_up({"a": [[3.0]], "b": [[2.0]], "c": [[1.0]]}, ["EN"])
    assert table(result, "markdown", methods=("c", "b")).splitlines() == [
        "| metric | c | b |",
        "| :-- | --: | --: |",
        "| EN ↑ | 1.0000 | <ins>2.0000</ins> |",
    ]


def test_plot_is_a_picture_with_a_panel_for_each_metric():
    values = np.random.default_rng(0).normal(size=(5, 7))
    values[:, 3], values[2, 4] = np.nan, np.inf
    result = made_up({"a": values.tolist(), "b": values.tolist()}, list(metrics.PANEL[:7]))
    picture = cv2.imdecode(np.frombuffer(plot(result, "png"), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture.shape[1] > 1000 and picture.std() > 10


def test_csv_and_json_leave_small_images_empty():
    result = made_up({"a": [[1.5, math.nan], [2.5, math.nan]]}, ["EN", "MS_SSIM"])
    rows = ["method,image,EN,MS_SSIM", "a,image0,1.5,", "a,image1,2.5,", "a,mean,2.0,"]
    assert to_csv(result).splitlines() == rows
    document = json.loads(to_json(result, True, [], ()))
    assert document["methods"]["a"]["mean"] == {"EN": 2.0, "MS_SSIM": None}


# --- the command line ------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> Path:
    """Three pairs with a colour source 1, and two methods: ours (colour) and theirs (grey)."""
    for folder in ("PET", "MRI", "ours", "theirs"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(("p1", "p2", "p3")):
        fused, source1, source2 = (textured(10 * k + j, (40, 48)) for j in range(3))
        tinted = np.stack([source1, source1 // 2, 255 - source1], axis=2)
        write_png(tmp_path / "PET" / f"{name}.png", tinted)
        write_png(tmp_path / "MRI" / f"{name}.png", source2)
        write_png(tmp_path / "ours" / f"{name}.png", np.stack([fused, source2, fused], axis=2))
        write_png(tmp_path / "theirs" / f"{name}.png", source2)
    return tmp_path


def arguments(folder: Path, *more: str | Path) -> list[str]:
    """The command line for `folders`, by one process unless `more` says otherwise."""
    words = ["--dir1", folder / "PET", "--dir2", folder / "MRI", "--jobs", "1", *more]
    if "--fused" not in more:
        words += ["--fused", folder / "ours", folder / "theirs"]
    return [str(word) for word in words]


@pytest.fixture
def run(in_process, folders):
    """Run the command in this process; stdout and stderr."""

    def run(*more: str | Path) -> tuple[str, str]:
        words = arguments(folders, *more)
        code, out, err = in_process(metrics, lambda: parse_args(MetricArgs), *words)
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def fails(in_process, folders):
    """Run it with an error: the one line, after a check that nothing was printed or written."""

    def fails(*more: str | Path) -> str:
        before = sorted(folders.rglob("*"))
        outputs = ("--csv", folders / "out.csv", "--json", folders / "out.json")
        words = arguments(folders, *outputs, *more)
        code, out, err = in_process(metrics, lambda: parse_args(MetricArgs), *words)
        assert (code, out) == (2, "")
        assert sorted(folders.rglob("*")) == before
        *notes, line = err.splitlines()
        assert all(note.startswith("note: ") for note in notes)
        assert line.startswith("metrics.py: error: ")
        return line

    return fails


def test_command_line_table(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = run()[0].splitlines()
    assert lines[0] == "means over 3 images"
    names = "metric  max  mean  source 1  source 2  pyramid  stretched mean  ours  theirs"
    assert lines[1].split() == names.split()
    assert [line.split()[0] for line in lines[2:21]] == list(metrics.PANEL)
    assert ["MS_SSIM", "↑"] in [line.split() for line in lines]  # the images are too small


def test_command_line_files(folders, run):
    formats = ("csv", "json", "markdown", "latex")
    outputs = {name: folders / f"out.{name}" for name in formats} | {"plot": folders / "out.png"}
    flags = [word for name, path in outputs.items() for word in (f"--{name}", path)]
    flags += ["--rank", "--between", "ours", "max", "--metrics", "EN", "SSIM", "MS_SSIM", "EN"]
    shown, _ = run(*flags)
    assert "mean rank ↓" in shown and "ours - max" in shown and "p (Holm)" in shown
    images = {
        name: [read_luma8(folders / f / f"{name}.png") for f in ("ours", "PET", "MRI")]
        for name in ("p1", "p2", "p3")
    }
    with outputs["csv"].open(newline="") as file:
        rows = {(row["method"], row["image"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8 * (3 + 1)
    for name, (fused, pet, mri) in images.items():
        assert float(rows["ours", name]["SSIM"]) == metrics.ssim(fused, pet, mri)
        assert rows["ours", name]["MS_SSIM"] == ""
        assert float(rows["max", name]["EN"]) == metrics.en(np.maximum(pet, mri), pet, mri)
        mean = np.floor((pet.astype(float) + mri) / 2 + 0.5)
        assert float(rows["mean", name]["EN"]) == metrics.en(mean, pet, mri)
        assert float(rows["source 2", name]["EN"]) == metrics.en(mri, pet, mri)
    average = np.mean([metrics.ssim(*lumas) for lumas in images.values()])
    assert float(rows["ours", "mean"]["SSIM"]) == pytest.approx(average)
    document = json.loads(outputs["json"].read_text())
    assert document["methods"]["ours"]["mean"]["SSIM"] == pytest.approx(average)
    assert document["methods"]["theirs"]["images"]["p2"]["MS_SSIM"] is None
    assert document["mean_rank"].keys() == {*TRIVIAL, "ours", "theirs"}
    assert [row["metric"] for row in document["difference"]["metrics"]] == ["EN", "SSIM"]
    assert outputs["markdown"].read_text().startswith("| metric | max | mean | source 1 |")
    assert outputs["latex"].read_text().startswith(r"\begin{tabular}{lrrrrrrrr}")
    assert cv2.imread(str(outputs["plot"])) is not None


def test_missing_images_are_named(folders, run, fails):
    (folders / "theirs" / "p2.png").unlink()
    assert "theirs lacks p2" in fails()
    out, err = run("--skip_unmatched", "--csv", folders / "out.csv", "--metrics", "EN")
    assert "theirs lacks p2; left out for every method" in err
    assert "means over 2 images" in out
    assert "p2" not in (folders / "out.csv").read_text()


def test_extra_images_are_named(folders, run):
    write_png(folders / "ours" / "p9.png", textured(1))
    out, err = run("--metrics", "EN")
    assert "ours: no sources for p9; left out" in err
    assert "means over 3 images" in out


def test_different_size_is_named(folders, fails):
    write_png(folders / "theirs" / "p3.png", textured(1, (50, 40)))
    write_png(folders / "MRI" / "p1.png", textured(1, (40, 47)))
    line = fails()
    assert "MRI/p1.png is 40x47, expected 40x48 as" in line
    assert "theirs/p3.png is 50x40, expected 40x48 as" in line and "PET/p3.png" in line


def test_damaged_and_tiny_images_are_named(folders, fails):
    (folders / "ours" / "p1.png").write_bytes(b"no image")
    assert "ours/p1.png" in fails()
    for folder in ("PET", "MRI", "ours", "theirs"):
        write_png(folders / folder / "p1.png", textured(1, (2, 9)))
    assert "PET/p1.png is 2x9, expected at least 3x3" in fails()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fused", "nowhere"], "nowhere: no such folder"),
        (["--fused", "ours", "a=ours", "a=theirs"], "would both be named 'a'"),
        (["--fused", "max=ours"], "'max' is that of a trivial fusion"),
        (["--metrics", "NIQE"], "unknown metric 'NIQE'"),
        (["--between", "ours", "hers"], "no method 'hers'"),
        (["--markdown", "nowhere/table.md"], "the folder of nowhere/table.md is not there"),
        (["--markdown", "a.txt", "--latex", "a.txt"], "two outputs have one name"),
        (["--plot", "out.gif2"], "a plot cannot be 'gif2'"),
        (["--metrics", "MS_SSIM"], "the images are too small for MS_SSIM"),
    ],
)
def test_bad_command_lines_end_in_one_line(fails, folders, monkeypatch, flags, message):
    monkeypatch.chdir(folders)
    assert message in fails(*flags)


def test_a_wrong_name_is_found_before_any_metric_is_computed(fails, monkeypatch):
    def broken(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(metrics, "compare_methods", broken)
    monkeypatch.setattr(metrics.own_content, "compare_one_source", broken)
    known = "expected two of max, mean, source 1, source 2, pyramid, stretched mean, ours, theirs"
    assert known in fails("--between", "ours", "hers")
    assert known in fails("--between", "his", "max", "--one-source")


def test_folders_are_named_by_what_tells_them_apart(tmp_path):
    given = [str(tmp_path / "one" / "PET-MRI"), f"x={tmp_path}", str(tmp_path / "two")]
    assert list(name_folders(given)) == ["one", "x", "two"]


# --- processes and threads -------------------------------------------------------------------


def test_processes_say_what_one_says(folders, run):
    """Those of the script by itself, too: they have to find its functions, which are `__main__`'s.

    A spawned process finds them only by their names, a forked one has them.
    """
    names = ("--metrics", "EN", "VIF")
    for jobs in ("1", "2"):
        run("--jobs", jobs, "--csv", folders / f"{jobs}.csv", *names)
    spawn = "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    (folders / "sitecustomize.py").write_text(spawn)
    words = arguments(folders, "--jobs", "2", "--csv", folders / "spawned.csv", *names)
    done = subprocess.run(
        [sys.executable, ROOT / "metrics.py", *words],
        env=os.environ | {"PYTHONPATH": str(folders)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    texts = {name: (folders / f"{name}.csv").read_text() for name in ("1", "2", "spawned")}
    assert len(set(texts.values())) == 1


@pytest.fixture
def three_threads():
    """OpenCV on three threads."""
    former = cv2.getNumThreads()
    cv2.setNumThreads(3)
    yield
    cv2.setNumThreads(former)


@pytest.mark.parametrize("jobs", [1, 2])
def test_compare_leaves_opencv_its_threads(folders, three_threads, jobs):
    pairs = match_pairs(folders / "PET", folders / "MRI")
    probe = {"threads": Metric(opencv_threads, True)}
    result = compare_methods(probe, {"ours": folders / "ours"}, pairs, jobs)
    assert (result.values["ours"] == 1).all()
    assert cv2.getNumThreads() == 3
    with pytest.raises(RuntimeError, match="a metric's own error"):
        compare_methods({"EN": Metric(broken, True)}, {"ours": folders / "ours"}, pairs, jobs)
    assert cv2.getNumThreads() == 3


def opencv_threads(*_) -> float:
    return float(cv2.getNumThreads())


def broken(*_) -> float:
    raise RuntimeError("a metric's own error")


def test_comparisons_at_once_leave_opencv_its_threads(folders, three_threads):
    """The last to end restores the number, whichever began first."""
    OPENCV_ON_ONE_THREAD.__enter__()  # one has begun
    with OPENCV_ON_ONE_THREAD:  # and another
        OPENCV_ON_ONE_THREAD.__exit__()  # the first is through
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == 3
    pairs = match_pairs(folders / "PET", folders / "MRI")
    probe = {"threads": Metric(opencv_threads, True)}
    methods = {"a": folders / "ours"}
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(compare_methods, probe, methods, pairs, 1) for _ in range(8)]
        assert all((done.result().values["a"] == 1).all() for done in work)
    assert cv2.getNumThreads() == 3


def test_files_in_place_of_a_folder(folders):
    pairs = match_pairs(folders / "PET", folders / "MRI")[:1]
    files = {"ours": {"p1": folders / "ours" / "p1.png"}}
    result = metrics.compare(files, pairs, jobs=1, metrics=["SSIM"], title="one")
    assert (result.title, result.images, list(result.metrics)) == ("one", ["p1"], ["SSIM"])
    lumas = [read_luma8(folders / f / "p1.png") for f in ("ours", "PET", "MRI")]
    assert result.mean("ours") == metrics.ssim(*lumas)
    with pytest.raises(UserError, match="lacks p1"):
        metrics.compare({"ours": {}}, pairs, jobs=1)


# --- the room --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "evaluation").glob("*.py")), ids=lambda p: p.stem)
def test_the_room_gets_images_and_functions(path):
    """Settings, weights and networks stay with the commands, which make functions of them."""
    taken = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    # `load_plain` is how any file of PyTorch is read here: within limits, and never as code.
    modules = {module for module, name in taken if name != "load_plain"}
    assert not modules & {"weights", "network", "inference", "losses", "metrics", "checkpoints"}
    assert {name for module, name in taken if module == "args_setting"} <= {"TASKS"}


# --- what only one source shows --------------------------------------------------------------


@pytest.fixture
def own(in_process, folders):
    """Run `metrics.py --one-source` on `folders` in this process: exit code, stdout, stderr."""

    def own(*more: str | Path) -> tuple[int, str, str]:
        words = arguments(folders, "--one-source", *more)
        return in_process(metrics, lambda: parse_args(MetricArgs), *words)

    return own


def test_one_source_table_and_files(folders, own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    names = ("csv", "json", "markdown", "latex")
    outputs = {name: folders / f"out.{name}" for name in names} | {"plot": folders / "out.png"}
    flags = [word for name, path in outputs.items() for word in (f"--{name}", path)]
    code, out, err = own(*flags, "--between", "ours", "mean")
    assert code == 0, err
    lines = [line.split("  ")[0] for line in out.splitlines() if line]
    assert lines[2:13] == [
        "kept source 1 ↑", "kept source 2 ↑", "kept, worse source ↑",
        "conspicuous source 1 ↑", "conspicuous source 2 ↑", "conspicuous, worse source ↑",
        "foreign ↓", "brighter than both ↓", "rise, levels ↓", "opposed details ↑",
        "hue shift, degrees ↓",
    ]  # fmt: skip
    assert "ours - mean" in out
    with outputs["csv"].open(newline="") as file:
        rows = {(row["method"], row["image"]): row for row in csv.DictReader(file)}
    pet = cv2.imread(str(folders / "PET" / "p1.png"))[..., ::-1] / 255 @ [0.299, 0.587, 0.114]
    mri, theirs = (read_luma8(folders / f / "p1.png") / 255 for f in ("MRI", "theirs"))
    stated = one_source(pet, mri, theirs)
    found = rows["theirs", "p1"]
    assert {n: float(found[n]) for n in stated._fields} == pytest.approx(stated._asdict())
    assert found["hue"] == "", "a grey image has none"
    assert float(rows["source 1", "p1"]["hue"]) < 0.5
    document = json.loads(outputs["json"].read_text())
    means = document["methods"]["theirs"]["mean"]
    worse = document["methods"]["theirs"]["worse_source"]
    assert worse["kept"] == min(means["kept1"], means["kept2"])
    assert document["methods"]["theirs"]["interval"]["kept"][0] <= worse["kept"]
    assert outputs["markdown"].read_text().startswith("| metric | max | mean | source 1 |")
    assert outputs["latex"].read_text().startswith(r"\begin{tabular}")
    assert cv2.imread(str(outputs["plot"])) is not None


def test_maps_show_what_is_lost(folders, own):
    code, _, err = own("--maps", folders / "maps")
    assert code == 0, err
    pictures = sorted((folders / "maps").iterdir())
    assert [path.name for path in pictures] == ["p1.png", "p2.png", "p3.png"]
    picture = cv2.imread(str(pictures[0]))
    assert picture.shape[1] > 6 * 256 and picture.shape[0] > 2 * 256  # six columns, two methods


def test_maps_do_not_replace_images(folders, own):
    before = (folders / "MRI" / "p1.png").read_bytes()
    for folder in ("MRI", "PET", "ours"):
        code, out, err = own("--maps", folders / folder)
        assert (code, out) == (2, "") and "holds images that are compared" in err
    assert (folders / "MRI" / "p1.png").read_bytes() == before
    assert "is a file" in own("--maps", folders / "MRI" / "p1.png")[2]
    assert "is not there" in own("--maps", folders / "no" / "maps")[2]


def test_people_of_the_data_set_and_of_own_names(tmp_path, in_process):
    data = write_task(tmp_path, "PET-MRI", "test", {"25001": 64, "30001": 64, "41001": 64})
    fused = data / "PET-MRI" / "test" / "MRI"

    def run(*more) -> str:
        words = ("--one-source", "--fused", f"copy={fused}", "--jobs", 1, *more)
        code, out, err = in_process(metrics, lambda: parse_args(MetricArgs), *words)
        assert code == 0, err
        return out

    out = run("--data_dir", data, "--task", "PET-MRI", "--per-person")
    assert "means over 3 images of 1 person" in out, "three cases are one head"
    assert "one person only: no interval" in out and "kept PET ↑" in out
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("PET-MRI 25")] == [
        ["PET-MRI", "25", "3"]
    ]
    dirs = ["--dir1", fused.with_name("PET"), "--dir2", fused]
    out = run(*dirs)
    assert "means over 3 images\n" in out and "95 % interval" in out
    out = run(*dirs, "--case_pattern", r"(\d+)001")
    assert "means over 3 images of 3 people" in out


def test_a_ct_has_no_uptake(tmp_path, in_process):
    data = write_task(tmp_path, "CT-MRI", "test", {"2001": 64, "16001": 64})
    words = ["--one-source", "--fused", f"copy={data / 'CT-MRI' / 'test' / 'CT'}", "--jobs", 1]
    words += ["--data_dir", data, "--csv", tmp_path / "out.csv"]
    code, out, err = in_process(metrics, lambda: parse_args(MetricArgs), *words)
    assert code == 0, err
    assert "kept CT ↑" in out and "rise" not in out and "hue" not in out
    assert "rise" not in (tmp_path / "out.csv").read_text()


def test_hue_shift():
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (20, 20, 3), np.uint8)
    assert hue_shift(source, source) == pytest.approx(0, abs=1e-9)
    turned = hue_shift(source[..., [1, 2, 0]], source)  # red becomes blue, and so on
    assert 90 < turned < 150
    assert math.isnan(hue_shift(source[..., 0], source))
    grey = np.repeat(source[..., :1], 3, 2)
    assert math.isnan(hue_shift(source, grey)) and math.isnan(hue_shift(grey, source))
