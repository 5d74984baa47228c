"""Where backbone weights come from: timm, Hugging Face, files and run folders, all read into our names."""

import difflib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.weights.rename import State, Table, rename
from ssl_lab.weights.tables import hf_dinov2, hf_vit, timm_vit

HF_TABLES: dict[str, Table] = {
    "vit": hf_vit.TABLE,
    "vit_mae": hf_vit.TABLE,
    "ijepa": hf_vit.TABLE,
    "dinov2": hf_dinov2.TABLE,
    "dinov2_with_registers": hf_dinov2.TABLE,
}
PAIRS = ("clip", "siglip")  # of which the image encoder is read
UNTOLD = "%s does not say its %s: unchecked, they are taken from here; they must be those of its run's config.yaml"
_INSTEAD = "give last.safetensors of the run once it is done, or export it"
HEADER = "ssl_lab"  # key of our entry in a safetensors header


@dataclass(frozen=True)
class Source:
    """Backbone weights in our names, with what the tensors alone do not tell, where it is known."""

    state: State
    num_heads: int | None = None
    grid: tuple[int, int] | None = None  # of the position table
    antialias: bool = True  # how its library resamples that table: timm with, transformers mostly without
    recipe: Mapping[str, Any] = field(default_factory=dict)  # `act` and `eps` of its blocks, where they are not usual


def read(spec: str) -> Source:
    """Weights named by `timm:<name>`, `hf:<folder or repository>`, a file or a run folder.

    Classification heads, poolers and decoders are left behind.

    Raises:
        UserError: nothing there, no network, a corrupt or unknown file, or an architecture that our ViT cannot express.
    """
    kind, colon, name = spec.partition(":")
    if colon and kind == "timm":
        return _from_timm(name)
    if colon and kind == "hf":
        return _from_hf(name)
    return _from_file(Path(spec))


def _from_timm(name: str) -> Source:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    check_timm_name(name)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UserError(
            f"timm:{name}: no weights ({first_line(error)}); without a network, fetch its safetensors file "
            "elsewhere and give its path"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"timm:{name} is a {type(model).__name__}, not a ViT; use backbone=timm with name={name} instead"
        )
    block: Any = model.blocks[0]
    act = getattr(block.mlp, "act", None)
    if not isinstance(act, nn.GELU) or act.approximate != "none":
        raise UserError(
            f"timm:{name} uses the activation {act}, our ViT exact GELU; use backbone=timm with name={name}"
        )
    state = rename(timm_vit.fold(model.state_dict(), model.patch_embed.num_patches), timm_vit.TABLE)
    return Source(state, block.attn.num_heads, tuple(model.patch_embed.grid_size))


def check_timm_name(name: str) -> None:
    """Refuse an architecture that timm does not know, with the nearest names.

    Raises:
        UserError: unknown name.
    """
    import timm

    architecture = name.split(".")[0]
    if ":" in name or timm.is_model(architecture):
        return
    near = difflib.get_close_matches(architecture, timm.list_models(), 3)
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise UserError(f"timm has no model {name!r}; {hint}")


