"""Planted findings: what trivial fusions keep of them is known, and positions never change."""

import csv
import sys
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from task_files import write_task

import metrics
from args_setting import MetricArgs
from cli import parse_args
from dataset import Pair, vary
from evaluation import findings, methods
from evaluation.findings import KINDS, measure_findings, positions, soft_disc
from evaluation.trivial import TRIVIAL, decompose, expand, pyramid
from images import read_luma8, write_png
from phantom import phantom_pair, seed_of


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    for name, image in zip(("ct", "mri"), phantom_pair("CT-MRI", 256), strict=True):
        write_png(folder / f"{name}.png", image)
    return [Pair("a", folder / "ct.png", folder / "mri.png")]


@pytest.fixture
def call(in_process):
    """Run metrics.py in this process: exit code, stdout, stderr."""
    return lambda *argv: in_process(metrics, lambda: parse_args(MetricArgs), *argv)


# --- the measure -----------------------------------------------------------------------------


def shares(method, pairs, kinds=KINDS) -> np.ndarray:
    found = measure_findings(method, pairs, 3407, "")
    return np.array([p.share for p in found if p.kind in kinds])


def table(results, task, people) -> list[list[str]]:
    """The lines of the table of some methods."""
    return findings.table_lines(
        {name: findings.summary(found, task, people, 0) for name, found in results.items()}
    )


def test_known_fusions_keep_what_they_must(pairs):
    assert shares(lambda a, b: (a + b) / 2, pairs) == pytest.approx(0.5, abs=0.03)
    assert shares(lambda a, b: 0.25 * a + 0.5 * b + 0.1, pairs).min() > 0.2
    first = [kind for kind in KINDS if kind.source == 0]
    second = [kind for kind in KINDS if kind.source == 1]
    assert shares(lambda a, b: a, pairs, first) == pytest.approx(1, abs=0.02)
    assert shares(lambda a, b: a, pairs, second) == pytest.approx(0, abs=0.02)
    assert shares(lambda a, b: 1 - a, pairs, first) == pytest.approx(-1, abs=0.02)


def test_gain_is_no_merit(pairs):
    """A share above 1 counts as 1, and how far a finding stands out is the same after a stretch."""
    twice = measure_findings(lambda a, b: (2 * a - 0.5).clip(0, 1), pairs, 3407, "")
    assert max(p.share for p in twice) == 1
    assert max(p.visible for p in twice) <= 1
    noise = np.random.default_rng(0).normal(0, 0.03, (256, 256)).astype(np.float32)

    def flat(a, b):  # far above the rounding to grey levels, and far from black and white
        return 0.3 + (a + b) / 8 + noise

    low = measure_findings(flat, pairs, 3407, "")
    high = measure_findings(lambda a, b: 1.5 * flat(a, b) - 0.2, pairs, 3407, "")
    assert np.mean([p.share for p in high]) > 1.4 * np.mean([p.share for p in low])
    for less, more in zip(low, high, strict=True):
        assert more.visible == pytest.approx(less.visible, rel=0.1, abs=0.02)
    copied = measure_findings(lambda a, b: a, pairs, 3407, "")
    own = [p.visible for p in copied if p.kind.source == 0]
    assert own == pytest.approx([1] * len(own), abs=0.05), "a copy shows it as its source does"


def test_the_worst_kind_has_an_interval_over_people(pairs):
    found = measure_findings(lambda a, b: (a + b) / 2, pairs, 3407, "")
    worse = [replace(p, pair="b", share=p.share - 0.2) for p in found]
    people = {"a": "x", "b": "y"}
    lines = table({"m": found + worse}, "CT-MRI", people)
    low, high = findings.worst_kind_interval(found + worse, "CT-MRI", people, 0)
    assert low == pytest.approx(0.3, abs=0.03) and high == pytest.approx(0.5, abs=0.03)
    column = lines[0].index("95 % interval")
    assert lines[1][column] == f"{low:.2f} .. {high:.2f}"
    alone = findings.worst_kind_interval(found + worse, "CT-MRI", {"a": "x", "b": "x"}, 0)
    assert np.isnan(alone).all()


def test_a_kind_without_a_place_is_empty(pairs):
    found = measure_findings(lambda a, b: (a + b) / 2, pairs, 3407, "")
    some = [p for p in found if p.kind.name("CT-MRI") != "CT+"]
    lines = table({"m": some}, "CT-MRI", {"a": "x"})
    assert "CT+" not in lines[0], "no method has a value"
    assert lines[1][lines[0].index("worst kind")] != ""
    assert not any("nan" in cell for cell in lines[1])


