"""Training in several processes that torchrun starts: on one machine or more, on GPUs or a CPU.

Legend: B pairs of a process, C channels, H W pixels.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join_processes(device: torch.device) -> torch.device:
    """Join the other processes that torchrun started; this one's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


class Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradients on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Sum.forward(None, gradient)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes; PyTorch's own of this name refuses a CPU.

    The processes must have batches of one size.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        if not self.training:
            return super().forward(x)
        world = dist.get_world_size()
        with torch.autocast(x.device.type, enabled=False):
            t = x.float()
            mean = Sum.apply(t.mean((0, 2, 3))) / world  # (C,)
            t = t - mean[:, None, None]
            variance = Sum.apply(t.square().mean((0, 2, 3))) / world  # (C,)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            out = t * scale[:, None, None] + self.bias[:, None, None]
        with torch.no_grad():
            count = t.numel() / len(mean) * world
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return out.to(x.dtype)


def synchronise_batchnorm(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm  # the same parameters and buffers


def agreed(stop: bool, device: torch.device, world: int) -> bool:
    """What the first process decides, in all of them."""
    if world == 1:
        return stop
    flag = torch.tensor(float(stop), device=device)
    dist.broadcast(flag, 0)
    return bool(flag)
