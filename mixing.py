"""The two softmaxes of SFEF in several forms; which is best depends on the device.

A CPU takes `library` inside `two_attentions`. CUDA takes what MIX_ON_CUDA and ATTEND_ON_CUDA name,
the two lines to edit; `benchmarks/attention.py` and `benchmarks/train_step.py` compare the forms.
At inference without a residual path both take `mix_in_place`, with ATTEND_ON_CUDA on CUDA.

PyTorch's fused kernels set limits (its sdp_utils.cpp): flash takes equal head widths up to 256, in
half precision; cuDNN up to 128 or 256, by its version and the chip; the memory-efficient one any
width that is a multiple of 8 (float32: of 4), but beyond 128 its result no longer stays in
registers; "math" any width, in float32 also for bfloat16. The published scales have d = 224, 320,
416 and 512.

Legend: B batch, d width, N tokens, M slots; q is (B, Nq, d), k and v are (B, Nk, d).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

TILE = 2**14  # tokens that `tiled` takes at once
PART = 2**11  # tokens that a CPU takes at once where the weights exist
KEPT = 2**24  # logits that a CPU keeps at inference, 64 MiB
SPAN = 32  # the largest power of `_by_one_power` is 2^SPAN; float32 loses those below 2^-126
LEAST = 2.0 ** (SPAN - 90)  # a sum that 4096 lost terms of 2^(SPAN - 126) change by 2^-24 at most


def mix(tokens: Tensor, slots: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """softmax over the slots of L, times experts(softmax over the tokens of L^T, times tokens).

    L = tokens slots^T, (B, N, M), without a scale. Tokens are (B, N, d), slots (B, M, d); `experts`
    maps (B, M, d) to (B, M, d). Returns (B, N, d).
    """
    return (MIX_ON_CUDA if tokens.is_cuda else two_attentions)(tokens, slots, experts)


def mix_in_place(tokens: Tensor, slots: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """`mix` at inference. Returns (B, N, n), in the tokens' place unless n differs from d.

    `experts` maps (B, M, d) to (B, M, n). A CPU computes L once for both softmaxes where it is
    small, and never holds all of it where it is not.
    """
    small = len(tokens) * tokens.shape[1] * slots.shape[1] <= KEPT
    exact = tokens.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")
    if small and exact and tokens.device.type == "cpu":
        return _by_one_power(tokens, slots, experts)
    slot_out = experts(attend(slots, tokens, tokens))
    out = _place(tokens, slot_out)
    # The library's attention has no fast path for a narrower value.
    narrow = explicit if tokens.is_cuda else few_columns
    step, weigh = (TILE, attend) if out is tokens else (PART, narrow)
    for place, part in zip(out.split(step, 1), tokens.split(step, 1), strict=True):
        place.copy_(weigh(part, slots, slot_out))
    return out


def _place(tokens: Tensor, slot_out: Tensor) -> Tensor:
    n = slot_out.shape[2]
    return tokens if n == tokens.shape[2] else tokens.new_empty(*tokens.shape[:2], n)


def _by_one_power(tokens: Tensor, slots: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """`mix_in_place` with one power of 2 of each logit for both softmaxes.

    A logit l, in base 2, has the power 2^(l - top + SPAN), where top is the slot's largest in the
    same PART. The softmax over the slots takes it 2^(top - highest + SPAN) times, where highest is
    the largest logit of all. `experts` may return up to 1e15; what float32 loses at the lower end
    changes a result by less than 2e-8.
    """
    base2 = (slots * math.log2(math.e)).mT  # (B, d, M)
    parts, kept = tokens.split(PART, 1), []
    slot_in = total = 0  # both times 2^(SPAN - level)
    level = tokens.new_full((), -math.inf)
    for part in parts:
        powers = part @ base2  # (B, PART, M)
        top = powers.amax(1, keepdim=True)  # (B, 1, M)
        powers.sub_(top - SPAN).exp2_()
        before, level = level, torch.maximum(level, top)
        old, new = ((t - level).exp2().mT for t in (before, top))  # (B, M, 1)
        slot_in = slot_in * old + (powers.mT @ part) * new  # (B, M, d)
        total = total * old + powers.sum(1).unsqueeze(2) * new  # (B, M, 1)
        kept.append((powers, top))
    slot_out = experts(slot_in / total)  # (B, M, n)
    highest = level.amax(2, keepdim=True)  # (B, 1, 1)
    out = _place(tokens, slot_out)
    for place, part, (powers, top) in zip(out.split(PART, 1), parts, kept, strict=True):
        times = (top - highest + SPAN).exp2().mT  # (B, M, 1)
        total = powers @ times  # (B, PART, 1)
        if total.min() > LEAST:
            torch.div(powers @ (times * slot_out), total, out=place)
        else:  # some token is far from all slots
            place.copy_(explicit(part, slots, slot_out))
    return out


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v: (B, Nq, d)."""
    return (ATTEND_ON_CUDA if q.is_cuda else library)(q, k, v)


