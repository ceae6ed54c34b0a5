"""An equivalent of the network that is faster and smaller on a CPU.

`network.py` is the definition. What only makes it faster is here, behind `optimise`. Tests hold the
results equal to 1e-5. docs/speed.md says how much time each part saves, and what was tried in vain.

* BlurPool: the largest of four neighbours is computed as two maxima.
* Fusion: the inverse transform is linear. So the spectra of both modalities are added first, and
  transformed back once.
* SFEF: both softmaxes share their logits, if no exponential can overflow.
* Decoder: BatchNorm becomes part of the convolution before it. Maps are not joined before a
  convolution: each meets its own part of the weights. The activation works in place.

Legend: as in network.py.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from network import SFEF, ASFEFusion, BlurPool, ConvBlock, Decoder, FusionModule

LARGEST_EXPONENT = 80  # exp(80) is 6e34, and float32 ends at 3e38
LARGEST_LOGITS = 2**23  # at most so many: glibc does not reuse a piece of memory of 32 MB


def optimise(model: ASFEFusion) -> ASFEFusion:
    """An equivalent of `model` that is faster on a CPU; on another device the model itself.

    It is a new model in evaluation mode that shares the parameters and buffers of `model`. Its
    `forward` and `fuse` give the same as the model's, to 1e-5, and never write into their
    arguments. With gradients enabled, in training mode, under autocast and in another type than
    float32 it computes as the definition does. To move or cast it, move or cast `model` and call
    this again. Hooks on inner modules may not fire.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fast = copy.deepcopy(model, shared).eval()
    # Not the encoder's convolutions: AFF's spectra would amplify the rounding of folded weights.
    slow = set(fast.encoder.blocks.modules())
    for module in fast.modules():
        if module not in slow:
            module.__class__ = FASTER.get(type(module), type(module))
    return fast


def as_defined(module: nn.Module, x: Tensor) -> bool:
    """Whether this pass has to go the way of the definition."""
    other = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
    return module.training or torch.is_grad_enabled() or other or x.device.type != "cpu"


class FastBlurPool(BlurPool):
    """BlurPool, without the places of the maxima, which only training asks for."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        if as_defined(self, x):
            return super().forward(x)
        x = torch.maximum(x[:, :, 1:], x[:, :, :-1])
        x = torch.maximum(x[..., 1:], x[..., :-1])  # (B, C, H-1, W-1)
        x = F.pad(x, (1, 2, 1, 2), mode="reflect")  # (B, C, H+2, W+2)
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class FastFusionModule(FusionModule):
    """FusionModule with one inverse transform."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # two (B, C, H, W) -> (B, 2C, H, W)
        if as_defined(self, x) or not self.aff1 or not self.casf:
            return super().forward(x, y)
        z = self.aff2.masked(self.aff2.transform(x))  # (B, 2C, H, K)
        z += self.aff1.masked(self.aff1.transform(y))
        maps = self.casf(x, y), self.aff1.inverse(z, *x.shape[2:])
        return self.sfef(torch.cat([m.movedim(1, 3) for m in maps], 3).movedim(3, 1))


class FastSFEF(SFEF):
    """SFEF with its logits as one matrix; a softmax divides by its sum after the product."""

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        if as_defined(self, x):
            return super().forward(x)
        gamma = self.norm.gamma * x.shape[1] ** 0.5
        slots = self.slot_norm(self.slot_embeds).flatten(0, 1) * gamma  # (E*S, d)
        tokens = F.normalize(x.flatten(2).mT, dim=2)  # (B, N, d), without their gamma
        # Tokens have length one, so a logit is at most the length of its slot. A sum has N terms.
        exponent = slots.norm(dim=1).max() + math.log(tokens.shape[1])
        many = tokens.shape[0] * tokens.shape[1] * len(slots) >= LARGEST_LOGITS
        if many or exponent > LARGEST_EXPONENT:
            return super().forward(x)
        weights = (tokens @ (slots.T * math.log2(math.e))).exp2_()  # (B, N, E*S)
        slot_in = weights.mT @ tokens * (gamma / weights.sum(1).unsqueeze(2))  # (B, E*S, d)
        per_expert = slot_in.chunk(len(self.experts), 1)  # E of (B, S, d)
        slot_out = [expert(t) for expert, t in zip(self.experts, per_expert, strict=True)]
        out, total = weights @ torch.cat(slot_out, 1), weights.sum(2, keepdim=True)
        out = x.flatten(2).mT.addcdiv(out, total) if self.residual else out.div_(total)
        return out.mT.unflatten(2, x.shape[2:])


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
        if as_defined(self, maps[0]):
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
        return self.outlayer(self.up1(z, z1))  # (B, HEADS, H, W)


KINDS = (FastBlurPool, FastFusionModule, FastSFEF, FastConvBlock, FastDecoder)
FASTER = {kind.__base__: kind for kind in KINDS}
