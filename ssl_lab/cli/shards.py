"""`ssl-lab shards`: write a data set of images, with or without captions, as .tar shards."""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from rich.status import Status

from ssl_lab.cli.compose import build
from ssl_lab.cli.screen import screen
from ssl_lab.cli.writable import require_folder
from ssl_lab.data.shards import CLASSES
from ssl_lab.data.shards_write import plan, write_shards
from ssl_lab.errors import UserError
from ssl_lab.files import write_text

_SPLITS = ("train", "test")


def run(cfg: DictConfig) -> None:
    """Write `out/train-00000.tar`, ... and `out/test-00000.tar`, ..., and what the classes are called.

    The same command continues where it was stopped.

    Raises:
        UserError: no images, or a folder with other shards or where nothing can be written.
    """
    if cfg.per_shard < 1:
        raise UserError(f"per_shard={cfg.per_shard}: a shard holds at least 1 row")
    out, console = Path(cfg.out), screen()
    require_folder(out)
    nodes: dict[str, Any] = {split: OmegaConf.to_container(cfg.data[split]) for split in _SPLITS if split in cfg.data}
    for node in nodes.values():  # captions are written as they are
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        if "tokenizer" in node and parameters["tokenizer"].default is None:
            node["tokenizer"] = None
        if "in_memory" in parameters:
            node["in_memory"] = False
    sources = {split: build(node) for split, node in nodes.items()}
    if any(source.unit != "images" for source in sources.values()):
        raise UserError("shards are written of images, with captions or without, and these data are none")
    rows = {split: len(source) for split, source in sources.items()}
    plan(out, {"per_shard": cfg.per_shard, "rows": rows, "data": nodes})
    classes = next(iter(sources.values())).classes
    if classes:
        write_text(out / CLASSES, json.dumps(classes, ensure_ascii=False) + "\n")
    for split, source in sources.items():
        with console.status(split) as status:
            say = partial(_say, status, split, rows[split])
            done = write_shards(source, out, split, cfg.per_shard, say)
        told = f"{done.records:,} records in {done.shards:,} shards"
        told += f", {done.kept:,} of them there before" if done.kept else ""
        told += f", {done.unreadable:,} unreadable images left out" if done.unreadable else ""
        console.print(f"{split:<10} {told}", soft_wrap=True)
    kind = "shards" if hasattr(next(iter(sources.values())), "captions") else "image_shards"
    console.print(f"{'read with':<10} data={kind} data.path={out}", soft_wrap=True)


def _say(status: Status, split: str, total: int, done: int) -> None:
    status.update(f"{split} {done:,} of {total:,}")
