"""What a training run leaves behind: its state to resume from, its table and its curves."""

import csv
import io
import math
import re
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import limits
from args_setting import TrainArgs
from cli import UserError
from images import whole_file, write_bytes
from losses import WEIGHTS
from network import ASFEFusion
from weights import load_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# A resumed run may differ in these settings: they do not change the epochs that are done.
FREE = (
    *("DEVICE", "threads", "data_dir", "save_dir", "name", "overwrite", "resume", "minutes"),
    *("workers", "compile", "save_every", "val_every", "patience", "cooldown"),
    *("epoch", "stages", "patch_size", "batch_size"),  # see `past`
)
PROGRESS = {"epoch": int, "best": (int, float), "waited": int, "rows": list}  # types of its fields


class TrainState(NamedTuple):
    """All that training changes; a checkpoint keeps the state of each."""

    model: ASFEFusion
    averaged: AveragedModel  # the weights to use: a moving average of the model's
    optimiser: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler


class Stage(NamedTuple):
    """A part of a run: crops of one size."""

    patch: int  # side of a crop, in pixels
    batch: int  # pairs in a step, over all processes
    epochs: int
    frozen: bool  # BatchNorm uses the statistics of whole images, as fusing does

    def __str__(self) -> str:
        return f"{self.patch}x{self.batch}" + ":frozen" * self.frozen


class Run(NamedTuple):
    """What one run is: its settings, its stages, and where its files lie."""

    args: TrainArgs
    stages: list[Stage]
    out: Path  # what its files begin with, such as modelsave/compact_CT-MRI
    started: float  # time.time(); --minutes counts from here
    data: str = ""  # `TrainPairs.digest` of the pairs to train on

    @property
    def epochs(self) -> int:
        """How many epochs the run has in all."""
        return sum(stage.epochs for stage in self.stages)

    def file(self, ending: str) -> Path:
        """A file of the run."""
        return run_file(self.out, ending)


def run_file(out: Path, ending: str) -> Path:
    """A file of the run whose files begin with `out`."""
    return out.with_name(out.name + ending)


def stages_of(args: TrainArgs) -> list[Stage]:
    """The stages that --stages names; without it one of --patch_size, --batch_size and --epoch.

    Raises UserError for a stage that is not PATCHxBATCHxEPOCHS, with ":frozen" or without.
    """
    if not args.stages:
        return [Stage(args.patch_size, args.batch_size, args.epoch, False)]
    stages = []
    for text in args.stages:
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,6})(:frozen)?", text)
        numbers = tuple(map(int, match.groups()[:3])) if match else (0,)
        if 0 in numbers:
            raise UserError(
                f"stage {text!r}, expected PATCHxBATCHxEPOCHS as in 64x8x200, or 256x4x10:frozen"
            )
        stages.append(Stage(*numbers, bool(match[4])))
    return stages


def stage_of(stages: list[Stage], epoch: int) -> tuple[Stage, bool]:
    """The stage of an epoch, counted from 0, and whether it begins there."""
    for stage in stages:
        if epoch < stage.epochs:
            return stage, epoch == 0
        epoch -= stage.epochs
    raise ValueError(f"the stages end {epoch + 1} epochs before")


class Progress:
    """How far a run has come; a checkpoint keeps it."""

    def __init__(self, epoch: int = 0, best: float = math.inf, waited: int = 0, rows=()):
        self.epoch = epoch  # how many are done
        self.best = best  # smallest shortfall so far, see evaluation/floors.py
        self.waited = waited  # validations since the best one
        self.rows = list(rows)  # of each epoch: what was measured, by name

    @property
    def seconds(self) -> float:
        """Time of training so far."""
        return sum(row["seconds"] for row in self.rows)

    def add(self, row: dict[str, float]) -> None:
        """Count an epoch with what it measured."""
        self.epoch += 1
        self.rows.append(row)

    def judge(self, kind: str, measured: dict[str, float]) -> bool:
        """Add what a validation measured to the last epoch; True if it is the best so far."""
        self.rows[-1] |= {f"{kind}_{name}": value for name, value in measured.items()}
        better = measured["shortfall"] < self.best
        self.best = min(self.best, measured["shortfall"])
        self.waited = 0 if better else self.waited + 1
        return better


def start_of_files(args: TrainArgs) -> Path:
    """What the files of a run begin with.

    Raises UserError if the name is no plain one, or if an earlier run would be overwritten.
    """
    name = args.name or f"{args.size}_{args.task}"
    if Path(name).name != name:
        raise UserError(f"name is {name!r}, expected a name without folders; see --save_dir")
    out = args.save_dir / name
    endings = ("_last.pt", ".safetensors", ".csv")
    earlier = [path.name for path in (run_file(out, e) for e in endings) if path.exists()]
    if earlier and not (args.resume or args.overwrite):
        resume = "--resume goes on with it, " if run_file(out, "_last.pt").exists() else ""
        raise UserError(
            f"{args.save_dir} has {', '.join(earlier)} of an earlier run: {resume}another --name "
            "or --save_dir keeps it, --overwrite replaces it"
        )
    return out


