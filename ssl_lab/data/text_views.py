"""From rows of a corpus to what a method sees: shifted, masked, corrupted.

Views of text map (`Samples.data`, position, seed) to keys of a batch, as those of images do; all that is random depends
on (seed, position) alone.
"""

import numpy as np
import torch
from torch import Tensor

from ssl_lab.data.text_pad import IGNORE, joined
from ssl_lab.data.tokenizer import Tokenizer, as_tokenizer
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

Rows = tuple[Tensor, Tensor]  # (B, L + 1) int64 tokens and documents within the row, as `Blocks` gives them
Passages = tuple[list[np.ndarray], list[np.ndarray]]  # B passages and B from elsewhere, as `NextSentences` gives them


class NextToken:
    """Every token is to be told from those before it: rows of `Blocks`, (B, L + 1), -> `tokens` and `labels` (B, L).

    The first token of a document cannot be told from another one, so it is no label (-100), and `segments` (B, L) keeps
    documents from seeing each other; it is given where a row holds more than one. `across=True` reads documents as one
    text, as GPT-2 did.
    """

    def __init__(self, *, across: bool = False):
        self.across = across

    def __call__(self, data: Rows, position: Tensor, seed: int) -> Batch:
        """Nothing is drawn."""
        tokens, segments = data
        batch: Batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        if not self.across and bool((segments != 0).any()):
            batch["labels"] = tokens[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], IGNORE)
            batch["segments"] = segments[:, :-1]
        return batch


