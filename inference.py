"""An equivalent of the network that is faster and smaller on a CPU.

`network.py` is the definition; whatever only makes it faster is here, behind `optimise`, and tests
hold the results equal to 1e-5. What is here is worth a tenth of a pass; docs/speed.md has the
figures, and what was tried and is worth less.

In the decoder, BatchNorm moves into the weights of the convolution before it, maps that would be
joined for a convolution each meet their own part of its weights, and the activation works in place.

Legend: as in network.py.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from network import ASFEFusion, ConvBlock, Decoder


def optimise(model: ASFEFusion) -> ASFEFusion:
    """An equivalent of `model` that is faster on a CPU; on another device the model itself.

    A new model in evaluation mode that shares the parameters and buffers of `model`. `forward` and
    `fuse` give what the model's do, to 1e-5, and never write into their arguments. With gradients
    enabled or in training mode it computes as the definition does. To move or cast it, do so with
    `model` and optimise that. Hooks on modules inside may not fire.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared).eval()
    # Not the encoder's blocks: AFF's spectra would amplify the rounding of folded weights.
    for module in fast.decoder.modules():
        module.__class__ = FASTER.get(type(module), type(module))
    return fast


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, *maps: Tensor) -> Tensor:
    """bn(conv(torch.cat(maps, 1))) in evaluation mode; the maps are (B, C, H, W) each."""
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    first, *others = zip(maps, weight.split([m.shape[1] for m in maps], 1), strict=True)
    out = F.conv2d(*first, bias, padding=conv.padding)
    for m, part in others:
        out += F.conv2d(m, part, padding=conv.padding)
    return out


class FastConvBlock(ConvBlock):
    """ConvBlock of the decoder; takes several maps in place of one that joins them."""

    def forward(self, *maps: Tensor) -> Tensor:  # c_in channels in all -> (B, c_out, H, W)
        if self.training or torch.is_grad_enabled() or maps[0].device.type != "cpu":
            return super().forward(torch.cat(maps, 1))
        x = conv_bn(self.conv2, self.bn2, conv_bn(self.conv1, self.bn1, *maps))
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return F.gelu(x, out=x)


class FastDecoder(Decoder):
    """Decoder, without joining maps."""

    def forward(self, z1: Tensor, z2: Tensor, z3: Tensor, z4: Tensor) -> Tensor:
        z = self.up3(self.up4(z4), z3)  # (B, C, H/2, W/2)
        z = self.up2(z, z2)  # (B, C, H, W)
        return self.outlayer(self.up1(z, z1))  # (B, 1 or 2, H, W)


FASTER = {kind.__base__: kind for kind in (FastConvBlock, FastDecoder)}
