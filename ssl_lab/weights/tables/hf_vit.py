"""transformers' ViTModel, ViTMAEModel and IJepaModel <-> our ViT (names of transformers >= 5)."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Drop, Fuse, Table

TABLE: Table = [
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("blocks.#.attn.norm.*", "layers.#.layernorm_before.*"),
    Fuse("blocks.#.attn.fn.qkv.*", tuple(f"layers.#.attention.{name}_proj.*" for name in "qkv")),
    ("blocks.#.attn.fn.proj.*", "layers.#.attention.o_proj.*"),
    ("blocks.#.mlp.norm.*", "layers.#.layernorm_after.*"),
    ("blocks.#.mlp.fn.*", "layers.#.mlp.*"),
    ("norm.*", "layernorm.*"),
    Drop("embeddings.mask_token"),
    Drop("pooler.*"),
]


def arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ViTConfig, ViTMAEConfig and IJepaConfig for the arguments of our ViT."""
    return {
        "image_size": architecture["image_size"],
        "patch_size": architecture["patch_size"],
        "num_channels": architecture["in_chans"],
        "hidden_size": architecture["dim"],
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "intermediate_size": int(architecture["dim"] * architecture["mlp_ratio"]),
        "layer_norm_eps": 1e-6,  # theirs is 1e-12 by default
    }
