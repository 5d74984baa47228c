"""transformers' T5ForConditionalGeneration (v1.0 and v1.1) <-> our EncoderDecoder of `t5_block`s."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Drop, Fuse, Row, Table

PREFIX = ""
MAX_LENGTH = 512  # T5's bias knows no end; this is the length of its training


def table(facts: Mapping[str, Any]) -> Table:
    """Rows for a model with these facts: plain or gated feed-forward, tied output or one of its own."""
    head = Drop("lm_head.weight") if facts["tied"] else ("head.weight", "lm_head.weight")
    return [
        ("embed.weight", "shared.weight"),
        Drop("encoder.embed_tokens.weight"),
        Drop("decoder.embed_tokens.weight"),
        *_stack("encoder", "source_positions", 1, facts["gated"]),
        *_stack("decoder", "target_positions", 2, facts["gated"]),
        Fuse(
            "decoder.blocks.#.cross.fn.kv.weight",
            tuple(f"decoder.block.#.layer.1.EncDecAttention.{name}.weight" for name in "kv"),
        ),
        ("decoder.blocks.#.cross.fn.q.weight", "decoder.block.#.layer.1.EncDecAttention.q.weight"),
        ("decoder.blocks.#.cross.fn.proj.weight", "decoder.block.#.layer.1.EncDecAttention.o.weight"),
        ("decoder.blocks.#.cross.norm.weight", "decoder.block.#.layer.1.layer_norm.weight"),
        head,
    ]


def _stack(name: str, positions: str, last: int, gated: bool) -> list[Row]:
    """Self-attention and feed-forward, which is their sublayer number `last`."""
    theirs, ours = f"{name}.block.#.layer", f"{name}.blocks.#"
    feed = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"fc1": "wi", "fc2": "wo"}
    return [
        (f"{positions}.table.weight", f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Fuse(f"{ours}.attn.fn.qkv.weight", tuple(f"{theirs}.0.SelfAttention.{part}.weight" for part in "qkv")),
        (f"{ours}.attn.fn.proj.weight", f"{theirs}.0.SelfAttention.o.weight"),
        (f"{ours}.attn.norm.weight", f"{theirs}.0.layer_norm.weight"),
        *((f"{ours}.mlp.fn.{a}.weight", f"{theirs}.{last}.DenseReluDense.{b}.weight") for a, b in feed.items()),
        (f"{ours}.mlp.norm.weight", f"{theirs}.{last}.layer_norm.weight"),
        (f"{name}.norm.weight", f"{name}.final_layer_norm.weight"),
    ]


def facts(config: Any) -> dict[str, Any]:
    """What a T5Config says of the architecture; whether the output is tied, the tensors tell."""
    return {
        "family": "t5",
        "vocab_size": config.vocab_size,
        "dim": config.d_model,
        "depth": [config.num_layers, config.num_decoder_layers],
        "num_heads": config.num_heads,
        "head_dim": config.d_kv,
        "hidden": config.d_ff,
        "gated": config.is_gated_act,
        "max_length": MAX_LENGTH,
        "num_buckets": config.relative_attention_num_buckets,
        "max_distance": config.relative_attention_max_distance,
        "eps": config.layer_norm_epsilon,
        "scaled": "head" if config.scale_decoder_outputs else "none",
        "tied": config.scale_decoder_outputs,
    }


def refusal(config: Any) -> str | None:
    """Why our model cannot express this one; None = it can."""
    wanted = "gelu_new" if config.is_gated_act else "relu"
    if config.dense_act_fn != wanted:
        return f"its activation is {config.dense_act_fn}, ours {wanted}"
    return None


def arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of T5Config."""
    return {
        "vocab_size": facts["vocab_size"],
        "d_model": facts["dim"],
        "num_layers": facts["depth"][0],
        "num_decoder_layers": facts["depth"][1],
        "num_heads": facts["num_heads"],
        "d_kv": facts["head_dim"],
        "d_ff": facts["hidden"],
        "feed_forward_proj": "gated-gelu" if facts["gated"] else "relu",
        "relative_attention_num_buckets": facts["num_buckets"],
        "relative_attention_max_distance": facts["max_distance"],
        "layer_norm_epsilon": facts["eps"],
        "tie_word_embeddings": facts["scaled"] == "head",
    }