def test_a_finding_in_noise_is_hard_to_see(pairs):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (256, 256)).astype(np.float32)
    quiet = measure_findings(lambda a, b: 0.3 + 0.4 * (a + b) / 2, pairs, 1, "")
    noisy = measure_findings(lambda a, b: 0.3 + 0.4 * (a + b) / 2 + noise, pairs, 1, "")
    assert np.median([p.d_prime for p in noisy]) < 0.7 * np.median([p.d_prime for p in quiet])
    assert np.mean([p.share for p in noisy]) == pytest.approx(0.2, abs=0.02)


def test_positions_are_inside_of_the_head_apart_and_the_same_each_time(pairs):
    sources = np.stack([read_luma8(path) / np.float32(255) for path in pairs[0][1:3]])
    inside = findings.inside_of(sources)
    for kind in KINDS:
        centres = positions(sources, inside, kind, 5)
        assert centres == positions(sources, inside, kind, 5)
        assert centres != positions(sources, inside, kind, 6)
        assert 1 <= len(centres) <= findings.DISCS
        for i, (row, column) in enumerate(centres):
            assert inside[row, column] and sources[:, row, column].max() > findings.HEAD
            level = sources[kind.source, row, column] + kind.sign * findings.CONTRAST
            assert -0.05 <= level <= 1.05, "the contrast fits into the source"
            assert all(np.hypot(row - r, column - c) >= findings.APART for r, c in centres[:i])
    black = np.zeros_like(sources)
    assert not findings.inside_of(black).any()
    assert positions(sources, findings.inside_of(black), KINDS[0], 5) == []


def test_a_seed_belongs_to_its_pair_and_kind():
    kinds = [astuple(kind) for kind in KINDS]
    seeds = {seed_of(s, p, *kind) for s in (1, 2) for p in "ab" for kind in kinds}
    assert len(seeds) == 4 * len(KINDS)
    assert seed_of(3407, "16009", *kinds[0]) == 13215530241158970871


def test_the_worst_tenth():
    assert findings.worst_tenth(np.arange(41.0)) == 4
    assert findings.worst_tenth(np.array([0.3])) == 0.3
    assert np.isnan(findings.worst_tenth(np.array([])))


def test_colour_counts_in_colour_images_only(tmp_path, pairs):
    for name, image in zip(("pet", "mri"), phantom_pair("PET-MRI", 256), strict=True):
        write_png(tmp_path / f"{name}.png", image)
    coloured = [Pair("a", tmp_path / "pet.png", tmp_path / "mri.png")]
    found = measure_findings(lambda a, b: a, coloured, 1, "")
    own = [p.colour for p in found if p.kind.source == 0]
    assert own == pytest.approx([1] * len(own), abs=0.02), "a copy keeps every colour"
    assert max(p.colour for p in found if p.kind.source == 1) < 0.02
    lines = table({"copy": found}, "PET-MRI", {"a": "x"})
    assert lines[0][-1] == "worst colour" and lines[1][-1] == "0.00"
    grey = measure_findings(lambda a, b: a, pairs, 1, "")
    lines = table({"copy": grey}, "CT-MRI", {"a": "x"})
    assert lines[0][-1] == "d'" and "95 % interval" not in lines[0], "one person has none"


# --- trivial fusions -------------------------------------------------------------------------


def test_a_pyramid_comes_back_and_takes_the_larger_detail():
    image = phantom_pair("CT-MRI", 100)[0]
    details, base = decompose(image)
    assert len(details) == 4 and base.shape == (7, 7)
    for detail in reversed(details):
        base = expand(base, detail.shape) + detail
    assert np.abs(base - image).max() < 1e-3
    assert np.array_equal(pyramid(image, image), image)
    flat = np.full_like(image, 100)
    spot = flat.copy()
    spot[40:60, 40:60] = 160
    assert np.array_equal(pyramid(spot, flat), pyramid(flat, spot))
    assert np.ptp(pyramid(spot, flat).astype(int)) > 45, "an average would keep 30"
    assert np.array_equal(TRIVIAL["source 2"](spot, flat), flat)


def test_the_stretched_mean_is_the_sum_less_a_quarter():
    a, b = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    wanted = (a.astype(float) / 255 + b.astype(float) / 255 - 0.25).clip(0, 1)
    assert np.abs(TRIVIAL["stretched mean"](a, b) - 255 * wanted).max() <= 0.5


