"""Our image encoder as the `vision_config` and the weights of a transformers LlavaConfig."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.backbones.vlm import VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.ffn import ACTIVATIONS, MLP
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.tables import hf_clip, hf_dinov2, hf_siglip, hf_vit

ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}  # ours -> theirs
_CAN = "to=hf can write a LLaVA of our ViT with its class token, or a CLIP's or SigLIP's, and connector linear or mlp2x"


@dataclass(frozen=True)
class Tower:
    """An image encoder in transformers' words.

    `config` is the name of the configuration's class and `arguments` what it takes; `state` are the tensors in the
    names of `AutoModel.from_config`; `strategy` says whether the first token is dropped ("default") or none ("full"),
    and `extra` how many tokens there are beside the patches.
    """

    config: str
    arguments: dict[str, Any]
    state: State
    strategy: Literal["default", "full"]
    extra: int


def tower(model: VisionLanguage) -> Tower:
    """The image encoder of `model`, up to the block that it reads.

    Its blocks after that one are gone, so their `vision_feature_layer` is -1, the output before the final norm.

    Raises:
        UserError: transformers has no such encoder, or its LLaVA does not read it in this way; the message names
            the part.
    """
    vit = model.vision
    if type(vit) is not ViT:
        raise cannot("vision", f"is a {type(vit).__name__}")
    if model.layer is None:
        raise cannot("layer=null", "reads the normed output, theirs that of a block (layer=-1)")
    shape = _shape(list(vit.blocks))
    registers = 0 if vit.registers is None else vit.registers.shape[1]
    if registers and model.drop_prefix:
        raise cannot("vision", f"has {registers} register tokens, which theirs reads with the patches")
    config, arguments, state = _family(vit, shape, registers)
    sizes = {
        "image_size": vit.grid[0] * vit.patch_embed.patch_size,
        "patch_size": vit.patch_embed.patch_size,
        "num_channels": vit.patch_embed.proj.in_channels,
        "hidden_size": vit.dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": shape["num_heads"],
        "hidden_act": ACTS[shape["act"]],
        "layer_norm_eps": shape["eps"],
    }
    strategy: Literal["default", "full"] = "default" if model.drop_prefix and vit.cls_token is not None else "full"
    return Tower(config, sizes | arguments, state, strategy, vit.num_prefix)


def _family(vit: ViT, shape: dict[str, Any], registers: int) -> tuple[str, dict[str, Any], State]:
    """Configuration, what it takes beside the sizes, and tensors."""
    cls, clip = vit.cls_token is not None, not isinstance(vit.patch_embed.norm, nn.Identity)
    if clip and (not cls or registers or shape["scaled"] or vit.patch_embed.proj.bias is not None):
        raise cannot("vision", "has a norm before its blocks, but not the other parts of a CLIP's")
    if not clip and vit.patch_embed.proj.bias is None:
        raise cannot("vision", "projects its patches without bias")
    if clip or not (cls or registers or shape["scaled"]):
        return _of_pair(vit, shape, clip)
    if not shape["scaled"]:
        if registers:
            raise cannot("vision", "has registers, but not the layer scale of a DINOv2")
        return "ViTConfig", {"intermediate_size": shape["hidden"]}, rename(vit.state_dict(), hf_vit.TABLE, back=True)
    if not cls or shape["hidden"] % vit.dim:
        raise cannot("vision", "has layer scale, but not the class token and whole mlp_ratio of a DINOv2")
    arguments = {"mlp_ratio": shape["hidden"] // vit.dim}
    state = rename(vit.state_dict(), hf_dinov2.TABLE, back=True)
    if registers:
        return "Dinov2WithRegistersConfig", arguments | {"num_register_tokens": registers}, state
    return "Dinov2Config", arguments, state


def _of_pair(vit: ViT, shape: dict[str, Any], clip: bool) -> tuple[str, dict[str, Any], State]:
    """Of CLIP's or SigLIP's encoder alone, whose tensors lack the `vision_model.` that they have in a pair."""
    ours = {f"{hf_clip.IMAGE}{key}": value for key, value in vit.state_dict().items()}
    found = rename(ours, hf_clip.TABLE if clip else hf_siglip.TABLE, back=True)
    named = {key.removeprefix("vision_model."): value for key, value in found.items()}
    named["embeddings.position_embedding.weight"] = named["embeddings.position_embedding.weight"][0]
    sizes = {"intermediate_size": shape["hidden"]}
    if not clip:
        return "SiglipVisionConfig", sizes | {"vision_use_head": False}, named
    named["embeddings.class_embedding"] = named["embeddings.class_embedding"][0, 0]
    return "CLIPVisionConfig", sizes, named


def _shape(blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """What all blocks have alike: heads, width of the feed-forward, activation, epsilon, layer scale."""
    found = [_of_block(block) for block in blocks]
    if not found or any(each is None or each != found[0] for each in found):
        raise cannot("vision", "has blocks of another recipe than transformers' encoders")
    return found[0] or {}


def _of_block(block: Any) -> dict[str, Any] | None:
    if list(block) != ["attn", "mlp"]:
        return None
    attention, mlp = block["attn"].fn, block["mlp"].fn
    if type(attention) is not Attention or type(mlp) is not MLP or attention.qk_norm or attention.qkv.bias is None:
        return None
    if attention.scale is not None or attention.num_kv_heads != attention.num_heads or mlp.fc1.bias is None:
        return None
    residuals = list(block.values())
    if any(r.place != "pre" or r.scale != 1.0 or type(r.norm) is not nn.LayerNorm for r in residuals):
        return None
    scaled = [not isinstance(r.layer_scale, nn.Identity) for r in residuals]
    act = next((name for name, known in ACTIVATIONS.items() if mlp.act is known), None)
    if act is None or scaled[0] != scaled[1] or residuals[0].norm.eps != residuals[1].norm.eps:
        return None
    hidden = mlp.fc1.out_features
    sizes = {"num_heads": attention.num_heads, "hidden": hidden, "act": act, "eps": residuals[0].norm.eps}
    return sizes | {"scaled": scaled[0]}


def cannot(part: str, what: str) -> UserError:
    """That a part has no counterpart, and what has."""
    return UserError(f"transformers' LLaVA cannot hold this model: {part} {what}; {_CAN}")
