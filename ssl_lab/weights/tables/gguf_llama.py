"""GGUF files of the architecture "llama" (LLaMA, Mistral, SmolLM2) <-> our Decoder of `llama_block`s.

GGUF pairs rotated channels (2i, 2i + 1), so rows of queries and keys stand in another order than ours.
"""

from collections.abc import Mapping
from typing import Any

from ssl_lab.nn.rope import from_interleaved
from ssl_lab.weights.rename import Fuse, Row, State, Table


def table(facts: Mapping[str, Any]) -> Table:
    """Rows for a decoder with these facts; a tied output has none."""
    head: list[Row] = [] if facts["tied"] else [("head.weight", "output.weight")]
    return [
        ("embed.weight", "token_embd.weight"),
        ("blocks.#.attn.norm.weight", "blk.#.attn_norm.weight"),
        Fuse(
            "blocks.#.attn.fn.qkv.weight",
            tuple(f"blk.#.attn_{name}.weight" for name in "qkv"),
            (facts["num_heads"], facts["num_kv_heads"], facts["num_kv_heads"]),
        ),
        ("blocks.#.attn.fn.proj.weight", "blk.#.attn_output.weight"),
        ("blocks.#.mlp.norm.weight", "blk.#.ffn_norm.weight"),
        *((f"blocks.#.mlp.fn.{name}.weight", f"blk.#.ffn_{name}.weight") for name in ("gate", "up", "down")),
        ("norm.weight", "output_norm.weight"),
        *head,
    ]


def by_halves(state: State, head_dim: int) -> State:
    """Their tensors with the rows of queries and keys as `nn.rope` pairs them."""
    rotated = (".attn_q.weight", ".attn_k.weight")
    return {key: from_interleaved(value, head_dim) if key.endswith(rotated) else value for key, value in state.items()}


def facts(metadata: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """What the metadata of a file say of the architecture."""
    known = {name.removeprefix("llama."): value for name, value in metadata.items()}
    heads, dim = known["attention.head_count"], known["embedding_length"]
    head_dim = known.get("attention.key_length", dim // heads)
    return {
        "family": "llama",
        "vocab_size": known.get("vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        "dim": dim,
        "depth": known["block_count"],
        "num_heads": heads,
        "num_kv_heads": known.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden": known["feed_forward_length"],
        "max_length": known["context_length"],
        "window": known.get("attention.sliding_window"),
        "base": float(known.get("rope.freq_base", 10000.0)),
        "scaling": None,
        "eps": known["attention.layer_norm_rms_epsilon"],
        "tied": tied,
    }


def refusal(metadata: Mapping[str, Any]) -> str | None:
    """Why our decoder cannot express this model; None = it can."""
    if (name := metadata["general.architecture"]) != "llama":
        return f"its architecture is {name!r}; ours are files of 'llama'"
    if (kind := metadata.get("llama.rope.scaling.type", "none")) != "none":
        return f"its rotary positions are scaled ({kind}), ours are not"
    if metadata.get("llama.expert_count"):
        return "it has experts"
    heads = metadata["llama.embedding_length"] // metadata["llama.attention.head_count"]
    if metadata.get("llama.rope.dimension_count", heads) != metadata.get("llama.attention.key_length", heads):
        return "it rotates a part of each head, ours the whole"
    return None
