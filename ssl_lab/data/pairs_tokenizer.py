"""Tokenizers trained on captions."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ssl_lab.data.pairs_shapes import train_captions
from ssl_lab.data.pairs_table import open_pairs
from ssl_lab.data.shards import open_shards
from ssl_lab.data.shards_index import is_sharded
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_clip import BEGIN, END
from ssl_lab.data.tokenizer_train import Kind, train

SHAPES = "shapes"  # the path of the generated captions
_MOST = 200_000  # images whose captions train a tokenizer
_SCENES = 2000  # enough for every word of the generated captions


def trained(
    path: str,
    kind: Kind = "bpe",
    vocab_size: int = 8192,
    *,
    caption_column: str | Sequence[str] | None = None,
    split: str = "train",
    index: str | None = None,
) -> Tokenizer:
    """Train a tokenizer on the captions of `split` at `path`; the same arguments give the same tokenizer.

    It has the tokens <pad> (id 0), <|startoftext|> and <|endoftext|>; of kinds that split into characters or words also
    one for what is unknown. At most 200,000 images are read.

    Args:
        path: as `Pairs` or `Shards` take it, or `shapes`.
        kind: bpe, bpe4, character or wordpiece; see `ssl_lab.data.tokenizer.trained`.
        vocab_size: tokens in all; it does not matter to `character`.
        caption_column: one or several of a table; None = found.
        split: what it is trained on.
        index: folder of the indices of shards, as of `Shards`.

    Raises:
        UserError: no captions, or a vocabulary smaller than the alphabet.
    """
    local = Path(path).expanduser()
    stamp = local.stat().st_mtime_ns if path != SHAPES and local.exists() else 0
    columns = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column or ())
    return _trained(path, kind, vocab_size, columns, split, index, stamp)


@lru_cache(maxsize=4)
def _trained(
    path: str, kind: Kind, vocab_size: int, columns: tuple[str, ...], split: str, index: str | None, stamp: int
) -> Tokenizer:
    # The end is not token 2: with that number transformers' CLIP reads a text at its largest id.
    special = {"character": ["<pad>", END, BEGIN, "<unk>"], "wordpiece": [BEGIN, END]}.get(kind, ["<pad>", END, BEGIN])
    return Tokenizer(train(_texts(path, columns, split, index), kind, vocab_size, special, origin=path))


def _texts(path: str, columns: tuple[str, ...], split: str, index: str | None) -> Iterable[str]:
    if path == SHAPES:
        return train_captions(_SCENES)
    if is_sharded(path):
        return _flat(open_shards(path, split, captions=True, index=index))
    return _flat(open_pairs(path, split, caption_column=columns))


def _flat(table: object) -> Iterator[str]:
    """All captions, those of some thousand images at a time."""
    count = min(len(table), _MOST)  # type: ignore[arg-type]
    for start in range(0, count, 4096):
        for captions in table.captions(range(start, min(start + 4096, count))):  # type: ignore[attr-defined]
            yield from captions
