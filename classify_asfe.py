"""Do fused images tell two groups of people apart better than the sources do?

    python classify_asfe.py --labels FILE.csv --dir1 FOLDER --dir2 FOLDER --fused FOLDER
    python classify_asfe.py --exploratory
    python classify_asfe.py --leakage

Features are frozen, the model is linear, and no person is in two folds; see evaluation/features.py
and docs/claims.md. Settings: args_setting.py.
"""

import csv
import importlib.util
from datetime import date
from pathlib import Path

import limits
from args_setting import ClassifyArgs, WeightsArgs
from cli import UserError, check_classify, command_line, run_script, say, setup_runtime

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(ClassifyArgs, __doc__, check_classify)

import cv2
import numpy as np

from dataset import (
    PEOPLE,
    Pair,
    Who,
    decode_pair,
    identify,
    images_in,
    match_pairs,
    read_pair,
    task_pairs,
)
from evaluation.classify import (
    all_others,
    by_person,
    interval,
    judge,
    nearest_accuracy,
    p_value,
    person_folds,
    shuffles,
    stratified_folds,
    vote,
)
from evaluation.features import extractor, radiomics
from evaluation.trivial import mean
from images import EXTENSIONS, luma8, luma8_of, read_luma8, to_uint8, write_png
from inference import optimise
from weights import load_model

COLUMNS = ("image", "person", "label")
GROUPS = ("Degenerative", "Cerebrovascular")  # of diagnoses.csv, label 0 and label 1
HEADS = "SPECT-MRI"  # the task that has people of both groups


# --- labels of the user ----------------------------------------------------------------------


