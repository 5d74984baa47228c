"""transformers' CLIPModel <-> our CLIP (names of transformers >= 5)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssl_lab.weights.rename import Fuse, Row, State, Table

ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
IMAGE, TEXT = "towers.image.backbone.", "towers.text.backbone."


def blocks(ours: str, theirs: str) -> list[Row]:
    """Rows of the blocks of a tower, which CLIP and SigLIP have alike."""
    ours, theirs = f"{ours}blocks.#.", f"{theirs}encoder.layers.#."
    return [
        (f"{ours}attn.norm.*", f"{theirs}layer_norm1.*"),
        Fuse(f"{ours}attn.fn.qkv.*", tuple(f"{theirs}self_attn.{name}_proj.*" for name in "qkv")),
        (f"{ours}attn.fn.proj.*", f"{theirs}self_attn.out_proj.*"),
        (f"{ours}mlp.norm.*", f"{theirs}layer_norm2.*"),
        (f"{ours}mlp.fn.*", f"{theirs}mlp.*"),
    ]


TABLE: Table = [
    (f"{IMAGE}cls_token", "vision_model.embeddings.class_embedding"),
    (f"{IMAGE}pos_embed", "vision_model.embeddings.position_embedding.weight"),
    (f"{IMAGE}patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    (f"{IMAGE}patch_embed.norm.*", "vision_model.pre_layrnorm.*"),
    *blocks(IMAGE, "vision_model."),
    (f"{IMAGE}norm.*", "vision_model.post_layernorm.*"),
    ("towers.image.projection.weight", "visual_projection.weight"),
    (f"{TEXT}embed.weight", "text_model.embeddings.token_embedding.weight"),
    (f"{TEXT}positions.weight", "text_model.embeddings.position_embedding.weight"),
    *blocks(TEXT, "text_model."),
    (f"{TEXT}norm.*", "text_model.final_layer_norm.*"),
    ("towers.text.projection.weight", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
]


def fold(state: Mapping[str, Tensor]) -> State:
    """Give tables and scalars the shapes that ours have."""
    out = dict(state)
    for name in ("class_embedding", "position_embedding.weight"):
        key = f"vision_model.embeddings.{name}"
        if key in out:
            out[key] = out[key].reshape(1, -1, out[key].shape[-1])
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in out.items()}


def unfold(state: Mapping[str, Tensor]) -> State:
    """Undo `fold`."""
    out, key = dict(state), "vision_model.embeddings."
    out[f"{key}class_embedding"] = out[f"{key}class_embedding"][0, 0]
    out[f"{key}position_embedding.weight"] = out[f"{key}position_embedding.weight"][0]
    return out


def facts(config: Any) -> dict[str, Any]:
    """What a CLIPConfig says of the architecture."""
    return {"family": "clip", "embed_dim": config.projection_dim, **tower_facts(config)}


def tower_facts(config: Any) -> dict[str, Any]:
    """Of both towers; SigLIP's configuration has the same names."""
    vision, text = config.vision_config, config.text_config
    size, patch = (each if isinstance(each, int) else each[0] for each in (vision.image_size, vision.patch_size))
    return {
        "image": {**_shape(vision), "image_size": size, "patch_size": patch},
        "text": {**_shape(text), "vocab_size": text.vocab_size, "max_length": text.max_position_embeddings},
    }


def refusal(config: Any) -> str | None:
    """Why our towers cannot express this model; None = they can."""
    acts = {each.hidden_act for each in (config.vision_config, config.text_config)}
    unknown = acts - set(ACTS)
    return f"its activation is {unknown.pop()}, ours {', '.join(ACTS)}" if unknown else None


def arguments(facts: Mapping[str, Any], eos: int | None = None) -> dict[str, Any]:
    """Arguments of CLIPConfig; `eos` is the token that ends a caption, where the text is read off."""
    vision, text = tower_arguments(facts)
    if eos is not None:
        text |= {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
    return {"projection_dim": facts["embed_dim"], "vision_config": vision, "text_config": text}


def tower_arguments(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the configurations of image and text."""
    image, text = facts["image"], facts["text"]
    return (
        {**_arguments(image), "image_size": image["image_size"], "patch_size": image["patch_size"]},
        {**_arguments(text), "vocab_size": text["vocab_size"], "max_position_embeddings": text["max_length"]},
    )


def _shape(config: Any) -> dict[str, Any]:
    return {
        "dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "act": ACTS.get(config.hidden_act),
        "eps": config.layer_norm_eps,
    }


def _arguments(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": tower["dim"],
        "num_hidden_layers": tower["depth"],
        "num_attention_heads": tower["num_heads"],
        "intermediate_size": tower["hidden"],
        "hidden_act": next(theirs for theirs, ours in ACTS.items() if ours == tower["act"]),
        "layer_norm_eps": tower["eps"],
    }
