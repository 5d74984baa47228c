"""CLIP and SigLIP as folders that open_clip or transformers opens: written, opened again by that library, compared."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.weights.export import Exported, gap, import_transformers
from ssl_lab.weights.look import Look
from ssl_lab.weights.pair_facts import facts_of
from ssl_lab.weights.pairs import HF
from ssl_lab.weights.rename import rename
from ssl_lab.weights.sources import quiet
from ssl_lab.weights.tables import open_clip

log = logging.getLogger(__name__)
Embed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and token ids -> embeddings of both


def to_hf(method: nn.Module, folder: Path, *, look: Look | None = None, eos: int | None = None) -> Exported:
    """Write what `save_pretrained` of transformers writes, for a CLIPModel or SiglipModel.

    Args:
        method: a `CLIP` or `SigLIP`.
        folder: exists and is empty.
        look: how the images were prepared, if known.
        eos: token that ends a caption; None = the largest id.

    Raises:
        UserError: towers without a counterpart, transformers missing, or embeddings that differ.
    """
    transformers = import_transformers()
    facts = _facts(method, "transformers")
    family, table = facts["family"], HF[facts["family"]]
    eos = facts["text"]["vocab_size"] - 1 if eos is None else eos
    if family == "clip" and eos == 2:
        raise UserError(
            "transformers' CLIP reads the largest id where the end token has id 2, as this tokenizer's has; use "
            "to=open_clip"
        )
    name = {"clip": "CLIP", "siglip": "Siglip"}[family]
    cls, config = (getattr(transformers, name + kind) for kind in ("Model", "Config"))
    theirs = cls(config(**table.arguments(facts, eos)))
    theirs.load_state_dict(table.unfold(rename(method.state_dict(), table.TABLE, back=True)))
    with quiet():
        theirs.save_pretrained(folder)
        if look is not None:
            look.hf(transformers).save_pretrained(folder)
        again = cls.from_pretrained(folder).eval()

    def embed(image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = again(pixel_values=image, input_ids=tokens)
        return out.image_embeds, out.text_embeds

    found, scale = compare(method, embed, facts, eos)
    return Exported(
        f"transformers {transformers.__version__}", found, scale, f'transformers.{name}Model.from_pretrained("{{}}")'
    )


def to_open_clip(method: nn.Module, folder: Path, *, look: Look | None = None, eos: int | None = None) -> Exported:
    """Write `open_clip_config.json` and `open_clip_model.safetensors` for open_clip's `local-dir:<folder>`.

    Arguments as `to_hf`; a SigLIP has no counterpart in its plain layout.

    Raises:
        UserError: towers without a counterpart, open_clip missing, or embeddings that differ.
    """
    try:
        import open_clip as library  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise UserError("to=open_clip needs open_clip: pip install open_clip_torch") from error
    facts = _facts(method, "open_clip")
    if facts["family"] != "clip":
        raise UserError("open_clip's layout has CLIP's towers, not SigLIP's; use to=hf")
    state = open_clip.unfold(rename(method.state_dict(), open_clip.TABLE, back=True))
    save_file(
        {key: value.cpu().contiguous() for key, value in state.items()},
        folder / "open_clip_model.safetensors",
        {"format": "pt"},
    )
    model = open_clip.arguments(facts, eos)
    if "logit_bias" in state:
        model["init_logit_bias"] = float(state["logit_bias"])
    described = {"model_cfg": model, "preprocess_cfg": look.open_clip() if look else {}}
    if look is not None and look.resize != look.size:
        log.warning("open_clip has no crop_pct: its preprocessing shows all of the shorter side, unlike the run's")
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    again = library.create_model(f"local-dir:{folder}", precision="fp32").eval()
    found, scale = compare(method, lambda image, tokens: again(image, tokens)[:2], facts, eos)
    opener = 'open_clip.create_model_and_transforms("local-dir:{}")'
    return Exported(f"open_clip {library.__version__}", found, scale, opener)


@torch.no_grad()
def compare(method: nn.Module, embed: Embed, facts: dict[str, Any], eos: int | None) -> tuple[float, float]:
    """Largest difference of both embeddings on two random images and texts, and the largest value.

    Raises:
        UserError: they differ by more than rounding.
    """
    generator, (image, text) = torch.Generator().manual_seed(0), (facts["image"], facts["text"])
    pixels = torch.randn(2, 3, image["image_size"], image["image_size"], generator=generator)
    end = text["vocab_size"] - 1 if eos is None else eos
    length = text["max_length"]
    tokens = torch.randint(0, text["vocab_size"] - 1, (2, length), generator=generator)
    tokens = tokens.masked_fill(tokens == end, (end + 1) % (text["vocab_size"] - 1))
    ends = torch.tensor([[length - 1], [length // 2]])
    at = torch.arange(length)
    tokens = tokens.masked_fill(at == ends, end).masked_fill(at > ends, 0)
    ours: Any = copy.deepcopy(method).float().cpu().eval()
    batch = {"image": pixels, "tokens": tokens, "valid": at <= ends}
    found = [
        gap(a, b) for a, b in zip((ours.embed_image(batch), ours.embed_text(batch)), embed(pixels, tokens), strict=True)
    ]
    return max(each[0] for each in found), max(each[1] for each in found)


def _facts(method: nn.Module, library: str) -> dict[str, Any]:
    facts = facts_of(method)
    if not facts:
        raise UserError(
            f"{library} knows CLIP's and SigLIP's own towers (backbones clip_vit and clip_text, siglip_vit and "
            "siglip_text), not these; use to=safetensors for the image tower"
        )
    return facts
