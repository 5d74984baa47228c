"""What generation asks of a model: begin with prompts, go on by a token, keep some rows. One class for each kind."""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.generation.compact import Compact
from ssl_lab.generation.layers import plan
from ssl_lab.nn.cache import KVCache

LanguageModel = Decoder | EncoderDecoder


class Stepper(Protocol):
    """Scores of the next token, with whatever must be remembered of the past."""

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        """Take in prompts (B, L), `valid` (B, L) False on the left, room for `new` more -> scores (B, V)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Take in one token (B,) of each row -> scores (B, V) of what follows."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row `rows[b]` was; rows (B',) int64."""
        ...


def stepper(model: LanguageModel, *, start: int = 0, cache: bool = True, compact: bool = True) -> Stepper:
    """The quickest stepper that serves `model`.

    Args:
        model: a decoder, or an encoder and decoder.
        start: id that every target begins with; for an encoder and decoder.
        cache: keep keys and values; else each step goes through all tokens again.
        compact: steps of few operations where the decoder is one that `Compact` knows.
    """
    if isinstance(model, EncoderDecoder):
        return Seq2Seq(model, start, cache=cache)
    layers = plan(model) if cache and compact else None
    return Cached(model, cache=cache) if layers is None else Compact(model, layers)


class Cached:
    """Steps through the modules of any decoder.

    Args:
        decoder: the model.
        cache: keep keys and values.
    """

    def __init__(self, decoder: Decoder, *, cache: bool = True) -> None:
        self.decoder, self.keeps = decoder, cache
        self.cache: KVCache | None = None
        self.tokens: Tensor | None = None  # (B, L) so far, where nothing else is kept
        self.valid: Tensor | None = None  # (B, L + new); True where a token is still to come

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        self.length = tokens.shape[1]
        self.valid = None if valid is None else torch.cat([valid, valid.new_ones(len(valid), new)], 1)
        if self.keeps:
            self.cache = KVCache(self.length + new, window=self.decoder.window)
        else:
            self.tokens = tokens
        return self._scores(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        self.length += 1
        if self.tokens is None:
            return self._scores(tokens[:, None])
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return self._scores(self.tokens)

    def reorder(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(rows)
        if self.tokens is not None:
            self.tokens = self.tokens[rows]
        if self.valid is not None:
            self.valid = self.valid[rows]

    def _scores(self, tokens: Tensor) -> Tensor:
        valid = None if self.valid is None else self.valid[:, : self.length]
        out = self.decoder(tokens, valid=valid, cache=self.cache)
        return self.decoder.logits(out.tokens[:, -1])


class Seq2Seq:
    """Steps of a decoder that looks at an encoded source; the prompts are the sources, padded on the right.

    Args:
        model: encoder and decoder.
        start: id that every target begins with.
        cache: keep keys and values.
    """

    def __init__(self, model: EncoderDecoder, start: int, *, cache: bool = True) -> None:
        self.model, self.start, self.keeps = model, start, cache
        self.cache: KVCache | None = None

    def begin(self, tokens: Tensor, valid: Tensor | None, new: int) -> Tensor:
        self.memory = self.model.encode(tokens, valid=valid)
        self.cache = KVCache(new + 1) if self.keeps else None
        self.tokens = torch.full((len(tokens), 1), self.start, dtype=torch.int64, device=tokens.device)
        return self._scores(self.tokens)

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return self._scores(self.tokens if self.cache is None else tokens[:, None])

    def reorder(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder(rows)
        self.tokens = self.tokens[rows]
        valid = None if self.memory.valid is None else self.memory.valid[rows]
        self.memory = replace(self.memory, tokens=self.memory.tokens[rows], valid=valid)

    def _scores(self, tokens: Tensor) -> Tensor:
        out = self.model.decode(tokens, self.memory, cache=self.cache)
        return self.model.logits(out.tokens[:, -1])
