"""transformers' Dinov2Model and Dinov2WithRegistersModel <-> our ViT with layer scale (names of transformers >= 5)."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.errors import UserError
from ssl_lab.weights.rename import Drop, Fuse, Table

TABLE: Table = [
    ("cls_token", "embeddings.cls_token"),
    ("registers", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("blocks.#.attn.norm.*", "encoder.layer.#.norm1.*"),
    Fuse("blocks.#.attn.fn.qkv.*", tuple(f"encoder.layer.#.attention.{name}_proj.*" for name in "qkv")),
    ("blocks.#.attn.fn.proj.*", "encoder.layer.#.attention.o_proj.*"),
    ("blocks.#.attn.layer_scale.gamma", "encoder.layer.#.layer_scale1.lambda1"),
    ("blocks.#.mlp.norm.*", "encoder.layer.#.norm2.*"),
    ("blocks.#.mlp.fn.*", "encoder.layer.#.mlp.*"),
    ("blocks.#.mlp.layer_scale.gamma", "encoder.layer.#.layer_scale2.lambda1"),
    ("norm.*", "layernorm.*"),
    Drop("embeddings.mask_token"),
]


def arguments(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Dinov2Config (or Dinov2WithRegistersConfig) for the arguments of our ViT.

    Raises:
        UserError: an MLP ratio that is no whole number, which these classes cannot express.
    """
    if architecture["mlp_ratio"] != int(architecture["mlp_ratio"]):
        raise UserError(f"transformers' Dinov2 needs a whole mlp_ratio, not {architecture['mlp_ratio']}; use to=timm")
    registers = architecture["num_registers"]
    return {
        "image_size": architecture["image_size"],
        "patch_size": architecture["patch_size"],
        "num_channels": architecture["in_chans"],
        "hidden_size": architecture["dim"],
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "mlp_ratio": int(architecture["mlp_ratio"]),
        "layerscale_value": architecture["layer_scale"],
        "layer_norm_eps": 1e-6,
        **({"num_register_tokens": registers} if registers else {"use_mask_token": False}),
    }
