"""transformers' ViTMAEForPreTraining <-> our MAE, encoder and decoder (names of transformers >= 5)."""

from ssl_lab.weights.rename import Fuse, Table, prefixed
from ssl_lab.weights.tables import hf_vit

TABLE: Table = [
    *prefixed(hf_vit.TABLE, "encoder.", "vit."),
    ("decoder.embed.*", "decoder.decoder_embed.*"),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.pos_embed", "decoder.decoder_pos_embed"),
    ("decoder.blocks.#.attn.norm.*", "decoder.decoder_layers.#.layernorm_before.*"),
    Fuse(
        "decoder.blocks.#.attn.fn.qkv.*",
        tuple(f"decoder.decoder_layers.#.attention.{name}_proj.*" for name in "qkv"),
    ),
    ("decoder.blocks.#.attn.fn.proj.*", "decoder.decoder_layers.#.attention.o_proj.*"),
    ("decoder.blocks.#.mlp.norm.*", "decoder.decoder_layers.#.layernorm_after.*"),
    ("decoder.blocks.#.mlp.fn.*", "decoder.decoder_layers.#.mlp.*"),
    ("decoder.norm.*", "decoder.decoder_norm.*"),
    ("decoder.head.*", "decoder.decoder_pred.*"),
]
