"""transformers' BertModel, and the heads of BertForPreTraining and its kin <-> our TextEncoder and heads."""

from collections.abc import Mapping
from typing import Any

from ssl_lab.weights.rename import Drop, Fuse, Row, Table

PREFIX = "bert."  # of the base model inside a BertForMaskedLM

_HEADS: list[Row] = [Drop("pooler.*"), Drop("cls.*"), Drop("classifier.*"), Drop("qa_outputs.*")]


def table(facts: Mapping[str, Any]) -> Table:
    """Rows for the encoder; every head is left behind."""
    return [
        ("embed.weight", "embeddings.word_embeddings.weight"),
        ("positions.weight", "embeddings.position_embeddings.weight"),
        ("types.weight", "embeddings.token_type_embeddings.weight"),
        ("embed_norm.*", "embeddings.LayerNorm.*"),
        Fuse(
            "blocks.#.attn.fn.qkv.*",
            tuple(f"encoder.layer.#.attention.self.{name}.*" for name in ("query", "key", "value")),
        ),
        ("blocks.#.attn.fn.proj.*", "encoder.layer.#.attention.output.dense.*"),
        ("blocks.#.attn.norm.*", "encoder.layer.#.attention.output.LayerNorm.*"),
        ("blocks.#.mlp.fn.fc1.*", "encoder.layer.#.intermediate.dense.*"),
        ("blocks.#.mlp.fn.fc2.*", "encoder.layer.#.output.dense.*"),
        ("blocks.#.mlp.norm.*", "encoder.layer.#.output.LayerNorm.*"),
        *_HEADS,
    ]


# `MaskedLMHead`: its decoder is the embedding, and only the bias is its own.
MASKED_LM: Table = [
    ("dense.*", "cls.predictions.transform.dense.*"),
    ("norm.*", "cls.predictions.transform.LayerNorm.*"),
    ("bias", "cls.predictions.bias"),
    Drop("cls.predictions.decoder.*"),
]
# `PoolerHead`: next sentence, or classes of a text.
NEXT_SENTENCE: Table = [("dense.*", "pooler.dense.*"), ("out.*", "cls.seq_relationship.*")]
CLASSIFIER: Table = [("dense.*", "pooler.dense.*"), ("out.*", "classifier.*")]


def facts(config: Any) -> dict[str, Any]:
    """What a BertConfig says of the architecture."""
    return {
        "family": "bert",
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "max_length": config.max_position_embeddings,
        "num_types": config.type_vocab_size,
        "eps": config.layer_norm_eps,
    }


def refusal(config: Any) -> str | None:
    """Why our encoder cannot express this model; None = it can."""
    if config.hidden_act != "gelu":
        return f"its activation is {config.hidden_act}, ours exact GELU"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return "its positions are relative, ours a table"
    return "it is a decoder" if getattr(config, "is_decoder", False) else None


def arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of BertConfig."""
    return {
        "vocab_size": facts["vocab_size"],
        "hidden_size": facts["dim"],
        "num_hidden_layers": facts["depth"],
        "num_attention_heads": facts["num_heads"],
        "intermediate_size": facts["hidden"],
        "max_position_embeddings": facts["max_length"],
        "type_vocab_size": facts["num_types"],
        "layer_norm_eps": facts["eps"],
    }
