"""Train ASFE-Fusion: `python train_asfe.py --task PET-MRI`; settings: args_setting.py.

Writes to modelsave/, under the name <size>_<task>:
  .safetensors   the weights to use: the best on the validation patients, else the last
  _last.pt       all that a run needs to go on with --resume, renewed every --save_every epochs
  .csv, _tensorboard/, _curve.png   losses, metrics, learning rate and throughput by epoch

Several GPUs: `torchrun --nproc_per_node N train_asfe.py …`. batch_size is that of a whole step, so
the same command trains the same network on any number of GPUs.

Legend: B pairs that a process takes at once, p patch side, H W sides of a whole image.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from args_setting import SIZES, TrainArgs
from cli import UserError, check_training, command_line, run_script, say, setup_runtime

if __name__ == "__main__":  # before the imports that take seconds
    ARGS = command_line(TrainArgs, __doc__, check_training)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoints import (
    Progress,
    Run,
    Stage,
    TrainState,
    describe,
    draw_curve,
    farewell,
    load_checkpoint,
    open_board,
    opening,
    save_checkpoint,
    stage_of,
    stages_of,
    start_of_files,
    write_board,
    write_csv,
)
from dataset import TrainPairs, split_lines, split_pairs
from evaluation.compare import means_of_rows
from evaluation.floors import shortfall
from evaluation.one_source import one_source
from evaluation.one_source_tables import with_worse
from evaluation.opposed import opposed
from images import to_uint8, writable_folder
from losses import fusion_loss, term_weights
from metrics import evaluate
from network import MIN_SIDE, ASFEFusion
from weights import load_sized, save_weights

GRADIENT_CLIP = 1.0  # largest norm of a step's gradient
METRICS = ("SSIM", "VIF", "Qabf")  # of validation, beside the values of one source
# At most so many pairs, spread evenly.
VALIDATION_PAIRS, BATCHNORM_PAIRS, TRAINING_PAIRS, SHOWN_PAIRS = 32, 64, 8, 4


Chosen = tuple[str, Tensor]  # a task and a pair to validate on, (2, H, W) uint8


class Processes(NamedTuple):
    """The processes of a run; torchrun starts several."""

    rank: int  # of this one, from 0
    world: int  # how many there are
    device: torch.device  # of this one


def main(args: TrainArgs) -> None:
    # setup
    check_training(args)
    processes = join_processes(setup_runtime(args))
    amp = set_precision(args.precision, processes.device)
    run = Run(args, stages_of(args), start_of_files(args), time.time())

    # data and model
    pairs, held = load_pairs(run, processes)
    run = run._replace(data=pairs.digest())
    check_settings(run, pairs, held, processes)
    torch.manual_seed(args.seed)
    model = make_model(run, processes.device)
    state = make_state(model, run, len(pairs))
    step = make_step(wrap(model, args, processes), state, args, amp, processes)

    # the run so far
    writable_folder(args.save_dir)
    progress = load_checkpoint(run, state) if args.resume else Progress()
    board = open_board(run, progress) if processes.rank == 0 else None

    # loop
    stop = False
    while progress.epoch < run.epochs and not stop:
        stage, begins = stage_of(run.stages, progress.epoch)
        if stage.frozen and begins:
            recompute_batchnorm(model, pairs.images)
        try:
            row = train_epoch(step, pairs, stage, progress.epoch, state, processes)
        except NotFiniteError as error:
            kept = keep_good(state.averaged.module, run) if processes.rank == 0 else ""
            raise UserError(f"{error}{kept}") from None
        progress.add(row)
        if board is not None:
            stop = finish_epoch(run, state, pairs, held, progress, board)
        stop = agreed(stop, processes)

    if board is not None:
        board.close()
        draw_curve(run.file("_curve.png"), progress.rows, METRICS)
        print(farewell(run, progress))
    if processes.world > 1:
        dist.destroy_process_group()


def finish_epoch(
    run: Run,
    state: TrainState,
    pairs: TrainPairs,
    held: TrainPairs,
    progress: Progress,
    board: SummaryWriter,
) -> bool:
    """Save, validate and write down what was measured; True if the run may stop."""
    args, model = run.args, state.averaged.module
    ends = progress.epoch == run.epochs
    stop = 0 < args.minutes * 60 <= time.time() - run.started
    if ends or stop or progress.epoch % args.save_every == 0:
        save_checkpoint(run, state, progress)  # before validation, which may fail
    if ends or progress.epoch % args.val_every == 0:
        stage, _ = stage_of(run.stages, progress.epoch - 1)
        if not stage.frozen:
            recompute_batchnorm(model, pairs.images)
        picture = keep_best(model, pairs, held, run, progress)
        board.add_image("img1, img2, fused", picture, progress.epoch, dataformats="HW")
        save_checkpoint(run, state, progress)  # now with the best so far
    write_csv(run.file(".csv"), progress.rows)
    write_board(board, progress)
    return stop or 0 < args.patience <= progress.waited


# --- one epoch -------------------------------------------------------------------------------


class NotFiniteError(ValueError):
    """A loss that is not finite; the message says where."""


def train_epoch(
    step: Callable[[Tensor], dict[str, float]],
    pairs: TrainPairs,
    stage: Stage,
    epoch: int,
    state: TrainState,
    processes: Processes,
) -> dict[str, float]:
    """Go through the pairs once; returns means of loss and terms, learning rate and throughput."""
    started = time.time()
    pairs.epoch, pairs.patch = epoch, stage.patch
    state.model.train()
    if stage.frozen:
        for norm in batchnorms(state.model):
            norm.eval()
    batches = pairs.batches(stage.batch, processes.rank, processes.world)
    loader = DataLoader(pairs, batch_sampler=batches, num_workers=pairs.workers)
    title = f"epoch {epoch + 1}, {stage}"
    means: dict[str, float] = {}
    hidden = processes.rank > 0
    with tqdm(loader, title, unit="step", disable=hidden, mininterval=1) as progress:
        for images, names in progress:  # (B, 2, p, p)
            lr = state.schedule.get_last_lr()[0]
            values = step(images.to(processes.device))
            if not math.isfinite(values["loss"]):
                raise NotFiniteError(
                    f"loss is {values['loss']} in epoch {epoch + 1}, pairs {list(names)}"
                )
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value / len(batches)
            progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
    seconds = time.time() - started
    rate = len(batches) * stage.batch / seconds
    return {"epoch": epoch + 1, **means, "lr": lr, "seconds": seconds, "pairs_per_s": rate}


def make_step(
    network: nn.Module,
    state: TrainState,
    args: TrainArgs,
    amp: torch.dtype | None,
    processes: Processes,
) -> Callable[[Tensor], dict[str, float]]:
    """The function that makes one step of training with a batch (B, 2, p, p).

    It returns loss and terms as means over all processes. `network` is the model of `state`, as
    several processes or a compiler wrap it.
    """
    weights = term_weights(args.recipe, args.loss_weights)
    parts, device = args.accumulate, processes.device.type

    def loss_of(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        img1, img2 = images.split(1, 1)  # two (B/parts, 1, p, p)
        with torch.autocast(device, amp, enabled=amp is not None):
            fused = network(img1, img2)  # (B/parts, 1, p, p)
        return fusion_loss(fused.float(), img1, img2, args.recipe, weights=weights)

    def gradients(images: Tensor) -> dict[str, float]:
        means = 0.0
        for k, part in enumerate(images.chunk(parts)):
            # Processes exchange their gradients once in a step, after its last part.
            waits = processes.world > 1 and k + 1 < parts
            with network.no_sync() if waits else nullcontext():
                loss, terms = loss_of(part)
                state.scaler.scale(loss / parts).backward()
            means = means + torch.stack([loss, *terms.values()]).detach() / parts
        if processes.world > 1:
            dist.all_reduce(means)
            means = means / processes.world
        return dict(zip(("loss", *terms), means.tolist(), strict=True))

    def step(images: Tensor) -> dict[str, float]:
        state.optimiser.zero_grad()
        with memory_hint(len(images), images.shape[-1]):
            values = gradients(images)
        if not math.isfinite(values["loss"]):
            return values  # the weights stay as they are
        state.scaler.unscale_(state.optimiser)
        nn.utils.clip_grad_norm_(state.model.parameters(), GRADIENT_CLIP)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        state.schedule.step()
        state.averaged.update_parameters(state.model)
        return values

    return step


@contextmanager
def memory_hint(batch: int, patch: int) -> Iterator[None]:
    """Turn running out of memory into a line that says which setting to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory with {batch} pairs of {patch}x{patch} at once: raise --accumulate, "
            "or lower the patch or the batch (--stages, --patch_size, --batch_size)"
        ) from None


