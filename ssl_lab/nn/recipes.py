"""Recipes of a block: which attention, which feed-forward, which norm and where it stands.

Each is a function (dim, num_heads, *, ..., layer=, kernel=, dropout=) -> `Block`, as `nn.block.encoder_block` is.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.attend import KernelName
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, NormType, Residual
from ssl_lab.nn.conv import ConvModule
from ssl_lab.nn.ffn import GLU, MLP
from ssl_lab.nn.mla import MLA
from ssl_lab.nn.moe import DeepSeekMoE, SwitchFFN
from ssl_lab.nn.norm import RMSNorm
from ssl_lab.nn.relative import RelativeAttention

gelu_tanh: Callable[[Tensor], Tensor] = functools.partial(F.gelu, approximate="tanh")


def layer_norm(dim: int, *, eps: float = 1e-5) -> nn.Module:
    """LayerNorm with the epsilon of GPT-2."""
    return nn.LayerNorm(dim, eps=eps)


def rms_norm(dim: int, *, eps: float = 1e-6) -> nn.Module:
    """RMSNorm (arXiv:1910.07467) with the epsilon of LLaMA, T5 and DeepSeek; LLaMA 2 and Mistral have 1e-5."""
    return RMSNorm(dim, eps=eps)


def swiglu_hidden(dim: int) -> int:
    """2/3 of 4 * dim, rounded up to a multiple of 64: three matrices of this height weigh about two of 4 * dim."""
    return -(-8 * dim // 3 // 64) * 64


def _block(
    dim: int, sublayers: dict[str, nn.Module], norm: NormType, dropout: float, place: Literal["pre", "post"] = "pre"
) -> Block:
    """Sublayers one after the other, each with a norm of its own and a way around it."""
    return Block(**{name: Residual(dim, fn, norm=norm, place=place, dropout=dropout) for name, fn in sublayers.items()})


def gpt_block(
    dim: int,
    num_heads: int,
    *,
    hidden: int | None = None,
    eps: float = 1e-5,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """GPT-2: pre-norm, tanh-GELU, biases; `hidden` is 4 * dim by default.

    Dropout acts on attention weights and on what both branches give.
    """
    attention = Attention(dim, num_heads, dropout=dropout, kernel=kernel, layer=layer)
    norm = functools.partial(layer_norm, eps=eps)
    mlp = MLP(dim, hidden or 4 * dim, act=gelu_tanh)
    return _block(dim, {"attn": attention, "mlp": mlp}, norm, dropout)


def llama_block(
    dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    eps: float = 1e-6,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """LLaMA (arXiv:2302.13971), Mistral and SmolLM2: RMSNorm, grouped heads, SwiGLU, no biases.

    `hidden` is by default `swiglu_hidden`.
    """
    attention = Attention(
        dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, qkv_bias=False, proj_bias=False, dropout=dropout,
        kernel=kernel, layer=layer,
    )  # fmt: skip
    norm = functools.partial(rms_norm, eps=eps)
    mlp = GLU(dim, hidden or swiglu_hidden(dim))
    return _block(dim, {"attn": attention, "mlp": mlp}, norm, dropout)


def bert_block(
    dim: int,
    num_heads: int,
    *,
    hidden: int | None = None,
    eps: float = 1e-12,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """BERT (arXiv:1810.04805): norms after the sums, exact GELU; dropout as in `gpt_block`."""
    attention = Attention(dim, num_heads, dropout=dropout, kernel=kernel, layer=layer)
    norm = functools.partial(layer_norm, eps=eps)
    mlp = MLP(dim, hidden or 4 * dim)
    return _block(dim, {"attn": attention, "mlp": mlp}, norm, dropout, place="post")


def transformer_block(
    dim: int,
    num_heads: int,
    *,
    hidden: int | None = None,
    cross: bool = False,
    eps: float = 1e-5,
    place: Literal["pre", "post"] = "post",
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """The Transformer of arXiv:1706.03762: norms after the sums, ReLU; with `cross`, attention to `Context.memory`.

    With `place="pre"` norms come first in each branch, as in fairseq's models of speech. Dropout acts on what each
    branch gives (section 5.4), not on attention weights.
    """
    norm = functools.partial(layer_norm, eps=eps)
    sublayers: dict[str, nn.Module] = {"attn": Attention(dim, num_heads, kernel=kernel, layer=layer)}
    if cross:
        sublayers["cross"] = Attention(dim, num_heads, cross=True, kernel=kernel, layer=layer)
    sublayers["mlp"] = MLP(dim, hidden or 4 * dim, act=F.relu)
    return _block(dim, sublayers, norm, dropout, place=place)


def t5_block(
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    hidden: int | None = None,
    gated: bool = False,
    cross: bool = False,
    eps: float = 1e-6,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """T5 (arXiv:1910.10683): RMSNorm first, no biases, scores not scaled, ReLU; `gated` = tanh-GEGLU of v1.1.

    `hidden` is 4 * dim by default. Dropout acts on attention weights, inside the feed-forward and on each branch.
    """

    def attention(cross: bool) -> Attention:
        return Attention(
            dim,
            num_heads,
            head_dim=head_dim,
            scale=1.0,
            cross=cross,
            qkv_bias=False,
            proj_bias=False,
            dropout=dropout,
            kernel=kernel,
            layer=layer,
        )

    width = hidden or 4 * dim
    sublayers: dict[str, nn.Module] = {"attn": attention(False)}
    if cross:
        sublayers["cross"] = attention(True)
    sublayers["mlp"] = (
        GLU(dim, width, act=gelu_tanh, dropout=dropout)
        if gated
        else MLP(dim, width, act=F.relu, bias=False, dropout=dropout)
    )
    norm = functools.partial(rms_norm, eps=eps)
    return _block(dim, sublayers, norm, dropout)


def mla_block(
    dim: int,
    num_heads: int,
    *,
    attention: Callable[..., nn.Module] = MLA,
    hidden: int | None = None,
    eps: float = 1e-6,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """A dense layer of DeepSeek-V3 (arXiv:2412.19437): `llama_block` with latent attention.

    `attention` makes it from (dim, num_heads, layer=, kernel=, dropout=), e.g. `functools.partial(MLA, kv_rank=64)`.
    """
    norm = functools.partial(rms_norm, eps=eps)
    latent = attention(dim, num_heads, layer=layer, kernel=kernel, dropout=dropout)
    mlp = GLU(dim, hidden or swiglu_hidden(dim))
    return _block(dim, {"attn": latent, "mlp": mlp}, norm, dropout)


def deepseek_block(
    dim: int,
    num_heads: int,
    *,
    attention: Callable[..., nn.Module] = MLA,
    moe: Callable[[int], nn.Module] = DeepSeekMoE,
    dense_layers: int = 1,
    hidden: int | None = None,
    eps: float = 1e-6,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """DeepSeek-V3 (arXiv:2412.19437): `mla_block`, with experts made by `moe` from dim after `dense_layers` layers.

    `hidden` is the width of the dense layers. A method adds `experts.aux_loss` to its loss and calls
    `experts.balance_` after a step.
    """
    block = mla_block(
        dim, num_heads, attention=attention, hidden=hidden, eps=eps, layer=layer, kernel=kernel, dropout=dropout
    )
    if layer >= dense_layers:
        block["mlp"] = Residual(dim, moe(dim), norm=functools.partial(rms_norm, eps=eps), dropout=dropout)
    return block


def switch_block(
    dim: int,
    num_heads: int,
    *,
    moe: Callable[..., nn.Module] = SwitchFFN,
    every: int = 2,
    head_dim: int | None = None,
    hidden: int | None = None,
    cross: bool = False,
    eps: float = 1e-6,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """Switch Transformer (arXiv:2101.03961): T5 blocks, of which every second one has experts in place of the MLP.

    `moe` makes them from (dim, hidden=, dropout=). A method adds `experts.aux_loss` to its loss.
    """
    block = t5_block(
        dim, num_heads, head_dim=head_dim, hidden=hidden, cross=cross, eps=eps, layer=layer, kernel=kernel,
        dropout=dropout,
    )  # fmt: skip
    if layer % every == every - 1:
        experts = moe(dim, hidden=hidden, dropout=dropout)
        block["mlp"] = Residual(dim, experts, norm=functools.partial(rms_norm, eps=eps), dropout=dropout)
    return block


def conformer_block(
    dim: int,
    num_heads: int,
    *,
    positions: Literal["relative", "rope", "none"] = "relative",
    mlp_ratio: float = 4.0,
    conv: Callable[[int], nn.Module] = ConvModule,
    eps: float = 1e-5,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
) -> Block:
    """Conformer (arXiv:2005.08100): half an MLP, attention, convolution, half an MLP, and a norm of the sum.

    With "rope" attention turns queries and keys by `Context.rope`; `conv` makes the convolution module from dim, e.g.
    `functools.partial(ConvModule, kernel_size=15)`. Dropout acts inside the MLPs and on what each branch gives.
    """
    norm = functools.partial(layer_norm, eps=eps)
    attention = RelativeAttention if positions == "relative" else Attention
    first, last = (MLP(dim, int(dim * mlp_ratio), act=F.silu, dropout=dropout) for _ in range(2))
    branch = functools.partial(Residual, dim, norm=norm, dropout=dropout)
    return Block(
        mlp1=branch(first, scale=0.5),
        attn=branch(attention(dim, num_heads, kernel=kernel, layer=layer)),
        conv=branch(conv(dim)),
        mlp2=branch(nn.Sequential(norm(dim), last), scale=0.5, place="post"),
    )
