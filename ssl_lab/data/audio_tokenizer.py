"""Tokenizers trained on transcripts. The first token is for padding, which is also CTC's blank."""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ssl_lab.data.medium import AUDIO
from ssl_lab.data.pairs_table import PairTable, csv_files, open_pairs
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import WHOLE, Kind, train
from ssl_lab.data.tones import WORDS
from ssl_lab.errors import UserError

TONES = "tones"  # the path of the generated words
_READ = 4096  # transcripts that are read together


def trained(
    path: str,
    kind: Kind = "character",
    vocab_size: int = 512,
    *,
    special: Sequence[str] = ("<pad>",),
    transcript_column: str | None = None,
    split: str = "train",
) -> Tokenizer:
    """Train a tokenizer on the transcripts at `path`; the same arguments give the same tokenizer.

    Without transcripts the names of the classes are taken, as the words of joined utterances are. A tokenizer of
    characters, or words, knows those of both splits, and the blank.

    Args:
        path: as `Clips` takes it, or `tones`.
        kind: character, word, bpe, bpe4 or wordpiece; see `ssl_lab.data.tokenizer.trained`.
        vocab_size: tokens in all; it does not matter to `character` and `word`.
        special: special tokens, the first with id 0; a decoder needs `</s>` too. Wordpiece has its own, [PAD] first.
        transcript_column: None = found.
        split: what kinds other than `character` and `word` are trained on.

    Raises:
        UserError: no transcripts and no classes, or a vocabulary smaller than the alphabet.
    """
    local = Path(path).expanduser()
    stamp = local.stat().st_mtime_ns if path != TONES and local.exists() else 0
    return _trained(path, kind, vocab_size, tuple(special), transcript_column, split, stamp)


@lru_cache(maxsize=4)
def _trained(
    path: str, kind: Kind, vocab_size: int, special: tuple[str, ...], column: str | None, split: str, stamp: int
) -> Tokenizer:
    texts = list(WORDS if path == TONES else _texts(path, split, column))
    if kind in WHOLE and path != TONES:
        with suppress(UserError):  # a set of the hub may call it otherwise
            texts += _texts(path, "test" if split == "train" else "train", column)
    blank = [" "] if kind == "character" else []
    own = [x for x in special if kind != "wordpiece" or not x.startswith("<pad")]
    return Tokenizer(train([*texts, *blank], kind, vocab_size, own, origin=path))


def _texts(path: str, split: str, column: str | None) -> list[str]:
    """The transcripts of a split as `Clips` finds them, or the names of its classes."""
    local, found = Path(path).expanduser(), list[str]()
    why = "list its clips with transcripts in a .csv file"
    if local.is_dir() and csv_files(local, alone=False):
        try:
            found = _transcripts(open_pairs(path, split, None, column, medium=AUDIO))
        except UserError as error:
            why = str(error)
        if not found and column is None:  # what the folders are called, beside a list of something else
            with suppress(UserError):
                found = open_pairs(path, split, medium=AUDIO, optional=True).classes
    else:
        table = open_pairs(path, split, None, column, medium=AUDIO, optional=True)
        found = _transcripts(table) or table.classes
    if not found:
        raise UserError(f"{path} has no transcripts and no classes: {why}")
    return found


def _transcripts(table: PairTable) -> list[str]:
    parts = (range(start, min(start + _READ, len(table))) for start in range(0, len(table), _READ))
    return [texts[0] for rows in parts for texts in table.captions(rows) if texts]
