"""The door of `tuning=...`: between a method with its starting weights and its optimizer, and the way back to a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ssl_lab.cli.compose import build
from ssl_lab.cli.saved import run_folder, without_downloads
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.nn.lora import fuse_
from ssl_lab.nn.tuning import added
from ssl_lab.rng import fold
from ssl_lab.train import checkpoint
from ssl_lab.train.base import Base


def tune(method: nn.Module, config: Mapping[str, Any]) -> Base | None:
    """Apply what `tuning` in a plain configuration says; what its checkpoints leave out, None where all learns.

    Raises:
        UserError: a pattern that fits nothing, a network that cannot be tuned so, or settings without a tuning.
    """
    if not (tuning := config.get("tuning")):
        return None
    if "_target_" not in tuning:
        away = " ".join(f"'~tuning.{name}'" for name in tuning)
        raise UserError(f"tuning=full has no settings, and there are {', '.join(tuning)}: take them away with {away}")
    torch.manual_seed(fold(int(config.get("seed", 0)), 1))
    parts = build(OmegaConf.create(tuning))(method)
    return Base(method, parts, list(starts(config["method"])))


def rebuild(config: Mapping[str, Any]) -> tuple[Method, Base | None]:
    """The method of a saved configuration, for a checkpoint to fill; a whole one needs no starting weights.

    A tuned method comes with the weights that it started from, of which the checkpoint has the checksum alone.

    Raises:
        UserError: those weights are gone.
    """
    if not config.get("tuning"):
        return build(OmegaConf.create(without_downloads(config["method"]))), None
    torch.manual_seed(int(config.get("seed", 0)))
    method = build(OmegaConf.create(config["method"]))
    return method, tune(method, config)


def whole(content: Mapping[str, Any], base: Base | None, path: Any) -> dict[str, Tensor]:
    """The `state_dict` of a checkpoint with what it left out.

    Raises:
        UserError: it was tuned from other weights.
    """
    return (content if base is None else base.put_back(content, path))["state_dict"]


def newest(path: Path, named: str) -> Path:
    """The checkpoint that `path` is, or the newest verified one of the run folder that it is; `named` as a person did.

    Raises:
        UserError: there is none yet.
    """
    found = path if path.is_file() else checkpoint.find(path)
    if found is None:
        raise UserError(f"{named} has no checkpoint yet: train longer, or give another folder")
    return found


def fill(method: nn.Module, base: Base | None, found: Path, content: Mapping[str, Any] | None = None) -> None:
    """Load a checkpoint of a run into its rebuilt method; `content` instead of what is in the file, such as a mean.

    The averaged weights count where there are such.

    Raises:
        UserError: it was tuned from other weights, or belongs to another method than its folder's config.yaml.
    """
    try:
        method.load_state_dict(whole(checkpoint.read(found) if content is None else content, base, found))
    except RuntimeError as error:
        line, folder = str(error).splitlines()[-1].strip(), run_folder(found)
        raise UserError(f"{found} does not fit the method in {folder}/config.yaml: {line}") from None


def plain(network: nn.Module, why: str) -> None:
    """Merge low-rank updates; a network that has something else beside its layers stays a network of this package.

    Raises:
        UserError: it has, and `why` says what needs plain layers.
    """
    fuse_(network)
    if left := added(network):
        raise UserError(f"{why}: {', '.join(left)} beside the layers cannot be merged into them; tuning=lora can")


def starts(node: Any) -> Iterator[str]:
    """Starting weights named anywhere in a method's configuration."""
    for key, value in node.items() if hasattr(node, "items") else ():
        if key == "weights" and isinstance(value, str):
            yield value
        elif key == "pretrained" and value is True:
            yield f"timm:{node.get('name')}"
        else:
            yield from starts(value)
