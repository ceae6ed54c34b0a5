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
from pathlib import Path

from args_setting import SIZES, TrainArgs
from cli import UserError, check_training, command_line, run_script, setup_runtime

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
    TrainState,
    describe,
    draw_curve,
    load_checkpoint,
    opening,
    run_file,
    save_checkpoint,
    start_of_files,
    write_csv,
)
from dataset import TrainPairs, split_lines, split_pairs, with_findings
from evaluation.batch import evaluate_batch
from images import writable_folder
from losses import fusion_loss, term_weights
from network import MIN_SIDE, ASFEFusion
from weights import load_sized, save_weights

GRADIENT_CLIP = 1.0  # largest norm of a step's gradient
METRICS = ("SSIM", "VIF", "Qabf", "SCD")
SCORE = ("SSIM", "VIF", "Qabf")  # their sum chooses the best weights
VALIDATION_PAIRS, BATCHNORM_PAIRS, SHOWN_PAIRS = 32, 64, 4  # at most, spread evenly


def main(args: TrainArgs) -> None:
    # setup: torchrun starts this in several processes, each with a rank of its own
    started = time.time()
    check_training(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = setup_runtime(args)
    if world > 1:
        device = join_processes(device)
    amp = set_precision(args.precision, device)

    # data
    out = start_of_files(args)
    split = split_pairs(args)
    train, val = split.train, split.val
    pairs = TrainPairs(train, args.patch_size, args.seed)
    val_images = TrainPairs(spread(val, VALIDATION_PAIRS), patch=MIN_SIDE).images
    check_settings(args, len(pairs), len(val), world)
    if rank == 0:
        pairs.doubts.tell()
        print(opening(args, device, train, val), *split_lines(split), sep="\n")

    # model
    torch.manual_seed(args.seed)
    model = make_model(args, device)
    averaged = AveragedModel(model, multi_avg_fn=moving_average(args.ema))
    network: nn.Module = model
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif rank == 0:
            print("several processes on a CPU: BatchNorm sees a process's part of a batch only")
        network = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    if args.compile:
        network = torch.compile(network)

    # optimiser
    optimiser = make_optimiser(model, args)
    steps = args.epoch * (len(pairs) // args.batch_size)
    schedule = LambdaLR(optimiser, lambda step: learning_rate(step, steps, args.warmup))
    # fp16 has too little range for gradients; for the other types the scaler does nothing
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    state = TrainState(model, averaged, optimiser, schedule, scaler)

    # the run so far
    writable_folder(args.save_dir)
    run = {"epoch": 0, "best": -math.inf, "waited": 0, "seconds": 0.0, "rows": []}
    if args.resume:
        run = load_checkpoint(run_file(out, "_last.pt"), state, args)
    if rank == 0:
        board = SummaryWriter(run_file(out, "_tensorboard"), purge_step=run["epoch"] + 1)

    # loop
    while run["epoch"] < args.epoch:
        row = train_epoch(network, state, pairs, args, amp, run["epoch"], (rank, world), out)
        run["epoch"] += 1
        run["seconds"] += row["seconds"]
        stop = False
        if rank == 0:
            if run["epoch"] % args.val_every == 0 or run["epoch"] == args.epoch:
                row |= keep_best(averaged.module, pairs, val_images, args, run, row, board, out)
            run["rows"].append(row)
            write_csv(run_file(out, ".csv"), run["rows"])
            for name, value in row.items():
                board.add_scalar(name.replace("_", "/", 1), value, run["epoch"])
            stop = 0 < args.patience <= run["waited"]
            stop |= 0 < args.minutes * 60 <= time.time() - started
            if stop or run["epoch"] % args.save_every == 0 or run["epoch"] == args.epoch:
                save_checkpoint(run_file(out, "_last.pt"), state, args, run)
        if agreed(stop, device, world):
            break

    if rank == 0:
        board.close()
        draw_curve(run_file(out, "_curve.png"), run["rows"], METRICS)
        rest = "" if run["epoch"] == args.epoch else f" of {args.epoch} (--resume goes on)"
        print(f"{run['epoch']} epochs{rest}; weights: {run_file(out, '.safetensors')}")
    if world > 1:
        dist.destroy_process_group()


# --- one epoch -------------------------------------------------------------------------------


def train_epoch(
    network: nn.Module,
    state: TrainState,
    pairs: TrainPairs,
    args: TrainArgs,
    amp: torch.dtype | None,
    epoch: int,
    ranks: tuple[int, int],
    out: Path,
) -> dict[str, float]:
    """Go through the pairs once; the means of loss and terms, learning rate and throughput."""
    started = time.time()
    rank, world = ranks
    device = next(state.model.parameters()).device
    pairs.epoch = epoch
    state.model.train()
    if args.freeze_batchnorm:
        for norm in batchnorms(state.model):
            norm.eval()
    batches = pairs.batches(args.batch_size, rank, world)
    loader = DataLoader(pairs, batch_sampler=batches, num_workers=args.workers)
    title = f"epoch {epoch + 1}/{args.epoch}"
    means: dict[str, float] = {}
    with tqdm(loader, title, unit="step", disable=rank > 0, mininterval=1) as progress:
        for images, planted, names in progress:  # two (B, 2, p, p)
            state.optimiser.zero_grad()
            with memory_hint(args):
                images = images.to(device), planted.to(device)
                values = forward_backward(network, images, args, amp, state.scaler, world)
            if not math.isfinite(values["loss"]):
                kept = keep_good(state.averaged.module, out) if rank == 0 else ""
                raise UserError(
                    f"loss is {values['loss']} in epoch {epoch + 1}, pairs {list(names)}{kept}"
                )
            state.scaler.unscale_(state.optimiser)
            nn.utils.clip_grad_norm_(state.model.parameters(), GRADIENT_CLIP)
            state.scaler.step(state.optimiser)
            state.scaler.update()
            state.schedule.step()
            state.averaged.update_parameters(state.model)
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value / len(batches)
            progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
    seconds = time.time() - started
    rate, lr = len(batches) * args.batch_size / seconds, state.schedule.get_last_lr()[0]
    return {"epoch": epoch + 1, **means, "lr": lr, "seconds": seconds, "pairs_per_s": rate}


def forward_backward(
    network: nn.Module,
    images: tuple[Tensor, Tensor],  # (B, 2, p, p), without and with findings
    args: TrainArgs,
    amp: torch.dtype | None,
    scaler: torch.amp.GradScaler,
    world: int,
) -> dict[str, float]:
    """Gradients of a step's loss, part by part; loss and terms as means over all processes."""
    n, device = args.accumulate, images[0].device.type
    weights = term_weights(args.recipe, args.loss_weights)
    means = 0.0
    for k, (clean, planted) in enumerate(zip(*(i.chunk(n) for i in images), strict=True)):
        part = torch.cat([clean, planted]) if args.recipe == "findings" else clean
        img1, img2 = part.split(1, 1)  # two (B/n, 1, p, p), or twice as many
        # processes exchange gradients once in a step, with its last part
        waits = world > 1 and k + 1 < n
        with network.no_sync() if waits else nullcontext():
            with torch.autocast(device, amp, enabled=amp is not None):
                fused = network(img1, img2)  # (B/n, 1, p, p)
            loss, terms = fusion_loss(fused.float(), img1, img2, args.recipe, weights=weights)
            scaler.scale(loss / n).backward()
        means = means + torch.stack([loss, *terms.values()]).detach() / n
    if world > 1:
        dist.all_reduce(means)
        means = means / world
    return dict(zip(("loss", *terms), means.tolist(), strict=True))


@contextmanager
def memory_hint(args: TrainArgs) -> Iterator[None]:
    """Turn running out of memory into a line that says which setting to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory with batch_size {args.batch_size} in {args.accumulate} parts and "
            f"patch_size {args.patch_size}: raise --accumulate, or lower --patch_size or "
            "--batch_size"
        ) from None


def keep_good(model: ASFEFusion, out: Path) -> str:
    """Save the averaged weights of a run that fails, if they are sound; what to tell of it."""
    path = run_file(out, "_stopped.safetensors")
    try:
        save_weights(model, path, {"stopped": True})
    except UserError:  # not finite
        return ""
    return f"; the averaged weights before this step are in {path}"


def keep_best(
    model: ASFEFusion,
    pairs: TrainPairs,
    val_images: list[Tensor],
    args: TrainArgs,
    run: dict,
    row: dict[str, float],
    board: SummaryWriter,
    out: Path,
) -> dict[str, float]:
    """Validate the averaged weights and save them if they are the best so far; the metrics."""
    last = run["epoch"] == args.epoch
    if not args.freeze_batchnorm:
        recompute_batchnorm(model, spread(pairs.images, BATCHNORM_PAIRS if last else 16))
    measured, panel = measure(model, val_images or spread(pairs.images, 8), args)
    board.add_image("img1, img2, fused", panel, run["epoch"], dataformats="HW")
    kind = "val" if val_images else "train"  # training pairs only say that training worked
    score = sum(measured[name] for name in SCORE)
    better = score > run["best"]
    run["waited"] = 0 if better else run["waited"] + 1
    if better or not val_images:
        run["best"] = score
        metadata = describe(args, run, row["loss"], {kind: measured}, len(val_images))
        save_weights(model, run_file(out, ".safetensors"), metadata)
    what = f"{len(val_images)} validation" if val_images else "some training"
    kept = "weights saved" if better or not val_images else f"the best is {run['best']:.4f}"
    print(f"epoch {run['epoch']}: score {score:.4f} on {what} pairs, {kept}")
    return {f"{kind}_{name}": value for name, value in (measured | {"score": score}).items()}


def batchnorms(model: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


@torch.no_grad()
def recompute_batchnorm(model: ASFEFusion, images: list[Tensor]) -> None:
    """Replace the running statistics by plain means over whole, unaugmented images (2, H, W)."""
    norms = batchnorms(model)
    device = next(model.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.train()
    for pair in images:
        height, width = (n - n % model.multiple for n in pair.shape[-2:])
        if height and width:
            img1, img2 = pair[:, None, None, :height, :width].to(device).float() / 255
            model(img1, img2)
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def measure(
    model: ASFEFusion, images: list[Tensor], args: TrainArgs
) -> tuple[dict[str, float], np.ndarray]:
    """Means over whole images of the loss, its terms and the metrics; a picture of a few rows.

    The loss also sees each image with findings; the metrics and the picture do not.
    """
    weights = term_weights(args.recipe, args.loss_weights)
    device = next(model.parameters()).device
    values: dict[str, list[float]] = {}
    rows = []
    for i, pair in enumerate(images):  # (2, H, W) in 0..255
        batch = with_findings(pair.float() / 255, i).to(device)  # (2, 2, H, W)
        img1, img2 = batch.split(1, 1)  # two (2, 1, H, W), the second half with findings
        fused = model.fuse(img1, img2)
        loss, terms = fusion_loss(fused, img1, img2, args.recipe, weights=weights)
        metrics = evaluate_batch(fused[:1], img1[:1], img2[:1], METRICS)
        for name, value in ({"loss": loss} | terms | metrics).items():
            values.setdefault(name, []).append(value.item())
        if not rows or (len(rows) < SHOWN_PAIRS and fused.shape[-1] * 3 == rows[0].shape[1]):
            row = torch.cat([img1, img2, fused], -1)[0, 0]
            rows.append((row * 255).round().byte().cpu().numpy())
    means = {name: round(sum(v) / len(v), 4) for name, v in values.items()}
    return means, np.concatenate(rows)


# --- several processes -----------------------------------------------------------------------


def join_processes(device: torch.device) -> torch.device:
    """Join the other processes that torchrun started; this one's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def agreed(stop: bool, device: torch.device, world: int) -> bool:
    """What the first process decides, in all of them."""
    if world == 1:
        return stop
    dist.broadcast(flag := torch.tensor(float(stop), device=device), 0)
    return bool(flag)


# --- settings --------------------------------------------------------------------------------


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spread."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def check_settings(args: TrainArgs, pairs: int, val_pairs: int, world: int) -> None:
    """UserError for numbers that do not fit the data, the processes or each other."""
    term_weights(args.recipe, args.loss_weights)
    if args.batch_size > pairs:
        raise UserError(f"batch_size is {args.batch_size}, but there are {pairs} pairs")
    if args.batch_size % (world * args.accumulate):
        raise UserError(
            f"batch_size is {args.batch_size}, expected a multiple of {world * args.accumulate} "
            f"({world} processes, {args.accumulate} parts)"
        )
    if args.freeze_batchnorm and not args.init:
        raise UserError("freeze_batchnorm needs the statistics of trained weights, give --init")
    if args.patience and not val_pairs:
        raise UserError("patience needs validation, but nobody is kept for it: see --val")
    if args.init and args.without:
        raise UserError("without changes the network, but init has one: give one of the two")
    if args.ema >= 1:
        raise UserError(f"ema is {args.ema}, expected less than 1")


def make_model(args: TrainArgs, device: torch.device) -> ASFEFusion:
    """The network with random weights, or those of --init; UserError if it does not fit."""
    if args.init:
        model = load_sized(args.init, args.size, device, args.aff)
    else:
        model = ASFEFusion(SIZES[args.size].without(args.without), args.aff).to(device)
    if args.patch_size % model.multiple:
        raise UserError(f"patch_size is {args.patch_size}, expected a multiple of {model.multiple}")
    return model


def make_optimiser(model: ASFEFusion, args: TrainArgs) -> torch.optim.AdamW:
    """AdamW as the settings say, in one kernel for all parameters."""
    decay = {"weight_decay": args.weight_decay}
    return torch.optim.AdamW(model.parameters(), args.lr, fused=True, **decay)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Fraction of the highest learning rate: up in a line over `warmup` steps, down in a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def moving_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """For AveragedModel; begins as a plain mean of the weights, so that early ones fade soon."""

    def update(averages: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averages, new, max(9 / (10 + int(count)), 1 - decay))

    return update


def set_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Set the arithmetic of float32 products; the type of mixed precision, None without."""
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
