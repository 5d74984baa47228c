"""How well a language model foresees held-out text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from tokenizers.decoders import ByteLevel
from torch import Tensor

from ssl_lab.evals.base import Common, Round, Skip
from ssl_lab.losses.lm import IGNORE
from ssl_lab.types import Batch, Predicts


@dataclass(frozen=True)
class Perplexity(Common):
    """Mean negative log likelihood of the scored tokens of the test split, each row by itself.

    Bits per byte do not depend on the tokenizer: all nats, in bits, over the UTF-8 bytes of the scored tokens' text.
    Tokens of byte-level BPE are counted one by one, since part of a character is no text yet.
    """

    needs: ClassVar[type] = Predicts

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {"mean over": "scored tokens of the test split", "limit": self.limit}

    def run(self, round: Round) -> dict[str, float]:
        """`nats` per token, `perplexity`, and `bits_per_byte` where the data have a tokenizer.

        Raises:
            Skip: no token is scored.
        """
        method, tokenizer = cast(Predicts, round.method), getattr(round.data, "tokenizer", None)

        written = _bytes_of(tokenizer)

        def sums(batch: Batch) -> Tensor:
            labels = batch["labels"]
            scored = labels != IGNORE
            bytes_ = [0] * len(labels)
            if tokenizer is not None:
                rows = zip(labels.cpu(), scored.cpu(), strict=True)
                bytes_ = [written(row[keep].tolist()) for row, keep in rows]
            count = torch.tensor(bytes_, device=labels.device)
            return torch.stack([method.nll(batch).double().sum(1), scored.sum(1), count], 1)

        nats, tokens, size = round.extract(sums, "test", self.limit).x.double().sum(0).tolist()
        if not tokens:
            raise Skip("no token of the test split is scored")
        found = {"nats": nats / tokens, "perplexity": math.exp(min(700.0, nats / tokens))}
        return found | ({"bits_per_byte": nats / math.log(2) / size} if size else {})


def _bytes_of(tokenizer: Any) -> Callable[[Sequence[int]], int]:
    """Counts the bytes of text that ids stand for; byte-level BPE writes each byte as one sign of a token's name."""
    backend = getattr(tokenizer, "backend", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return lambda ids: len(tokenizer.decode(ids).encode())
    special = set(tokenizer.special)
    return lambda ids: sum(len(backend.id_to_token(i) or "") for i in ids if i not in special)
