"""Do fused images tell two groups of people apart better than the sources do?

    python classify_asfe.py --labels FILE.csv --dir1 FOLDER --dir2 FOLDER --fused FOLDER
    python classify_asfe.py --leakage

Features are radiomic and frozen, the model is linear, and no person is in two folds.
"""

import csv
from datetime import date

from args_setting import ClassifyArgs
from cli import UserError, command_line, either, run_script

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(ClassifyArgs, __doc__, either("labels", "leakage"))

import cv2
import numpy as np

from dataset import Pair, case_of, match_pairs, people, task_pairs
from evaluation.classify import (
    by_person,
    interval,
    judge,
    nearest_accuracy,
    person_folds,
    radiomics,
    scores,
)
from evaluation.trivial import mean
from images import read_luma8, write_png


def read_labels(path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Images, people and labels (0 or 1, by the order of their names) of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "person", "label"} <= rows[0].keys():
        raise UserError(f"{path}: expected rows with the columns image, person, label")
    names, who, texts = (np.array([r[k] for r in rows]) for k in ("image", "person", "label"))
    found, labels = np.unique(texts, return_inverse=True)
    if len(found) != 2:
        raise UserError(f"{path}: the labels are {', '.join(found)}; expected two")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: an image is named twice, expected once")
    for person in np.unique(who):
        if len(set(labels[who == person])) > 1:
            raise UserError(f"{path}: person {person} has two labels, expected one")
    return list(names), who, labels


def inputs(pair: Pair, fused) -> dict[str, np.ndarray]:
    """Features of each way to show a pair to the model."""
    luma1, luma2 = read_luma8(pair.path1), read_luma8(pair.path2)
    first, second = radiomics(luma1), radiomics(luma2)
    found = {"source 1": first, "source 2": second, "average": radiomics(mean(luma1, luma2))}
    found["both"] = np.concatenate([first, second])
    return found | ({"fused": radiomics(read_luma8(fused))} if fused else {})


def classify(args: ClassifyArgs) -> None:
    """Print balanced accuracy and AUC with intervals, and p, for each input."""
    if not (args.dir1 and args.dir2):
        raise UserError("--labels needs the folders --dir1 and --dir2")
    names, who, labels = read_labels(args.labels)
    pairs = {pair.name: pair for pair in match_pairs(args.dir1, args.dir2, True)}
    if lacking := [name for name in names if name not in pairs]:
        raise UserError(f"{lacking[0]} of {args.labels} is not in both --dir1 and --dir2")
    fused = {n: args.fused / f"{n}.png" if args.fused else None for n in names}
    rows = [inputs(pairs[n], fused[n]) for n in names]
    rng = np.random.default_rng(args.seed)
    folds, truth = person_folds(who, args.folds, rng), by_person(labels, who)
    print(f"radiomic features, {len(truth)} people, seed {args.seed}, {date.today()}")
    for key in rows[0]:
        features = np.stack([row[key] for row in rows])
        p, votes = permutation_test(features, truth, who, folds, args.draws, rng)
        (low, low_auc), (high, high_auc) = interval(votes, truth, args.draws, rng)
        accuracy, auc = judge(votes, truth)
        print(
            f"{key}: balanced accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}], "
            f"AUC {auc:.3f} [{low_auc:.3f}, {high_auc:.3f}], p {p:.3f}"
        )


def permutation_test(features, truth, who, folds, draws, rng) -> tuple[float, np.ndarray]:
    """p of the AUC when the labels of people are shuffled, and the votes of the true labels."""
    index = np.unique(who, return_inverse=True)[1]

    def votes_of(given):
        return by_person(scores(features, given[index], who, folds), who)

    votes, above = votes_of(truth), 0
    for _ in range(draws):
        shuffled = rng.permutation(truth)
        above += judge(votes_of(shuffled), shuffled)[1] >= judge(votes, truth)[1]
    return (1 + above) / (1 + draws), votes


def leakage(args: ClassifyArgs) -> None:
    """Print, and draw, the accuracy on random labels of people: by slices and by people."""
    task, rng = "SPECT-MRI", np.random.default_rng(args.seed)
    listed = people(args.data_dir)
    pairs = [p for split in ("train", "test") for p in task_pairs(args.data_dir, task, split)]
    who = np.array([listed.get((task, case_of(p)), case_of(p)) for p in pairs])
    features = np.stack([radiomics(mean(read_luma8(p.path1), read_luma8(p.path2))) for p in pairs])
    names, index = np.unique(who, return_inverse=True)
    labels = rng.integers(0, 2, (args.draws, len(names)))[:, index]
    found = {
        "slices": nearest_accuracy(features, labels, rng.permutation(len(who)) % args.folds),
        "people": nearest_accuracy(features, labels, person_folds(who, args.folds, rng)),
    }
    print(f"{len(who)} slices, {len(names)} people, seed {args.seed}, {date.today()}")
    for name, values in found.items():
        low, high = np.percentile(values, (2.5, 97.5))
        print(f"split by {name}: accuracy {values.mean():.3f} [{low:.3f}, {high:.3f}]")
    if args.plot:
        write_png(args.plot, draw(found, rng))


def draw(found: dict[str, np.ndarray], rng) -> np.ndarray:
    """A dot for each draw; accuracy from 0 at the left to 1 at the right."""
    sheet = np.full((60 + 80 * len(found), 640, 3), 255, np.uint8)
    for row, (name, values) in enumerate(found.items()):
        y = 50 + 80 * row
        cv2.putText(sheet, f"by {name}", (8, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1)
        for value in values:
            centre = (120 + int(480 * value), y + int(rng.integers(-25, 25)))
            cv2.circle(sheet, centre, 2, (30, 90, 180), -1, cv2.LINE_AA)
    for tick in (0, 0.5, 1):
        at = (110 + int(480 * tick), sheet.shape[0] - 10)
        cv2.putText(sheet, f"{tick:g}", at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1)
    return sheet


def main(args: ClassifyArgs) -> None:
    """Raises UserError unless one of --labels and --leakage is given."""
    if bool(args.labels) == args.leakage:
        raise UserError("expected one of --labels FILE.csv and --leakage")
    (leakage if args.leakage else classify)(args)


if __name__ == "__main__":
    run_script(main, ARGS)