class MaskTokens:
    """BERT's masking (Devlin et al., 2019, appendix A.1), drawn anew in every pass.

    Rows of `Blocks`, (B, L + 1), -> `tokens` (B, L), which begin with [CLS] and end with [SEP] where the tokenizer has
    them, and `labels` (B, L) with the true token at `rate` of the places (rounded, at least one) and -100 elsewhere.
    What is chosen becomes the mask token in `masked` of the cases, any ordinary token in `random` of them, and stays in
    the rest. Special tokens are never chosen. `whole_words` chooses words and masks all their tokens, as many words as
    fit into the number. Documents see each other, as in RoBERTa, unless `across` is false: then `segments` (B, L) tell
    them apart, and [CLS] belongs to the first.

    Raises:
        UserError: the tokenizer has no mask token, or the shares are none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        *,
        rate: float = 0.15,
        masked: float = 0.8,
        random: float = 0.1,
        whole_words: bool = False,
        across: bool = True,
    ):
        if not 0 < rate < 1 or min(masked, random) < 0 or masked + random > 1:
            raise UserError(
                f"rate={rate}, masked={masked}, random={random}: take 0 < rate < 1 and masked + random <= 1"
            )
        self.tokenizer = as_tokenizer(tokenizer)
        (self.mask,) = self.tokenizer.require("mask")
        self.rate, self.masked, self.random = rate, masked, random
        self.whole_words, self.across = whole_words, across
        self._special = torch.zeros(self.tokenizer.vocab_size, dtype=torch.bool)
        self._special[self.tokenizer.special] = True
        self._ordinary = (~self._special).nonzero()[:, 0]

    def __call__(self, data: Rows, position: Tensor, seed: int) -> Batch:
        tokens, segments = data[0][:, :-1], data[1][:, :-1]
        cls, sep = self.tokenizer.cls, self.tokenizer.sep
        if cls is not None and sep is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], cls), tokens[:, :-2], tokens[:, -1:]], 1)
            tokens[:, -1] = sep
            segments = torch.cat([segments[:, :1], segments[:, :-2], segments[:, -3:-2]], 1)
        batch = self.corrupt(tokens, None, position, seed)
        if not self.across and bool((segments != 0).any()):
            batch["segments"] = segments
        return batch

    def corrupt(self, tokens: Tensor, valid: Tensor | None, position: Tensor, seed: int) -> Batch:
        """`tokens` (B, L), of which `valid` (B, L) bool are real (None = all), -> `tokens` and `labels` (B, L)."""
        score, fate, other = uniform(seed, position, 3 * tokens.shape[1]).chunk(3, 1)
        free = ~self._special[tokens] if valid is None else ~self._special[tokens] & valid
        size = torch.full((len(tokens),), tokens.shape[1]) if valid is None else valid.sum(1)
        count = (size * self.rate).round().long().clamp(min=1).minimum(free.sum(1))
        chosen = self._words(tokens, free, score, count) if self.whole_words else _lowest(score, free, count)
        labels = tokens.masked_fill(~chosen, IGNORE)
        replacement = self._ordinary[(other * len(self._ordinary)).long()]
        tokens = torch.where(chosen & (fate < self.masked + self.random), replacement, tokens)
        tokens = tokens.masked_fill(chosen & (fate < self.masked), self.mask)
        return {"tokens": tokens, "labels": labels}

    def _words(self, tokens: Tensor, free: Tensor, score: Tensor, count: Tensor) -> Tensor:
        """(B, L) bool: words in random order, each unless it would exceed the number."""
        chosen = torch.zeros_like(free)
        begins = self.tokenizer.starts[tokens] | ~free
        begins[:, 1:] |= ~free[:, :-1]
        begins[:, 0] = True
        for row, wanted in enumerate(count.tolist()):
            starts = begins[row].nonzero()[:, 0].tolist()
            ends = [*starts[1:], tokens.shape[1]]
            words = [(s, e) for s, e in zip(starts, ends, strict=True) if free[row, s]]
            order = score[row].tolist()
            for start, end in sorted(words, key=lambda word: order[word[0]]):
                if end - start <= wanted:
                    chosen[row, start:end] = True
                    wanted -= end - start
        return chosen


class MaskPairs(MaskTokens):
    """Masking and the prediction of the next sentence (Devlin et al., 2019): [CLS] a [SEP] b [SEP].

    Takes what `NextSentences` gives: passages, and as many from elsewhere. A passage is cut after a sentence, or
    anywhere if it has no second one; with probability `shuffled` its second part is taken from elsewhere. -> `tokens`,
    `labels`, `types` and `valid` (B, L), L being the longest of the batch; `target` (B,) int64 is 0 where b follows a
    and 1 where it does not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        *,
        rate: float = 0.15,
        masked: float = 0.8,
        random: float = 0.1,
        whole_words: bool = False,
        shuffled: float = 0.5,
    ):
        super().__init__(tokenizer, rate=rate, masked=masked, random=random, whole_words=whole_words)
        self.tokenizer.require("cls", "sep")
        self.shuffled = shuffled
        self._ends = self.tokenizer.ends.numpy()

    def __call__(self, data: Passages, position: Tensor, seed: int) -> Batch:  # type: ignore[override]
        passages, others = data
        draws = uniform(seed, position, 2)
        pairs, following = [], []
        for passage, other, (place, coin) in zip(passages, others, draws.tolist(), strict=True):
            cut = self._cut(passage, place)
            shuffled = coin < self.shuffled
            second = other[self._cut(other, place) :][: len(passage) - cut] if shuffled else passage[cut:]
            pairs.append((passage[:cut], second))
            following.append(int(shuffled))
        tokens, types, valid = joined(pairs, self.tokenizer, None)
        batch = self.corrupt(tokens, valid, position, fold(seed, 1))
        batch.update({"types": types, "valid": valid, "target": torch.tensor(following)})
        return batch

    def _cut(self, passage: np.ndarray, place: float) -> int:
        """A place from 1 on where a sentence begins, else any; `place` 0..1 says which of them."""
        ends = self._ends[passage]
        options = np.flatnonzero(ends[:-1] & ~ends[1:]) + 1
        if not len(options):
            options = np.arange(1, len(passage))
        return int(options[int(place * len(options))]) if len(options) else 1


