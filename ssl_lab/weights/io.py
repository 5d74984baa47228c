"""Weights into a backbone, a backbone into a file, and back from the file alone."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT, layer_norm
from ssl_lab.errors import UserError
from ssl_lab.files import replacing
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, encoder_block
from ssl_lab.nn.embed import PatchEmbed
from ssl_lab.nn.ffn import MLP, ratio
from ssl_lab.nn.tuning import added
from ssl_lab.weights import families, towers
from ssl_lab.weights.rename import State
from ssl_lab.weights.sources import HEADER, Source, read, read_safetensors

# In YAML a layer to be made is named by its path.
_QK_NORM = {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-6}


class OtherArchitecture(UserError):
    """Weights of another ViT; `arguments` are those of ours that would fit, `mlp_ratio` and so on under `block`."""

    def __init__(self, message: str, arguments: dict[str, Any]) -> None:
        super().__init__(message)
        self.arguments = arguments


def load(backbone: nn.Module, spec: str) -> None:
    """Fill `backbone` with the weights named by `spec`, every tensor or none.

    Args:
        backbone: a `ViT`; files and run folders also serve any other backbone whose names they hold.
        spec: `timm:<name>`, `hf:<folder or repository>`, a .safetensors or .ckpt file, or a run folder.

    A position table of another size is resampled by the rule of the library that it comes from (bicubic; antialiased
    but for most of transformers' models), the class position kept.

    Raises:
        UserError: nothing there, or tensors that fit nowhere.
        OtherArchitecture: another ViT; the message says in what it differs, and what to set.
    """
    source = read(spec)
    own = backbone.state_dict()
    state = _resampled(source, own, getattr(backbone, "grid", None), spec)
    here, there = (_facts(each) for each in (own, state))
    if here and there:
        here["num_heads"] = num_heads(backbone)
        there["num_heads"] = source.num_heads or here["num_heads"]
        if wrong := [name for name in here if there[name] != here[name]]:
            told = "; ".join(f"{name} {there[name]} there, {here[name]} here" for name in wrong)
            fitting = _settings({name: there[name] for name in wrong})
            named = {"stem.in_chans" if name == "in_chans" else name: value for name, value in flat(fitting).items()}
            words = " ".join(f"method.encoder.{name}={word(value)}" for name, value in named.items())
            raise OtherArchitecture(f"{spec} does not fit this backbone: {told}; to match it: {words}", fitting)
    if problems := differences(own, state):
        raise UserError(
            f"{spec} does not fit this backbone: {'; '.join(problems[:4])}; choose another backbone or other weights"
        )
    if other := towers.unlike(backbone, source.recipe):
        told = "; ".join(f"{name} {there} there, {here} here" for name, (there, here, _) in other.items())
        block = dict(argument for _, _, argument in other.values())
        words = " ".join(f"method.encoder.block.{name}={word(value)}" for name, value in block.items())
        raise OtherArchitecture(f"{spec} does not fit this backbone: {told}; to match it: {words}", {"block": block})
    backbone.load_state_dict(state)


def save(backbone: nn.Module, path: str | Path) -> None:
    """Write a safetensors file that `build` needs nothing else for; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # copied: a file of safetensors has no two names for one tensor
    state = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, metadata={"format": "pt", HEADER: json.dumps(architecture(backbone))})


