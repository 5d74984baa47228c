"""Language models that help a search over speech: an n-gram from an ARPA file, or a causal decoder of ours."""

import gzip
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.errors import UserError
from ssl_lab.generation.batch import room_of
from ssl_lab.generation.words import Decodes

_UNKNOWN = ("<unk>", "<UNK>", "[UNK]")
_NEVER_SEEN = math.log(1e-7)  # of a word that the model lacks, where it says nothing of unknown ones
_MARKS = "\u0120\u2581"  # how byte-level BPE and SentencePiece write a blank before a word


class NGram:
    """A back-off model (Katz, 1987, doi:10.1109/TASSP.1987.1165125): ln P of a word after the words before it.

    Args:
        entries: n-gram -> (ln P of its last word after the others, ln of its back-off weight).
        order: the longest n-gram.
    """

    def __init__(self, entries: dict[tuple[str, ...], tuple[float, float]], order: int) -> None:
        self.entries, self.order = entries, order
        self.unknown = next((x for x in _UNKNOWN if (x,) in entries), None)
        self.begin = ["<s>"] if ("<s>",) in entries else []

    def log_prob(self, history: Sequence[str], word: str) -> float:
        """ln P(word | history), in nats; of the history the last `order` - 1 words count."""
        if (word,) not in self.entries:
            if self.unknown is None:
                return _NEVER_SEEN
            word = self.unknown
        context = tuple(history[max(0, len(history) - self.order + 1) :])
        passed = 0.0
        while True:
            if (found := self.entries.get((*context, word))) is not None:
                return passed + found[0]
            passed += self.entries.get(context, (0.0, 0.0))[1]
            context = context[1:]


def read_arpa(path: str | Path) -> NGram:
    r"""An n-gram of an ARPA file, plain or .gz: `\data\`, `\1-grams:` and so on, decimal logarithms.

    Raises:
        UserError: no such file, or none of this format.
    """
    path = Path(path).expanduser()
    entries: dict[tuple[str, ...], tuple[float, float]] = {}
    order = highest = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if head := re.fullmatch(r"\\(\d+)-grams:", line):
                order = int(head[1])
                highest = max(highest, order)
            elif line == "\\end\\":
                break
            elif order and line:
                parts = line.split()
                words = tuple(parts[1 : 1 + order])
                if len(words) < order or len(parts) > order + 2:
                    raise ValueError(f"line {number} is no {order}-gram: {line[:40]!r}")
                weight = float(parts[1 + order]) if len(parts) > 1 + order else 0.0
                entries[words] = float(parts[0]) * math.log(10), weight * math.log(10)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"lm={path} cannot be read as an ARPA file: {error}") from None
    if not any(len(key) == 1 for key in entries):
        raise UserError(f"lm={path} is no ARPA file: it has no \\1-grams: section; make one with KenLM or SRILM")
    return NGram(entries, highest)


class WordScore:
    """An n-gram of words for a search over any tokens: a word counts when the token after it begins another one.

    Within a word all tokens score 0. `end` scores the last word; how a sentence ends is not asked, since a search may
    cover a part of one.

    Args:
        ngram: the model. One whose words are single letters scores letters, the blank as <space>, _ or |.
        tokenizer: of the tokens.
        vocab_size: tokens V.

    Raises:
        UserError: the model is one of letters, and a token is longer.
    """

    def __init__(self, ngram: NGram, tokenizer: Decodes, vocab_size: int) -> None:
        self.ngram, self.tokenizer = ngram, tokenizer
        names = [_name(tokenizer, i) for i in range(vocab_size)]
        self.begins = torch.tensor(_begins(names, whole=getattr(tokenizer, "of_words", False)))
        plain = [key[0] for key in ngram.entries if len(key) == 1 and not key[0].startswith("<")]
        self.letters = names if plain and all(len(word) == 1 for word in plain) else None
        long = [x for x in self.letters or () if len(x) > 1 and (x,) not in ngram.entries and x not in _UNKNOWN]
        if long:
            raise UserError(
                f"lm is a model of letters, and {long[0]!r} is one of the tokenizer's {len(long)} longer tokens, which "
                "it cannot score: give an ARPA file of words"
            )
        self.blank = next((x for x in ("<space>", "_", "|", "\u2581") if (x,) in ngram.entries), " ")

    def __call__(self, prefix: tuple[int, ...]) -> Tensor:
        """(V,) float64 of what follows."""
        if self.letters is not None:
            said = [*self.ngram.begin, *(self._letter(self.letters[i]) for i in prefix)]
            scores = [self.ngram.log_prob(said, self._letter(name)) if name else 0.0 for name in self.letters]
            return torch.tensor(scores, dtype=torch.float64)
        return self.begins.double() * self._last(prefix)

    def end(self, prefix: tuple[int, ...]) -> float:
        """What the last word adds."""
        return 0.0 if self.letters is not None else self._last(prefix)

    def _last(self, prefix: tuple[int, ...]) -> float:
        """ln P of the word that the text ends with; 0 after a blank."""
        text = self.tokenizer.decode(prefix)
        said = text.split()
        return 0.0 if not said or text[-1].isspace() else self._word(tuple(said[-self.ngram.order :]), len(said))

    @lru_cache(maxsize=65536)  # noqa: B019 (it lives as long as one command)
    def _word(self, said: tuple[str, ...], count: int) -> float:
        history = said[:-1] if count > len(said) else (*self.ngram.begin, *said[:-1])
        return self.ngram.log_prob(history, said[-1])

    def _letter(self, name: str) -> str:
        return self.blank if name.isspace() or name in _MARKS else name


class DecoderScore:
    """A causal decoder over the same tokens.

    Args:
        decoder: gives the scores of the next token.
        begin: what it reads before a text, such as the token that ends another one; () = the first token is free.
        most: tokens before the next one that count.
    """

    def __init__(self, decoder: Decoder, begin: Sequence[int] = (), most: int = 128) -> None:
        self.decoder, self.begin = decoder.eval(), list(begin)
        self.most = min(most, room_of(decoder))

    @torch.inference_mode()
    def __call__(self, prefix: tuple[int, ...]) -> Tensor:
        """(V,) float32 of what follows."""
        weight = self.decoder.head_weight
        ids = [*self.begin, *prefix][-self.most :]
        if not ids:
            return torch.zeros(len(weight))
        out = self.decoder(torch.tensor([ids], device=weight.device))
        return self.decoder.logits(out.tokens[0, -1]).float().log_softmax(-1).cpu()


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            yield line.strip()


def _begins(names: Sequence[str], *, whole: bool) -> list[bool]:
    """Whether each token begins a word: WordPiece marks those that go on, by ##, the others mark what begins."""
    marked = [name != "" and (name[0].isspace() or name[0] in _MARKS) for name in names]
    pieces = not whole and not any(marked) and any(name.startswith("##") for name in names)
    if whole or pieces:
        return [name != "" and not (pieces and name.startswith("##")) for name in names]
    return marked


def _name(tokenizer: Decodes, token: int) -> str:
    """How a token is written, with the blank that it begins with; empty for special ones."""
    text, backend = tokenizer.decode([token]), getattr(tokenizer, "backend", None)
    written = "" if backend is None or not text else backend.id_to_token(token) or ""
    return written if written[:1] in _MARKS and written else text