def save_checkpoint(run: Run, state: TrainState, progress: Progress) -> None:
    """Write all that --resume needs; a kill at any moment leaves the old file or the new one.

    It needs no state of random generators: what is random in an epoch follows from its number.
    """
    states = {name: part.state_dict() for name, part in state._asdict().items()}
    stages = past(run.stages, progress.epoch)
    done = {"stages": stages, "progress": vars(progress), "data": run.data}
    with whole_file(run.file("_last.pt")) as file:
        torch.save({"state": states, "settings": plain(run.args), "run": done}, file)


def past(stages: list[Stage], epoch: int) -> list[list]:
    """The stages until an epoch, as lists of numbers: what a resumed run can no longer change."""
    done = []
    for stage in stages:
        epochs = min(stage.epochs, epoch)
        epoch -= epochs
        if epochs:
            done.append([*stage._replace(epochs=epochs)])
    return done


def load_checkpoint(run: Run, state: TrainState) -> Progress:
    """Put `state` back to what a checkpoint keeps; returns how far the run has come.

    It is read to the CPU. AdamW keeps its step counts there: on a GPU, each step would wait for
    every one of them. The parts copy all else to their own device.

    Raises UserError if there is none, if it is damaged, or if a setting has changed. What is still
    to come of the stages may change.
    """
    path = run.file("_last.pt")
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is no run to resume")
    saved = parts_of_checkpoint(path)
    progress = saved.progress
    now = plain(run.args)
    # Settings that are newer than the file count as the defaults.
    settings = plain(TrainArgs()) | saved.settings
    changed = [
        f"{name} is {now.get(name)!r} and was {settings.get(name)!r}"
        for name in {**settings, **now}
        if name not in FREE and unordered(now.get(name)) != unordered(settings.get(name))
    ]
    if saved.data != run.data:
        changed.append("the pairs to train on are others than they were")
    if past(run.stages, progress.epoch) != saved.stages:
        changed.append(f"the first {progress.epoch} epochs were {named(saved.stages)}")
    if changed:
        weights = run.file(".safetensors")
        raise UserError(
            f"cannot resume {path} with other settings: {'; '.join(changed)}. To train on with "
            f"these, begin a new run from its weights: --init {weights} --name NEW"
        )
    for name, part in state._asdict().items():
        try:
            check_part(part, saved.states[name])
            part.load_state_dict(saved.states[name])
        except Exception:  # of another network, or crafted: tensors of any kind, words, nothing
            raise UserError(f"{path}: damaged, its {name} does not fit this run") from None
    return progress


def named(done: list[list]) -> str:
    """Stages of a checkpoint as --stages has them."""
    return " ".join(f"{p}x{b}x{epochs}" + ":frozen" * frozen for p, b, epochs, frozen in done)


def check_part(part, saved: dict) -> None:
    """ValueError if what was saved of a part of a training is of other types than the part's.

    Otherwise it would only be seen in a later step. What the optimiser keeps for a parameter is a
    number, or of its shape.
    """
    own = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        for index, kept in saved["state"].items():
            for value in kept.values():
                if value.shape not in ((), parameters[index].shape) or value.is_complex():
                    raise ValueError("of another shape")
        own, saved = own["param_groups"][0], saved["param_groups"][0]
    for name, value in own.items():
        other = saved[name]
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        if not (numbers or value is None or isinstance(other, type(value))):
            raise ValueError(f"{name} is of another type")
        if isinstance(value, torch.Tensor) and other.is_complex():
            raise ValueError(f"{name} is complex")


class Saved(NamedTuple):
    """What a checkpoint keeps."""

    settings: dict
    states: dict  # of the parts of `TrainState`, by their names
    stages: list[list]  # those that are done, see `past`
    progress: Progress
    data: str  # see `Run`


