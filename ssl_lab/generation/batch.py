"""Prompts of different lengths as one batch, and what must hold before a model is asked to go on with them."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_lab.errors import UserError

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


def pad_left(prompts: Prompts, pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Prompts as (B, L) int64, filled with `pad` on the left, and (B, L) bool with False there; None if nothing is.

    Raises:
        UserError: no prompt, or one without tokens.
    """
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompts]
    if not rows or min(len(row) for row in rows) == 0:
        raise UserError("a prompt has no tokens: give some text, or the token that begins one")
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), pad)
    valid = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :] = row
        valid[i, longest - len(row) :] = True
    return tokens.to(device), None if bool(valid.all()) else valid.to(device)


def pad_right(prompts: Prompts, pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """As `pad_left`, filled on the right: sources of an encoder."""
    turned = [torch.as_tensor(row, dtype=torch.int64).flip(0) for row in prompts]
    tokens, valid = pad_left(turned, pad, device)
    return tokens.flip(1), None if valid is None else valid.flip(1)


def pad_sound(clips: Prompts, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
    """Clips (Si,) as (B, S) float, filled with zeros on the right, and (B, S) bool with False there, None if none is.

    Raises:
        UserError: no clip, or one without samples.
    """
    rows = [torch.as_tensor(row) for row in clips]
    if not rows or min(len(row) for row in rows) == 0:
        raise UserError("a clip has no samples: leave it out")
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    audio = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return audio.to(device), None if bool(valid.all()) else valid.to(device)


def room_of(model: Any) -> int:
    """Tokens that a decoder's context holds beside a learned prompt; of an encoder and decoder the source's."""
    holder = getattr(model, "source_positions", getattr(model, "positions", model))
    context, prompt = getattr(holder, "max_length", None), getattr(model, "prompt", None)
    return (sys.maxsize if context is None else int(context)) - (0 if prompt is None else len(prompt))


def check(tokens: Tensor, new: int, vocab_size: int, room: int) -> None:
    """Raise before any work is done.

    Args:
        tokens: (B, L) prompts.
        new: tokens to be generated.
        vocab_size: ids of the model.
        room: positions of the model.

    Raises:
        UserError: nothing to generate, ids that the model lacks, or more tokens than its context holds.
    """
    if new < 1:
        raise UserError(f"max_new_tokens={new} must be 1 or more")
    if int(tokens.max()) >= vocab_size or int(tokens.min()) < 0:
        raise UserError(
            f"the prompt has the token {int(tokens.max())}, the model knows 0 to {vocab_size - 1}: use the tokenizer "
            "that it was trained with"
        )
    length = tokens.shape[1]
    if length > room:
        raise UserError(f"the prompt has {length} tokens, the model's context holds {room}: shorten the prompt")
    if length + new > room:
        raise UserError(
            f"a prompt of {length} tokens and max_new_tokens={new} are more than the model's context of {room}: "
            f"at most max_new_tokens={room - length}" + ("" if room > length else ", so shorten the prompt")
        )
