"""The trainings of gpu.py: measure the pace, train for the time there is, fuse and measure.

The learning rate falls over the whole run, so the number of epochs must fit the time beforehand:
three epochs of a trial, the last with a checkpoint and a validation, say how long one takes. It is
kept in plan.json, and a training that was stopped goes on with it, from its last checkpoint.
"""

import json
import math
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from piece import ROOT, Piece, StoppedError, end

VALIDATIONS = 10  # in a run, and checkpoints
MOST_EPOCHS = 2000  # the published number
EVALUATION = 100  # seconds kept for fusing and measuring
DRAWN = {"train": 6, "test": 2}  # phantom pairs of a dry run, by split; two patients each


@dataclass(frozen=True)
class Training:
    """A network to train; `flags` are those of train_asfe.py that differ from its defaults."""

    size: str
    task: str
    flags: tuple[str, ...]
    published: bool = False  # the published arithmetic of AFF and the stretch of the output


PAPER = ("--patch_size", "256", "--lr", "2e-4")
PUBLISHED = (*PAPER, "--recipe", "paper", "--ema", "0", "--val", "0", "--warmup", "0")
TRAININGS = {
    "paper-CT-MRI": Training("paper", "CT-MRI", PAPER),
    "paper-PET-MRI": Training("paper", "PET-MRI", PAPER),
    "paper-SPECT-MRI": Training("paper", "SPECT-MRI", PAPER),
    "published": Training("paper", "CT-MRI", PUBLISHED, published=True),
    "compact-CT-MRI": Training("compact", "CT-MRI", ()),
    "compact-PET-MRI": Training("compact", "PET-MRI", ()),
    "compact-SPECT-MRI": Training("compact", "SPECT-MRI", ()),
}


def train_and_test(piece: Piece) -> dict:
    """Train what the piece is named after, fuse the test split, measure it beside others."""
    training = TRAININGS[piece.name]
    size = "compact" if piece.args.dry_run else training.size
    stem = piece.folder / f"{size}_{training.task}"
    found = {"size": size, "task": training.task}
    found["plan"], found["training"] = train(piece, training, size, stem)
    weights = stem.with_name(f"{stem.name}.safetensors")
    found["test"] = test(piece, training, size, weights)
    if training.size == "compact":
        found["validation"] = validate(piece, training, weights)
    return found


# --- training --------------------------------------------------------------------------------


def command(piece: Piece, training: Training, size: str, save_dir: Path) -> list[object]:
    """train_asfe.py with the flags of a training, but for the epochs."""
    args = piece.args
    words: list[object] = ["train_asfe.py", "--size", size, "--task", training.task]
    words += [*training.flags, "--data_dir", args.data_dir, "--save_dir", save_dir]
    words += ["--DEVICE", args.DEVICE, *shlex.split(args.train_args)]
    if training.published:
        words += ["--init", published_start(piece, size)]
    if args.dry_run:  # the last of a flag that is given twice counts
        words += ["--patch_size", 32, "--batch_size", 2, "--threads", 1]
    return words


def published_start(piece: Piece, size: str) -> Path:
    """Random weights with the published arithmetic of AFF, which training takes from a file."""
    path = piece.folder / f"start_{size}.safetensors"
    if not path.exists():
        import torch

        from network import ASFEFusion, save_weights

        torch.manual_seed(3407)
        save_weights(ASFEFusion(size, "published"), path, {}, half=False)
    return path


def train(piece: Piece, training: Training, size: str, stem: Path) -> tuple[dict, dict]:
    """Run or resume the training; the plan, and what it came to."""
    plan_path = piece.folder / "plan.json"
    if not plan_path.exists():
        plan = make_plan(piece, training, size)
        plan_path.write_text(json.dumps(plan))
    plan = json.loads(plan_path.read_text())
    last = stem.with_name(f"{stem.name}_last.pt")
    if len(read_rows(stem)) < plan["epochs"]:
        words = command(piece, training, size, piece.folder)
        words += ["--epoch", plan["epochs"], "--val_every", plan["val_every"]]
        words += ["--save_every", plan["val_every"], *(["--resume"] if last.exists() else [])]
        run_timed(piece, plan_path, plan, words)
    rows = read_rows(stem)
    if len(rows) < plan["epochs"]:
        raise StoppedError(f"{len(rows)} of {plan['epochs']} epochs are trained")
    for path in (last, *piece.folder.glob("start_*.safetensors")):  # gigabytes, of no more use
        path.unlink(missing_ok=True)
    runs = plan["runs_s"]
    return plan, {
        "epochs": len(rows),
        "wall_s": None if None in runs else sum(runs),  # null: a run was killed, its time is lost
        "steps_s": sum(float(row["seconds"]) for row in rows),
        "pairs_per_s": float(rows[-1]["pairs_per_s"]),
        "first_epoch": rows[0],
        "last_epoch": rows[-1],
        "weights": weights_metadata(stem.with_name(f"{stem.name}.safetensors")),
    }


def run_timed(piece: Piece, plan_path: Path, plan: dict, words: list[object]) -> None:
    """Train for the time that is left, and put the seconds that it took into the plan."""
    minutes = max(0.1, (piece.left() - EVALUATION) / 60)
    plan["runs_s"].append(None)
    plan_path.write_text(json.dumps(plan))
    started = time.time()
    try:
        piece.call(*words, "--minutes", f"{minutes:.2f}")
    finally:
        plan["runs_s"][-1] = time.time() - started
        plan_path.write_text(json.dumps(plan))


