"""Writing a set of images, with captions and classes where it has them, as .tar shards."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ssl_lab.data.decode import Unreadable, decode
from ssl_lab.data.images import EncodedImages
from ssl_lab.data.medium import IMAGES
from ssl_lab.data.source import Source
from ssl_lab.errors import UserError
from ssl_lab.files import replacing, sweep, write_text

PLAN = "shards.json"  # what the shards of a folder are made from; files that lie there already belong to it
_SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "MPO": "jpg"}  # others by their own name
_READ = 256  # rows read at once


@dataclass(slots=True)
class Written:
    """Of one split: shards and records on disk, images that could not be read, shards that were there before."""

    shards: int = 0
    records: int = 0
    unreadable: int = 0
    kept: int = 0


def write_shards(
    source: Source, folder: Path, split: str, per_shard: int, done: Callable[[int], None] = lambda rows: None
) -> Written:
    """Write `<split>-00000.tar`, ... with `per_shard` rows each into `folder`; those that are there are kept.

    Record `key` is row `key` of the source: its image as it is stored (as PNG what is only in memory, or of a
    format that shards are not searched for), `key.cls` with
    its class, `key.txt` with its caption, and with several captions `key.json` with all of them. Unreadable images are
    left out. The same source gives the same bytes, and a shard appears whole or not at all.

    Args:
        source: images, or images with captions.
        folder: made if need be.
        split: begins the names of the shards.
        per_shard: rows in each.
        done: told how many rows are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    total, written = len(source), Written()
    for number, start in enumerate(range(0, total, per_shard)):
        path, rows = _shard(folder, split, number), range(start, min(start + per_shard, total))
        if path.exists():
            with tarfile.open(path) as tar:
                count = len({name.partition(".")[0] for name in tar.getnames()})
            written.kept += 1
        else:
            with replacing(path) as temporary:
                count = _write(source, temporary, rows)
        written.shards, written.records = written.shards + 1, written.records + count
        written.unreadable += len(rows) - count
        done(rows[-1] + 1)
    return written


def plan(folder: Path, facts: dict[str, Any]) -> None:
    """Record what a folder of shards is made from, or check that it is the same as before.

    Raises:
        UserError: it holds shards of something else.
    """
    file, text = folder / PLAN, json.dumps(facts, indent=2, sort_keys=True) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    if file.exists() or any(folder.glob("*.tar")):
        raise UserError(f"out={folder} holds shards of other data or settings: give an empty folder, or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def planned(folder: Path) -> list[Path]:
    """The shards that a folder was made to hold; none where it has no record of them."""
    try:
        facts = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        counts = {split: -(-rows // facts["per_shard"]) for split, rows in facts["rows"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return [_shard(folder, split, number) for split, count in counts.items() for number in range(count)]


def _shard(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.tar"


def _write(source: Source, path: Path, rows: range) -> int:
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for start in range(0, len(rows), _READ):
            part = rows[start : start + _READ]
            captions = source.captions(part) if hasattr(source, "captions") else [[]] * len(part)
            for row, (blob, suffix, target), texts in zip(part, _images(source, part), captions, strict=True):
                if not suffix:
                    continue
                count += 1
                _add(tar, f"{row:09d}.{suffix}", blob)
                if texts:
                    _add(tar, f"{row:09d}.txt", texts[0].encode())
                if len(texts) > 1:
                    _add(tar, f"{row:09d}.json", json.dumps({"captions": texts}, ensure_ascii=False).encode())
                if target >= 0:
                    _add(tar, f"{row:09d}.cls", str(target).encode())
    return count


def _images(source: Source, rows: Sequence[int]) -> Iterator[tuple[bytes, str, int]]:
    """(file, its suffix, class) of each row; no suffix where the image cannot be read."""
    if isinstance(source, EncodedImages):
        blobs, targets = source.table.blobs(rows), source.table.labels(torch.tensor(rows)).tolist()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for (blob, suffix), target in zip(pool.map(_stored, blobs), targets, strict=True):
                yield blob, suffix, target
        return
    samples = source.read(list(rows))
    for image, target in zip(samples.data, samples.targets.tolist(), strict=True):
        yield _png(image), "png", target


def _stored(blob: bytes) -> tuple[bytes, str]:
    try:
        pixels = decode(blob)
    except Unreadable:
        return b"", ""
    with Image.open(io.BytesIO(blob)) as image:
        name = str(image.format)
    suffix = _SUFFIXES.get(name, name.lower())
    return (blob, suffix) if f".{suffix}" in IMAGES.suffixes else (_png(pixels), "png")


def _png(image: Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, format="PNG")
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no owner and no time: the same bytes again
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
