"""transformers' SiglipModel <-> our SigLIP (names of transformers >= 5)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssl_lab.weights.rename import Fuse, State, Table
from ssl_lab.weights.tables import hf_clip
from ssl_lab.weights.tables.hf_clip import IMAGE, TEXT, blocks

_HEAD = "vision_model.head."

TABLE: Table = [
    (f"{IMAGE}pos_embed", "vision_model.embeddings.position_embedding.weight"),
    (f"{IMAGE}patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    *blocks(IMAGE, "vision_model."),
    (f"{IMAGE}norm.*", "vision_model.post_layernorm.*"),
    ("towers.image.pool.probe", f"{_HEAD}probe"),
    ("towers.image.pool.attn.q.*", f"{_HEAD}attention.q.*"),
    Fuse("towers.image.pool.attn.kv.*", (f"{_HEAD}attention.k.*", f"{_HEAD}attention.v.*")),
    ("towers.image.pool.attn.proj.*", f"{_HEAD}attention.out_proj.*"),
    ("towers.image.pool.norm.*", f"{_HEAD}layernorm.*"),
    ("towers.image.pool.mlp.*", f"{_HEAD}mlp.*"),
    (f"{TEXT}embed.weight", "text_model.embeddings.token_embedding.weight"),
    (f"{TEXT}positions.weight", "text_model.embeddings.position_embedding.weight"),
    *blocks(TEXT, "text_model."),
    (f"{TEXT}norm.*", "text_model.final_layer_norm.*"),
    ("towers.text.projection.*", "text_model.head.*"),
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
]


def fold(state: Mapping[str, Tensor]) -> State:
    """Give tables and scalars the shapes that ours have, and the pooling head's projections a tensor each."""
    out = hf_clip.fold(state)
    for kind in ("weight", "bias"):
        fused = out.pop(f"{_HEAD}attention.in_proj_{kind}", None)
        if fused is not None:
            out |= {f"{_HEAD}attention.{name}.{kind}": part for name, part in zip("qkv", fused.chunk(3), strict=True)}
    return out


def unfold(state: Mapping[str, Tensor]) -> State:
    """Undo `fold`."""
    out, key = dict(state), "vision_model.embeddings.position_embedding.weight"
    out[key] = out[key][0]
    for kind in ("weight", "bias"):
        parts = [out.pop(f"{_HEAD}attention.{name}.{kind}") for name in "qkv"]
        out[f"{_HEAD}attention.in_proj_{kind}"] = torch.cat(parts)
    return {name: value.reshape(1) if name.startswith("logit_") else value for name, value in out.items()}


def facts(config: Any) -> dict[str, Any]:
    """What a SiglipConfig says of the architecture."""
    return {"family": "siglip", "embed_dim": config.vision_config.hidden_size, **hf_clip.tower_facts(config)}


def refusal(config: Any) -> str | None:
    """Why our towers cannot express this model; None = they can."""
    if config.text_config.projection_size != config.vision_config.hidden_size:
        return "its text is projected to another width than its images have"
    return hf_clip.refusal(config)


def arguments(facts: Mapping[str, Any], eos: int | None = None) -> dict[str, Any]:
    """Arguments of SiglipConfig; the last position is read, whatever token stands there."""
    vision, text = hf_clip.tower_arguments(facts)
    text |= {"projection_size": facts["embed_dim"], "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
    return {"vision_config": vision, "text_config": text}
