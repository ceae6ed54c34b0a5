"""What a loss can reach at best: optimise the fused pixels themselves, then measure them.

    python benchmarks/loss_on_pixels.py --task CT-MRI --pairs 8

No network takes part, so a minute per loss tells what no network can beat under it. It runs on
training pairs, spread over the patients; the losses are weighted sums of the terms in losses.py.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:1] = [str(HERE.parent), str(HERE)]  # the root first: its metrics.py is meant

import torch  # noqa: E402
from machine import machine  # noqa: E402
from torch import Tensor  # noqa: E402

from args_setting import TASKS  # noqa: E402
from dataset import read_pair, task_pairs  # noqa: E402
from losses import (  # noqa: E402
    fusion_loss,
    information_loss,
    max_content_loss,
    max_gradient_loss,
    structure_loss,
)
from metrics import evaluate_batch  # noqa: E402

# weights of content (brighter source), gradient (steeper source), structure and information
WEIGHTS = (
    (4, 10, 1, 0),
    (4, 60, 1, 0),
    (2, 60, 1, 0),
    (4, 120, 1, 0),
    (4, 60, 2, 0),
    (4, 60, 2, 0.4),
    (2, 60, 2, 0.1),
)
NAMES = ("SD", "AG", "MI", "SCD", "SSIM", "VIF", "Qabf", "PSNR")


def optimise(loss, img1: Tensor, img2: Tensor, steps: int) -> Tensor:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=HERE.parent / "HMIFDatasets")
    parser.add_argument("--task", default="CT-MRI", choices=TASKS)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    pairs = task_pairs(args.data_dir, args.task, "train")
    pairs = pairs[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    lumas = [[torch.from_numpy(luma) for luma in read_pair(pair)[:2]] for pair in pairs]
    img1, img2 = (torch.stack([both[i] for both in lumas])[:, None] for i in (0, 1))

    def show(name: str, fused: Tensor) -> None:
        values = evaluate_batch(fused, img1, img2, NAMES)
        cells = " | ".join(f"{values[metric].mean():.3f}" for metric in NAMES)
        print(f"| {name} | {cells} |", flush=True)

    print(machine("torch"), f"\n\n{args.task}, {len(pairs)} training pairs\n")
    print(f"| loss | {' | '.join(NAMES)} |\n|---|{'---|' * len(NAMES)}")
    show("none: mean", (img1 + img2) / 2)
    show("none: max", torch.maximum(img1, img2))
    show("paper", optimise(lambda *t: fusion_loss(*t, "paper")[0], img1, img2, args.steps))
    terms = max_content_loss, max_gradient_loss, structure_loss, information_loss
    for weights in WEIGHTS:

        def loss(*images: Tensor, weights: tuple = weights) -> Tensor:
            return sum(w * term(*images) for w, term in zip(weights, terms, strict=True) if w)

        show(", ".join(map(str, weights)), optimise(loss, img1, img2, args.steps))


if __name__ == "__main__":
    main()
