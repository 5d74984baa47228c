"""From text to token ids and back, by the `tokenizers` library; files are those of Hugging Face.

In a configuration `data.tokenizer` is the path of a saved tokenizer or `clip:`, or a node whose target trains one:
`{_target_: ssl_lab.data.tokenizer.trained, path: ${data.path}, kind: bpe, vocab_size: 4096}`.
"""

import itertools
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from ssl_lab.data import tokenizer_clip
from ssl_lab.data.folders import missing
from ssl_lab.data.text_files import Documents
from ssl_lab.data.text_tables import CAPTIONS
from ssl_lab.data.tokenizer_train import USUAL, WHOLE, Kind, train, whole
from ssl_lab.errors import UserError
from ssl_lab.files import write_text
from ssl_lab.weights import gguf

_BLANKS = "\u0120\u010a\u0109\u010d\u2581"  # how byte-level BPE writes a blank, line end, tab; SentencePiece a blank


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows what its special tokens are for.

    `pad`, `bos`, `eos`, `unk`, `mask`, `cls`, `sep` are their ids, None where there is no such token. `config` is what
    stands in tokenizer_config.json (`pad_token` and so on); without it, special tokens are known by their usual names.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if config is None:
            found = {role: next((x for x in names if x in added), None) for role, names in USUAL.items()}
            config = {f"{role}_token": name for role, name in found.items() if name is not None}
        self.config = config
        ids = {role: _id(backend, config.get(f"{role}_token")) for role in USUAL}
        self.pad, self.bos, self.eos, self.unk, self.mask, self.cls, self.sep = (ids[role] for role in USUAL)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab().values()) + 1

    @cached_property
    def special(self) -> list[int]:
        """Ids of all special tokens, ascending."""
        return sorted(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def starts(self) -> Tensor:
        """(V,) bool: the token begins a word when it follows other text. Special tokens do.

        WordPiece marks what goes on with ##, byte-level BPE and SentencePiece mark what begins; elsewhere letters and
        digits go on.
        """
        if self.of_words:
            return torch.ones(self.vocab_size, dtype=torch.bool)
        names = [self.backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        hashes = isinstance(self.backend.model, tokenizers.models.WordPiece)  # byte-level BPE may have ## as a word
        goes_on = [name.startswith("##") if hashes else name[:1].isalnum() and name[0] not in _BLANKS for name in names]
        found = ~torch.tensor(goes_on)
        found[self.special] = True
        return found

    @cached_property
    def ends(self) -> Tensor:
        """(V,) bool: the token ends a sentence or a line."""
        names = (self.backend.decode([i], skip_special_tokens=True) for i in range(self.vocab_size))
        return torch.tensor([name.rstrip(" ").endswith((".", "!", "?", "\n")) for name in names])

    @cached_property
    def sentinels(self) -> list[int]:
        """Ids of <extra_id_0>, <extra_id_1>, ..., which stand for spans that were taken out (T5)."""
        found = (self.backend.token_to_id(f"<extra_id_{i}>") for i in range(self.vocab_size))
        return list(itertools.takewhile(lambda x: x is not None, found))  # type: ignore[arg-type]

    @cached_property
    def of_words(self) -> bool:
        """Each token is a word."""
        return isinstance(self.backend.model, tokenizers.models.WordLevel)

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters, or the words, that are tokens, if nothing else is: others would vanish silently."""
        if self.unk is not None:
            return None
        special = set(self.special)
        names = {name for name, i in self.backend.get_vocab().items() if i not in special}
        if names >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet()):  # its characters stand for bytes: all of them
            return None
        return frozenset(names) if self.of_words or all(len(name) == 1 for name in names) else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the tokens; `special` adds those that the tokenizer puts around a text, such as [CLS] and [SEP].

        Half of a surrogate pair counts as ?.

        Raises:
            UserError: characters, or words, that a tokenizer of characters, or words, does not know.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """As `encode`, several texts at once on several threads."""
        texts = [whole(text) for text in texts]
        self.require_known(texts)
        return [x.ids for x in self.backend.encode_batch_fast(texts, add_special_tokens=special)]

    def encode_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids without special tokens, and for each the characters (from, to) that it stands for."""
        texts = [whole(text) for text in texts]
        self.require_known(texts)
        return [(x.ids, x.offsets) for x in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | Tensor, *, special: bool = False) -> str:
        """The text; `special` keeps special tokens."""
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        return str(self.backend.decode(listed, skip_special_tokens=not special))

    def require(self, *roles: str) -> list[int]:
        """Ids of special tokens that a task cannot do without.

        Raises:
            UserError: the tokenizer lacks one of them.
        """
        lacking = [role for role in roles if getattr(self, role) is None]
        if lacking:
            raise UserError(
                f"this needs a tokenizer with a {lacking[0]} token, and data.tokenizer has none: give "
                "data.tokenizer.kind=wordpiece, or another tokenizer that has one"
            )
        return [int(getattr(self, role)) for role in roles]

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained` opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | self.config
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    def require_known(self, texts: Sequence[str]) -> None:
        """Check that every character, or word, has a token.

        Raises:
            UserError: one has none; the message names it.
        """
        if self._alphabet is None:
            return
        if unknown := set().union(*(text.split() if self.of_words else text for text in texts)) - self._alphabet:
            kind, shown = "word" if self.of_words else "character", " ".join(sorted(unknown)[:5])
            raise UserError(f"the {kind} tokenizer has no token for {shown!r}: train it on text that has them")


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, of a folder that holds one, such as a run folder, or of `gguf:<file>`.

    `clip:` is CLIP's own, `clip:<file>` the same from its list of merges; see `ssl_lab.data.tokenizer_clip`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    kind, colon, name = str(path).partition(":")
    if colon and kind == "gguf":
        return _from_gguf(Path(name).expanduser())
    if colon and kind == "clip":
        return _from_merges(name or None)
    given = Path(path).expanduser()
    file = given / "tokenizer.json" if given.is_dir() else given
    if not given.exists():
        raise UserError(f"no tokenizer: {missing(given)}")
    if not file.is_file():
        names = ", ".join(sorted(x.name for x in given.iterdir())[:6]) or "nothing"
        raise UserError(
            f"no tokenizer.json in {given} (it holds {names}): save it there with `ssl-lab tokenizer`, or with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    stamps = tuple(x.stat().st_mtime_ns if x.is_file() else 0 for x in (file, _config(file)))
    return _load(file, stamps)


@lru_cache(maxsize=2)
def _from_gguf(file: Path) -> Tokenizer:
    return Tokenizer(*gguf.tokenizer(file))


@lru_cache(maxsize=2)
def _from_merges(file: str | None) -> Tokenizer:
    return Tokenizer(tokenizer_clip.backend(file), {"bos_token": tokenizer_clip.BEGIN, "eos_token": tokenizer_clip.END})


@lru_cache(maxsize=8)
def _load(file: Path, stamps: tuple[int, ...]) -> Tokenizer:
    try:
        text = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare ones
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise UserError(f"{file} is no tokenizer.json of the tokenizers library ({reason}): save it again") from None
    try:
        config = json.loads(_config(file).read_text(encoding="utf-8")) if _config(file).is_file() else None
    except ValueError as error:
        raise UserError(f"{_config(file)} is no JSON ({error}): save the tokenizer again, or remove it") from None
    return Tokenizer(backend, config)


def trained(
    path: str,
    kind: Kind = "bpe",
    vocab_size: int = 8192,
    *,
    special: Sequence[str] = (),
    sentinels: int = 0,
    column: str | Sequence[str] | None = None,
    split: str | None = "train",
) -> Tokenizer:
    """Train a tokenizer on the texts at `path`; the same arguments give the same tokenizer, trained once a process.

    Args:
        path: text as `documents` takes it, or `captions`.
        kind: `character` or `word` (each that occurs, in all splits); byte-level `bpe` with the pattern of GPT-2;
            byte-level `bpe4` with that of GPT-4, which takes digits by three; `wordpiece` with BERT's rules, uncased.
        vocab_size: tokens in all; it does not matter to `character`.
        special: names of further special tokens. Roles are told from usual names such as <pad> and <eos>.
        sentinels: tokens <extra_id_0>, ... for span corruption, whose ids descend from the end of the vocabulary.
        column: where the text of a table stands; several columns are read one after another.
        split: what it is trained on.

    Raises:
        UserError: no text, or a vocabulary smaller than the alphabet.
    """
    local = Path(path).expanduser()
    stamp = local.stat().st_mtime_ns if path != CAPTIONS and local.is_file() else 0
    columns = column if column is None or isinstance(column, str) else tuple(column)
    split = None if kind in WHOLE else split
    return _trained(path, kind, vocab_size, tuple(special), sentinels, columns, split, stamp)


@lru_cache(maxsize=4)
def _trained(
    path: str,
    kind: Kind,
    vocab_size: int,
    special: tuple[str, ...],
    sentinels: int,
    column: str | tuple[str, ...] | None,
    split: str | None,
    stamp: int,
) -> Tokenizer:
    return Tokenizer(train(Documents(path, split, column), kind, vocab_size, special, sentinels, origin=path))


def character(path: str, *, special: Sequence[str] = ()) -> Tokenizer:
    """Every character of the texts at `path`, in sorted order; see `trained`."""
    return trained(path, "character", special=special)


def as_tokenizer(tokenizer: Tokenizer | str | Path) -> Tokenizer:
    """A tokenizer as it is, or the one at a path."""
    return tokenizer if isinstance(tokenizer, Tokenizer) else load(tokenizer)


def _id(backend: tokenizers.Tokenizer, name: Any) -> int | None:
    """The id of a token, named by a text or by a dict of its `content`."""
    name = name.get("content") if isinstance(name, dict) else name
    return None if name is None else backend.token_to_id(name)


def _config(file: Path) -> Path:
    return file.with_name("tokenizer_config.json")
