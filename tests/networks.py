"""Networks for the tests: small ones, and ones with statistics as after some training."""

import torch
from torch import nn

from args_setting import ModelSize
from network import ASFEFusion

# as the published size in everything but its widths
NARROW = ModelSize((8, 10, 12, 16, 20), 4, (4,) * 4, dim=32, heads=2, experts=2, slots=8)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def settled(model: ASFEFusion) -> ASFEFusion:
    """The model in evaluation mode, with running statistics as after some training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()
