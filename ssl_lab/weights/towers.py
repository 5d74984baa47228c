"""The image encoder of a pair of towers as a backbone by itself: transformers' CLIP and SigLIP."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.ffn import ACTIVATIONS, MLP
from ssl_lab.weights.rename import rename
from ssl_lab.weights.sources import Source, first_line, quiet
from ssl_lab.weights.tables import hf_clip, hf_siglip

_TABLES = {"clip": hf_clip, "siglip": hf_siglip}


def image_tower(name: str, transformers: Any, config: Any) -> Source:
    """The image encoder `hf:<name>` of a CLIP or SigLIP, whether it comes with its text tower or alone.

    Raises:
        UserError: the weights cannot be read, or an activation that ours have not.
    """
    family = config.model_type.removesuffix("_vision_model")
    table = {"clip": hf_clip, "siglip": hf_siglip}[family]
    vision = getattr(config, "vision_config", config)
    if vision.hidden_act not in hf_clip.ACTS:
        raise UserError(f"hf:{name}: its activation is {vision.hidden_act}, ours {', '.join(hf_clip.ACTS)}")
    try:
        with quiet():
            model, info = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({first_line(error)})") from error
    theirs = "vision_model."
    state = {key[key.find(theirs) + len(theirs) if theirs in key else 0 :]: v for key, v in model.state_dict().items()}
    missing = sorted(key for key in info["missing_keys"] if "text_model." not in key)
    if missing:
        raise UserError(f"hf:{name}: the weights lack {missing[0]!r} ({len(missing)} missing); is the file complete?")
    other = ("text_model.", "text_projection.", "visual_projection.", "logit_", "head.")
    kept = {f"{theirs}{key}": value for key, value in state.items() if not key.startswith(other)}
    rows = [row for row in table.TABLE if hf_clip.IMAGE in str(row)]
    found = {k.removeprefix(hf_clip.IMAGE): v for k, v in rename(table.fold(kept), rows).items()}
    (height, width), (down, across) = (_sides(size) for size in (vision.image_size, vision.patch_size))
    recipe = {"act": hf_clip.ACTS[vision.hidden_act], "eps": vision.layer_norm_eps}
    return Source(found, vision.num_attention_heads, (height // down, width // across), antialias=False, recipe=recipe)


def unlike(backbone: nn.Module, recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any, Any]]:
    """What of `Source.recipe` a backbone does otherwise, which no tensor tells: name -> there, here, our argument."""
    blocks: Any = getattr(backbone, "blocks", nn.Module())
    feeds = [module for module in blocks.modules() if isinstance(module, MLP)]
    norms = [module for module in blocks.modules() if isinstance(module, nn.LayerNorm)]
    if not recipe or not feeds or not norms:
        return {}
    here = {
        "act": next((name for name, known in ACTIVATIONS.items() if feeds[0].act is known), "another"),
        "eps": norms[0].eps,
    }
    norm = {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": recipe["eps"]}
    named = {"act": ("act", recipe["act"]), "eps": ("norm", norm)}
    return {name: (recipe[name], here[name], named[name]) for name in here if here[name] != recipe[name]}


def _sides(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
