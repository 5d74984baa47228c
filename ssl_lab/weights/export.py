"""A backbone as a folder that timm or transformers opens: written, opened again by that library, and compared."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_lab.backbones.timm import Timm, built_for_one_size
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.types import Pooling
from ssl_lab.weights import io
from ssl_lab.weights.families import LanguageModel
from ssl_lab.weights.look import Look
from ssl_lab.weights.rename import State, Table, rename
from ssl_lab.weights.sources import quiet
from ssl_lab.weights.tables import hf_dinov2, hf_vit, timm_vit

TOLERANCE = 1e-4  # of features of unit size, in float32: a wrong GELU or norm shows at 1e-3, rounding at 1e-6


@dataclass(frozen=True)
class Exported:
    """What was written into a folder, and how far the library's features are from ours."""

    library: str
    difference: float  # largest absolute difference on a random batch
    scale: float  # largest absolute feature
    opened_by: str  # the line of Python that opens it; {} stands for the folder


def to_timm(
    backbone: nn.Module, folder: Path, *, look: Look | None = None, head: tuple[nn.Linear, Pooling] | None = None
) -> Exported:
    """Write `config.json` and `model.safetensors` for `timm.create_model("local-dir:<folder>", pretrained=True)`.

    Args:
        backbone: a ViT, or any timm model.
        folder: exists and is empty.
        look: how the images were prepared, if known.
        head: a ViT's classifier, and what it sees.

    Raises:
        UserError: an architecture without a counterpart, or features that differ.
    """
    import timm

    if isinstance(backbone, Timm):
        state, args = backbone.model.state_dict(), dict(backbone.arguments)
        name, size = args.pop("name"), args.pop("image_size")
        args |= {"num_classes": 0} | ({"img_size": size} if size and built_for_one_size(name) else {})
        chans, size = args.get("in_chans", 3), size or 224
    else:
        facts = _facts(backbone)
        args = timm_vit.arguments(facts)
        state = timm_vit.unfold(rename(backbone.state_dict(), timm_vit.TABLE, back=True))
        name, chans, size = "vit_base_patch16_224", facts["in_chans"], facts["image_size"]
        if head is not None:
            args |= {"num_classes": head[0].out_features, "global_pool": {"cls": "token", "mean": "avg"}[head[1]]}
            state |= {f"head.{key}": value for key, value in head[0].state_dict().items()}
    described = {
        "architecture": name.split(".")[0],
        "num_classes": args["num_classes"],
        "num_features": backbone.dim,
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": args["num_classes"],
            "input_size": [chans, size, size],
            "classifier": "head" if args["num_classes"] else None,
            **(look.timm() if look else {}),
        },
    }
    save_file(
        {key: value.cpu().contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    theirs: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    difference, scale = compare(backbone, theirs.forward_features, (chans, size, size))
    if args["num_classes"] and head is not None:
        x = torch.randn(2, chans, size, size, generator=torch.Generator().manual_seed(0))
        ours = nn.Sequential(*copy.deepcopy([backbone, head[0]])).float().cpu().eval()
        with torch.no_grad():
            gap(ours[1](ours[0](x).pooled(head[1])), theirs(x))
    opener = 'timm.create_model("local-dir:{}", pretrained=True)'
    return Exported(f"timm {timm.__version__}", difference, scale, opener)


def to_hf(backbone: nn.Module, folder: Path, *, look: Look | None = None) -> Exported:
    """Write what `save_pretrained` of transformers writes: a ViTModel, IJepaModel or Dinov2Model (also WithRegisters).

    A language model: see `text_export`.

    Raises:
        UserError: an architecture without a counterpart, transformers missing, or features that differ.
    """
    if isinstance(backbone, LanguageModel):
        from ssl_lab.weights import text_export  # it builds on this module

        return text_export.to_hf(backbone, folder)
    transformers = import_transformers()
    facts = _facts(backbone)
    kind, table = hf_kind(facts)
    config = getattr(transformers, f"{kind}Config")(**_hf_arguments(kind, facts))
    extra = {"add_pooling_layer": False} if kind in ("ViT", "IJepa") else {}
    cls = getattr(transformers, f"{kind}Model")
    write_hf(cls(config, **extra), backbone.state_dict(), table, folder, look)
    with quiet():
        theirs = cls.from_pretrained(folder, **extra).eval()
    shape = (facts["in_chans"], facts["image_size"], facts["image_size"])
    difference, scale = compare(backbone, lambda x: theirs(x).last_hidden_state, shape)
    return Exported(
        f"transformers {transformers.__version__}",
        difference,
        scale,
        f'transformers.{kind}Model.from_pretrained("{{}}")',
    )


def write_hf(theirs: Any, state: State, table: Table, folder: Path, look: Look | None) -> None:
    """Fill a transformers model and save it, with its image processor where `look` is known.

    Only a mask token may stay as it was.

    Raises:
        UserError: a tensor is missing or has no place.
    """
    problems = theirs.load_state_dict(rename(state, table, back=True), strict=False)
    missing = [key for key in problems.missing_keys if not key.endswith("mask_token")]
    if missing or problems.unexpected_keys:
        raise UserError(
            f"{type(theirs).__name__} does not fit: {[*missing, *problems.unexpected_keys][0]!r}; use to=timm"
        )
    with quiet():
        theirs.save_pretrained(folder)
        if look is not None:
            look.hf(import_transformers()).save_pretrained(folder)


@torch.no_grad()
def compare(
    backbone: nn.Module, theirs: Callable[[Tensor], Tensor], shape: tuple[int, int, int]
) -> tuple[float, float]:
    """Largest difference of all tokens on two random images of `shape` (C, H, W), and the largest feature.

    Raises:
        UserError: they differ by more than rounding.
    """
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    encoded = copy.deepcopy(backbone).float().cpu().eval()(x)
    ours, others = torch.cat([encoded.prefix, encoded.tokens], 1), theirs(x)
    if others.dim() == 4:
        others = others.flatten(1, 2) if others.shape[-1] == ours.shape[-1] else others.flatten(2).transpose(1, 2)
    return gap(ours, others)


def gap(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Largest absolute difference and largest value of ours.

    Raises:
        UserError: other shapes, values that are not finite, or a difference beyond rounding.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"the exported model gives {tuple(theirs.shape)}, ours {tuple(ours.shape)}: not exported")
    scale = max(1.0, ours.abs().max().item())
    found = (ours - theirs).abs().max().item()
    if not found <= TOLERANCE * scale:  # also when it is not a number
        raise UserError(
            f"the exported model gives other features than ours (largest difference {found:.1e}): not exported"
        )
    return found, scale


def import_transformers() -> Any:
    """The library, or a UserError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("to=hf needs transformers: pip install 'ssl-lab[hf]'") from error
    return transformers


def instead(backbone: nn.Module) -> str:
    """How weights that no other library reads are used."""
    if io.architecture(backbone):
        return "use to=safetensors"
    return "a network that a configuration builds reads them from the run's folder: weights=<run folder>"


def _facts(backbone: nn.Module) -> dict[str, Any]:
    described = io.architecture(backbone) if isinstance(backbone, ViT) else {}
    if not described:
        raise UserError(f"{type(backbone).__name__} of these parts has no counterpart there; {instead(backbone)}")
    facts: dict[str, Any] = described["arguments"]
    return facts


def hf_kind(facts: dict[str, Any]) -> tuple[str, Table]:
    """Which transformers class has these parts."""
    scaled, cls, registers = facts["layer_scale"] is not None, facts["cls_token"], facts["num_registers"]
    if facts["qk_norm"] or (registers and not (scaled and cls)) or (scaled and not cls):
        parts = f"cls_token={cls}, num_registers={registers}, layer_scale={scaled}, qk_norm={facts['qk_norm']}"
        raise UserError(f"transformers has no ViT with {parts}; use to=timm")
    if scaled:
        return ("Dinov2WithRegisters" if registers else "Dinov2"), hf_dinov2.TABLE
    return ("ViT" if cls else "IJepa"), hf_vit.TABLE


def _hf_arguments(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
    return hf_dinov2.arguments(facts) if kind.startswith("Dinov2") else hf_vit.arguments(facts)
