"""OpenAI's CLIP, as open_clip holds it (open_clip >= 2.20) <-> our CLIP."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.nn.ffn import ratio
from ssl_lab.weights.rename import Drop, Row, State, Table, Transposed
from ssl_lab.weights.tables.hf_clip import IMAGE, TEXT


def _blocks(ours: str, theirs: str) -> list[Row]:
    ours, theirs = f"{ours}blocks.#.", f"{theirs}transformer.resblocks.#."
    return [
        (f"{ours}attn.norm.*", f"{theirs}ln_1.*"),
        (f"{ours}attn.fn.qkv.weight", f"{theirs}attn.in_proj_weight"),
        (f"{ours}attn.fn.qkv.bias", f"{theirs}attn.in_proj_bias"),
        (f"{ours}attn.fn.proj.*", f"{theirs}attn.out_proj.*"),
        (f"{ours}mlp.norm.*", f"{theirs}ln_2.*"),
        (f"{ours}mlp.fn.fc1.*", f"{theirs}mlp.c_fc.*"),
        (f"{ours}mlp.fn.fc2.*", f"{theirs}mlp.c_proj.*"),
    ]


TABLE: Table = [
    (f"{IMAGE}cls_token", "visual.class_embedding"),
    (f"{IMAGE}pos_embed", "visual.positional_embedding"),
    (f"{IMAGE}patch_embed.proj.weight", "visual.conv1.weight"),
    (f"{IMAGE}patch_embed.norm.*", "visual.ln_pre.*"),
    *_blocks(IMAGE, "visual."),
    (f"{IMAGE}norm.*", "visual.ln_post.*"),
    Transposed("towers.image.projection.weight", "visual.proj"),
    (f"{TEXT}embed.weight", "token_embedding.weight"),
    (f"{TEXT}positions.weight", "positional_embedding"),
    *_blocks(TEXT, ""),
    (f"{TEXT}norm.*", "ln_final.*"),
    Transposed("towers.text.projection.weight", "text_projection"),
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
    *(Drop(name) for name in ("input_resolution", "context_length", "vocab_size", "attn_mask")),  # OpenAI's own file
]


def fold(state: Mapping[str, Tensor]) -> State:
    """Give tables and scalars the shapes that ours have; names without the `module.` of a parallel run.

    Raises:
        UserError: no such model.
    """
    out = {key.removeprefix("module."): value for key, value in state.items()}
    if not {"visual.class_embedding", "visual.proj", "text_projection", "positional_embedding"} <= set(out):
        first = next(iter(out), None)
        raise UserError(
            f"weights (first key {first!r}): no CLIP of OpenAI's layout, a ViT and a text tower with a matrix"
        )
    for name in ("class_embedding", "positional_embedding"):
        out[f"visual.{name}"] = out[f"visual.{name}"].reshape(1, -1, out[f"visual.{name}"].shape[-1])
    return {key: value.reshape(()) if key.startswith("logit_") else value for key, value in out.items()}


def unfold(state: Mapping[str, Tensor]) -> State:
    """Undo `fold`."""
    out = dict(state)
    out["visual.class_embedding"] = out["visual.class_embedding"][0, 0]
    out["visual.positional_embedding"] = out["visual.positional_embedding"][0]
    return out


def facts(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What folded tensors say of the architecture, and a `model_cfg` of heads, activation and epsilon.

    Without one heads are 64 wide, as in all of OpenAI's, and what the tensors do not tell is None.
    """
    patches, tokens = state["visual.conv1.weight"], state["token_embedding.weight"]
    side = round((state["visual.positional_embedding"].shape[1] - 1) ** 0.5)
    vision = {} if config is None else config["vision_cfg"]
    text = {} if config is None else config["text_cfg"]
    act = None if config is None else "quick_gelu" if config.get("quick_gelu") else "gelu"
    image_shape = _shape(state, "visual.", patches.shape[0])
    text_shape = _shape(state, "", tokens.shape[1])
    known = {"act": act, "eps": 1e-5}
    return {
        "family": "clip",
        "embed_dim": state["visual.proj"].shape[1],
        "image": {
            **image_shape,
            **known,
            "num_heads": image_shape["dim"] // vision.get("head_width", 64),
            **({"eps": vision["norm_kwargs"]["eps"]} if vision.get("norm_kwargs") else {}),
            "image_size": side * patches.shape[-1],
            "patch_size": patches.shape[-1],
        },
        "text": {
            **text_shape,
            **known,
            "num_heads": text.get("heads") or text_shape["dim"] // 64,
            **({"eps": text["norm_kwargs"]["eps"]} if text.get("norm_kwargs") else {}),
            "vocab_size": tokens.shape[0],
            "max_length": state["positional_embedding"].shape[0],
        },
    }


def arguments(facts: Mapping[str, Any], eos: int | None = None) -> dict[str, Any]:
    """A `model_cfg`; `eos` is the token that ends a caption, where the text is read off, None = the largest id.

    Raises:
        UserError: activations or heads that it cannot say.
    """
    image, text = facts["image"], facts["text"]
    if image["act"] != text["act"] or image["act"] not in ("gelu", "quick_gelu"):
        raise UserError(
            f"open_clip has one activation for both towers, not {image['act']} and {text['act']}; use to=hf"
        )
    return {
        "embed_dim": facts["embed_dim"],
        "quick_gelu": image["act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "width": image["dim"],
            "layers": image["depth"],
            "head_width": image["dim"] // image["num_heads"],
            "mlp_ratio": ratio(image["hidden"], image["dim"]),
            "norm_kwargs": {"eps": image["eps"]},
        },
        "text_cfg": {
            "context_length": text["max_length"],
            "vocab_size": text["vocab_size"],
            "width": text["dim"],
            "heads": text["num_heads"],
            "layers": text["depth"],
            "mlp_ratio": ratio(text["hidden"], text["dim"]),
            "norm_kwargs": {"eps": text["eps"]},
            **({} if eos is None else {"pool_type": "eos", "eos_id": eos}),
        },
    }


def _shape(state: Mapping[str, Tensor], tower: str, dim: int) -> dict[str, Any]:
    prefix = f"{tower}transformer.resblocks."
    return {
        "dim": dim,
        "depth": len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}),
        "hidden": state[f"{prefix}0.mlp.c_fc.weight"].shape[0],
    }


_PLAIN: dict[str, dict[str, Any]] = {  # options without tensors of their own, and the only value that ours has
    "vision_cfg": {
        "pool_type": "tok",
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "no_ln_pre": False,
        "act_kwargs": None,
        "block_type": None,
        "timm_model_name": None,
        "attentional_pool": False,
    },
    "text_cfg": {
        "no_causal_mask": False,
        "final_ln_after_pool": False,
        "embed_cls": False,
        "act_kwargs": None,
        "block_type": None,
        "hf_model_name": None,
    },
}


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why our towers cannot express a `model_cfg`; None = they can."""
    for part, plain in _PLAIN.items():
        for name, value in plain.items():
            if config[part].get(name, value) != value:
                return f"its {part}.{name} is {config[part][name]}"
    read = config["text_cfg"].get("pool_type", "argmax")
    if read not in ("argmax", "eos"):  # both are the end token
        return f"its text_cfg.pool_type is {read}"
    return None