def parts_of_checkpoint(path: Path) -> Saved:
    """What a checkpoint file keeps.

    Raises UserError for a file that has none of these, or has them of other types.
    """
    try:
        saved = load_plain(path, limits.CHECKPOINT_BYTES)
        settings, states = saved["settings"], saved["state"]
        done, progress = saved["run"]["stages"], Progress(**saved["run"]["progress"])
        data = str(saved["run"]["data"])
        sound = isinstance(settings, dict) and isinstance(states, dict)
        sound &= all([*map(type, stage)] == [int, int, int, bool] for stage in done)
        sound &= all(isinstance(getattr(progress, name), kind) for name, kind in PROGRESS.items())
        sound &= all(isinstance(row["seconds"], int | float) for row in progress.rows)
    except UserError:  # which has said why
        raise
    except Exception:  # a parser of strange bytes may stumble in any way
        sound = False
    if not sound:
        raise UserError(
            f"{path}: damaged, or not a checkpoint of this version of train_asfe.py; begin a new "
            "run from its weights: --init WEIGHTS --name NEW"
        )
    return Saved(settings, states, done, progress, data)


def unordered(value):
    """A setting for a comparison: the order of a list, as of --loss_weights, does not count."""
    return sorted(value, key=repr) if isinstance(value, list) else value


def plain(args: TrainArgs) -> dict:
    """The settings as numbers, words and lists of them; a path is its last name."""
    plain_types = {Path: lambda path: path.name, tuple: list}
    values = asdict(args).items()
    return {
        key: next((to(v) for kind, to in plain_types.items() if isinstance(v, kind)), v)
        for key, v in values
    }


def describe(args: TrainArgs, progress: Progress, measured: dict, val_pairs: int) -> dict:
    """What a weights file says of its making."""
    settings = {key: value for key, value in plain(args).items() if key not in FREE}
    return {
        "task": args.task,
        "epochs": progress.epoch,
        "training_loss": round(progress.rows[-1]["loss"], 4),
        "minutes": round(progress.seconds / 60, 1),
        "date": date.today().isoformat(),
        "validation_pairs": val_pairs,
        "metrics": measured,
        "settings": settings,
    }


def opening(args: TrainArgs, device: torch.device, pairs: int) -> str:
    """What a run says before it starts: device, and how many pairs it trains on."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{args.task}, size {args.size}, on {device}{threads}: {pairs} pairs to train on"


def farewell(run: Run, progress: Progress) -> str:
    """What a run says at its end, or where it was stopped."""
    weights = run.file(".safetensors")
    rest = "" if progress.epoch == run.epochs else f" of {run.epochs} (--resume goes on)"
    there = weights if weights.is_file() else "none yet, they come with the first validation"
    return f"{progress.epoch} epochs{rest}; weights: {there}"


def open_board(run: Run, progress: Progress) -> "SummaryWriter":
    """The TensorBoard of a run, to go on after the epochs that are done."""
    from torch.utils.tensorboard import SummaryWriter  # only training needs it, and it loads slowly

    return SummaryWriter(run.file("_tensorboard"), purge_step=progress.epoch + 1)


def write_board(board: "SummaryWriter", progress: Progress) -> None:
    """Add the last epoch's values to the TensorBoard."""
    for name, value in progress.rows[-1].items():
        board.add_scalar(name.replace("_", "/", 1), value, progress.epoch)


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """One line for each epoch; empty where an epoch was not validated."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def draw_curve(path: Path, rows: list[dict[str, float]], metrics: tuple[str, ...]) -> None:
    """Loss and terms on the left (dashed: on whole images), metrics on the right, by epoch; PNG."""
    data = io.BytesIO()
    curves(rows, metrics).savefig(data, format="png", dpi=110)
    write_bytes(path, data.getvalue())


def curves(rows: list[dict[str, float]], metrics: tuple[str, ...]) -> "Figure":
    """The figure that `draw_curve` writes."""
    from matplotlib.figure import Figure  # only needed here, and it loads slowly

    figure = Figure(figsize=(12, 4), layout="constrained")
    losses, measures = figure.subplots(1, 2)
    terms = list(dict.fromkeys(["loss", *(name for recipe in WEIGHTS.values() for name in recipe)]))
    for name in dict.fromkeys(name for row in rows for name in row):
        epochs = [row["epoch"] for row in rows if name in row]
        values = [row[name] for row in rows if name in row]
        kind, what = name.split("_")[0], name.split("_")[-1]
        if what in terms:
            style = {"color": f"C{terms.index(what)}", "marker": "."}
            if kind != what:
                style |= {"linestyle": "--", "marker": "o", "markerfacecolor": "none"}
            losses.plot(epochs, values, label=name, **style)
        elif what in metrics:
            measures.plot(epochs, values, marker=".", label=name)
    validated = any(name.startswith("val_") for row in rows for name in row)
    losses.set(yscale="log", ylabel="loss", title="loss and its terms (dashed: whole images)")
    title = f"metrics of {'validation' if validated else 'training'} images"
    measures.set(ylabel="metric", title=title)
    for axes in (losses, measures):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, max((row["epoch"] for row in rows), default=0) + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
