"""classify_asfe.py on planted data: what is there is found, and no person is split."""

import re
import sys

import numpy as np
import pytest
import torch
from task_files import write_task

import classify_asfe
from args_setting import ClassifyArgs
from cli import UserError, parse_args
from evaluation.classify import (
    all_others,
    by_person,
    judge,
    nearest_accuracy,
    p_value,
    person_folds,
    scores,
    shuffles,
    stratified_folds,
    vote,
)
from evaluation.features import extractor, radiomics
from images import write_png

sklearn = pytest.importorskip("sklearn", reason="needs requirements-classify.txt")
WHO = np.repeat([f"p{i:02}" for i in range(20)], 5)


@pytest.fixture
def call(in_process):
    return lambda *argv: in_process(classify_asfe, lambda: parse_args(ClassifyArgs), *argv)


def planted(seed: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (100, 6) with a mark of each person and of the label, and people's labels (20,)."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(20) % 2
    features = np.repeat(rng.normal(size=(20, 6)), 5, 0) + 0.05 * rng.normal(size=(100, 6))
    features[:, 0] += effect * np.repeat(truth, 5)
    return features, truth


def test_a_planted_label_is_found_by_people():
    features, truth = planted(0, 8)
    assert min(judge(vote(features, truth, WHO, 5, 0), truth)) > 0.9
    others = shuffles(truth, 19, np.random.default_rng(0))
    assert p_value(features, truth, WHO, 5, 0, others) == 0.05


def fast_scores(features, labels, who, folds):
    """As `scores`, by the difference of the means: a linear model of microseconds."""
    found = np.zeros(len(labels))
    for fold in np.unique(folds):
        seen, held = folds != fold, folds == fold
        first, second = (features[seen & (labels == label)].mean(0) for label in (0, 1))
        found[held] = (features[held] - (first + second) / 2) @ (second - first)
    return found


def test_random_labels_are_found_as_seldom_as_p_says(monkeypatch):
    monkeypatch.setattr("evaluation.classify.scores", fast_scores)
    rng = np.random.default_rng(0)
    who, features = np.arange(16), rng.normal(size=(16, 2))
    truth, found = np.repeat([0, 1], 8), 0
    for _ in range(200):
        labels = rng.permutation(truth)
        found += p_value(features, labels, who, 16, 0, shuffles(truth, 24, rng)) < 0.05
    assert 3 <= found <= 14  # 95 % of a binomial of 200 and 1 / 25: the only p below .05 is .04


def test_random_labels_leak_by_slices_and_not_by_people():
    features, _ = planted(0, 0)
    rng = np.random.default_rng(1)
    labels = np.repeat(rng.integers(0, 2, (200, 20)), 5, 1)
    assert nearest_accuracy(features, labels, rng.permutation(100) % 5).mean() > 0.95
    assert abs(nearest_accuracy(features, labels, person_folds(WHO, 5, rng)).mean() - 0.5) < 0.05


def test_a_person_in_two_folds_is_an_error():
    features, truth = planted(0, 0)
    with pytest.raises(UserError, match="p00 is in two folds"):
        scores(features, np.repeat(truth, 5), WHO, np.arange(100) % 5)


@pytest.mark.parametrize("seed", range(5))
def test_each_fold_has_whole_people_of_both_labels(seed):
    truth = np.arange(20) % 4 // 3  # 5 of 20
    folds = stratified_folds(truth, WHO, 5, seed)
    for fold in range(5):
        held = folds == fold
        assert not set(WHO[held]) & set(WHO[~held])
        assert by_person(np.repeat(truth, 5)[held], WHO[held]).sum() == 1


def test_an_exact_test_counts_every_labeling_once():
    truth = np.array([0, 1, 1, 0, 1, 1, 0, 1])
    labelings = {tuple(labeling) for labeling in all_others(truth)}
    assert len(labelings) == 55 and {sum(labeling) for labeling in labelings} == {5}
    assert tuple(truth) not in labelings


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path):
    """12 people of 2 images; the label is a texture that only source 2 and the fused image have."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        label = i // 2 % 2
        one, two = (rng.integers(0, 120, (32, 32), np.uint8) for _ in range(2))
        two[:: 1 + label] += 100
        for folder, image in (("a", one), ("b", two), ("f", two)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_png(tmp_path / folder / f"{i}.png", image)
        rows.append((f"{i}.png" if i % 3 else str(i), f"p{i // 2}", ("well", "ill")[label]))
    write(tmp_path, rows)
    return tmp_path, rows


def write(folder, rows, head="image,person,label"):
    text = "\n".join([head, *(",".join(row) for row in rows)])
    (folder / "labels.csv").write_text(f"{text}\n", encoding="utf-8")


def flags(folder):
    return "--labels", folder / "labels.csv", "--dir1", folder / "a", "--dir2", folder / "b"


def table(out: str) -> dict[str, tuple[float, float, float]]:
    """Balanced accuracy, AUC and p of each input."""
    lines = [line for line in out.splitlines() if line.count("[") == 2]
    cells = {line[:20].strip(): line[20:].replace("[", " ").split() for line in lines}
    return {key: (float(c[0]), float(c[3]), float(c[6])) for key, c in cells.items()}


def test_the_command_finds_what_is_planted_and_where(study, call):
    folder, _ = study
    more = "--fused", folder / "f", "--draws", 19, "--folds", 2, "--features", "radiomic"
    code, out, _ = call(*flags(folder), *more)
    assert code == 0
    assert "radiomic features" in out and "6 ill and 6 well people, 24 images" in out
    found = table(out)
    assert [*found] == ["source 1", "source 2", "average", "both as two channels", "fused"]
    for key in ("source 2", "both as two channels", "fused"):
        assert found[key] == (1, 1, 0.05), key
    assert found["source 1"][2] > 0.05
    assert call(*flags(folder), *more)[1] == out  # the same again


def test_without_fused_images_the_sources_are_judged(study, call):
    code, out, _ = call(*flags(study[0]), "--draws", 1, "--folds", 2)
    assert code == 0 and "fused" not in table(out) and len(table(out)) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [("no", *rows[0][1:]), *rows[1:]], "image no of .* is not in both"),
        (lambda rows: [(*rows[0][:2], "ill"), *rows[1:]], "person p0 has two labels"),
        (lambda rows: [(*row[:2], "ill") for row in rows], "the labels are ill; expected two"),
        (lambda rows: [*rows, rows[0]], "image 0 is named twice"),
        (lambda rows: [*rows, ("5", "p2")], "row 26 has no label"),
        (lambda rows: [*rows, ("5", " ", "ill")], "row 26 has no person"),
        (lambda rows: rows[:10], "a label has 2 people, expected at least --folds"),
        (lambda rows: [], "expected rows with the columns image, person, label"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(study, call, change, words):
    folder, rows = study
    write(folder, change(rows))
    code, _, err = call(*flags(folder), "--folds", 3)
    assert code == 2 and err.count("\n") == 1
    assert re.search(words, err), err


def test_more_one_line_errors(study, call):
    folder, rows = study
    for argv, words in (
        ((), "give --labels or --exploratory or --leakage"),
        (("--leakage", "--exploratory"), "give one of --exploratory and --leakage, not both"),
        ((*flags(folder), "--leakage"), "give one of --labels and --leakage, not both"),
        ((*flags(folder), "--plot", "a.png"), "--plot is for --leakage, but this is --labels"),
        (("--leakage", "--fused", folder), "--fused is for --labels, but this is --leakage"),
        (("--labels", folder / "labels.csv"), "needs the folders"),
        ((*flags(folder), "--fused", folder / "none"), "no such folder"),
        (("--exploratory", "--data_dir", folder), "no such folder"),
    ):
        code, _, err = call(*argv)
        assert code == 2 and err.count("\n") == 1 and words in err
    write_png(folder / "b" / "7.png", np.zeros((16, 32), np.uint8))
    assert "32x32" in call(*flags(folder))[2] and "16x32" in call(*flags(folder))[2]
    write_png(folder / "b" / "7.png", np.zeros((32, 32), np.uint8))
    write_png(folder / "f" / "7.png", np.zeros((16, 16), np.uint8))
    code, _, err = call(*flags(folder), "--fused", folder / "f")
    assert code == 2 and "7.png is 16x16, its sources are 32x32, expected equal" in err
    write(folder, rows, "picture,person,label")
    assert "the columns image, person, label" in call(*flags(folder))[2]
    (folder / "labels.csv").write_bytes(b"image,person,label\n\xff,a,b\n")
    assert "not a CSV file in UTF-8" in call(*flags(folder))[2]


def test_without_scikit_learn_one_line_says_what_to_install(study, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, err = call(*flags(study[0]))
    assert code == 2 and err.count("\n") == 1
    assert "needs scikit-learn: pip install -r requirements-classify.txt" in err


def test_the_backbone_is_used_if_its_weights_are_here(study, call, monkeypatch, tmp_path):
    from torchvision.models import resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    luma = np.random.default_rng(0).integers(0, 255, (40, 32), np.uint8)
    features, told = extractor("auto")
    assert features is radiomics and "no backbone weights at" in told
    assert call(*flags(study[0]), "--features", "backbone")[0] == 2

    path = tmp_path / "hub" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(resnet18(weights=None).state_dict(), path)
    features, told = extractor("auto")
    assert told == f"features of ResNet-18, {path}"
    assert features(luma).shape == (512,) and np.isfinite(features(luma)).all()
    assert extractor("radiomic")[0] is radiomics
    code, out, _ = call(*flags(study[0]), "--folds", 2, "--draws", 1)
    assert code == 0 and "features of ResNet-18" in out

    torch.save({"a": torch.zeros(1)}, path)
    code, _, err = call(*flags(study[0]))
    assert code == 2 and "not those of ResNet-18" in err and err.count("\n") == 1


def test_the_exploratory_comparison_says_what_it_is(call, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.classify.scores", fast_scores)
    cases = (4, 10, 15, 18, 35, 3, 11, 29, 9, 21)
    for split, slices in (("train", "010"), ("test", "011")):
        write_task(tmp_path, "SPECT-MRI", split, {f"{case}{slices}": 32 for case in cases})
    code, out, _ = call("--exploratory", "--data_dir", tmp_path, "--draws", 2)
    assert code == 0
    assert "EXPLORATORY: vascular (cases 4, 10, 15, 18, 35) against degenerative (3, 11, 29)" in out
    assert "8 people, 16 slices, each person left out once" in out
    assert "exact over 56 labelings, so never below 0.018" in out and "not rank" in out
    assert len(table(out)) == 5 and "fused" in table(out)
    for _, _, p in table(out).values():
        assert abs(p * 56 - round(p * 56)) < 0.03  # a whole number of labelings, to three digits