# --- the command -----------------------------------------------------------------------------


def test_command_line(call, tmp_path):
    data = write_task(tmp_path, "CT-MRI", "test", {"2001": 128, "16001": 128})
    copy = f"{sys.executable} -c 'import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])'"
    argv = ["--findings", "--data_dir", data, "--cases", 2, "--csv", tmp_path / "f.csv"]
    argv += ["--plot", tmp_path / "f.png", "--method", f"mine={copy} {{1}} {{2}} {{out}}"]
    code, out, err = call(*argv)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines() if line]
    names = "ours max mean source source pyramid stretched mine"
    assert [line[0] for line in lines[2:]] == names.split()
    assert "CT+" in out and "worst kind" in out
    assert lines[-1][1:5] == ["1.00", "1.00", "0.00", "0.00"], "a copy of the CT"
    assert lines[4][1:5] == ["0.50"] * 4
    rows = list(csv.DictReader((tmp_path / "f.csv").open()))
    assert {row["pair"] for row in rows} == {"2001"} and {row["method"] for row in rows} >= {"mine"}
    assert read_luma8(tmp_path / "f.png").std() > 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "x"], "expected NAME=FILE.onnx or NAME=COMMAND"),
        (["--method", "max=cp {1} {2} {out}"], "--method is 'max=cp"),
        (["--method", "a=cp {1} {out}"], "expected {1}, {2} and {out}"),
        (["--method", "a=DIR/no.onnx"], "no such file"),
        (["--method", "a=DIR/bad.onnx"], "not an ONNX file"),
        (["--method", "a=false {1} {2} {out}"], "failed: it wrote no image"),
        (["--method", "a=SMALLER {1} {2} {out}"], "made 20x20 of 64x64, expected equal sizes"),
        (["--weights", "DIR/no.safetensors"], "no such file"),
        (["--cases", "9"], "cases has ['9'], which the test split of CT-MRI lacks"),
        (
            ["--json", "DIR/f.json"],
            "--json is for --fused and --one_source, but this is --findings",
        ),
        (["--plot", "DIR/f.xyz"], "a plot cannot be 'xyz'"),
        (["--plot", "DIR/no/f.png"], "is not there, expected an existing one"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, argv, message, monkeypatch):
    monkeypatch.setattr(methods, "TRIVIAL", {"max": TRIVIAL["max"]})
    data = write_task(tmp_path, "CT-MRI", "test", {"2001": 64})
    (tmp_path / "bad.onnx").write_text("hello")
    write_png(tmp_path / "small.png", np.zeros((20, 20), np.uint8))
    smaller = f"sh -c 'cp {tmp_path}/small.png $2' "  # its third argument is the file to write
    argv = [text.replace("DIR", str(tmp_path)).replace("SMALLER", smaller) for text in argv]
    code, _, err = call("--findings", "--data_dir", data, *argv)
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("plot", [False, True])
def test_images_without_room_for_a_finding_are_one_line(call, tmp_path, plot):
    """They gave a table of nan with exit code 0, or an IndexError."""
    data = write_task(tmp_path, "CT-MRI", "test", {"2001": 32, "2002": 40})
    argv = ["--findings", "--data_dir", data]
    argv += ["--plot", tmp_path / "f.png"] if plot else []
    code, out, err = call(*argv)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "no finding fits into the 2 pairs" in err
    assert not (tmp_path / "f.png").exists()


def test_a_disc_has_its_size_and_a_soft_edge():
    share = soft_disc((41, 51), (20, 25), 8)
    assert share.shape == (41, 51) and share.dtype == np.float32
    assert share.min() >= 0 and 0.95 < share.max() <= 1
    assert ((share > 0.01) & (share < 0.99)).any()
    y, x = np.ogrid[:41, :51]
    assert share[np.hypot(y - 20, x - 25) > 16].max() < 0.01
    assert share.sum() == pytest.approx(np.pi * 64, rel=0.15)


# --- in training -----------------------------------------------------------------------------


def test_sources_vary_by_themselves_and_stay_in_range():
    images = torch.stack([torch.from_numpy(i) / 255 for i in phantom_pair("CT-MRI", 64)])
    varied = [vary(images.clone()) for _ in range(300)]
    assert all(v.min() >= 0 and v.max() <= 1 for v in varied)
    same = [[torch.equal(v[k], images[k]) for v in varied] for k in (0, 1)]
    assert 50 < sum(same[0]) < 100 and 20 < sum(same[1]) < 55, "each by itself; one is shifted"
