"""An equivalent of the network that is faster and smaller on a CPU.

`network.py` is the definition; whatever only makes it faster is here, behind `optimise`, and tests
hold the results equal to 1e-5. What is here is worth a tenth of a pass; docs/speed.md has the
figures, and what was tried and is worth less.

* The decoder's convolutions: BatchNorm moves into the weights before it, maps that would be joined
  each meet their own part of the weights, and the activation works in place.
* Fewer maps at a time: one image after the other goes through the encoder, a scale is let go once
  it is fused, and SFEF normalises its tokens in place, with the scale of the norm on the few slots.

Legend: as in network.py.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from network import SFEF, ASFEFusion, ConvBlock, Decoder, attend


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
    # Not the encoder's blocks: the rounding of folded weights is what AFF's spectra amplify.
    for module in (fast, *fast.fusion.modules(), *fast.decoder.modules()):
        module.__class__ = FASTER.get(type(module), type(module))
    return fast


def as_defined(module: nn.Module, x: Tensor) -> bool:
    """Whether a module has to compute as in network.py."""
    return module.training or torch.is_grad_enabled() or x.device.type != "cpu"


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
        return self.outlayer(self.up1(z, z1))  # (B, 1 or 2, H, W)


class FastSFEF(SFEF):
    """SFEF that writes its normalised tokens over its input, if no residual path needs that."""

    def forward(self, x: Tensor) -> Tensor:  # (B, d, H, W) -> (B, d, H, W)
        if self.residual or as_defined(self, x):
            return super().forward(x)
        tokens = x.flatten(2).mT  # (B, N, d)
        tokens = F.normalize(tokens, dim=-1, out=tokens)
        scale = self.norm.gamma * len(self.norm.gamma) ** 0.5  # (d,)
        slots = (self.slot_norm(self.slot_embeds) * scale).flatten(0, 1)  # (E*S, d)
        slots = slots.expand(len(x), -1, -1)  # (B, E*S, d)
        per_expert = (attend(slots, tokens, tokens) * scale).chunk(len(self.experts), 1)
        slot_out = [expert(t) for expert, t in zip(self.experts, per_expert, strict=True)]
        out = attend(tokens, slots, torch.cat(slot_out, 1))  # (B, N, d)
        return out.mT.unflatten(2, x.shape[2:])


class FastASFEFusion(ASFEFusion):
    """ASFEFusion that holds fewer maps at a time."""

    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:  # two (B, 1, H, W) -> (B, 1, H, W)
        if as_defined(self, img1):
            return super().forward(img1, img2)
        self.check(img1, img2)
        scales1, scales2 = self.encoder(img1), self.encoder(img2)  # four of (B, C, H, W) each
        fused = [module(scales1.pop(0), scales2.pop(0)) for module in self.fusion]
        return self.head(self.decoder(*fused), img1, img2)


KINDS = FastConvBlock, FastDecoder, FastSFEF, FastASFEFusion
FASTER = {kind.__base__: kind for kind in KINDS}