class CorruptSpans:
    """T5's span corruption (Raffel et al., 2020, section 3.1.4): rows of `Blocks` -> `tokens`, `labels`.

    Of L = `length` raw tokens, `rate` are noise, in spans of `mean_span` tokens on average; the text is divided into
    spans at random, noise last. In the input each span of noise becomes one sentinel; the labels are each sentinel
    with what it stands for. Sentinels are the tokenizer's <extra_id_0>, <extra_id_1>, ..., whose ids descend from the
    end of the vocabulary. Both sequences end with end-of-text. 568 raw tokens give 512 inputs and 114 labels.

    The paper's figure closes the labels with one more sentinel; its code, whose lengths these are, has none there.
    `closing=True` adds it.

    Raises:
        UserError: the tokenizer has too few sentinels, or no end-of-text token.
    """

    def __init__(
        self, tokenizer: Tokenizer | str, *, rate: float = 0.15, mean_span: float = 3.0, closing: bool = False
    ):
        if not 0 < rate < 1 or mean_span < 1:
            raise UserError(f"rate={rate}, mean_span={mean_span}: take 0 < rate < 1 and spans of at least 1 token")
        self.tokenizer = as_tokenizer(tokenizer)
        (self.eos,) = self.tokenizer.require("eos")
        self.rate, self.mean_span, self.closing = rate, mean_span, closing
        self._sentinels = torch.tensor(self.tokenizer.sentinels, dtype=torch.int64)

    def __call__(self, data: Rows, position: Tensor, seed: int) -> Batch:
        tokens = data[0][:, :-1]
        rows, length = tokens.shape
        noise, spans = noise_of(length, self.rate, self.mean_span)
        if len(self._sentinels) < spans + self.closing:
            raise UserError(
                f"rows of {length} tokens have {spans} spans, and data.tokenizer has {len(self._sentinels)} sentinels: "
                f"train it with data.tokenizer.sentinels={spans + self.closing}, or set a smaller data.train.length"
            )
        u = uniform(seed, position, length - 2)
        kept = _parts(length - noise, spans, u[:, : length - noise - 1])
        lost = _parts(noise, spans, u[:, length - noise - 1 :])
        ends = torch.stack([kept, lost], 2).flatten(1).cumsum(1)
        span = torch.searchsorted(ends, torch.arange(length).expand(rows, -1).contiguous(), right=True)
        first = torch.diff(span, dim=1, prepend=torch.full((rows, 1), -1)) != 0
        is_noise, sentinel = span % 2 == 1, self._sentinels[span // 2]
        # A sentinel takes the place of the first token of each noise span, and in the labels of each kept span.
        inputs = torch.where(is_noise, sentinel, tokens)[~is_noise | first].view(rows, -1)
        labels = torch.where(is_noise, tokens, sentinel)[is_noise | first].view(rows, -1)
        end = torch.full((rows, 1), self.eos)
        closing = [self._sentinels[spans].expand(rows, 1)] if self.closing else []
        tokens = torch.cat([inputs, end], 1)
        return {
            "tokens": tokens,
            "valid": torch.ones_like(tokens, dtype=torch.bool),
            "labels": torch.cat([labels, *closing, end], 1),
        }


def noise_of(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of `length` tokens are noise, and in how many spans."""
    noise = min(max(round(length * rate), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def _parts(total: int, parts: int, u: Tensor) -> Tensor:
    """(B, total - 1) draws -> (B, parts) int64 lengths from 1 on that sum to `total`, all equally likely."""
    cuts = u.topk(parts - 1, dim=1, largest=False).indices.sort(1).values + 1
    edge = torch.zeros(len(u), 1, dtype=torch.int64)
    return torch.diff(torch.cat([edge, cuts, edge + total], 1), dim=1)


def _lowest(score: Tensor, free: Tensor, count: Tensor) -> Tensor:
    """(B, L) bool: the `count` (B,) places with the lowest score among the free ones."""
    order = score.masked_fill(~free, 2.0).topk(int(count.max()), dim=1, largest=False).indices
    wanted = torch.arange(order.shape[1]) < count[:, None]
    return torch.zeros_like(free).scatter_(1, order, wanted)
