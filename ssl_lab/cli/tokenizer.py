"""`ssl-lab tokenizer`: train a tokenizer, save it as Hugging Face does, and say how well it packs text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from ssl_lab.cli.screen import screen
from ssl_lab.cli.writable import require_folder
from ssl_lab.data.text_files import documents
from ssl_lab.data.tokenizer import Tokenizer, load, trained
from ssl_lab.errors import UserError

_SAMPLE = 5_000_000  # characters that are measured, from the beginning of each split
_BATCH = 1000  # documents that are encoded at once


@dataclass(slots=True)
class Packing:
    """What some text comes to: documents, bytes (UTF-8), tokens, and those among them that stand for the unknown."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0


def run(cfg: DictConfig) -> None:
    """Train on `data`, write `out`, show bytes per token on the split it was trained on and on what is held out.

    Raises:
        UserError: no text, an unfit kind or size, another tokenizer in `out`, or nothing can be written there.
    """
    console, out, path = screen(), Path(str(cfg.out)), str(cfg.data.path)
    require_folder(out)
    given = cfg.data.column
    columns: list[str | None] = [given] if given is None or isinstance(given, str) else list(given)
    tokenizer = trained(
        path,
        cfg.kind,
        cfg.vocab_size,
        special=list(cfg.special),
        sentinels=cfg.sentinels,
        column=[column for column in columns if column is not None] or None,
        split=cfg.data.split,
    )
    _keep(tokenizer, out)
    table = Table("text", "split", title=f"{cfg.kind}, {tokenizer.vocab_size:,} tokens", title_justify="left", box=None)
    counted = ("documents", "bytes", "tokens", "bytes per token", *(["unknown"] if tokenizer.unk is not None else []))
    for name in counted:
        table.add_column(name, justify="right")
    for column in columns:
        for split in dict.fromkeys([cfg.data.split, "test"]):
            try:
                found = packing(tokenizer, path, split, column)
            except UserError:  # nothing is held out, or it cannot be told by characters alone
                continue
            tokens = max(found.tokens, 1)
            shares = [f"{found.bytes / tokens:.2f}", f"{found.unknown / tokens:.2%}"][: len(counted) - 3]
            counts = [f"{x:,}" for x in (found.documents, found.bytes, found.tokens)]
            table.add_row(column or Path(path).name, split, *counts, *shares)
    console.print(table)
    console.print(f"{out}: tokenizer.json, tokenizer_config.json", soft_wrap=True)
    console.print(f"use it with data.tokenizer={out}", soft_wrap=True)


def packing(tokenizer: Tokenizer, path: str, split: str, column: str | None) -> Packing:
    """Counts for the first five million characters of a split."""
    found = Packing()
    for texts in _batches(documents(path, split, column)):
        found.documents += len(texts)
        found.bytes += sum(len(text.encode()) for text in texts)
        for ids in tokenizer.encode_batch(texts):
            found.tokens += len(ids)
            found.unknown += 0 if tokenizer.unk is None else ids.count(tokenizer.unk)
    return found


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text[: _SAMPLE - characters])
        characters += len(batch[-1])
        if len(batch) == _BATCH or characters >= _SAMPLE:
            yield batch
            batch = []
        if characters >= _SAMPLE:
            return
    if batch:
        yield batch


def _keep(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer, unless another one stands there: models may depend on it."""
    if (out / "tokenizer.json").exists() and load(out).backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{out} holds another tokenizer, which models may depend on: name another folder with out=...")
    tokenizer.save(out)
