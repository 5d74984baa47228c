"""`ssl-lab evaluate`: judge a run, a checkpoint, imported weights or an untrained encoder."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ssl_lab.analysis.embedding import require_projection
from ssl_lab.cli.compose import build
from ssl_lab.cli.data_name import data_name
from ssl_lab.cli.gallery import Gallery
from ssl_lab.cli.gallery_sound import SoundGallery
from ssl_lab.cli.saved import load_config, own_tokenizer, run_folder, without_downloads
from ssl_lab.cli.screen import screen
from ssl_lab.cli.starting import decided_by_data
from ssl_lab.cli.tuned import rebuild, whole
from ssl_lab.cli.watch import Extraction
from ssl_lab.cli.writable import require_folder
from ssl_lab.data.audio_module import AudioModule
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Evaluator, Round
from ssl_lab.evals.pixels import Pixels
from ssl_lab.evals.results import Row, markdown, matrix, read, table, write
from ssl_lab.evals.runner import run_round
from ssl_lab.files import write_text
from ssl_lab.train import average as mean
from ssl_lab.train import checkpoint
from ssl_lab.train.base import Base
from ssl_lab.types import Embeds
from ssl_lab.weights import io, pairs

Plain = dict[str, Any]


def run(cfg: DictConfig) -> None:
    """Build as trained, load, evaluate, draw.

    Rows go to `metrics.json`, after each evaluator; as a table to the screen and to `table.md`; pictures to
    `pictures/index.html`.

    Raises:
        UserError: nowhere to write, nothing to evaluate or to evaluate with, or weights that do not fit.
    """
    given: Plain = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    spec = None if cfg.ckpt is None else str(cfg.ckpt)
    folder = _run_of(spec)
    saved = {} if folder is None else load_config(folder, cfg.trust)
    if folder is not None:
        saved["data"] = own_tokenizer(saved.get("data") or {}, folder)
    method_config, data_config = (_laid_over(saved, given, part) for part in ("method", "data"))
    fabric = _fabric(cfg.device, cfg.precision or saved.get("trainer", {}).get("precision") or "32-true")
    require_projection(cfg.projection)
    evaluators = build(given.get("eval") or {})
    if not evaluators:
        raise UserError("eval=[] leaves nothing to do: choose e.g. eval=[knn,linear]")
    out, console = Path(cfg.out or folder or "runs/evaluate"), screen()
    require_folder(out)
    read(out / "metrics.json")  # whether results can be added to it
    data = build(data_config)
    data.setup("test")
    decided_by_data(method_config, data)

    rows: list[Row] = []
    other = data_name(saved.get("data") or {}, data_config)
    with Extraction(console, {"train": len(data.train), "test": len(data.test)}) as watch:

        def keep(found: list[Row]) -> None:
            rows.extend(replace(row, data=other) for row in found)
            write(out / "metrics.json", rows)

        def judge(method: nn.Module, step: int, subject: str) -> Round:
            able, watch.subject = evaluators, subject
            if isinstance(method, Pixels):  # they have features and no more
                able = {name: e for name, e in evaluators.items() if isinstance(method, e.needs)}
            round = Round(method.to(fabric.device), data, fabric.autocast, watch)
            run_round(able, round, step=step, subject=subject, say=console.print, keep=keep)
            return round

        torch.manual_seed(cfg.seed)
        base, step, subject = None, 0, "random encoder"
        if saved.get("tuning") and not str(spec).endswith(".safetensors"):
            method, base = rebuild(saved | {"method": method_config})
            subject = "before tuning"
        else:
            method = build(without_downloads(method_config))
        found = None if spec is None or folder is None else _checkpoint(Path(spec))
        if spec is not None and found is None:
            evaluators = _of_features(evaluators, method, spec, console.print)
        if cfg.baselines and hasattr(data.eval_views, "stats"):  # there are images
            judge(Pixels(), 0, "raw pixels")
        if cfg.baselines and spec is not None:
            judge(method, step, subject)
        if spec is not None:
            watch.say(f"reading {spec}")
            step, subject = _load(method, spec, cfg.average, base, found)
        round = judge(method, step, subject)
        console.print(table(rows))
        write_text(out / "table.md", markdown(rows))
        places = {"table": out / "table.md", "protocols": out / "metrics.json"}
        sound = isinstance(data, AudioModule)
        if cfg.pictures and (sound or hasattr(data.eval_views, "stats")):
            title = subject if folder is None else f"{folder.parent.name}/{folder.name}, {subject}, step {step:,}"
            title += f", on {other}" if other else ""
            last = [row for row in rows if row.subject == subject]
            gallery = (SoundGallery if sound else Gallery)(round, cfg.projection, cfg.seed)
            places["pictures"] = gallery.write(out / "pictures", title, matrix(last) if last else ())
    for name, path in places.items():
        console.print(f"{name:<10} {path}", soft_wrap=True)


def _fabric(device: str, precision: Any) -> Fabric:
    try:
        return Fabric(accelerator=device, devices=1, precision=precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise UserError(f"device={device} with precision={precision}: {' '.join(str(error).split())}") from error


def _run_of(spec: str | None) -> Path | None:
    """The run folder that `spec` names or lies in, None if it comes without one."""
    if spec is None or spec.startswith(("timm:", "hf:", "open_clip:")):
        return None
    if not Path(spec).exists():
        raise UserError(
            f"ckpt={spec} does not exist; give a run folder, a .ckpt, a .safetensors, timm:<name>, hf:<folder> or "
            "open_clip:<folder>"
        )
    return run_folder(Path(spec))


def _laid_over(saved: Plain, given: Plain, part: str) -> Plain:
    """What is given, alone if it is complete (it has a `_target_`), else laid over what was saved."""
    new: Plain = given.get(part) or {}
    if "_target_" not in new:
        new = OmegaConf.to_container(OmegaConf.merge(saved.get(part, {}), new))  # type: ignore[assignment]
    if "_target_" not in new:
        raise UserError(
            f"{part} is not known: choose {part}=NAME, or give ckpt=<run folder>, which brings its own; weights alone "
            "need a method whose encoder they fit, e.g. method=mae backbone=vit_b16 data=cifar10 data.image_size=224"
        )
    return new


def _checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path of a run means, None where it holds weights of an encoder alone."""
    return checkpoint.find(path) if path.is_dir() else path if path.suffix == ".ckpt" else None


