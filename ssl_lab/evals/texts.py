"""What evaluators of images and texts share: where the texts come from, and their embeddings."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round, Skip, moved
from ssl_lab.evals.features import gather_rows
from ssl_lab.types import Batch, EmbedsPairs

Encode = Callable[[Sequence[str]], Batch]  # texts -> their `tokens` and `valid`

_TEXTS = 256  # texts that are embedded at once


def encoder_of(round: Round) -> Encode:
    """What makes tokens of texts, as the data do it for their captions.

    Raises:
        Skip: the data have no captions.
    """
    encode = getattr(getattr(round.data, "train", None), "encode", None)
    encode = encode or getattr(getattr(round.data, "test", None), "encode", None)
    if encode is None:
        raise Skip("these data have no captions, and so no tokenizer for texts")
    return cast(Encode, encode)


def captions_of(round: Round, rows: Sequence[int]) -> list[list[str]]:
    """All captions of these rows of the test split.

    Raises:
        Skip: there are none.
    """
    source: Any = getattr(round.data, "test", None)
    if not hasattr(source, "captions"):
        raise Skip("the test split has no captions")
    found: list[list[str]] = source.captions(rows)
    return found


def embed_texts(round: Round, texts: Sequence[str], encode: Encode) -> Tensor:
    """Texts -> (N, E) float32 on the CPU, each rank having embedded a part of them.

    Raises:
        UserError: an embedding is not finite.
    """
    method, share = cast(EmbedsPairs, round.method), -(-len(texts) // dist.world_size())
    own = texts[dist.rank() * share : (dist.rank() + 1) * share]
    parts = []
    with torch.no_grad():
        for start in range(0, max(1, len(own)), _TEXTS):  # a rank without texts of its own embeds one, and drops it
            batch = moved(encode(own[start : start + _TEXTS] or texts[:1]), round.device, round.dtype)
            with round.precision():
                parts.append(method.embed_text(batch).float().cpu())
    x = gather_rows(torch.cat(parts)[: len(own)], round.device)
    if not x.isfinite().all():
        raise UserError("embeddings of texts are not finite: the weights have diverged; evaluate an earlier checkpoint")
    return x