def keep_good(model: ASFEFusion, run: Run) -> str:
    """Save the averaged weights of a run that fails, if they are finite; returns words on it."""
    path = run.file("_stopped.safetensors")
    try:
        save_weights(model, path, {"stopped": True})
    except UserError:  # not finite
        return ""
    return f"; the averaged weights before this step are in {path}"


# --- validation ------------------------------------------------------------------------------


def keep_best(
    model: ASFEFusion,
    pairs: TrainPairs,
    held: TrainPairs,
    run: Run,
    progress: Progress,
) -> np.ndarray:
    """Validate the averaged weights, save them if they are the best so far, and say so.

    Returns a picture of some of the pairs and their fused images, see `picture_of`.
    """
    shown, count = (held, VALIDATION_PAIRS) if len(held) else (pairs, TRAINING_PAIRS)
    chosen = spread(list(zip(shown.tasks, shown.images, strict=True)), count)
    fused = fuse_all(model, chosen)
    measured = validate(chosen, fused)
    kind = "val" if len(held) else "train"  # training pairs only say that training worked
    better = progress.judge(kind, measured)
    if better or not len(held):
        metadata = describe(run.args, progress, {kind: measured}, len(held))
        save_weights(model, run.file(".safetensors"), metadata)
    what = f"{len(chosen)} validation" if len(held) else "some training"
    kept = "weights saved" if better or not len(held) else f"the best lack {progress.best:.4f}"
    lacking = f"{measured['shortfall']:.4f} lacking of the floors"
    print(f"epoch {progress.epoch}: {lacking} on {what} pairs, {kept}")
    return picture_of(chosen[:SHOWN_PAIRS], fused)


