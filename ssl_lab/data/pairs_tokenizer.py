"""Tokenizers of captions: trained on them, or CLIP's own from its list of merges."""

import gzip
import importlib.util
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ssl_lab.data.folders import missing
from ssl_lab.data.pairs_shapes import train_captions
from ssl_lab.data.pairs_table import open_pairs
from ssl_lab.data.shards import open_shards
from ssl_lab.data.shards_index import is_sharded
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import Kind, train
from ssl_lab.errors import UserError

SHAPES = "shapes"  # the path of the generated captions
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_MOST = 200_000  # images whose captions train a tokenizer
_SCENES = 2000  # enough for every word of the generated captions
_CLIP_MERGES = 49152 - 256 - 2  # lines of CLIP's file that count
_CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP takes digits one by one


def trained(
    path: str,
    kind: Kind = "bpe",
    vocab_size: int = 8192,
    *,
    caption_column: str | None = None,
    split: str = "train",
) -> Tokenizer:
    """Train a tokenizer on the captions of `split` at `path`; the same arguments give the same tokenizer.

    It has the tokens <pad> (id 0), <|startoftext|> and <|endoftext|>; of kinds that split into characters or words also
    one for what is unknown. At most 200,000 images are read.

    Args:
        path: as `Pairs` or `Shards` take it, or `shapes`.
        kind: bpe, bpe4, character or wordpiece; see `ssl_lab.data.tokenizer.trained`.
        vocab_size: tokens in all; it does not matter to `character`.
        caption_column: of a table; None = found.
        split: what it is trained on.

    Raises:
        UserError: no captions, or a vocabulary smaller than the alphabet.
    """
    local = Path(path).expanduser()
    stamp = local.stat().st_mtime_ns if path != SHAPES and local.exists() else 0
    return _trained(path, kind, vocab_size, caption_column, split, stamp)


@lru_cache(maxsize=4)
def _trained(path: str, kind: Kind, vocab_size: int, column: str | None, split: str, stamp: int) -> Tokenizer:
    # The end is not token 2: with that number transformers' CLIP reads a text at its largest id.
    special = {"character": ["<pad>", END, BEGIN, "<unk>"], "wordpiece": [BEGIN, END]}.get(kind, ["<pad>", END, BEGIN])
    return Tokenizer(train(_texts(path, column, split), kind, vocab_size, special, origin=path))


def _texts(path: str, column: str | None, split: str) -> Iterable[str]:
    if path == SHAPES:
        return train_captions(_SCENES)
    if is_sharded(path):
        return _flat(open_shards(path, split, captions=True))
    return _flat(open_pairs(path, split, caption_column=column))


def _flat(table: object) -> Iterator[str]:
    """All captions, those of some thousand images at a time."""
    count = min(len(table), _MOST)  # type: ignore[arg-type]
    for start in range(0, count, 4096):
        for captions in table.captions(range(start, min(start + 4096, count))):  # type: ignore[attr-defined]
            yield from captions


def clip(path: str | None = None) -> Tokenizer:
    """CLIP's own tokenizer from `bpe_simple_vocab_16e6.txt.gz`; None = the file that the package open_clip brings.

    49,408 byte-level tokens of lower-case text (Radford et al., 2021); it ends with <|startoftext|> and <|endoftext|>,
    and pads with 0. Unlike the original it neither undoes HTML escapes nor mends broken Unicode.

    Raises:
        UserError: no such file, or another one.
    """
    if path is None:
        spec = importlib.util.find_spec("open_clip")
        if spec is None or spec.origin is None:
            raise UserError("give bpe_simple_vocab_16e6.txt.gz as data.tokenizer.path, or install open_clip_torch")
        path = str(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no merges of CLIP's tokenizer: {missing(file)}")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8")
        merges = [tuple(line.split()) for line in text.split("\n")[1 : 1 + _CLIP_MERGES]]
        return Tokenizer(_clip_backend(merges), {"bos_token": BEGIN, "eos_token": END})  # type: ignore[arg-type]
    except Exception as error:
        raise UserError(f"{file} holds no merges of CLIP's tokenizer ({error}): take it from open_clip") from None


def _clip_backend(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    # Bytes come in the order of their visible stand-ins: those that are printable, then the others.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in [*printable, *range(256, 324)]]
    names = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), BEGIN, END]
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix="</w>", fuse_unk=False)
    backend = tokenizers.Tokenizer(model)
    clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(clean)
    split = pre_tokenizers.Split(Regex(_CLIP_PATTERN), "removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens([BEGIN, END])
    return backend
