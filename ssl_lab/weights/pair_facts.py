"""What a pair of towers is, in plain facts, and the towers that facts describe: OpenAI's CLIP and SigLIP."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from ssl_lab.backbones.text import TextEncoder
from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, encoder_block
from ssl_lab.nn.embed import PatchEmbed
from ssl_lab.nn.ffn import ACTIVATIONS, MLP, ratio
from ssl_lab.nn.pool import AttentionPool
from ssl_lab.nn.positions import Learned

Facts = Mapping[str, Any]
FAMILIES = ("clip", "siglip")


def towers(facts: Facts) -> dict[Literal["image", "text"], Tower]:
    """The towers that facts describe, with new weights, for `CLIP(**towers(facts))` or `SigLIP(...)`."""
    clip, image, text = facts["family"] == "clip", facts["image"], facts["text"]
    norm = partial(nn.LayerNorm, eps=image["eps"])
    vit = ViT(
        image["dim"],
        image["depth"],
        image["num_heads"],
        image_size=image["image_size"],
        patch_size=image["patch_size"],
        cls_token=clip,
        stem=partial(PatchEmbed, bias=False, norm=norm) if clip else PatchEmbed,
        block=_block(image),
    )
    encoder = TextEncoder(
        text["vocab_size"],
        text["dim"],
        text["depth"],
        text["num_heads"],
        max_length=text["max_length"],
        num_types=0,
        causal=clip,
        block=_block(text),
        norm=partial(nn.LayerNorm, eps=text["eps"]),
    )
    if clip:
        return {"image": Tower(vit, facts["embed_dim"]), "text": Tower(encoder, facts["embed_dim"])}
    width = ratio(image["hidden"], image["dim"])
    pooling = partial(AttentionPool, num_heads=image["num_heads"], mlp_ratio=width, act=image["act"], eps=image["eps"])
    return {
        "image": Tower(vit, facts["embed_dim"], pooling=pooling, projection="none"),
        "text": Tower(encoder, facts["embed_dim"], pooling="last", projection="affine", padding="seen"),
    }


def facts_of(method: nn.Module) -> dict[str, Any]:
    """The facts of a `CLIP` or `SigLIP` of ours; empty where its towers are neither OpenAI's nor SigLIP's kind."""
    pair = dict(getattr(method, "towers", {}).items())
    if set(pair) != {"image", "text"}:
        return {}
    image, text = pair["image"], pair["text"]
    shapes = [_shape(image.backbone), _shape(text.backbone)]
    if not isinstance(image.backbone, ViT) or not isinstance(text.backbone, TextEncoder) or None in shapes:
        return {}
    vit, encoder = image.backbone, text.backbone
    family = next((name for name in FAMILIES if _is(name, image, text)), None)
    if family is None or vit.registers is not None or encoder.types is not None or not vit.pos_embed.requires_grad:
        return {}
    patch = vit.patch_embed.patch_size
    return {
        "family": family,
        "embed_dim": image.embed_dim,
        "image": {**(shapes[0] or {}), "image_size": vit.grid[0] * patch, "patch_size": patch},
        "text": {**(shapes[1] or {}), "vocab_size": encoder.vocab_size, "max_length": encoder.positions.max_length},
    }


def settings(facts: Facts) -> dict[str, Any]:
    """Arguments of the method that fit these facts, as a configuration writes them, for the family's backbones."""
    out: dict[str, Any] = {}
    for name in ("image", "text"):
        tower = facts[name]
        recipe = {"act": tower["act"], "mlp_ratio": ratio(tower["hidden"], tower["dim"])}
        backbone = {key: tower[key] for key in ("dim", "depth", "num_heads", "patch_size") if key in tower}
        backbone["block"] = {key: value for key, value in recipe.items() if value is not None}
        out[name] = {"embed_dim": facts["embed_dim"], "backbone": backbone}
        if facts["family"] == "siglip" and name == "image":
            out[name]["pooling"] = {"num_heads": tower["num_heads"], **backbone["block"]}
    return out


def _is(family: str, image: Tower, text: Tower) -> bool:
    """Whether the towers are built as in this family."""
    vit: Any = image.backbone
    encoder: Any = text.backbone
    stem, linear = vit.patch_embed, (image.projection, text.projection)
    biased = [isinstance(each, nn.Linear) and each.bias is not None for each in linear]
    first = vit.blocks[0]["attn"].norm.eps
    if family == "clip":
        plain = all(isinstance(each, nn.Linear) for each in linear) and not any(biased)
        normed = isinstance(stem.norm, nn.LayerNorm) and stem.norm.eps == first and stem.proj.bias is None
        read = image.pool is None and image.pooling in (None, "cls") and text.pooling == "last" and text.pool is None
        return plain and normed and read and vit.cls_token is not None and encoder.causal
    if not isinstance(image.pool, AttentionPool) or image.pool.norm.eps != first or text.pool is not None:
        return False
    plain = isinstance(image.projection, nn.Identity) and biased[1]
    bare = isinstance(stem.norm, nn.Identity) and stem.proj.bias is not None and vit.cls_token is None
    feed, head = vit.blocks[0]["mlp"].fn, image.pool
    alike = head.mlp.act is feed.act and head.mlp.fc1.out_features == feed.fc1.out_features
    alike = alike and head.attn.num_heads == vit.blocks[0]["attn"].fn.num_heads
    read = text.pooling == "last" and text.padding == "seen" and not encoder.causal
    return plain and bare and alike and read


def _shape(backbone: nn.Module) -> dict[str, Any] | None:
    """Widths and recipe of a stack of plain pre-norm blocks, None for another."""
    stack: Any = getattr(backbone, "blocks", ())
    found: list[tuple[int, int, str, float]] = []
    for block in stack:
        if not isinstance(block, Block) or list(block) != ["attn", "mlp"]:
            return None
        attention, mlp = block["attn"].fn, block["mlp"].fn
        if type(attention) is not Attention or type(mlp) is not MLP or attention.qk_norm or attention.qkv.bias is None:
            return None
        if any(r.place != "pre" or not isinstance(r.layer_scale, nn.Identity) for r in block.values()):
            return None
        act = next((name for name, known in ACTIVATIONS.items() if mlp.act is known), None)
        norms: list[Any] = [backbone.norm, *(residual.norm for residual in block.values())]
        if act is None or any(norm.eps != norms[0].eps for norm in norms):
            return None
        found.append((attention.num_heads, mlp.fc1.out_features, act, norms[0].eps))
    positions = getattr(backbone, "positions", None)
    if len(set(found)) != 1 or not (positions is None or isinstance(positions, Learned)):
        return None
    recipe = dict(zip(("num_heads", "hidden", "act", "eps"), found[0], strict=True))
    return {"dim": backbone.dim, "depth": len(stack), **recipe}


def _block(tower: Facts) -> partial[Block]:
    return partial(
        encoder_block,
        mlp_ratio=ratio(tower["hidden"], tower["dim"]),
        act=tower["act"],
        norm=partial(nn.LayerNorm, eps=tower["eps"]),
    )
