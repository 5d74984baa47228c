"""transformers' LlamaForCausalLM and MistralForCausalLM <-> our Decoder of `llama_block`s."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Drop, Fuse, Row, Table

PREFIX = "model."  # of the base model inside a LlamaForCausalLM


def table(facts: Mapping[str, Any]) -> Table:
    """Rows for a decoder with these facts: key/value heads are fewer than query heads, and a tied output has no row."""
    head: list[Row] = [Drop("lm_head.weight")] if facts["tied"] else [("head.weight", "lm_head.weight")]
    return [
        ("embed.weight", "embed_tokens.weight"),
        ("blocks.#.attn.norm.weight", "layers.#.input_layernorm.weight"),
        Fuse(
            "blocks.#.attn.fn.qkv.weight",
            tuple(f"layers.#.self_attn.{name}_proj.weight" for name in "qkv"),
            (facts["num_heads"], facts["num_kv_heads"], facts["num_kv_heads"]),
        ),
        ("blocks.#.attn.fn.proj.weight", "layers.#.self_attn.o_proj.weight"),
        ("blocks.#.mlp.norm.weight", "layers.#.post_attention_layernorm.weight"),
        *((f"blocks.#.mlp.fn.{name}.weight", f"layers.#.mlp.{name}_proj.weight") for name in ("gate", "up", "down")),
        ("norm.weight", "norm.weight"),
        *head,
    ]


def facts(config: Any) -> dict[str, Any]:
    """What a LlamaConfig or MistralConfig says of the architecture."""
    rope = config.rope_parameters
    return {
        "family": "llama",
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden": config.intermediate_size,
        "max_length": config.max_position_embeddings,
        "window": getattr(config, "sliding_window", None),
        "base": float(rope["rope_theta"]),
        "scaling": _scaling(rope, config.max_position_embeddings),
        "eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
    }


def refusal(config: Any) -> str | None:
    """Why our decoder cannot express this model; None = it can."""
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, ours SiLU"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases, ours has none"
    rope = config.rope_parameters
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "yarn", "llama3"):
        return f"its rotary positions are scaled in a way that ours are not ({kind})"
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        return "its rotary positions sharpen scores in a way of their own (mscale)"
    return None


def arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of LlamaConfig and, where there is a window, of MistralConfig."""
    window = {"sliding_window": facts["window"]} if facts["window"] else {}
    return window | {
        "vocab_size": facts["vocab_size"],
        "hidden_size": facts["dim"],
        "num_hidden_layers": facts["depth"],
        "num_attention_heads": facts["num_heads"],
        "num_key_value_heads": facts["num_kv_heads"],
        "head_dim": facts["head_dim"],
        "intermediate_size": facts["hidden"],
        "max_position_embeddings": facts["max_length"],
        "rms_norm_eps": facts["eps"],
        "tie_word_embeddings": facts["tied"],
        "rope_parameters": {"rope_theta": facts["base"], **_rope_parameters(facts["scaling"])},
    }


def _scaling(rope: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    """Ours for theirs; `length` is that of the training where nothing else is said."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    given = {ours: rope[theirs] for ours, theirs in _NAMES[kind].items() if rope.get(theirs) is not None}
    if kind == "yarn":
        defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}
        given = defaults | {"original_length": length} | given
    return {"kind": kind} | given


def _rope_parameters(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    given = {theirs: scaling[ours] for ours, theirs in _NAMES[scaling["kind"]].items() if scaling[ours] is not None}
    return {"rope_type": scaling["kind"]} | given


_ORIGINAL = {"original_length": "original_max_position_embeddings"}
_NAMES: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "yarn": {name: name for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate")} | _ORIGINAL,
    "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"} | _ORIGINAL,
}
