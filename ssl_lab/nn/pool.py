"""From tokens to one vector per sample."""

import torch
from torch import Tensor, nn

from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Context
from ssl_lab.nn.ffn import ACTIVATIONS, MLP, Activation
from ssl_lab.nn.mask import AttnMask
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


class AttentionPool(nn.Module):
    """A learned query attends to all tokens, then a residual MLP: (B, L, D) -> (B, D) (SigLIP's pooling head).

    Args:
        dim: width D.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over D.
        act: its activation.
        eps: of the norm before it.
    """

    def __init__(
        self, dim: int, num_heads: int, *, mlp_ratio: float = 4.0, act: Activation = "gelu_tanh", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.xavier_uniform_(self.probe[0])
        self.attn, self.norm = Attention(dim, num_heads, cross=True), nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act=ACTIVATIONS[act])

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, L, D), and `valid` (B, L) bool with False = padding, which is not seen -> (B, D)."""
        ctx = Context(memory=tokens, memory_mask=AttnMask(valid=valid))
        x = self.attn(self.probe.to(tokens.dtype).expand(len(tokens), -1, -1), ctx)
        return (x + self.mlp(self.norm(x)))[:, 0]