def fuse_all(model: ASFEFusion, chosen: list[Chosen]) -> list[np.ndarray]:
    """The fused image of each pair, uint8 (H, W)."""
    return [to_uint8(model.fuse(*images).cpu().numpy()) for _, images in chosen]


def picture_of(chosen: list[Chosen], fused: list[np.ndarray]) -> np.ndarray:
    """Rows of source 1, source 2 and fused image, (H, W) uint8; only those as wide as the first."""
    pairs = zip(chosen, fused, strict=False)
    rows = [np.concatenate([*images.numpy(), image], 1) for (_, images), image in pairs]
    return np.concatenate([row for row in rows if row.shape[1] == rows[0].shape[1]])


def validate(chosen: list[Chosen], fused: list[np.ndarray]) -> dict[str, float]:
    """Metrics, values of one source and shortfall of whole pairs and their fused images.

    For each task it takes the means over the images. `kept` and `conspicuous` are those of the
    source with the lower mean. The result is the mean over the tasks.
    """
    rows: dict[str, list[list[float]]] = {}  # task -> the values of each image
    for (task, images), image in zip(chosen, fused, strict=True):
        source1, source2 = images.numpy()
        values = evaluate(image, source1, source2, METRICS)
        lumas = source1 / 255, source2 / 255, image / 255
        values |= one_source(*lumas)._asdict() | {"opposed": opposed(*lumas)}
        rows.setdefault(task, []).append(list(values.values()))
    of_tasks = []
    for task, of_images in rows.items():
        means = with_worse(means_of_rows(np.array(of_images)), list(values))
        of_tasks.append([*means.values(), shortfall(task, means)])
    names = [*means, "shortfall"]
    found = dict(zip(names, means_of_rows(np.array(of_tasks)), strict=True))
    # Of kept1 and kept2, and of conspicuous1 and conspicuous2, the worse one is there as well.
    return {
        name: round(float(value), 4)
        for name, value in found.items()
        if not name.endswith(("1", "2"))
    }


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    """All BatchNorm layers of a network."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


@torch.no_grad()
def recompute_batchnorm(model: ASFEFusion, images: list[Tensor]) -> None:
    """Replace the running statistics by plain means over whole images (2, H, W), not augmented.

    It takes at most BATCHNORM_PAIRS of the images, evenly spread.
    """
    norms = batchnorms(model)
    device = next(model.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.train()
    for pair in spread(images, BATCHNORM_PAIRS):
        height, width = (n - n % model.multiple for n in pair.shape[-2:])
        if height and width:
            img1, img2 = pair[:, None, None, :height, :width].to(device).float() / 255
            model(img1, img2)
    for norm in norms:
        norm.momentum = 0.1


# --- several processes -----------------------------------------------------------------------


def join_processes(device: torch.device) -> Processes:
    """Join the other processes that torchrun started, if it did."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)


def wrap(model: ASFEFusion, args: TrainArgs, processes: Processes) -> nn.Module:
    """The network as several processes or a compiler want it; the parameters are the model's."""
    network: nn.Module = model
    if processes.world > 1:
        cuda = processes.device.type == "cuda"
        if cuda:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif processes.rank == 0:
            print("several processes on a CPU: BatchNorm sees a process's part of a batch only")
        network = DistributedDataParallel(network, [processes.device.index] if cuda else None)
    return torch.compile(network) if args.compile else network


