"""transformers' Wav2Vec2Model <-> our Wav2Vec2 (names of transformers >= 5)."""

from ssl_lab.weights.rename import Drop, Fuse, Table

_PLACE = "encoder.pos_conv_embed.conv.parametrizations.weight"

TABLE: Table = [
    Drop("masked_spec_embed"),
    ("front.convs.#.*", "feature_extractor.conv_layers.#.conv.*"),
    ("front.norms.#.*", "feature_extractor.conv_layers.#.layer_norm.*"),
    ("feature_norm.*", "feature_projection.layer_norm.*"),
    ("proj.*", "feature_projection.projection.*"),
    ("positions.gain", f"{_PLACE}.original0"),
    ("positions.weight", f"{_PLACE}.original1"),
    ("positions.bias", "encoder.pos_conv_embed.conv.bias"),
    Fuse("blocks.#.attn.fn.qkv.*", tuple(f"encoder.layers.#.attention.{name}_proj.*" for name in "qkv")),
    ("blocks.#.attn.fn.proj.*", "encoder.layers.#.attention.out_proj.*"),
    ("blocks.#.attn.norm.*", "encoder.layers.#.layer_norm.*"),
    ("blocks.#.mlp.fn.fc1.*", "encoder.layers.#.feed_forward.intermediate_dense.*"),
    ("blocks.#.mlp.fn.fc2.*", "encoder.layers.#.feed_forward.output_dense.*"),
    ("blocks.#.mlp.norm.*", "encoder.layers.#.final_layer_norm.*"),
]


def table(*, post: bool) -> Table:
    """The norm beside the blocks stands before them where they are post-norm, else behind them."""
    return [*TABLE, ("embed_norm.*" if post else "norm.*", "encoder.layer_norm.*")]
