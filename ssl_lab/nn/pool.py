"""From tokens to one vector per sample."""

import torch
from torch import Tensor

from ssl_lab.types import Backbone, Encoded, Pooling


def features(encoder: Backbone, x: Tensor, how: Pooling | None = None) -> Tensor:
    """Input -> (B, D) pooled output of `encoder`; what the pooling does not read is not computed where it can be left.

    Args:
        encoder: any backbone.
        x: its input, e.g. images (B, C, H, W).
        how: see `pool`.
    """
    return encoder(x, tokens=how in ("mean", "last")).pooled(how)


def pool(encoded: Encoded, how: Pooling | None = None) -> Tensor:
    """(B, D): the class token ("cls", the first prefix token), the mean over valid tokens, or the last valid token.

    None means "cls" where there is a class token, else "mean".

    Raises:
        ValueError: "cls" of a backbone without a class token.
    """
    tokens, valid = encoded.tokens, encoded.valid
    has_cls = encoded.has_cls and encoded.prefix.shape[1] > 0
    how = how or ("cls" if has_cls else "mean")
    if how == "cls":
        if not has_cls:
            raise ValueError("pooling='cls' needs a class token, and this backbone has none: use 'mean'")
        return encoded.prefix[:, 0]
    if valid is None:
        return tokens.mean(1) if how == "mean" else tokens[:, -1]
    if how == "mean":
        weight = valid.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
    last = (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), last]