def agreed(stop: bool, processes: Processes) -> bool:
    """Whether all processes stop: the first one decides."""
    if processes.world == 1:
        return stop
    flag = torch.tensor(float(stop), device=processes.device)
    dist.broadcast(flag, 0)
    return bool(flag)


# --- settings --------------------------------------------------------------------------------


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def load_pairs(run: Run, processes: Processes) -> tuple[TrainPairs, TrainPairs]:
    """The pairs to train on and those to validate on; the first process says which they are."""
    args, split = run.args, split_pairs(run.args)
    largest = max(stage.patch for stage in run.stages)
    pairs = TrainPairs(split.train, largest, args.seed, args.workers)
    if processes.rank == 0:
        say(*pairs.doubts.notes(), opening(args, processes.device, len(pairs)))
        say(*split_lines(split))
    return pairs, TrainPairs(split.val, MIN_SIDE)


def check_settings(run: Run, pairs: TrainPairs, held: TrainPairs, processes: Processes) -> None:
    """UserError for numbers that do not fit the data, the processes or each other."""
    args = run.args
    term_weights(args.recipe, args.loss_weights)
    parts = processes.world * args.accumulate
    for stage in run.stages:
        if stage.batch > len(pairs):
            raise UserError(f"batch_size is {stage.batch}, but there are {len(pairs)} pairs")
        if stage.batch % parts:
            raise UserError(
                f"batch_size is {stage.batch}, expected a multiple of {parts} "
                f"({processes.world} processes, {args.accumulate} parts)"
            )
    if run.stages[0].frozen and not args.init:
        raise UserError("a frozen first stage needs the statistics of trained weights, give --init")
    if args.patience and not len(held):
        raise UserError("patience needs validation, but nobody is kept for it: see --val")
    if args.init and args.without:
        raise UserError("without changes the network, but init has one: give one of the two")
    if args.ema >= 1:
        raise UserError(f"ema is {args.ema}, expected less than 1")
    if args.cooldown > 1:
        raise UserError(f"cooldown is {args.cooldown}, expected a share from 0 to 1")


def make_model(run: Run, device: torch.device) -> ASFEFusion:
    """The network with random weights, or those of --init; UserError if it does not fit."""
    args = run.args
    if args.init:
        model = load_sized(args.init, args.size, device, args.aff)
    else:
        model = ASFEFusion(SIZES[args.size].without(args.without), args.aff).to(device)
    for stage in run.stages:
        if stage.patch % model.multiple:
            raise UserError(f"patch_size is {stage.patch}, expected a multiple of {model.multiple}")
    return model


def make_state(model: ASFEFusion, run: Run, pairs: int) -> TrainState:
    """All that training changes, at its beginning: AdamW, its schedule, the moving average."""
    args = run.args
    # One kernel for all parameters.
    optimiser = torch.optim.AdamW(
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True
    )
    steps = sum(stage.epochs * (pairs // stage.batch) for stage in run.stages)
    schedule = LambdaLR(
        optimiser, lambda step: learning_rate(step, steps, args.warmup, args.cooldown)
    )
    averaged = AveragedModel(model, multi_avg_fn=moving_average(args.ema))
    # fp16 has too little range for gradients; for the other types the scaler does nothing.
    device = next(model.parameters()).device.type
    half = device == "cuda" and args.precision == "fp16"
    scaler = torch.amp.GradScaler(device, enabled=half)
    return TrainState(model, averaged, optimiser, schedule, scaler)


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Share of the highest learning rate: up in a line, level, down in a cosine.

    It rises over `warmup` steps. It falls over the last steps: `cooldown` is their share of all.
    While it is level it does not depend on the number of steps, so a run can still be made longer.
    """
    falling = cooldown * steps
    before = steps - falling
    down = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - before) / max(1, falling))))
    return min((step + 1) / warmup if step < warmup else 1.0, down if step > before else 1.0)


def moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """The update for AveragedModel; it begins as a plain mean, so early weights fade soon."""

    def update(averages: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averages, new, max(9 / (10 + int(count)), 1 - decay))

    return update


def set_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Set the arithmetic of float32 products; returns the type of mixed precision, or None."""
    if name == "auto":  # bf16 only where the hardware has it: emulated, it is slower than fp32
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp32"
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"precision is fp16, which needs CUDA, but DEVICE is {device.type}")
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


if __name__ == "__main__":
    run_script(main, ARGS)