def read_labels(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Images, people and labels (0 or 1) of a CSV file, and the names of the labels."""
    try:
        rows = list(csv.DictReader(limits.read_table(path).splitlines()))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    if not rows or not set(COLUMNS) <= rows[0].keys():
        raise UserError(f"{path}: expected rows with the columns {', '.join(COLUMNS)}")
    for line, row in enumerate(rows, 2):
        if empty := [name for name in COLUMNS if not (row[name] or "").strip()]:
            raise UserError(f"{path}: row {line} has no {empty[0]}")
    names, who, texts = (np.array([r[name].strip() for r in rows]) for name in COLUMNS)
    names = [Path(n).stem if n.lower().endswith(EXTENSIONS) else n for n in names.tolist()]
    found, labels = np.unique(texts, return_inverse=True)
    if len(found) != 2:
        raise UserError(f"{path}: the labels are {', '.join(found)}; expected two")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: image {twice[0]} is named twice, expected once")
    for person in np.unique(who):
        if len(set(labels[who == person])) > 1:
            raise UserError(f"{path}: person {person} has two labels, expected one")
    return names, who, labels, found.tolist()


def inputs(lumas: tuple, fused: np.ndarray | None, features) -> dict[str, np.ndarray]:
    """Features of each way to show a pair to the model; "both" are those of both, side by side."""
    first, second = map(features, lumas)
    found = {"source 1": first, "source 2": second, "average": features(mean(*lumas))}
    found["both as two channels"] = np.concatenate([first, second])
    return found | ({} if fused is None else {"fused": features(fused)})


def read_pair8(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Lumas (H, W) of both sources in 8 bits; UserError if their sizes differ."""
    luma1, luma2 = map(luma8, decode_pair(pair))
    return luma1, luma2


def read_fused8(path: Path, lumas: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Luma of a fused image; UserError if it is not of the size of its sources."""
    fused = read_luma8(path)
    if fused.shape != lumas[0].shape:
        sides = ["x".join(map(str, luma.shape)) for luma in (fused, lumas[0])]
        raise UserError(f"{path} is {sides[0]}, its sources are {sides[1]}, expected equal")
    return fused


def named(files: dict, names: list[str], table: Path, where: str) -> None:
    """UserError if an image of the table is not among the files."""
    if lacking := [name for name in names if name not in files]:
        raise UserError(f"image {lacking[0]} of {table} is not in {where}")


def classify(args: ClassifyArgs) -> None:
    """Print balanced accuracy and AUC with intervals, and p, for each input."""
    if not (args.dir1 and args.dir2):
        raise UserError("--labels needs the folders --dir1 and --dir2")
    names, who, labels, found = read_labels(args.labels)
    pairs = {pair.name: pair for pair in match_pairs(args.dir1, args.dir2, True)}
    named(pairs, names, args.labels, "both --dir1 and --dir2")
    fused = images_in(args.fused) if args.fused else {}
    if args.fused:
        named(fused, names, args.labels, "--fused")
    truth = by_person(labels, who).astype(int)
    stratified_folds(truth, who, args.folds, args.seed)  # refuses what cannot be done
    features, told = extractor(args.features)
    rows = []
    for name in names:
        lumas = read_pair8(pairs[name])
        rows.append(inputs(lumas, read_fused8(fused[name], lumas) if fused else None, features))
    counts = " and ".join(f"{(truth == i).sum()} {name}" for i, name in enumerate(found))
    say(told, f"{counts} people, {len(names)} images, {args.folds} folds of whole people")
    rng = np.random.default_rng(args.seed)
    rivals = list(shuffles(truth, args.draws, rng))
    print_table(rows, truth, who, args.folds, args, rivals)


def print_table(rows: list[dict], truth, who, folds: int, args: ClassifyArgs, rivals) -> None:
    """A line for each input; `rivals` are the labelings that p counts."""
    rng = np.random.default_rng(args.seed)
    print(f"seed {args.seed}, {args.draws} draws, 95 % intervals over people, {date.today()}\n")
    print(f"{'input':20s}  {'balanced accuracy':20s}  {'AUC':20s}  p")
    for key in rows[0]:
        features = np.stack([row[key] for row in rows])
        votes = vote(features, truth, who, folds, args.seed)
        values, (low, high) = judge(votes, truth), interval(votes, truth, args.draws, rng)
        cells = [
            f"{value:.2f} [{a:.2f}, {b:.2f}]" for value, a, b in zip(values, low, high, strict=True)
        ]
        p = p_value(features, truth, who, folds, args.seed, rivals)
        print(f"{key:20s}  {cells[0]:20s}  {cells[1]:20s}  {p:.3f}")


# --- the people of the atlas -----------------------------------------------------------------


def diagnosed() -> dict[str, int]:
    """Label of each case of diagnoses.csv whose group is one of GROUPS."""
    with PEOPLE.with_name("diagnoses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["case"]: label
        for row in rows
        for label, group in enumerate(GROUPS)
        if row["group"].startswith(group)
    }


def exploratory(args: ClassifyArgs) -> None:
    """Print the table for the vascular against the degenerative people of SPECT-MRI."""
    label_of = diagnosed()
    shown = {pair: w for pair, w in heads(args).items() if w.case in label_of}
    who = np.array([w.person for w in shown.values()])
    labels = np.array([label_of[w.case] for w in shown.values()])
    if len(set(labels)) < 2:
        raise UserError(f"{args.data_dir} has no people of both groups; is it complete?")
    truth = by_person(labels, who).astype(int)
    features, told = extractor(args.features)
    weights = WeightsArgs()
    model = optimise(load_model(weights, HEADS, setup_runtime(weights)))
    rows = [inputs(read_pair8(pair), fused_luma(model, pair), features) for pair in shown]
    cases = sorted({w.case for w in shown.values()}, key=int)
    groups = [", ".join(case for case in cases if label_of[case] == i) for i in (1, 0)]
    print(f"EXPLORATORY: vascular (cases {groups[0]}) against degenerative ({groups[1]})")
    say(told, f"{len(truth)} people, {len(who)} slices, each person left out once")
    rivals = list(all_others(truth))
    print_table(rows, truth, who, len(truth), args, rivals)
    total = len(rivals) + 1
    print(
        f"\np is exact over {total} labelings, so never below {1 / total:.3f}. Few people, "
        "diagnoses partly of one source:\nthis says whether anything shows at all, and does not "
        "rank the rows."
    )


def fused_luma(model, pair: Pair) -> np.ndarray:
    """Luma of the fused image as test_asfe.py would write it."""
    luma1, luma2, chroma = read_pair(pair)
    return luma8_of(to_uint8(model.fuse(luma1, luma2).cpu().numpy(), chroma))


def heads(args: ClassifyArgs) -> dict[Pair, Who]:
    """The pairs of SPECT-MRI, both splits, and whose they are."""
    splits = ("train", "test")
    pairs = [p for split in splits for p in task_pairs(args.data_dir, HEADS, split)]
    return identify({HEADS: pairs}, args.data_dir)


def leakage(args: ClassifyArgs) -> None:
    """Print, and draw, the accuracy on random labels of people: by slices and by people."""
    rng = np.random.default_rng(args.seed)
    shown = heads(args)
    who = np.array([w.person for w in shown.values()])
    features = np.stack([radiomics(mean(*read_pair8(pair))) for pair in shown])
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
    """Raises UserError unless one of --labels, --exploratory and --leakage is given."""
    check_classify(args)
    if not args.leakage and importlib.util.find_spec("sklearn") is None:
        raise UserError("this needs scikit-learn: pip install -r requirements-classify.txt")
    command = classify if args.labels else exploratory if args.exploratory else leakage
    command(args)


if __name__ == "__main__":
    run_script(main, ARGS)
