"""What a training run leaves behind: its state to resume from, its table and its curves."""

import csv
import io
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from args_setting import TrainArgs
from cli import UserError
from dataset import Pair, case_of
from images import whole_file, write_bytes
from losses import WEIGHTS
from network import ASFEFusion
from weights import load_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A resumed run may differ in these, as they do not change what is trained.
FREE = ("DEVICE", "threads", "data_dir", "save_dir", "workers", "resume", "minutes", "compile")
FREE += ("save_every", "name", "overwrite")


RUN = {  # what a run is known by: types of its fields
    "epoch": int,
    "best": (int, float),
    "waited": int,
    "seconds": (int, float),
    "rows": list,
}


class TrainState(NamedTuple):
    """All that training changes; a checkpoint keeps the state of each."""

    model: ASFEFusion
    averaged: AveragedModel  # the weights to use: a moving average of the model's
    optimiser: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler


def run_file(out: Path, ending: str) -> Path:
    """A file of the run whose files begin with `out`, such as modelsave/compact_CT-MRI."""
    return out.with_name(out.name + ending)


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


def save_checkpoint(path: Path, state: TrainState, args: TrainArgs, run: dict) -> None:
    """Write all that --resume needs; a kill at any moment leaves the old file or the new one.

    No state of random generators is in it: what is random in an epoch follows from its number.
    """
    states = {name: part.state_dict() for name, part in state._asdict().items()}
    with whole_file(path) as file:
        torch.save({"state": states, "settings": plain(args), "run": run}, file)


def load_checkpoint(path: Path, state: TrainState, args: TrainArgs) -> dict:
    """Put `state` back to what a checkpoint keeps; returns the run so far.

    It is read to the CPU, where AdamW keeps its step counts: on a GPU, each step would wait for
    every one of them. The parts copy the rest to their own device.

    Raises UserError if there is none, if it is damaged, or if a setting has changed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is no run to resume")
    settings, states, run = parts_of_checkpoint(path)
    now = plain(args)
    settings = plain(TrainArgs()) | settings  # what an older version did not know
    changed = [
        f"{name} is {now.get(name)!r} and was {settings.get(name)!r}"
        for name in {**settings, **now}
        if name not in FREE and unordered(now.get(name)) != unordered(settings.get(name))
    ]
    if changed:
        weights = path.with_name(path.name.removesuffix("_last.pt") + ".safetensors")
        raise UserError(
            f"cannot resume {path} with other settings: {'; '.join(changed)}. To train on with "
            f"these, begin a new run from its weights: --init {weights} --name NEW"
        )
    for name, part in state._asdict().items():
        try:
            check_part(part, states[name])
            part.load_state_dict(states[name])
        except Exception:  # of another network, or crafted: tensors of any kind, words, nothing
            raise UserError(f"{path}: damaged, its {name} does not fit this run") from None
    return run


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


def parts_of_checkpoint(path: Path) -> tuple[dict, dict, dict]:
    """Settings, states by part, and the run so far; UserError for a file that has none."""
    damaged = UserError(f"{path}: damaged or not a checkpoint of train_asfe.py")
    try:
        saved = load_plain(path)
        parts = tuple(saved[name] for name in ("settings", "state", "run"))
    except Exception:  # a parser of strange bytes may stumble in any way
        raise damaged from None
    settings, states, run = parts
    sound = all(isinstance(part, dict) for part in parts) and states.keys() >= {*TrainState._fields}
    kinds = {name: run.get(name) for name in RUN} if sound else {}
    if not sound or any(not isinstance(kinds[name], kind) for name, kind in RUN.items()):
        raise damaged
    return settings, states, run


def unordered(value):
    """A setting as it is compared: the order of a list, as of --loss_weights, means nothing."""
    return sorted(value, key=repr) if isinstance(value, list) else value


def plain(args: TrainArgs) -> dict:
    """The settings as numbers, words and lists of them; of a path its last name."""
    plain_types = {Path: lambda path: path.name, tuple: list}
    values = asdict(args).items()
    return {
        key: next((to(v) for kind, to in plain_types.items() if isinstance(v, kind)), v)
        for key, v in values
    }


def describe(args: TrainArgs, run: dict, loss: float, measured: dict, val_pairs: int) -> dict:
    """What a weights file says of its making."""
    settings = {key: value for key, value in plain(args).items() if key not in FREE}
    return {
        "task": args.task,
        "epochs": run["epoch"],
        "training_loss": round(loss, 4),
        "minutes": round(run["seconds"] / 60, 1),
        "date": date.today().isoformat(),
        "validation_pairs": val_pairs,
        "metrics": measured,
        "settings": settings,
    }


def opening(args: TrainArgs, device: torch.device, train: list[Pair], val: list[Pair]) -> str:
    """What a run says before it starts: device, pairs, and who is held out."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    text = f"{args.task}, size {args.size}, on {device}{threads}: {len(train)} pairs to train on"
    if not val:
        return f"{text}, nobody held out for validation"
    cases = sorted({case_of(pair, args.case_pattern) for pair in val})
    return f"{text}, {len(val)} held out for validation (cases {', '.join(cases)})"


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
