"""The sublayers of plain decoder blocks as functions of few operations, for `Compact`.

Root mean squares come from one norm: sqrt(sum x^2 + D eps) is the hypotenuse of |x| and sqrt(D eps).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Residual
from ssl_lab.nn.ffn import GLU, MLP
from ssl_lab.nn.linear import Linear, linear
from ssl_lab.nn.norm import RMSNorm
from ssl_lab.nn.positions import Positions

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """The sublayers of a block as functions of (B, D)."""

    norm: Map
    qkv: Map
    proj: Map
    ffn_norm: Map
    ffn: Map
    scale: float


def plan(decoder: Decoder) -> list[Layer] | None:
    """The layers of a decoder that `Compact` can run, None if it has anything else, hooks and autocast included."""
    weights = list(decoder.parameters())
    kind, device = weights[0].dtype, weights[0].device
    if any(p.dtype != kind or p.device != device or type(p) is not nn.Parameter for p in weights):
        return None
    if torch.is_autocast_enabled(device.type) or any(
        m._forward_hooks or m._forward_pre_hooks for m in decoder.modules()
    ):
        return None
    if type(decoder) is not Decoder or type(decoder.embed) is not nn.Embedding or not _normal(decoder.norm):
        return None
    if type(decoder.positions).bias is not Positions.bias or decoder.prompt is not None:
        return None
    layers = [_layer(block) for block in decoder.blocks]
    found = [layer for layer in layers if layer is not None]
    heads = {_heads(block) for block in decoder.blocks}
    return found if len(found) == len(layers) and len(heads) == 1 else None


def _layer(block: nn.Module) -> Layer | None:
    residuals = list(block.values()) if type(block) is Block else []
    if len(residuals) != 2 or not all(_plain(r) for r in residuals):
        return None
    attention, ffn = (r.get_submodule("fn") for r in residuals)
    if type(attention) is not Attention or attention.cross or attention.qk_norm or attention.prefix is not None:
        return None
    maps = [attention.qkv, attention.proj, *(m for m in ffn.children() if not isinstance(m, nn.Dropout))]
    if type(ffn) not in (MLP, GLU) or any(type(m) is not Linear for m in maps):
        return None
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    return Layer(
        norm_map(residuals[0].get_submodule("norm")),
        _map(attention.qkv),
        _map(attention.proj),
        norm_map(residuals[1].get_submodule("norm")),
        _ffn(ffn),
        scale,
    )


def _plain(residual: nn.Module) -> bool:
    """x + fn(norm(x)) and nothing else."""
    return (
        type(residual) is Residual
        and residual.place == "pre"
        and residual.scale == 1.0
        and residual.gate is None
        and residual.adapter is None
        and type(residual.layer_scale) is nn.Identity
        and _normal(residual.norm)
    )


def _normal(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, nn.RMSNorm, RMSNorm) and norm.weight is not None


def _heads(block: nn.Module) -> tuple[int, int, int] | None:
    attention = next((m for m in block.modules() if type(m) is Attention), None)
    return None if attention is None else (attention.num_heads, attention.num_kv_heads, attention.head_dim)


def _map(module: nn.Linear) -> Map:
    return product(module.weight, module.bias)


def product(weight: Tensor, bias: Tensor | None) -> Map:
    """x (B, D) times weight (E, D) transposed.

    One row on a CPU reads the whole matrix for few sums. In float32 MKL does that with one thread and oneDNN with much
    fixed cost: as a batch of 8 slices times the row, the threads share it. In bf16 torch's own product has less fixed
    cost than oneDNN, and is quicker for small matrices; torch takes it only while oneDNN is switched off.
    """
    kind, slices = weight.dtype, math.gcd(len(weight), 8)
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return lambda x: linear(x, weight, bias)
    if kind == torch.float32 and torch.backends.mkl.is_available():
        parts = weight.detach().view(slices, -1, weight.shape[1])

        def row(x: Tensor) -> Tensor:
            # the row must look transposed: MKL takes eight times as long for it with the strides of a column
            return torch.bmm(parts, x.expand(slices, 1, -1).transpose(1, 2)).view(1, -1)
    elif kind == torch.bfloat16:
        turned, small = weight.detach().t(), weight.numel() < 2**18

        def row(x: Tensor) -> Tensor:
            if not small:
                return torch.mm(x, turned)
            before = torch.backends.mkldnn.enabled
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            try:
                return torch.mm(x, turned)
            finally:
                torch.backends.mkldnn.enabled = before
    else:
        return lambda x: linear(x, weight, bias)

    def call(x: Tensor) -> Tensor:
        if len(x) > 1:
            return linear(x, weight, bias)
        return row(x) if bias is None else row(x).add_(bias)

    return call


def norm_map(module: nn.Module) -> Map:
    """Of a LayerNorm or RMSNorm: x (B, D) in float32 at least -> the dtype of the weights."""
    weight = module.weight
    assert isinstance(weight, Tensor) and isinstance(module, nn.LayerNorm | nn.RMSNorm)
    kind, shape, wide = weight.dtype, list(weight.shape), torch.promote_types(weight.dtype, torch.float32)
    gain, eps = weight.detach().to(wide), module.eps
    if isinstance(module, nn.LayerNorm):
        bias, small = None if module.bias is None else module.bias.detach().to(wide), module.eps
        return lambda x: torch.layer_norm(x, shape, gain, bias, small).to(kind)
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, shape, gain, eps).to(kind)
    eps, root = torch.finfo(kind).eps if eps is None else eps, weight.numel() ** 0.5
    gain, floor = gain * root, torch.full((1, 1), eps**0.5 * root, dtype=wide)

    def rms(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # sqrt(D) times the root mean square
        return (x / torch.hypot(length, floor)).mul_(gain).to(kind)

    return rms


def _ffn(module: nn.Module) -> Map:
    if isinstance(module, MLP):
        first, act, second = _map(module.fc1), module.act, _map(module.fc2)
        return lambda x: second(act(first(x)))
    assert isinstance(module, GLU)
    act, down = module.act, _map(module.down)
    weight = module.gate.weight
    if weight.dtype == torch.float32 or weight.numel() > 2**19:  # else an operation less gains more than a copy costs
        gate, up = _map(module.gate), _map(module.up)
        return lambda x: down(act(gate(x)).mul_(up(x)))
    biases = (module.gate.bias, module.up.bias)
    both = product(torch.cat([module.gate.weight, module.up.weight]), None if biases[0] is None else torch.cat(biases))

    def glu(x: Tensor) -> Tensor:
        first, second = both(x).chunk(2, 1)
        return down(act(first).mul_(second))

    return glu
