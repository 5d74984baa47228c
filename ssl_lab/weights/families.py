"""Language models that a few facts describe: what a model is, and the model that facts describe.

Facts are plain JSON: they stand in the header of our files, are read off transformers' and GGUF's configurations, and
are compared before weights are loaded.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Residual
from ssl_lab.nn.ffn import GLU, MLP
from ssl_lab.nn.norm import RMSNorm
from ssl_lab.nn.positions import Learned, Relative, Rotary, Sinusoidal
from ssl_lab.nn.recipes import (
    bert_block,
    gelu_tanh,
    gpt_block,
    layer_norm,
    llama_block,
    rms_norm,
    t5_block,
    transformer_block,
)
from ssl_lab.nn.rope import LinearScaling, Llama3Scaling, Scaling, YaRN

Facts = Mapping[str, Any]
LanguageModel = Decoder | TextEncoder | EncoderDecoder
KINDS: dict[str, type[LanguageModel]] = {
    "bert": TextEncoder,
    "gpt2": Decoder,
    "llama": Decoder,
    "t5": EncoderDecoder,
    "transformer": EncoderDecoder,
}
# What describes a family, in the order of its constructor.
_BASIC = ("family", "vocab_size", "dim", "depth", "num_heads", "hidden", "max_length", "eps")
NAMES = {
    "bert": (*_BASIC, "num_types"),
    "gpt2": (*_BASIC, "tied"),
    "llama": (*_BASIC, "num_kv_heads", "head_dim", "window", "base", "scaling", "tied"),
    "t5": (*_BASIC, "head_dim", "gated", "num_buckets", "max_distance", "scaled", "tied"),
    "transformer": (*_BASIC, "halves", "scaled", "tied"),
}
SCALINGS = {"linear": LinearScaling, "yarn": YaRN, "llama3": Llama3Scaling}
_ACTS = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class _Traits:
    """What tells one recipe of a block from another."""

    place: str
    norm: type[nn.Module]
    act: str
    gated: bool
    bias: bool
    scale: float | None
    positions: type[nn.Module]


_RECIPES: dict[str, tuple[_Traits, ...]] = {
    "bert": (_Traits("post", nn.LayerNorm, "gelu", False, True, None, Learned),),
    "gpt2": (_Traits("pre", nn.LayerNorm, "gelu_tanh", False, True, None, Learned),),
    "llama": (_Traits("pre", RMSNorm, "silu", True, False, None, Rotary),),
    "t5": (
        _Traits("pre", RMSNorm, "relu", False, False, 1.0, Relative),
        _Traits("pre", RMSNorm, "gelu_tanh", True, False, 1.0, Relative),
    ),
    "transformer": (_Traits("post", nn.LayerNorm, "relu", False, True, None, Sinusoidal),),
}


def facts_of(model: nn.Module) -> dict[str, Any]:
    """The facts of a model of ours; empty where no family has such parts (ALiBi, experts, latent attention)."""
    if isinstance(model, EncoderDecoder):
        stacks, positions = [model.encoder, model.decoder], model.source_positions
        facts: dict[str, Any] = {"depth": [len(stack.blocks) for stack in stacks], "scaled": model.scaled}
    elif isinstance(model, Decoder | TextEncoder) and not getattr(model, "causal", False):
        stacks, positions = [model], model.positions
        facts = {"depth": len(model.blocks), "window": getattr(model, "window", None)}
    else:
        return {}
    blocks = [_block_facts(block, positions) for stack in stacks for block in stack.blocks]
    if not blocks or blocks[0] is None or any(block != blocks[0] for block in blocks):
        return {}
    traits, shape = blocks[0]
    family = next((name for name, kind in KINDS.items() if traits in _RECIPES[name] and isinstance(model, kind)), None)
    if family is None:
        return {}
    facts |= {"family": family, "vocab_size": model.vocab_size, "dim": model.dim, "max_length": positions.max_length}
    if isinstance(model, TextEncoder):
        facts["num_types"] = 0 if model.types is None else model.types.num_embeddings
    else:
        facts["tied"] = model.head is None
    if isinstance(positions, Relative):
        facts |= {"num_buckets": positions.table.num_buckets, "max_distance": positions.table.max_distance}
    elif isinstance(positions, Rotary):
        facts |= {"base": positions.base, "rotated": positions.head_dim, "scaling": _scaling(positions.scaling)}
    elif isinstance(positions, Sinusoidal):
        facts["halves"] = positions.halves
    facts |= shape
    return {name: facts[name] for name in NAMES[family]} if _told(model, facts) else {}


def arguments(facts: Facts) -> dict[str, Any]:
    """Arguments of `KINDS[facts["family"]]` for a model with these facts."""
    family, f = facts["family"], facts
    out = {name: f[name] for name in ("vocab_size", "dim", "depth", "num_heads", "max_length")}
    out |= {name: f[name] for name in ("num_types", "window", "scaled", "tied") if name in f}
    shape = {"hidden": f["hidden"], "eps": f["eps"]}
    if family == "llama":
        scaling = dict(f["scaling"] or {})
        stretched = SCALINGS[scaling.pop("kind")](**scaling) if scaling else None
        out["positions"] = functools.partial(Rotary, base=f["base"], head_dim=f["head_dim"], scaling=stretched)
        out["block"] = functools.partial(llama_block, num_kv_heads=f["num_kv_heads"], head_dim=f["head_dim"], **shape)
    elif family == "t5":
        out["positions"] = functools.partial(Relative, num_buckets=f["num_buckets"], max_distance=f["max_distance"])
        out["block"] = functools.partial(t5_block, head_dim=f["head_dim"], gated=f["gated"], **shape)
    elif family == "transformer":
        out["positions"] = functools.partial(Sinusoidal, halves=f["halves"])
        out["block"] = functools.partial(transformer_block, **shape)
    else:
        out["block"] = functools.partial({"gpt2": gpt_block, "bert": bert_block}[family], **shape)
    out["norm"] = functools.partial(rms_norm if family in ("llama", "t5") else layer_norm, eps=f["eps"])
    return out


def make(facts: Facts) -> LanguageModel:
    """The model that facts describe, with new weights."""
    given = arguments(facts)
    if isinstance(given["depth"], list):
        given["depth"] = tuple(given["depth"])
    return KINDS[facts["family"]](**given)


def settings(facts: Facts) -> dict[str, Any]:
    """`arguments` as a configuration writes them: what is called is named by its path."""
    return {name: _setting(value) for name, value in arguments(facts).items()}


def _setting(value: Any) -> Any:
    if isinstance(value, functools.partial):
        given = {name: _setting(each) for name, each in value.keywords.items()}
        return {"_target_": f"{value.func.__module__}.{value.func.__qualname__}", "_partial_": True, **given}
    if isinstance(value, LinearScaling | YaRN | Llama3Scaling):
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **dataclasses.asdict(value)}
    return value


def _scaling(found: Scaling | None) -> dict[str, Any] | None:
    """Its kind and numbers; only the kind "another" for one that facts cannot say."""
    if found is None:
        return None
    if not isinstance(found, LinearScaling | YaRN | Llama3Scaling):
        return {"kind": "another"}
    return {"kind": next(name for name, cls in SCALINGS.items() if type(found) is cls), **dataclasses.asdict(found)}


def _block_facts(block: nn.Module, positions: nn.Module) -> tuple[_Traits, dict[str, Any]] | None:
    """Traits and widths of a block of attention and feed-forward, None for another."""
    if not isinstance(block, Block) or list(block) not in (["attn", "mlp"], ["attn", "cross", "mlp"]):
        return None
    residuals = [residual for residual in block.values() if isinstance(residual, Residual)]
    attention, feed, norm = residuals[0].fn, residuals[-1].fn, residuals[0].norm
    if type(attention) is not Attention or attention.qk_norm or not isinstance(feed, MLP | GLU):
        return None
    if not isinstance(norm, nn.LayerNorm | RMSNorm):
        return None
    if any(residual.scale != 1.0 or residual.gate is not None for residual in residuals):
        return None
    act = next((name for name, known in _ACTS.items() if feed.act is known), "another")
    place, gated, bias = residuals[0].place, isinstance(feed, GLU), attention.qkv.bias is not None
    shape = {
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden": (feed.gate if isinstance(feed, GLU) else feed.fc1).out_features,
        "gated": gated,
        "eps": norm.eps,
    }
    return _Traits(place, type(norm), act, gated, bias, attention.scale, type(positions)), shape


def _told(model: nn.Module, facts: Facts) -> bool:
    """Whether the family's arguments can say all that these facts say, and one epsilon is that of all norms."""
    names, heads = NAMES[facts["family"]], facts["num_heads"]
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm | RMSNorm)}
    return (
        epsilons == {facts["eps"]}
        and ("num_kv_heads" in names or facts["num_kv_heads"] == heads)
        and ("head_dim" in names or facts["head_dim"] * heads == facts["dim"])
        and facts.get("rotated", facts["head_dim"]) == facts["head_dim"]
        and (facts.get("scaling") or {}).get("kind") != "another"
        and ("window" in names or facts.get("window") is None)
    )
