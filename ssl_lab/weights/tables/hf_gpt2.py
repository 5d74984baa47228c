"""transformers' GPT2LMHeadModel <-> our Decoder of `gpt_block`s. Their Conv1D holds matrices as (in, out)."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Drop, Row, Table, Transposed

PREFIX = "transformer."  # of the base model inside a GPT2LMHeadModel

_LINEAR = {
    "attn.fn.qkv": "attn.c_attn",
    "attn.fn.proj": "attn.c_proj",
    "mlp.fn.fc1": "mlp.c_fc",
    "mlp.fn.fc2": "mlp.c_proj",
}


def table(facts: Mapping[str, Any]) -> Table:
    """Rows for a decoder with these facts: a tied output has none."""
    head: list[Row] = [Drop("lm_head.weight")] if facts["tied"] else [("head.weight", "lm_head.weight")]
    return [
        ("embed.weight", "wte.weight"),
        ("positions.weight", "wpe.weight"),
        ("blocks.#.attn.norm.*", "h.#.ln_1.*"),
        ("blocks.#.mlp.norm.*", "h.#.ln_2.*"),
        *(Transposed(f"blocks.#.{ours}.weight", f"h.#.{theirs}.weight") for ours, theirs in _LINEAR.items()),
        *((f"blocks.#.{ours}.bias", f"h.#.{theirs}.bias") for ours, theirs in _LINEAR.items()),
        ("norm.*", "ln_f.*"),
        *head,
    ]


def facts(config: Any) -> dict[str, Any]:
    """What a GPT2Config says of the architecture."""
    return {
        "family": "gpt2",
        "vocab_size": config.vocab_size,
        "dim": config.n_embd,
        "depth": config.n_layer,
        "num_heads": config.n_head,
        "hidden": config.n_inner or 4 * config.n_embd,
        "max_length": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "tied": config.tie_word_embeddings,
    }


def refusal(config: Any) -> str | None:
    """Why our decoder cannot express this model; None = it can."""
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        return f"its activation is {config.activation_function}, ours the tanh form of GELU"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "it scales its attention scores in another way"
    return None


def arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of GPT2Config."""
    return {
        "vocab_size": facts["vocab_size"],
        "n_embd": facts["dim"],
        "n_layer": facts["depth"],
        "n_head": facts["num_heads"],
        "n_inner": facts["hidden"],
        "n_positions": facts["max_length"],
        "layer_norm_epsilon": facts["eps"],
        "tie_word_embeddings": facts["tied"],
    }
