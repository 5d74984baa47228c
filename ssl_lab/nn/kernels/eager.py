"""Attention written out: the definition, and on CPU the fastest kernel for short sequences and for bf16."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_lab.nn.dropout import dropout, kept
from ssl_lab.nn.kernels.products import at_a_time, product
from ssl_lab.nn.mask import AttnMask


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttnMask,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
    *,
    overwrite: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, (B, H, L, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dv) -> (B, H, L, Dv).

    A query that may attend to nothing gives 0. `overwrite`: nobody needs `bias` afterwards.
    """
    trains = q.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trains and dropout_p < 1 and q.device.type == "cpu":
        allowed = mask.dense(q.shape[2], k.shape[2], q.device)
        hidden = None if allowed is None else ~allowed
        if bias is not None:
            whole = (*q.shape[:3], k.shape[2])
            overwrite = overwrite and bias.shape == whole and bias.is_contiguous()
            bias = bias.to(q.dtype).expand(whole)
        return _in_pieces(q, k, v, bias, hidden, (scale, mask.may_be_empty, dropout_p, overwrite))
    weights = attention_map(q, k, mask, scale, dropout_p, bias)
    return _per_head(weights, v)


def _in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    settings: tuple[float, bool, float, bool],
) -> Tensor:
    """`_Training` on some samples at a time, so that no tensor of scores takes more than `AT_A_TIME`."""
    rows = at_a_time(len(q), q.shape[1] * q.shape[2] * k.shape[2] * q.element_size())
    if rows >= len(q):
        out: Tensor = _Training.apply(q, k, v, bias, hidden, *settings)
        return out
    count = -(-len(q) // rows)
    biases = [None] * count if bias is None else bias.split(rows)
    hiddens = [hidden] * count if hidden is None or len(hidden) == 1 else hidden.split(rows)
    parts = zip(q.split(rows), k.split(rows), v.split(rows), biases, hiddens, strict=True)
    settings = (*settings[:-1], False)  # autograd lets nobody write into one of several views
    return torch.cat([_Training.apply(*part, *settings) for part in parts])


class _Training(torch.autograd.Function):
    """The same with its derivative written out: hidden scores cost one pass in place, and none backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        hidden: Tensor | None,
        scale: float,
        empty_rows: bool,
        dropout_p: float,
        overwrite: bool,
    ) -> Tensor:
        (B, H, L, Dh), (_, G, S, _) = q.shape, k.shape
        q, k, v = q.reshape(B * G, -1, Dh), k.flatten(0, 1), v.flatten(0, 1)
        plus = None if bias is None else bias.detach().reshape(B * G, -1, S)
        # One mask for all is a mere addend. By its shape: padding (B, 1, 1, S) may have as many numbers.
        if hidden is not None and hidden.shape == (1, 1, L, S) and plus is None and G == H:
            plus = q.new_zeros(1, L, S).masked_fill_(hidden.view(1, L, S), float("-inf"))
        scores = product(q, k.transpose(1, 2), alpha=scale, plus=plus, overwrite=overwrite and bias is not None)
        if hidden is not None and (bias is not None or plus is None):
            scores.view(B, H, L, S).masked_fill_(hidden, float("-inf"))
        weights = torch.softmax(scores, -1, out=scores)  # in place: large tensors cost most when they are first touched
        if hidden is not None and empty_rows:  # softmax over -inf is NaN
            weights.view(B, H, L, S).masked_fill_(hidden.all(-1, keepdim=True), 0.0)
        mask, share = kept(weights.shape, dropout_p, weights.dtype) if dropout_p > 0 else (None, 1.0)
        ctx.save_for_backward(q, k, v, weights, mask)
        ctx.scale, ctx.gain, ctx.shape = scale, 1 / share, (B, H, L, G, S)
        return product(weights if mask is None else weights * mask, v, alpha=ctx.gain).view(B, H, L, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mask = ctx.saved_tensors
        B, H, L, G, S = ctx.shape
        grad = grad.reshape(B * G, -1, grad.shape[-1])
        into_v = product((weights if mask is None else weights * mask).transpose(1, 2), grad, alpha=ctx.gain)
        into_scores = product(grad, v.transpose(1, 2), alpha=ctx.gain)
        if mask is not None:
            into_scores.mul_(mask)
        torch.ops.aten._softmax_backward_data.out(into_scores, weights, -1, weights.dtype, grad_input=into_scores)
        into_q = product(into_scores, k, alpha=ctx.scale)
        into_k = product(into_scores.transpose(1, 2), q, alpha=ctx.scale)
        into_bias = into_scores.view(B, H, L, S) if ctx.needs_input_grad[3] else None
        return (
            into_q.view(B, H, L, -1),
            into_k.view(B, G, S, -1),
            into_v.view(B, G, S, -1),
            into_bias,
            *[None] * 5,
        )


def attention_map(
    q: Tensor, k: Tensor, mask: AttnMask, scale: float, dropout_p: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """Attention weights (B, H, L, S); torch's softmax computes half precision in float32 and rounds once."""
    scores = _scores(q, k, scale)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1)
    if allowed is not None and mask.may_be_empty:  # softmax over -inf is NaN
        weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return dropout(weights, dropout_p)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q k^T * scale -> (B, H, L, S); the scale costs no pass of its own, nor do shared key heads a copy."""
    (B, H, L, Dh), groups = q.shape, k.shape[1]
    rows = q.flatten(0, 1) if groups == H else q.reshape(B * groups, -1, Dh)
    out = torch.baddbmm(q.new_empty(()), rows, k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return out.view(B, H, L, k.shape[2])


def _per_head(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (B, H, L, S) times values (B, Hkv, S, Dv) -> (B, H, L, Dv)."""
    (B, H, L, S), groups = weights.shape, v.shape[1]
    rows = weights.flatten(0, 1) if groups == H else weights.reshape(B * groups, -1, S)
    return torch.bmm(rows, v.flatten(0, 1)).view(B, H, L, v.shape[-1])
