"""The figures in the texts are those of docs/results.csv, and what the texts say of them holds."""

import hashlib
import sys

import numpy as np
import pytest
from task_files import write_task

from args_setting import ROOT, TASKS
from cli import UserError
from evaluation.trivial import TRIVIAL
from images import read_luma8, write_png
from metrics import METRICS, PANEL

sys.path.append(str(ROOT / "benchmarks"))
import results

PUBLISHED = ("ASFE-authors", "AdaFuse", "TEA-Net")


@pytest.fixture(scope="module")
def rows() -> list[results.Row]:
    if not results.CSV.is_file():
        pytest.skip("docs/results.csv is not measured: python benchmarks/results.py")
    return results.read_rows()


@pytest.mark.parametrize("path", results.TEXTS, ids=lambda path: path.parent.name)
def test_texts_have_the_figures_of_the_file(path, rows):
    text = path.read_text(encoding="utf-8")
    assert results.MARKED.search(text)
    assert results.filled(text, results.tables_of(rows)) == text, (
        "run: python benchmarks/results.py --texts"
    )


def test_the_file_has_what_the_texts_are_made_of(rows):
    assert results.to_csv(rows) == results.CSV.read_text(encoding="utf-8")
    found = results.by_view(rows)
    for task in TASKS:
        methods = [*results.OURS, *TRIVIAL, *sorted(PUBLISHED)]
        assert list(found[task, "metrics"]) == list(found[task, "one source"]) == methods
        assert list(found[task, "findings"]) == methods[: -len(PUBLISHED)]
        assert found[task, "metrics"]["ours"].keys() == set(PANEL)


def test_the_figures_are_those_of_the_shipped_weights(rows):
    sums = (ROOT / "model_pre" / "SHA256SUMS").read_text().split()[::2]
    measured = results.by_view(rows)["", "about"][""]["weights"].mean.split()
    assert set(measured) <= set(sums), "run: python benchmarks/results.py"
    for path in (ROOT / "model_pre").glob("*.safetensors"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in sums


# --- what the texts say ----------------------------------------------------------------------


def best_in(rows: list[results.Row], task: str, metric: str) -> str:
    """The method that is best in a metric."""
    methods = results.by_view(rows)[task, "metrics"]
    choose = max if METRICS[metric].higher_is_better else min
    return choose(methods, key=lambda m: methods[m][metric].mean)


@pytest.mark.parametrize("task", TASKS)
def test_what_results_md_says_of_single_metrics(rows, task):
    assert {best_in(rows, task, name) for name in ("PSNR", "CC")} == {"mean"}
    assert best_in(rows, task, "EN") == "ASFE-authors"
    copies = {best_in(rows, task, name) for name in ("VIF", "FMI_pixel", "QCB", "QCV", "QNCIE")}
    assert copies <= {"source 1", "source 2"}
    methods = results.by_view(rows)[task, "metrics"]
    assert methods["source 1"]["Nabf"].mean == methods["source 2"]["Nabf"].mean == 0
    ranks = results.metric_means(results.by_view(rows), task).mean_ranks()
    assert sorted(ranks, key=ranks.get).index("max") < len(ranks) / 2


@pytest.mark.parametrize("task", ["PET-MRI", "SPECT-MRI"])
def test_what_metrics_md_says_of_the_copy_of_the_mri(rows, task):
    assert {best_in(rows, task, name) for name in ("Qabf", "VIF", "QCV")} == {"source 2"}


@pytest.mark.parametrize("task", TASKS)
def test_a_mean_keeps_half_and_a_copy_nothing_of_the_other(rows, task):
    methods = results.by_view(rows)[task, "one source"]
    assert methods["mean"]["kept"].mean == pytest.approx(0.5, abs=0.01)
    assert methods["source 1"]["kept"].mean == pytest.approx(0, abs=0.01)
    planted = results.by_view(rows)[task, "findings"]["mean"]["worst kind"].mean
    assert planted == pytest.approx(0.5, abs=0.01)


# --- the script ------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A data folder of two drawn pairs a task, and texts of their own."""
    for task in TASKS:
        write_task(tmp_path, task, "test", {"1001": 176, "2001": 176})
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "CSV", tmp_path / "results.csv")
    text = tmp_path / "text.md"
    text.write_text("before\n<!-- table: ours -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(results, "TEXTS", (text,))
    return tmp_path


def run(*argv) -> None:
    results.main(results.parse([str(word) for word in argv]))


def test_the_script_measures_and_writes(small, weights, capsys):
    named = small / "theirs"
    for task in TASKS:
        (named / task).mkdir(parents=True)
        for path in (small / task / "test" / "MRI").iterdir():
            write_png(named / task / path.name, read_luma8(path))
    flags = ["--data_dir", small, "--weights", weights, "--jobs", 1]
    run(*flags, "--fused", f"theirs={named}")
    first = results.read_rows(small / "results.csv")
    found = results.by_view(first)
    assert list(found["CT-MRI", "metrics"]) == [*results.OURS, *TRIVIAL, "theirs"]
    for name in PANEL:
        of_copy = [found["CT-MRI", "metrics"][m][name].mean for m in ("theirs", "source 2")]
        assert of_copy[0] == of_copy[1], name
    text = (small / "text.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("-MRI |") == len(TASKS)

    (small / "text.md").write_text(text.replace("-MRI", "-XXX"))
    run("--texts")
    assert (small / "text.md").read_text() == text


def test_methods_that_are_not_measured_again_keep_their_rows():
    old = [results.Row("CT-MRI", "metrics", m, "SSIM", 0.1) for m in ("ours", "theirs", "max")]
    new = [results.Row("CT-MRI", "metrics", m, "SSIM", 0.2) for m in ("max", "ours")]
    found = {row.method: row.mean for row in results.merged(old, new)}
    assert found == {"ours": 0.2, "max": 0.2, "theirs": 0.1}
    assert list(found) == ["ours", "max", "theirs"], "the order of every table"


def test_rows_come_back_from_the_file(tmp_path):
    rows = [
        results.Row("CT-MRI", "one source", "ours", "kept", 0.8125, 0.75, 0.875),
        results.Row("PET-MRI", "one source", "ours", "kept", 0.5),
        results.Row("", "about", "", "date", "2026-11-30"),
    ]
    (tmp_path / "r.csv").write_text(results.to_csv(rows))
    again = results.read_rows(tmp_path / "r.csv")
    assert again[0] == rows[0] and again[2][:5] == rows[2][:5]
    assert again[1].mean == 0.5 and np.isnan(again[1].low)
    assert results.to_csv(again) == results.to_csv(rows)


def test_gains_at_zero_are_the_blend_alone(weights):
    import torch

    from network import blend

    images = np.random.default_rng(0).random((2, 64, 64)).astype(np.float32)
    fused = results.network_methods(results.shipped_path("compact", "CT-MRI"))["blend"](*images)
    alone = blend(*(torch.from_numpy(image)[None, None] for image in images))[0, 0].clamp(0, 1)
    white = images[0] > 0.75  # an older head draws bone by a rule of its own
    assert fused[~white] == pytest.approx(alone.numpy()[~white], abs=1e-5)


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match="no table 'x', expected one of a, b"):
        results.filled("<!-- table: x -->\n<!-- end -->", {"a": "", "b": ""})
