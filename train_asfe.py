"""Train ASFE-Fusion on one task: `python train_asfe.py --task PET-MRI`; settings: args_setting.py.

A first, simple form: AdamW built once, linear warm-up and cosine decay of the learning rate,
gradient clipping, BatchNorm statistics recomputed at the end on whole images, in the size that they
are used for. The weights are written after every epoch to modelsave/<size>_<task>.safetensors.
"""

import math
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from args_setting import TrainArgs, parse_args, run_script
from dataset import TrainPairs, task_pairs, writable_folder
from losses import fusion_loss
from metrics import evaluate_batch
from network import ASFEFusion, load_weights, save_weights, start

GRADIENT_CLIP = 1.0  # largest norm of a step's gradient


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Fraction of the highest learning rate: up in a line over `warmup` steps, down in a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def recompute_batchnorm(model: nn.Module, pairs: TrainPairs, device: torch.device) -> None:
    """Replace the running statistics by plain means over whole, unaugmented training images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    model.train()
    for images in pairs.images[:: max(1, len(pairs) // 64)]:
        height, width = (n - n % model.multiple for n in images.shape[-2:])
        img1, img2 = images[:, None, None, :height, :width].to(device).float() / 255
        model(img1, img2)
    for norm in norms:
        norm.momentum = 0.1


def measure(model: ASFEFusion, pairs: TrainPairs, count: int = 8) -> dict[str, float]:
    """Mean metrics of a few whole training pairs: they say that training worked, no more."""
    values: dict[str, list[float]] = {}
    for img1, img2 in pairs.images[:: max(1, len(pairs) // count)][:count]:
        fused = model.fuse(img1, img2).cpu()[None, None]
        images = fused, img1[None, None].float() / 255, img2[None, None].float() / 255
        for name, value in evaluate_batch(*images, ("SSIM", "VIF", "Qabf", "SCD")).items():
            values.setdefault(name, []).append(value.item())
    return {name: round(sum(v) / len(v), 4) for name, v in values.items()}


def main(args: TrainArgs) -> None:
    # setup
    torch.manual_seed(args.seed)
    device = start(args)

    # data
    pairs = TrainPairs(task_pairs(args.data_dir, args.task, "train"), args.patch_size)
    if args.batch_size > len(pairs):
        raise ValueError(f"batch_size is {args.batch_size}, but there are {len(pairs)} pairs")
    loader = DataLoader(pairs, args.batch_size, shuffle=True, drop_last=True)

    # model
    if args.init:
        model, metadata = load_weights(args.init, device)
        if metadata["size"] != args.size:
            raise ValueError(f"{args.init} is of size {metadata['size']}, --size is {args.size}")
    else:
        model = ASFEFusion(args.size).to(device)
    if args.patch_size % model.multiple:
        raise ValueError(
            f"patch_size is {args.patch_size}, expected a multiple of {model.multiple}"
        )

    out = writable_folder(args.save_dir) / f"{args.size}_{args.task}.safetensors"

    # optimiser
    optimiser = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    steps = args.epoch * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: learning_rate(step, steps, args.warmup)
    )

    # loop
    started = time.time()
    progress = tqdm(range(args.epoch), unit="epoch", desc=f"{args.size} {args.task}")
    for epoch in progress:
        model.train()
        total = 0.0
        for img1, img2, names in loader:  # two (B, 1, patch, patch)
            img1, img2 = img1.to(device), img2.to(device)
            loss, _ = fusion_loss(model(img1, img2), img1, img2, args.recipe)
            if not torch.isfinite(loss):
                raise ValueError(f"loss is {loss.item()} in epoch {epoch}, pairs {list(names)}")
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
            optimiser.step()
            schedule.step()
            total += loss.item()
        last = epoch + 1 == args.epoch
        if last:
            recompute_batchnorm(model, pairs, device)
        metadata = describe(args, epoch + 1, total / len(loader), started)
        if last:
            metadata["training_metrics"] = measure(model, pairs)
        save_weights(model, out, metadata, half=last)
        progress.set_postfix(loss=f"{total / len(loader):.4f}")
    print(f"weights written to {out}")


def describe(args: TrainArgs, epochs: int, loss: float, started: float) -> dict:
    """What a weights file says of its making."""
    settings = {k: v.name if isinstance(v, Path) else v for k, v in asdict(args).items()}
    for place in ("DEVICE", "data_dir", "save_dir", "threads"):
        settings.pop(place)  # these describe a machine
    return {
        "task": args.task,
        "epochs": epochs,
        "training_loss": round(loss, 4),
        "minutes": round((time.time() - started) / 60, 1),
        "date": date.today().isoformat(),
        "settings": settings,
    }


if __name__ == "__main__":
    run_script(main, parse_args(TrainArgs, description=__doc__))
