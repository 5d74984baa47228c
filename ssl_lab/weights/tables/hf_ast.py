"""transformers' ASTModel <-> our AST (names of transformers >= 5)."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Fuse, State, Table

TABLE: Table = [
    ("cls_token", "embeddings.cls_token"),
    ("registers", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("blocks.#.attn.norm.*", "layers.#.layernorm_before.*"),
    Fuse("blocks.#.attn.fn.qkv.*", tuple(f"layers.#.attention.{name}_proj.*" for name in "qkv")),
    ("blocks.#.attn.fn.proj.*", "layers.#.attention.o_proj.*"),
    ("blocks.#.mlp.norm.*", "layers.#.layernorm_after.*"),
    ("blocks.#.mlp.fn.*", "layers.#.mlp.*"),
    ("norm.*", "layernorm.*"),
]


def fold(state: Mapping[str, Any]) -> State:
    """Our names with the position of the distillation token added to the token itself: the function stays the same."""
    out = dict(state)
    table = out["pos_embed"]
    out["registers"] = out["registers"] + table[:, 1:2]
    out["pos_embed"] = table[:, [0, *range(2, table.shape[1])]]
    return out