def hf_config(name: str) -> tuple[Any, Any]:
    """The library transformers, and the configuration of one of its models: a folder or a repository.

    Raises:
        UserError: transformers is missing, or there is no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"hf:{name} needs transformers: pip install 'ssl-lab[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"hf:{name}: no config.json found ({first_line(error)}); give a folder written by save_pretrained, or a "
            "repository name and a network"
        ) from error
    return transformers, config


def _from_hf(name: str) -> Source:
    transformers, config = hf_config(name)
    if config.model_type.removesuffix("_vision_model") in PAIRS:
        from ssl_lab.weights.towers import image_tower

        return image_tower(name, transformers, config)
    if config.model_type not in HF_TABLES:
        raise UserError(f"hf:{name} is a {config.model_type!r}; a ViT takes {', '.join((*HF_TABLES, *PAIRS))}")
    if config.hidden_act != "gelu" or getattr(config, "use_swiglu_ffn", False) or not config.qkv_bias:
        raise UserError(f"hf:{name}: our ViT has exact GELU, no SwiGLU, and qkv biases; this model differs")
    extra = {"add_pooling_layer": False} if config.model_type in ("vit", "ijepa") else {}
    try:
        with quiet():
            model, info = transformers.AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **extra
            )
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"hf:{name}: the weights lack {missing[0]!r} ({len(missing)} missing); is the file complete?")
    (height, width), (rows, columns) = _pair(config.image_size), _pair(config.patch_size)
    state = rename(model.state_dict(), HF_TABLES[config.model_type])
    antialias = config.model_type == "dinov2_with_registers"
    return Source(state, config.num_attention_heads, (height // rows, width // columns), antialias)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports of unused heads; what is missing, we say ourselves."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _from_file(path: Path) -> Source:
    path = inside(path)
    if path.suffix == ".safetensors":
        state, header = read_safetensors(path)
        arguments = header.get("arguments", {})
    else:
        state, arguments = read_checkpoint(path), _config_beside(path)
    heads, size, patch = (arguments.get(name) for name in ("num_heads", "image_size", "patch_size"))
    grid = (size // patch, size // patch) if isinstance(size, int) and isinstance(patch, int) else None
    return Source(_ours(state, path), heads, grid)


def inside(path: Path) -> Path:
    """The weights file of a run folder; any other path as it is."""
    if path.is_dir():
        steps = sorted(path.glob("checkpoints/step=*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
        found = [
            p for p in (path / "last.safetensors", *reversed(steps), path / "checkpoints" / "last.ckpt") if p.is_file()
        ]
        if not found:
            hint = f"; a Hugging Face folder is named hf:{path}" if (path / "config.json").is_file() else ""
            raise UserError(f"{path} holds neither last.safetensors nor checkpoints/*.ckpt{hint}")
        return found[0]
    if not path.is_file():
        raise UserError(f"no weights at {path}: it is neither a file, a run folder, timm:<name> nor hf:<repository>")
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"):
        raise UserError(
            f"{path}: weights are read from .safetensors, .ckpt, .pt or .pth, not {path.suffix or 'a bare name'}"
        )
    return path


def read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    """Tensors and our header (empty if the file is not ours).

    Raises:
        UserError: not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118  (no Mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no complete safetensors file ({first_line(error)}); export or copy it again"
        ) from error


def read_checkpoint(path: Path, instead: str = _INSTEAD) -> State:
    """Tensors of a Lightning checkpoint or of a saved state dict; `instead`: what to do about one without its base.

    Raises:
        UserError: no such thing.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({first_line(error)}); is it complete, and a file of weights alone?"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("base"), dict):
        raise UserError(f"{path} holds what was tuned alone: {instead}")
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else {}
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; expected a Lightning checkpoint or a plain state dict")
    return state


def _config_beside(path: Path) -> dict[str, Any]:
    """Arguments of the encoder from the config.yaml of the run that the checkpoint lies in, if there is one."""
    file = path.parent.parent / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.is_file() else None
        encoder = config["method"]["encoder"] if config else {}
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError):
        return {}
    return encoder if isinstance(encoder, dict) else {}


def _ours(state: State, path: Path) -> State:
    """The backbone in a state dict of our own or of a timm ViT, in our names and without heads."""
    foreign = any(key.startswith(("encoder.layer.", "encoder.layers.")) for key in state)
    encoder = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    if encoder and not foreign:
        return encoder
    if any(".attn.fn." in key or key.startswith("model.") for key in state):
        return state
    if "blocks.0.norm1.weight" in state:
        return rename(timm_vit.fold(state), timm_vit.TABLE)
    raise UserError(
        f"{path} (first key {next(iter(state), None)!r}) is no backbone of ours and no timm ViT; give a transformers "
        f"model by its folder, hf:{path.parent}"
    )


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def first_line(error: BaseException) -> str:
    """First line of a foreign error, shortened."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