def make_plan(piece: Piece, training: Training, size: str) -> dict:
    """Epochs that fit --minutes, from the times at which three epochs of a trial end."""
    folder = piece.folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)  # of a trial that was stopped
    words = command(piece, training, size, folder)
    started = time.time()
    # the second epoch ends in the table, then comes its checkpoint: it is in the third one's time
    child = piece.start(*words, "--epoch", 3, "--val_every", 9, "--save_every", 2)
    ends: list[float] = []
    rows: list[dict[str, str]] = []
    stem = folder / f"{size}_{training.task}"
    try:
        running = True
        while running and piece.left() > 0:
            running = child.poll() is None
            rows = read_rows(stem)  # also after the end, which may come between two looks
            ends += [time.time() - started] * (len(rows) - len(ends))
            time.sleep(0.01)
    finally:
        end(child)
        shutil.rmtree(folder, ignore_errors=True)
    if running:
        raise StoppedError("three epochs of a trial were not done in time")
    if child.returncode or len(ends) < 3:
        raise ValueError(f"the trial ended with {child.returncode}: {piece.last_line()}")
    # at least what the run itself says, if this process was kept waiting
    epoch = max(ends[1] - ends[0], float(rows[1]["seconds"]))
    tenth = max(0.0, ends[2] - ends[1] - epoch)
    start = max(0.0, ends[0] - epoch)
    seconds, most = 60 * piece.args.minutes, 2 if piece.args.dry_run else MOST_EPOCHS
    plan = {"start_s": start, "epoch_s": epoch, "validation_and_checkpoint_s": tenth, "runs_s": []}
    return plan | epochs_in(seconds, start, epoch, tenth, most)


def epochs_in(seconds: float, start: float, epoch: float, tenth: float, most: int) -> dict:
    """How many epochs fit, 2 at least, and after how many comes what takes `tenth`, ten times."""
    epochs = int((seconds - start - VALIDATIONS * tenth) / epoch)
    epochs = min(max(2, epochs), most)
    return {"epochs": epochs, "val_every": math.ceil(epochs / VALIDATIONS)}


def read_rows(stem: Path) -> list[dict[str, str]]:
    """The table of a training, a row for each finished epoch."""
    path = stem.with_name(f"{stem.name}.csv")
    if not path.exists():
        return []
    names, *lines = (line.split(",") for line in path.read_text().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


def weights_metadata(path: Path) -> dict:
    from network import load_weights

    return load_weights(path)[1]


# --- what came of it -------------------------------------------------------------------------


def test(piece: Piece, training: Training, size: str, weights: Path) -> dict:
    """Fuse the test split and measure it beside the published images; means by method."""
    args = piece.args
    runs = {"ours": (weights, ())}
    if training.published:  # the authors' test code stretches each image
        runs = {"stretch": (weights, ("--stretch",)), "clip": (weights, ())}
    if training.size == "compact" and (shipped := shipped_weights(training)):
        runs["shipped"] = (shipped, ())
    folders = {}
    for name, (path, extra) in runs.items():
        folders[name] = piece.folder / "fused" / name / training.task
        words = ["test_asfe.py", "--task", training.task, "--size", size, "--weights", path]
        words += ["--data_dir", args.data_dir, "--out", folders[name], "--DEVICE", args.DEVICE]
        piece.call(*words, *extra)
    for folder in sorted(args.published.glob(f"*/{training.task}")):
        if not args.dry_run:
            folders[folder.parent.name] = folder
    result = piece.folder / "metrics.json"
    words = ["metrics.py", "--task", training.task, "--data_dir", args.data_dir, "--rank"]
    words += ["--json", result, "--fused", *(f"{name}={path}" for name, path in folders.items())]
    piece.call(*words, *(("--jobs", 1) if args.dry_run else ()))
    document = json.loads(result.read_text())
    means = {name: method["mean"] for name, method in document["methods"].items()}
    return {"metrics": means, "mean_rank": document["mean_rank"]}


def shipped_weights(training: Training) -> Path | None:
    """The compact weights of the task in model_pre/, if there are any that this network takes."""
    path = ROOT / "model_pre" / f"compact_{training.task}.safetensors"
    try:
        weights_metadata(path)
    except ValueError as error:
        print(f"not compared: {error}", flush=True)
        return None
    return path


def validate(piece: Piece, training: Training, weights: Path) -> dict:
    """New and shipped weights on the patients that the new ones have not seen."""
    shipped = shipped_weights(training)
    files = [weights, *([shipped] if shipped else [])]
    path = piece.folder / "validation.json"
    words = ["--data_dir", piece.args.data_dir, "--DEVICE", piece.args.DEVICE, "--json", path]
    piece.call("benchmarks/validate.py", "--weights", *files, "--task", training.task, *words)
    return json.loads(path.read_text())


def draw_data(folder: Path, side: int = 64) -> None:
    """A data set of phantoms, two patients in each split of each task."""
    from args_setting import TASKS
    from dataset import write_png
    from phantom import phantom_pair

    for task, modality in TASKS.items():
        for split, count in DRAWN.items():
            for i in range(count):
                for kind, image in zip((modality, "MRI"), phantom_pair(task, side, i), strict=True):
                    path = folder / task / split / kind / f"{1 + i % 2}{i:03d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_png(path, image)
