"""Where the records of a .tar shard lie: read once, written beside the shard, mapped into memory from then on.

A record is what webdataset takes it for: the files of a shard that have the same name up to the first dot after the
last slash. `key.jpg` (or .png, ...) is its image, `key.txt` its caption, `key.json` may hold captions and a label,
`key.cls` holds a class.
"""

import hashlib
import json
import logging
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssl_lab.data.medium import IMAGES
from ssl_lab.files import replacing

log = logging.getLogger(__name__)

VERSION = 1  # of the index; another one is made again
RECORD = np.dtype(
    [("image", "<i8"), ("image_size", "<i4"), ("text", "<i8"), ("text_size", "<i4"), ("json", "?"), ("target", "<i4")]
)
_ALIGN = 64  # bytes that the head of an index is a multiple of
_KEYS = ("captions", "caption", "text", "txt")  # of a .json
_SHOWN = 3  # examples of what was left out
_MOST_TEXT = 1 << 20  # bytes of a caption


@dataclass(slots=True)
class ShardIndex:
    """The records of one shard, those that are held out of a single split first.

    `count` records, of which `held_out`; `target` is the largest class, -1 = none; `left_out` counts records by the
    reason why they are not among them, `examples` names some; `start` is where the records begin in `file`.
    """

    file: str
    count: int = 0
    held_out: int = 0
    target: int = -1
    left_out: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    start: int = 0
    memory: bytes | None = None  # the records, where nothing could be written

    def records(self) -> np.ndarray:
        """(count,) RECORD, mapped from disk."""
        if self.memory is not None:
            return np.frombuffer(self.memory, RECORD)
        return np.memmap(self.file, RECORD, mode="r", offset=self.start, shape=(self.count,))


def is_sharded(path: str) -> bool:
    """Whether a path means shards: a .tar, a pattern or a .txt list of them, or a folder with some."""
    local = Path(path).expanduser()
    return path.endswith((".tar", ".txt")) or (local.is_dir() and any(local.glob("*.tar")))


def index_of(shard: Path, captions: bool, folder: Path | None = None) -> ShardIndex:
    """The index of a shard; it is made if there is none, or the shard has changed since.

    Args:
        shard: a .tar file.
        captions: a record needs a caption, not only an image.
        folder: where indices are kept; None = beside the shard, in `.index`, or in memory if that cannot be written.
    """
    stat = shard.stat()
    stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
    where = shard.parent / ".index" if folder is None else folder
    mark = "" if folder is None else f"-{hashlib.sha256(str(shard.absolute()).encode()).hexdigest()[:12]}"
    file = where / f"{shard.stem}{mark}.{'pairs' if captions else 'images'}"
    known = _read(file, stamp)
    if known is not None:
        return known
    found, records = _scan(shard, captions)
    found.file = str(file)
    try:
        where.mkdir(parents=True, exist_ok=True)
        _write(file, stamp, found, records)
    except OSError:
        if folder is not None:
            raise
        found.memory = records.tobytes()
    return found


def captions_of(payload: bytes, is_json: bool) -> list[str]:
    """The captions that a .txt or .json file holds; none where it cannot be read."""
    try:
        text = payload.decode("utf-8")
        if not is_json:
            return [text.strip()] if text.strip() else []
        found = json.loads(text)
        value: Any = next((found[key] for key in _KEYS if found.get(key)), [])
        return [x.strip() for x in ([value] if isinstance(value, str) else value) if isinstance(x, str) and x.strip()]
    except (ValueError, AttributeError, TypeError):
        return []


def _scan(shard: Path, captions: bool) -> tuple[ShardIndex, np.ndarray]:
    records: list[tuple[int, tuple[Any, ...]]] = []
    left_out: Counter[str] = Counter()
    examples: list[str] = []

    def leave(what: str, reason: str) -> None:
        left_out[reason] += 1
        if len(examples) < _SHOWN:
            examples.append(f"{shard.name} {what} ({reason})".replace("  ", " "))

    size = shard.stat().st_size
    members: dict[str, dict[str, tuple[int, int]]] = {}
    cut: set[str] = set()
    try:
        for name, offset, length in _members(shard):
            key, suffix = re.fullmatch(r"((?:.*/)?[^/.]*)\.?([^/]*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
            members.setdefault(key, {})[suffix.lower()] = offset, length
            if offset + length > size:
                cut.add(key)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        leave("", f"damaged, what follows {len(members)} records is lost: {error}" if members else f"no tar: {error}")
    with open(shard, "rb") as file:

        def read(place: tuple[int, int]) -> bytes:
            file.seek(place[0])
            return file.read(min(place[1], _MOST_TEXT))

        for key, parts in members.items():
            image = next((parts[s] for s in parts if f".{s.rpartition('.')[2]}" in IMAGES.suffixes), None)
            facts = read(parts["json"]) if "json" in parts else b""
            text, is_json = parts.get("txt", (0, 0)), False
            if facts and (len(captions_of(facts, True)) > 1 or not captions_of(read(text), False)):
                text, is_json = parts["json"], True
            if key in cut:
                leave(key, "cut off")
            elif image is None:
                leave(key, "no image")
            elif captions and not captions_of(read(text), is_json):
                leave(key, "no caption")
            else:
                target = _target(read(parts["cls"]) if "cls" in parts else b"", facts)
                held = zlib.crc32(key.encode()) % 10 == 0
                records.append((not held, (*image, *text, is_json, target)))
    records.sort(key=lambda x: x[0])  # stable: in the order of the shard otherwise
    made = np.array([record for _, record in records], RECORD)
    held_out, target = sum(not kept for kept, _ in records), int(made["target"].max(initial=-1))
    return ShardIndex("", len(made), held_out, target, dict(left_out), examples), made


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the contents, size) of the files of a tar."""
    with tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]
            if member.isreg():
                yield member.name, member.offset_data, member.size


def _target(cls: bytes, facts: bytes) -> int:
    try:
        found = int(cls) if cls else json.loads(facts or b"{}").get("label", -1)
    except (ValueError, AttributeError):
        return -1
    return found if isinstance(found, int) and -1 <= found < 1 << 31 else -1


def _read(file: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        with open(file, "rb") as stream:
            head = stream.readline()
            facts = json.loads(head)
            index = ShardIndex(str(file), **facts["index"])
        if facts["stamp"] == stamp and file.stat().st_size == index.start + index.count * RECORD.itemsize:
            return index
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(file: Path, stamp: list[int], index: ShardIndex, records: np.ndarray) -> None:
    def head(start: int) -> bytes:
        index.start = start
        facts = {k: v for k, v in asdict(index).items() if k not in ("file", "memory")}
        return json.dumps({"stamp": stamp, "index": facts}).encode()

    start = -(-(len(head(1 << 20)) + 1) // _ALIGN) * _ALIGN
    with replacing(file) as temporary:
        temporary.write_bytes(head(start).ljust(start - 1) + b"\n" + records.tobytes())
