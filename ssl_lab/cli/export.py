"""`ssl-lab export`: weights of a run for timm, Hugging Face or plain safetensors, compared before it says done."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.cli import export_llava
from ssl_lab.cli.saved import load_config, run_folder
from ssl_lab.cli.tuned import fill, plain, rebuild
from ssl_lab.data import tokenizer
from ssl_lab.data.views import STATS, Resize
from ssl_lab.errors import UserError
from ssl_lab.methods.llava import LLaVA
from ssl_lab.methods.mae import MAE
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.train import average as mean
from ssl_lab.train import checkpoint
from ssl_lab.types import EmbedsPairs
from ssl_lab.weights import export, io, pairs_export, text_export
from ssl_lab.weights.export import Exported
from ssl_lab.weights.families import LanguageModel
from ssl_lab.weights.look import Look
from ssl_lab.weights.sources import quiet
from ssl_lab.weights.tables import hf_mae, hf_vit

Writer = Callable[[nn.Module, Path, Look | None], Exported]


def run(cfg: DictConfig) -> None:
    """Read `ckpt`, write `out`, and say how to open it.

    Raises:
        UserError: nothing to read, an unknown `to`, an architecture that the library lacks, or features that differ.
    """
    writers: dict[str, Writer] = {
        "timm": _timm,
        "hf": functools.partial(_hf, run=run_folder(Path(str(cfg.ckpt)))),
        "safetensors": _safetensors,
        "open_clip": _open_clip,
    }
    if cfg.to not in writers:
        raise UserError(f"to={cfg.to}: choose one of {', '.join(writers)}")
    path = Path(str(cfg.ckpt))
    out = Path(cfg.out) if cfg.out else (run_folder(path) or path.parent) / "export" / cfg.to
    if out.is_file() or out.suffix == ".safetensors":
        raise UserError(f"out={out} must be a folder; the files inside have the names that the library expects")
    method, look = _read(path, list(cfg.trust), cfg.average)
    if isinstance(method, EmbedsPairs):
        writers |= _of_pairs(run_folder(path))
    if isinstance(method, LLaVA):
        writers["hf"] = functools.partial(export_llava.to_hf, run=run_folder(path), trust=list(cfg.trust))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        done = writers[cfg.to](method, Path(scratch), look)
        for file in (run_folder(path) or path.parent).glob("tokenizer*.json"):
            if not (Path(scratch) / file.name).exists():
                shutil.copy(file, scratch)
        out.mkdir(exist_ok=True)
        names = sorted(os.listdir(scratch))
        for name in names:
            os.replace(Path(scratch) / name, out / name)
    print(f"{out}: {', '.join(names)}")
    print(
        f"opened again with {done.library}: largest difference {done.difference:.1e} in values up to {done.scale:.1f}"
    )
    print(f"open it with {done.opened_by.format(out)}")
    if look is None and cfg.to != "safetensors" and not isinstance(_backbone(method), LanguageModel):
        print("how its images were cut and normalised is not known here: prepare them as in training")


def _read(path: Path, trust: list[str], average: int) -> tuple[nn.Module, Look | None]:
    """The method of a run folder or checkpoint, or the backbone of a safetensors file; how its images were normalised.

    Raises:
        UserError: nothing there, or a checkpoint that lies in no run folder.
    """
    if path.suffix == ".safetensors":
        return io.build(path), None
    if not path.exists():
        raise UserError(
            f"ckpt={path}: no such file or folder; give a run folder, a .ckpt in one, or a .safetensors file"
        )
    folder = run_folder(path)
    if folder is None:
        raise UserError(f"ckpt={path}: no config.yaml beside it, so its architecture is unknown; give a run folder")
    found = path if path.is_file() else checkpoint.find(path)
    if found is None:
        return io.build(path), None
    config = load_config(folder, trust)
    method, base = rebuild(config)
    fill(method, base, found, mean.read(path, average) if average > 1 else None)
    plain(method, f"ckpt={path} cannot be exported")
    return method, _look((config.get("data") or {}).get("eval_views") or {})


def _look(views: Mapping[str, Any]) -> Look | None:
    """How a run sees images, by its configuration; None where its views are none of ours."""
    views = views.get("image", views)  # of images with captions
    if views.get("_target_") != f"{Resize.__module__}.{Resize.__qualname__}":
        return None
    resize = Resize(**{name: value for name, value in views.items() if not name.startswith("_")})
    return Look(resize.size, resize.resize, resize.mode.value, STATS[resize.stats])


def _backbone(method: nn.Module) -> nn.Module:
    parts = (getattr(method, name, None) for name in ("encoder", "decoder", "model"))
    return next((part for part in parts if isinstance(part, nn.Module)), method)


def _timm(method: nn.Module, folder: Path, look: Look | None) -> Exported:
    backbone, head = _backbone(method), None
    if isinstance(method, Supervised) and isinstance(backbone, ViT):
        pooling = method.pooling or ("cls" if backbone.cls_token is not None else "mean")
        if pooling in ("mean", "cls"):
            head = (method.head, pooling)
    return export.to_timm(backbone, folder, look=look, head=head)


def _hf(method: nn.Module, folder: Path, look: Look | None, *, run: Path | None) -> Exported:
    if isinstance(method, MAE):
        return _mae_to_hf(method, folder, look)
    backbone = _backbone(method)
    if isinstance(backbone, LanguageModel):
        special = {"decoder_start": getattr(method, "start_token", None)}
        if run is not None and (run / "tokenizer.json").is_file():
            tokens = tokenizer.load(run)
            special |= {"pad": tokens.pad, "bos": tokens.bos, "eos": tokens.eos}
        return text_export.to_hf(backbone, folder, heads=_heads(method), special=special)
    return export.to_hf(backbone, folder, look=look)


def _heads(method: nn.Module) -> list[MaskedLMHead | PoolerHead]:
    """Those of a BERT; a classifier alone only if it sees the class token, as theirs."""
    found = [part for part in method.children() if isinstance(part, MaskedLMHead | PoolerHead)]
    alone = len(found) == 1 and isinstance(found[0], PoolerHead)
    return [] if alone and getattr(method, "pooling", None) not in (None, "cls") else found


def _open_clip(method: nn.Module, folder: Path, look: Look | None) -> Exported:
    raise UserError("open_clip holds images and text together: to=open_clip needs a run of CLIP; use to=timm")


def _of_pairs(run: Path | None) -> dict[str, Writer]:
    """Writers of both towers; the tokenizer of the run says which token ends a caption."""
    eos = tokenizer.load(run).eos if run is not None and (run / "tokenizer.json").is_file() else None

    def alone(method: nn.Module, folder: Path, look: Look | None) -> Exported:
        raise UserError("to=safetensors writes one network: of images and texts take to=hf, or to=open_clip of CLIP")

    return {
        "safetensors": alone,
        "hf": lambda method, folder, look: pairs_export.to_hf(method, folder, look=look, eos=eos),
        "open_clip": lambda method, folder, look: pairs_export.to_open_clip(method, folder, look=look, eos=eos),
    }


def _safetensors(method: nn.Module, folder: Path, look: Look | None) -> Exported:
    backbone = _backbone(method)
    if not io.architecture(backbone):
        kind = type(backbone).__name__
        raise UserError(f"to=safetensors: no header describes a {kind} of these parts; {export.instead(backbone)}")
    io.save(backbone, folder / "model.safetensors")
    again = io.build(folder / "model.safetensors")
    state, other = backbone.state_dict(), again.state_dict()
    if any(not torch.equal(value.cpu().to(other[key].dtype), other[key]) for key, value in state.items()):
        raise UserError("the written tensors differ from ours: not exported")
    return Exported("ssl_lab", 0.0, 1.0, 'ssl_lab.weights.io.build("{}/model.safetensors")')


def _mae_to_hf(mae: MAE, folder: Path, look: Look | None) -> Exported:
    """ViTMAEForPreTraining with its decoder; compared in what it predicts and in its loss for one given mask."""
    transformers = export.import_transformers()
    facts = io.architecture(mae.encoder).get("arguments")
    if not facts or export.hf_kind(facts)[0] != "ViT":
        raise UserError("transformers' ViTMAE knows plain blocks only; export to=timm, or to=safetensors")
    hidden = mae.decoder.state_dict()["blocks.0.mlp.fn.fc1.bias"]
    config = transformers.ViTMAEConfig(
        **hf_vit.arguments(facts),
        decoder_hidden_size=mae.decoder.embed.out_features,
        decoder_num_hidden_layers=len(mae.decoder.blocks),
        decoder_num_attention_heads=io.num_heads(mae.decoder),
        decoder_intermediate_size=len(hidden),
        norm_pix_loss=mae.norm_pix,
        mask_ratio=mae.mask_ratio,
    )
    export.write_hf(transformers.ViTMAEForPreTraining(config), mae.state_dict(), hf_mae.TABLE, folder, look)
    with quiet():
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, facts["in_chans"], facts["image_size"], facts["image_size"], generator=generator)
    noise = torch.rand(2, mae.encoder.grid[0] * mae.encoder.grid[1], generator=generator)
    mae.float().cpu().eval()
    with torch.no_grad():
        loss, predicted, _, drop = mae.reconstruct(image, noise)
        other = theirs(image, noise=noise)
    logits = other.logits.gather(1, drop.unsqueeze(-1).expand_as(predicted))
    found, scale = export.gap(predicted, logits)
    export.gap(loss, other.loss)
    opener = 'transformers.ViTMAEForPreTraining.from_pretrained("{}")'
    return Exported(f"transformers {transformers.__version__}", found, scale, opener)
