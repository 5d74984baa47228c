"""`ssl-lab export to=hf` of a LLaVA: the model, and the tokenizer and processor that its run trained it with."""

from pathlib import Path
from typing import Any

from torch import nn

from ssl_lab.cli.partner import require_marker, talk
from ssl_lab.cli.saved import load_config
from ssl_lab.errors import UserError
from ssl_lab.methods.llava import LLaVA
from ssl_lab.weights import vlm_export, vlm_processor
from ssl_lab.weights.export import Exported
from ssl_lab.weights.look import Look
from ssl_lab.weights.vlm_vision import tower


def to_hf(method: nn.Module, folder: Path, look: Look | None, *, run: Path | None, trust: list[str]) -> Exported:
    """Write what `LlavaForConditionalGeneration` and `AutoProcessor` of transformers open.

    Raises:
        UserError: a part without a counterpart, no run folder, or logits that differ.
    """
    assert isinstance(method, LLaVA)
    if run is None:
        raise UserError("to=hf of a LLaVA needs its run folder, where the tokenizer lies: give ckpt=<run folder>")
    config: dict[str, Any] = load_config(run, trust)
    encode, _ = talk(config, run)
    require_marker(method.model, encode, run)
    words = encode.tokenizer
    done = vlm_export.to_hf(method.model, folder, end=encode.end, pad=words.pad)
    if look is not None:
        vision = tower(method.model)
        vlm_processor.write(
            folder,
            tokenizer=run / "tokenizer.json",
            config=encode.settings | {"image_token": encode.marker},
            system=encode.system,
            look=look,
            patch_size=vision.arguments["patch_size"],
            strategy=vision.strategy,
            extra=vision.extra,
        )
    return done
