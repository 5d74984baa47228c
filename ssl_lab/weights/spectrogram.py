"""Weights into an AST: its own, transformers', or those of a ViT that saw images (arXiv:2104.01778, section 2.2)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.ast import AST
from ssl_lab.errors import UserError
from ssl_lab.weights import io, sources
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.tables import hf_ast


def load(backbone: AST, spec: str) -> None:
    """Fill an AST with the weights named by `spec`, every tensor or none.

    Args:
        backbone: the AST.
        spec: `hf:<folder or repository>` of an AST or a ViT, `timm:<name>`, a .safetensors or .ckpt file, or a run.

    Of a ViT for images the first convolution is summed over the colours, and positions are cut or stretched to the
    spectrogram's grid, see `resampled`. A ViT has no distillation token: that of the AST stays as it began.

    Raises:
        UserError: nothing there, or tensors that do not fit.
    """
    kind, colon, name = spec.partition(":")
    grid = None
    if colon and kind == "hf" and sources.hf_config(name)[1].model_type == "audio-spectrogram-transformer":
        state, grid = _from_hf(backbone, name)
    else:
        source = sources.read(spec)
        state, grid = source.state, source.grid
    own = backbone.state_dict()
    weight, table = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    images = weight is not None and weight.dim() == 4 and weight.shape[1] != 1
    if weight is not None and images:
        state = {"registers": own["registers"]} | state | {"patch_embed.proj.weight": weight.sum(1, keepdim=True)}
    if table is not None and "cls_token" in state and (grid or table.shape != own["pos_embed"].shape):
        count = table.shape[1] - 1
        old = grid or ((math.isqrt(count),) * 2 if images else (backbone.grid[0], count // backbone.grid[0]))
        if old[0] * old[1] != count:
            raise UserError(f"{spec}: its {count} positions form no grid of {old[0]} x {old[1]}; choose other weights")
        state = state | {"pos_embed": resampled(table, old, backbone.grid, middle=images)}
    if problems := io.differences(own, state):
        raise UserError(f"{spec} does not fit this AST: {'; '.join(problems[:4])}; choose its size by the weights")
    backbone.load_state_dict(state)


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int], *, middle: bool = True) -> Tensor:
    """Positions (1, 1 + rows * columns, D) of one grid -> of another, each axis by itself as in the paper.

    A shorter axis takes the middle of the old one, or its beginning, which an AST has for short inputs; a longer one
    stretches it, linearly. The first position stays.
    """
    grid = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    for axis in (2, 3):
        size, wanted = grid.shape[axis], new[axis - 2]
        if wanted <= size:
            grid = grid.narrow(axis, (size - wanted) // 2 if middle else 0, wanted)
        else:
            sides = (wanted, grid.shape[3]) if axis == 2 else (grid.shape[2], wanted)
            grid = F.interpolate(grid, sides, mode="bilinear")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def _from_hf(backbone: AST, name: str) -> tuple[State, tuple[int, int]]:
    """An AST of transformers in our names, and the grid of its positions; its epsilon becomes that of the norms."""
    transformers, config = sources.hf_config(name)
    facts = {"frequency_stride": config.frequency_stride, "time_stride": config.time_stride}
    stride, size = backbone.stem.stride, config.patch_size
    if set(facts.values()) != {stride} or config.hidden_act != "gelu" or not config.qkv_bias:
        raise UserError(
            f"hf:{name} has patches every {facts['frequency_stride']} bins and {facts['time_stride']} frames, "
            f"{config.hidden_act} and qkv_bias={config.qkv_bias}; this AST has {stride}, gelu and biases"
        )
    try:
        with sources.quiet():
            model: Any = transformers.ASTModel.from_pretrained(name, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({sources.first_line(error)})") from error
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
    grid = (config.num_mel_bins - size) // stride + 1, (config.max_length - size) // stride + 1
    return hf_ast.fold(rename(model.state_dict(), hf_ast.TABLE)), grid
