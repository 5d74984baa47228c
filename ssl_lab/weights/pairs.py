"""Weights of towers that belong together: open_clip's CLIP, transformers' CLIP and SigLIP, and our own runs."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.weights import io, sources
from ssl_lab.weights.pair_facts import Facts, facts_of, settings
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.tables import hf_clip, hf_siglip, open_clip

log = logging.getLogger(__name__)
HF = {"clip": hf_clip, "siglip": hf_siglip}
BACKBONES = {  # what to choose for a family
    "clip": "backbone@method.image.backbone=clip_vit backbone@method.text.backbone=clip_text",
    "siglip": "backbone@method.image.backbone=siglip_vit backbone@method.text.backbone=siglip_text",
}
_TEXT_POSITIONS = "towers.text.backbone.positions.weight"
_IMAGE_POSITIONS = "towers.image.backbone.pos_embed"


@dataclass(frozen=True)
class Source:
    """Weights in our names, with the facts that are known (empty for a run of ours)."""

    state: State
    facts: Facts = field(default_factory=dict)
    antialias: bool = True  # how its library resamples positions


def read(spec: str) -> Source:
    """Weights of a pair of towers.

    Args:
        spec: `hf:<folder or repository>` of a CLIPModel or SiglipModel; `open_clip:<folder, file or name/tag>`, e.g.
            `open_clip:ViT-B-32/openai`; a run folder or .ckpt of ours.

    Raises:
        UserError: nothing there, no network, a corrupt file, or an architecture that our towers cannot express.
    """
    kind, colon, name = spec.partition(":")
    if colon and kind == "hf":
        return _from_hf(name)
    if colon and kind == "open_clip":
        return _from_open_clip(name)
    path = Path(spec)
    if path.is_dir():
        steps = sorted(path.glob("checkpoints/step=*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
        found = [p for p in (*reversed(steps), path / "checkpoints" / "last.ckpt") if p.is_file()]
        if not found:
            raise UserError(f"{spec} holds no checkpoints/*.ckpt; give a run folder, hf:<folder> or open_clip:<folder>")
        path = found[0]
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is one network alone; give the run folder, a .ckpt or hf:<folder>")
    state = sources.read_checkpoint(sources.inside(path), "export it with `ssl-lab export to=hf` and give hf:<folder>")
    if not any(key.startswith("towers.") for key in state):
        raise UserError(f"{path} (first key {next(iter(state), None)!r}) is no CLIP or SigLIP of ours")
    return Source(state)


def load(method: nn.Module, spec: str) -> None:
    """Fill the towers, scale and bias of a `CLIP` or `SigLIP` with the weights named by `spec`, see `read`.

    Positions of images of another size are resampled; a shorter text context takes the first positions.

    Raises:
        UserError: as `read`, another family, another vocabulary, or a longer context.
        OtherArchitecture: another size; the message says what to set.
    """
    source = read(spec)
    if source.facts:
        here = facts_of(method)
        _require_fit(here, source.facts, spec)
        if source.facts["image"]["act"] is None:
            act, other = here["image"]["act"], "gelu" if here["image"]["act"] == "quick_gelu" else "quick_gelu"
            words = " ".join(f"method.{tower}.backbone.block.act={other}" for tower in ("image", "text"))
            log.warning("%s does not say its activation, so %s is taken; for the other one: %s", spec, act, words)
    else:
        log.warning(sources.UNTOLD, spec, "heads, epsilon and activation")
    own, state = method.state_dict(), dict(source.state)
    ours, theirs = own.get(_IMAGE_POSITIONS), state.get(_IMAGE_POSITIONS)
    if ours is not None and theirs is not None and ours.shape[1] != theirs.shape[1]:
        prefix = int("towers.image.backbone.cls_token" in own)
        new, old = ([round((table.shape[1] - prefix) ** 0.5)] * 2 for table in (ours, theirs))
        state[_IMAGE_POSITIONS] = resample_abs_pos_embed(theirs, new, old, prefix, antialias=source.antialias)
    ours, theirs = own.get(_TEXT_POSITIONS), state.get(_TEXT_POSITIONS)
    if ours is not None and theirs is not None:
        if len(ours) > len(theirs):
            raise UserError(
                f"{spec} reads captions of {len(theirs)} tokens, not {len(ours)}: set "
                f"data.train.context_length={len(theirs)}"
            )
        state[_TEXT_POSITIONS] = theirs[: len(ours)]
    if problems := io.differences(own, state):
        raise UserError(f"{spec} does not fit these towers: {'; '.join(problems[:4])}; choose other backbones")
    method.load_state_dict(state)


def _require_fit(here: Facts, there: Facts, spec: str) -> None:
    """Refuse what no resampling can make fit."""
    family = there["family"]
    if not here or here["family"] != family:
        raise UserError(
            f"{spec} is a {family}, and these towers are not built so: set method={family} {BACKBONES[family]}"
        )
    ours, theirs = _flat(here), _flat(there)
    if ours["text.vocab_size"] != theirs["text.vocab_size"]:
        raise UserError(
            f"{spec} reads a vocabulary of {theirs['text.vocab_size']} tokens, the data write one of "
            f"{ours['text.vocab_size']}: set data.tokenizer to the tokenizer of these weights"
        )
    free = ("text.max_length", "image.image_size")
    wrong = {k: v for k, v in theirs.items() if k not in free and v is not None and ours[k] != v}
    if wrong:
        told = "; ".join(f"{name} {value} there, {ours[name]} here" for name, value in wrong.items())
        if set(wrong) <= {"image.eps", "text.eps"}:
            raise UserError(f"{spec} does not fit these towers: {told}; set eps of their norms")
        fitting = settings(there)
        words = " ".join(f"method.{name}={io.word(value)}" for name, value in _flat(fitting).items())
        raise io.OtherArchitecture(f"{spec} does not fit these towers: {told}; to match it: {words}", fitting)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= {f"{name}.{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {name: value}
    return out


def _from_hf(name: str) -> Source:
    transformers, config = sources.hf_config(name)
    if (table := HF.get(config.model_type)) is None:
        raise UserError(f"hf:{name} is a {config.model_type!r}; a pair of towers takes {', '.join(HF)}")
    if (reason := table.refusal(config)) is not None:
        raise UserError(f"hf:{name}: {reason}; use other weights")
    cls: Any = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[config.model_type]
    try:
        with sources.quiet():
            model, info = cls.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({sources.first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"hf:{name}: the weights lack {missing[0]!r} ({len(missing)} missing); is the file complete?")
    return Source(rename(table.fold(model.state_dict()), table.TABLE), table.facts(config), antialias=False)


def _from_open_clip(name: str) -> Source:
    """A folder with open_clip_config.json, a file of tensors, or a model and tag that open_clip knows."""
    path, config = Path(name), None
    if path.is_dir():
        found = [
            p for p in (path / f"open_clip_{n}" for n in ("model.safetensors", "pytorch_model.bin")) if p.is_file()
        ]
        if not found or not (path / "open_clip_config.json").is_file():
            raise UserError(f"open_clip:{name} holds no open_clip_config.json with open_clip_model.safetensors")
        config, path = json.loads((path / "open_clip_config.json").read_text())["model_cfg"], found[0]
    if path.is_file():
        state = sources.read_safetensors(path)[0] if path.suffix == ".safetensors" else sources.read_checkpoint(path)
    else:
        config, state = _by_name(name)
    if config is not None and (reason := open_clip.refusal(config)) is not None:
        raise UserError(f"open_clip:{name}: {reason}, which our towers do not have; use other weights")
    folded = open_clip.fold(state)
    return Source(rename(folded, open_clip.TABLE), open_clip.facts(folded, config))


def _by_name(name: str) -> tuple[dict[str, Any], State]:
    try:
        import open_clip as library  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise UserError(
            f"open_clip:{name} is no file or folder, and to fetch it by name needs: pip install open_clip_torch"
        ) from error
    architecture, _, tag = name.rpartition("/")
    try:
        model = library.create_model(architecture, pretrained=tag)
        config = dict(library.get_model_config(architecture))
    except Exception as error:
        raise UserError(
            f"open_clip:{name}: no such weights ({sources.first_line(error)}); write <model>/<tag>, e.g. "
            "ViT-B-32/openai, or give a folder or file"
        ) from error
    config["quick_gelu"] = config.get("quick_gelu", False) or tag == "openai" or "quickgelu" in architecture
    return config, model.state_dict()
