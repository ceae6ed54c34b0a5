"""The same network written the direct way, as a yardstick for speed and numbers.

Every formula is spelled out with einsum: SFEF's N x E*S logits and both of its softmaxes exist as
a whole, CASF's attention matrices too, each image goes through the encoder by itself, and maps are
(B, C, H, W) in memory. `direct(model)` gives a copy with the same weights.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from network import AFF, CASF, SFEF, ASFEFusion, Encoder, FusionModule


class DirectEncoder(Encoder):
    def forward(self, img: Tensor) -> list[Tensor]:
        scales = [self.blocks[0](self.inlayer(img))]
        for pool, block in zip(self.pools, self.blocks[1:], strict=True):
            scales.append(block(F.gelu(pool(scales[-1]))))
        return scales


class DirectAFF(AFF):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        spectrum = torch.fft.rfft2(x, norm=self.fft_norm)  # (B, C, H, W/2+1)
        z = torch.stack([spectrum.real, spectrum.imag], 2).reshape(b, 2 * c, h, -1)
        z = F.relu(self.bn(self.conv(z)))
        pooled = torch.cat([z.mean(1, keepdim=True), z.max(1, keepdim=True).values], 1)
        z = (z * torch.sigmoid(self.mask(pooled))).reshape(b, c, 2, h, -1)
        if self.aff == "published":
            z = z.movedim(2, -1)  # (B, C, H, W/2+1, 2): the next line then takes two rows of H
        spectrum = torch.complex(z[:, :, 0].contiguous(), z[:, :, 1].contiguous())
        return torch.fft.irfft2(spectrum, s=(h, w), norm=self.fft_norm)


class DirectCASF(CASF):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        b, c, h, w = x.shape
        maps, values = [], []
        for img, embed, norm, to_qkv in (
            (x, self.embed1, self.norm1, self.qkv1),
            (y, self.embed2, self.norm2, self.qkv2),
        ):
            tokens = F.conv2d(img, embed.weight, embed.bias, stride=self.patch)
            tokens = norm(tokens.flatten(2).transpose(1, 2))  # (B, N, D)
            qkv = to_qkv(tokens).reshape(b, tokens.shape[1], 3, self.heads, -1)
            q, k, v = qkv.unbind(2)  # (B, N, heads, D/heads)
            logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
            maps.append(logits.softmax(-1))
            values.append(v)
        crossed1 = torch.einsum("bhij,bjhd->bihd", maps[0], values[1]).flatten(2)
        crossed2 = torch.einsum("bhij,bjhd->bihd", maps[1], values[0]).flatten(2)
        patches = self.unpatch((self.proj1(crossed1) + self.proj2(crossed2)) / 2)
        p = self.patch
        patches = patches.reshape(b, h // p, w // p, p, p, c)
        return x + y + torch.einsum("bijklc->bcikjl", patches).reshape(b, c, h, w)


class DirectFusionModule(FusionModule):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.sfef(torch.cat([self.casf(x, y), self.aff2(x) + self.aff1(y)], 1))


class DirectSFEF(SFEF):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, N, d)
        slots = self.slot_norm(self.slot_embeds)  # (E, S, d)
        logits = torch.einsum("bnd,esd->bnes", tokens, slots)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1)  # (B, N, E*S)
        slot_in = torch.einsum("bnd,bnes->ebsd", tokens, dispatch)
        slot_out = torch.stack([f(t) for f, t in zip(self.experts, slot_in, strict=True)], 1)
        out = torch.einsum("bsd,bns->bnd", slot_out.flatten(1, 2), combine)
        out = out.transpose(1, 2).reshape(x.shape)
        return x + out if self.residual else out


class DirectASFEFusion(ASFEFusion):
    def forward(self, img1: Tensor, img2: Tensor) -> Tensor:
        scales = zip(self.encoder(img1), self.encoder(img2), strict=True)
        fused = [fuse(x, y) for fuse, (x, y) in zip(self.fusion, scales, strict=True)]
        return self.head(self.decoder(*fused), img1, img2)


def direct(model: ASFEFusion, share: bool = False) -> DirectASFEFusion:
    """A direct copy of the model; with `share`, the model itself is turned into one."""
    model = model if share else copy.deepcopy(model)
    kinds = DirectEncoder, DirectAFF, DirectCASF, DirectFusionModule, DirectSFEF, DirectASFEFusion
    for kind in kinds:
        for module in model.modules():
            if type(module) is kind.__base__:
                module.__class__ = kind
    return model.to(memory_format=torch.contiguous_format)