def _of_features(
    evaluators: dict[str, Evaluator], method: nn.Module, spec: str, say: Callable[[str], None]
) -> dict[str, Evaluator]:
    """Those that weights of an encoder alone can be judged by: a new head would give the others values of chance."""
    if not isinstance(getattr(method, "encoder", None), nn.Module):
        raise UserError(f"{type(method).__name__} has no encoder that ckpt={spec} could fill; give a run folder")
    if hasattr(method, "towers"):  # they are read whole
        return evaluators
    able = {name: evaluator for name, evaluator in evaluators.items() if evaluator.needs is Embeds}
    left_out = ", ".join(name for name in evaluators if name not in able)
    why = f"ckpt={spec} fills the encoder alone, the head is new; give a run folder or .ckpt"
    if not able:
        raise UserError(f"eval=[{left_out}] judges more than features: {why}, or eval=[knn]")
    if left_out:
        say(f"evaluator {left_out} skipped: {why}")
    return able


def _load(method: Any, spec: str, average: int, base: Base | None, found: Path | None) -> tuple[int, str]:
    """Fill the method from the checkpoint `found`, else its encoder; the step of the weights, and what to call them."""
    path = Path(spec)
    if found is None:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, when the end is one line of ours
        if hasattr(method, "towers"):
            pairs.load(method, spec)
        else:
            io.load(method.encoder, spec)
        return 0, spec
    content = mean.read(path if average > 1 else found, average)
    try:
        method.load_state_dict(whole(content, base, found))
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise UserError(f"{found} does not fit this {type(method).__name__}: {line}") from None
    return int(content["global_step"]), "trained" if average == 1 else f"mean of {average}"