# --- one softmax -----------------------------------------------------------------------------


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The library's fused attention; the Nq x Nk matrix never exists."""
    q, k, v = (t.unsqueeze(1) for t in (q, k, v))  # one head
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1)  # (B, Nq, d)


def split(q: Tensor, k: Tensor, v: Tensor, width: int = 128) -> Tensor:
    """`library` for `width` columns of v at a time, each of which computes the weights anew."""
    return torch.cat([library(q, k, part) for part in v.split(width, -1)], -1)


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products, with the Nq x Nk matrix of weights between them."""
    q, k, v = as_autocast(q, k, v)
    with torch.autocast(q.device.type, enabled=False):  # it would store weights in float32
        return torch.softmax(q @ k.mT, -1) @ v


def few_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`explicit` by a 1x1 convolution, which a CPU computes faster where v has few columns."""
    q, k, v = as_autocast(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        weights = torch.softmax(q @ k.mT, -1).unsqueeze(2).permute(0, 3, 1, 2)  # (B, Nk, Nq, 1)
        kernels = v.mT.unsqueeze(3).unsqueeze(4)  # (B, n, Nk, 1, 1)
        pairs = zip(weights.split(1), kernels, strict=True)
        return torch.cat([F.conv2d(w, kernel) for w, kernel in pairs]).squeeze(3).mT


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`explicit` for TILE tokens at a time, whose weights are computed anew on the way back."""
    q, k, v = as_autocast(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        if q.shape[1] >= k.shape[1]:
            return torch.cat([_again(explicit, part, k, v) for part in q.split(TILE, 1)], 1)
        pairs = zip(k.split(TILE, 1), v.split(TILE, 1), strict=True)
        parts, levels = zip(*(_again(_explicit_and_level, q, *pair) for pair in pairs), strict=True)
        shares = torch.softmax(torch.stack(levels), 0)  # (tiles, B, Nq, 1): each tile's part
        return (torch.stack(parts) * shares).sum(0).to(q.dtype)


def _explicit_and_level(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`explicit`, and the logarithm of what its softmax divides by, (B, Nq, 1) in float32."""
    logits = q @ k.mT  # (B, Nq, Nk)
    return torch.softmax(logits, -1) @ v, logits.float().logsumexp(-1, keepdim=True)


def _again(function: Callable, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


# --- both ------------------------------------------------------------------------------------


def two_attentions(tokens: Tensor, slots: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """`mix` by two calls of `attend`."""
    return attend(tokens, slots, experts(attend(slots, tokens, tokens)))


def shared(tokens: Tensor, slots: Tensor, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """`mix` with L computed once; L is all of its size that is kept for the way back."""
    tokens, slots = as_autocast(tokens, slots)
    with torch.autocast(tokens.device.type, enabled=False):
        logits = tokens @ slots.mT  # (B, N, M)
        slot_in = Weigh.apply(logits.mT, tokens)  # (B, M, d)
    (slot_out,) = as_autocast(experts(slot_in))
    with torch.autocast(tokens.device.type, enabled=False):
        return Weigh.apply(logits, slot_out)


class Weigh(torch.autograd.Function):
    """softmax(logits) v of (B, Nq, Nk) and (B, Nk, d), the softmax over the last axis.

    Keeps its logits, which it may share with others, and computes the weights anew on the way back.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, v: Tensor) -> Tensor:
        level = _logsumexp(logits)  # (B, Nq, 1)
        out = _weights(logits, level) @ v
        ctx.save_for_backward(logits, level, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        logits, level, v, out = ctx.saved_tensors
        weights = _weights(logits, level)
        inner = (gradient.to(level.dtype) * out).sum(-1, keepdim=True)  # (B, Nq, 1)
        to_logits = (gradient @ v.mT - inner).mul_(weights).to(logits.dtype)
        return to_logits, weights.mT @ gradient


def _weights(logits: Tensor, level: Tensor) -> Tensor:
    return (logits - level).exp_().to(logits.dtype)


def _logsumexp(logits: Tensor) -> Tensor:
    """Over the last axis, (B, Nq, 1), in float32 at least; -inf is no logit here."""
    top = logits.amax(-1, keepdim=True).to(torch.promote_types(logits.dtype, torch.float32))
    return top + (logits - top).exp_().sum(-1, keepdim=True).log()


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's type where autocast is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


# The choice for CUDA: one of library, split, explicit, tiled; one of two_attentions, shared.
ATTEND_ON_CUDA = library
MIX_ON_CUDA = two_attentions