def build(path: str | Path) -> ViT | Timm | families.LanguageModel:
    """The backbone that `save` wrote, with its weights.

    Raises:
        UserError: no such file, or one without a known architecture in its header.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last.safetensors"
    if not path.is_file():
        raise UserError(f"no weights at {path}; give a .safetensors file or a run folder that holds last.safetensors")
    state, header = read_safetensors(path)
    kind, arguments = header.get("class"), header.get("arguments", {})
    if kind not in _MAKERS:
        raise UserError(
            f"{path} does not say what it is (no architecture in its header); give it as weights= of a backbone"
        )
    backbone = _MAKERS[kind](arguments)
    if problems := differences(backbone.state_dict(), state):
        raise UserError(f"{path}: header and tensors disagree: {'; '.join(problems[:4])}")
    backbone.load_state_dict(state)
    return backbone


def architecture(backbone: nn.Module) -> dict[str, Any]:
    """Class and constructor arguments as plain JSON; empty for a backbone of other parts."""
    if added(backbone):
        return {}
    if isinstance(backbone, Timm):
        return {"class": "Timm", "arguments": backbone.arguments}
    if facts := families.facts_of(backbone):
        return {"class": families.KINDS[facts["family"]].__name__, "arguments": facts}
    if type(backbone) is not ViT or not all(map(_plain, backbone.blocks)):
        return {}
    stem = backbone.patch_embed
    if stem.proj.bias is None or not isinstance(stem.norm, nn.Identity) or backbone.norm.eps != layer_norm(1).eps:
        return {}
    facts = _facts(backbone.state_dict())
    return {
        "class": "ViT",
        "arguments": {
            "dim": backbone.dim,
            "depth": len(backbone.blocks),
            "num_heads": num_heads(backbone),
            "image_size": backbone.grid[0] * facts["patch_size"],
            "patch_size": facts["patch_size"],
            "in_chans": facts["in_chans"],
            "mlp_ratio": facts["mlp_ratio"],
            "cls_token": facts["cls_token"],
            "num_registers": facts["num_registers"],
            "layer_scale": 1.0 if facts["layer_scale"] else None,
            "qk_norm": facts["qk_norm"],
            "positions": "learned" if backbone.pos_embed.requires_grad else "sincos",
        },
    }


def vit(arguments: Mapping[str, Any]) -> ViT:
    """A ViT from the arguments that `architecture` gives."""
    arguments = dict(arguments)
    recipe = {name: arguments.pop(name) for name in ("mlp_ratio", "layer_scale", "qk_norm")}
    recipe["qk_norm"] = layer_norm if recipe["qk_norm"] else None
    stem = functools.partial(PatchEmbed, in_chans=arguments.pop("in_chans", 3))
    return ViT(**arguments, stem=stem, block=functools.partial(encoder_block, **recipe))


_MAKERS: dict[str, Callable[[Mapping[str, Any]], ViT | Timm | families.LanguageModel]] = {
    "ViT": vit,
    "Timm": lambda arguments: Timm(**arguments),
    **{kind.__name__: families.make for kind in families.KINDS.values()},
}


def num_heads(backbone: nn.Module) -> int | None:
    """Attention heads of a transformer of ours, None for anything else."""
    return next((module.num_heads for module in backbone.modules() if isinstance(module, Attention)), None)


def _plain(block: nn.Module) -> bool:
    """Whether `encoder_block` made it, so that a handful of arguments describe it."""
    if not isinstance(block, Block) or list(block) != ["attn", "mlp"]:
        return False
    attention, mlp = block["attn"].fn, block["mlp"].fn
    if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
        return False
    norms = [attention.q_norm, *(residual.norm for residual in block.values())]
    known = [isinstance(norm, nn.LayerNorm) and norm.eps == layer_norm(1).eps for norm in norms]
    return (known[0] or isinstance(norms[0], nn.Identity)) and all(known[1:]) and mlp.act is F.gelu


def _resampled(source: Source, own: State, grid: tuple[int, int] | None, spec: str) -> State:
    """The source's state with its position table on our grid."""
    table, prefix = source.state.get("pos_embed"), int("cls_token" in source.state)
    if table is None or grid is None or "pos_embed" not in own or source.grid == grid:
        return source.state
    patches = table.shape[1] - prefix
    if source.grid is None and patches == grid[0] * grid[1]:
        return source.state
    side = math.isqrt(patches)
    old = source.grid or (side, side)
    if old[0] * old[1] != patches:
        raise UserError(f"{spec}: {patches} positions form no grid of {old[0]} x {old[1]}; they cannot be resampled")
    table = resample_abs_pos_embed(table, list(grid), list(old), prefix, antialias=source.antialias)
    return source.state | {"pos_embed": table}


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Why `state` cannot fill `own`, tensor by tensor; empty = it can."""
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    if shapes == theirs:
        return []
    problems = [
        f"{key} {theirs[key]} there, {shapes[key]} here"
        for key in shapes
        if key in theirs and theirs[key] != shapes[key]
    ]
    problems += [f"no {key} there" for key in shapes if key not in theirs]
    return problems + [f"{key} has no place here" for key in theirs if key not in shapes]


def _facts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors of a ViT say of its architecture; empty for anything else."""
    patch, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fn.fc1.weight")
    if patch is None or hidden is None:
        return {}
    registers = state.get("registers")
    return {
        "dim": patch.shape[0],
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "patch_size": patch.shape[-1],
        "in_chans": patch.shape[1],
        "mlp_ratio": ratio(hidden.shape[0], hidden.shape[1]),
        "cls_token": "cls_token" in state,
        "num_registers": 0 if registers is None else registers.shape[1],
        "layer_scale": "blocks.0.attn.layer_scale.gamma" in state,
        "qk_norm": "blocks.0.attn.fn.q_norm.weight" in state,
    }


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with those of a block as `block.<name>`."""
    block = {f"block.{name}": value for name, value in arguments.get("block", {}).items()}
    return {name: value for name, value in arguments.items() if name != "block"} | block


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ViT`, those of its blocks under `block`, that make a backbone with these facts."""
    out = {name: value for name, value in facts.items() if name not in ("mlp_ratio", "layer_scale", "qk_norm")}
    block = {name: facts[name] for name in ("mlp_ratio", "layer_scale", "qk_norm") if name in facts}
    if "layer_scale" in block:
        block["layer_scale"] = 1.0 if block["layer_scale"] else None  # the weights say how much
    if "qk_norm" in block:
        block["qk_norm"] = _QK_NORM if block["qk_norm"] else None
    return out | ({"block": block} if block else {})


def word(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{word(each)}" for name, each in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
