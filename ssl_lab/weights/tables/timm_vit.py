"""timm's VisionTransformer <-> our ViT (timm >= 1.0)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.weights.rename import Drop, State, Table

TABLE: Table = [
    ("cls_token", "cls_token"),
    ("registers", "reg_token"),
    ("pos_embed", "pos_embed"),
    ("patch_embed.proj.*", "patch_embed.proj.*"),
    ("blocks.#.attn.norm.*", "blocks.#.norm1.*"),
    ("blocks.#.attn.fn.*", "blocks.#.attn.*"),
    ("blocks.#.attn.layer_scale.gamma", "blocks.#.ls1.gamma"),
    ("blocks.#.mlp.norm.*", "blocks.#.norm2.*"),
    ("blocks.#.mlp.fn.*", "blocks.#.mlp.*"),
    ("blocks.#.mlp.layer_scale.gamma", "blocks.#.ls2.gamma"),
    ("norm.*", "norm.*"),
    Drop("head.*"),
]


def fold(state: Mapping[str, Tensor], num_patches: int | None = None) -> State:
    """Give the class token and the patches a position each, and registers none: what the table expects.

    timm stores positions for every token, for the patches alone (`no_embed_class`), or for class token and patches.
    A position of a register is added to the register; a missing one of the class token is zero. The function computed
    by the model stays the same. Without `num_patches` the grid is taken to be square.

    Raises:
        UserError: no position table, or one that fits no grid.
    """
    out = dict(state)
    table = out.get("pos_embed")
    if table is None:
        raise UserError("weights: this timm model has no position table (rotary or relative); our ViT needs one")
    cls = int("cls_token" in out)
    registers = out["reg_token"].shape[1] if "reg_token" in out else 0
    length = table.shape[1]

    def patches(count: int) -> bool:
        return count == num_patches if num_patches else count > 0 and math.isqrt(count) ** 2 == count

    if patches(length):
        out["pos_embed"] = torch.cat([torch.zeros_like(table[:, :cls]), table], 1)
    elif registers and patches(length - cls - registers):
        head, own, rest = table[:, :cls], table[:, cls : cls + registers], table[:, cls + registers :]
        out["pos_embed"], out["reg_token"] = torch.cat([head, rest], 1), out["reg_token"] + own
    elif not patches(length - cls):
        raise UserError(f"weights: {length} positions beside {cls + registers} prefix tokens do not form a square grid")
    return out


def unfold(state: Mapping[str, Tensor]) -> State:
    """Undo `fold` for a model with registers, which timm builds with `no_embed_class`.

    The class token's position is added to the class token.
    """
    out = dict(state)
    if "reg_token" in out and "cls_token" in out:
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for the arguments of our ViT."""
    cls, registers = architecture["cls_token"], architecture["num_registers"]
    return {
        "img_size": architecture["image_size"],
        "patch_size": architecture["patch_size"],
        "in_chans": architecture["in_chans"],
        "num_classes": 0,
        "global_pool": "token" if cls else "avg",
        "fc_norm": False,
        "embed_dim": architecture["dim"],
        "depth": architecture["depth"],
        "num_heads": architecture["num_heads"],
        "mlp_ratio": architecture["mlp_ratio"],
        "init_values": architecture["layer_scale"],
        "qk_norm": architecture["qk_norm"],
        "class_token": cls,
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
    }
