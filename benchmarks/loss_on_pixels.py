"""What a loss can reach at best: optimise the fused pixels themselves, then measure them.

    python benchmarks/loss_on_pixels.py --task CT-MRI --pairs 8

No network takes part, so a minute per loss tells what no network can beat under it. It runs on
training pairs, spread over the patients; the losses are weighted sums of the terms in losses.py.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import machine, make_parser, positive
from torch import Tensor

from args_setting import DATA_DIR, TASKS
from cli import run_script
from dataset import read_pair, task_pairs
from images import to_uint8
from losses import (
    fusion_loss,
    information_loss,
    max_content_loss,
    max_gradient_loss,
    structure_loss,
)
from metrics import evaluate

TERMS = (max_content_loss, max_gradient_loss, structure_loss, information_loss)
WEIGHTS = (  # of the terms
    (4, 10, 1, 0),
    (4, 60, 1, 0),
    (2, 60, 1, 0),
    (4, 120, 1, 0),
    (4, 60, 2, 0),
    (4, 60, 2, 0.4),
    (2, 60, 2, 0.1),
)
NAMES = ("SD", "AG", "MI", "SCD", "SSIM", "VIF", "Qabf", "PSNR")


def best_pixels(loss: Callable, img1: Tensor, img2: Tensor, steps: int) -> Tensor:
    """Pixels (B, 1, H, W) in [0, 1] that minimise the loss, from the mean of the sources on."""
    fused = ((img1 + img2) / 2).requires_grad_()
    optimiser = torch.optim.Adam([fused], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(fused, img1, img2).backward()
        optimiser.step()
        schedule.step()
    return fused.detach().clamp(0, 1)


def main(args: argparse.Namespace) -> None:
    torch.set_flush_denormal(True)
    pairs = task_pairs(args.data_dir, args.task, "train")
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    lumas = [[torch.from_numpy(luma) for luma in read_pair(pair)[:2]] for pair in pairs]
    img1, img2 = (torch.stack([both[i] for both in lumas])[:, None] for i in (0, 1))

    def show(name: str, fused: Tensor) -> None:
        images = (to_uint8(x[:, 0].numpy()) for x in (fused, img1, img2))
        values = [evaluate(*lumas, NAMES) for lumas in zip(*images, strict=True)]
        cells = (f"{np.mean([v[metric] for v in values]):.3f}" for metric in NAMES)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    print(machine("torch"), f"\n\n{args.task}, {len(pairs)} training pairs\n")
    print(f"| loss | {' | '.join(NAMES)} |\n|---|{'---|' * len(NAMES)}")
    show("none: mean", (img1 + img2) / 2)
    show("none: max", torch.maximum(img1, img2))
    show("paper", best_pixels(lambda *t: fusion_loss(*t, "paper")[0], img1, img2, args.steps))
    for weights in WEIGHTS:

        def loss(*images: Tensor, weights: tuple = weights) -> Tensor:
            return sum(w * term(*images) for w, term in zip(weights, TERMS, strict=True) if w)

        show(", ".join(map(str, weights)), best_pixels(loss, img1, img2, args.steps))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--task", default="CT-MRI", choices=tuple(TASKS))
    parser.add_argument("--data_dir", type=Path, default=DATA_DIR)
    parser.add_argument("--pairs", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=150)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse())
