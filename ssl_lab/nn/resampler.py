"""The Perceiver resampler (Flamingo, arXiv:2204.14198, section 3.1.1): any number of tokens becomes a fixed one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.attend import attend
from ssl_lab.nn.linear import Linear


class ResamplerLayer(nn.Module):
    """Latents (N, R, D) look at the media (N, S, D) and at themselves; a feed-forward. Biases are in norms."""

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, hidden: int, act: Callable[[Tensor], Tensor], *, qk_norm: bool
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.head_dim, self.act = head_dim, act
        self.media_norm, self.latent_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv = Linear(dim, inner, bias=False), Linear(dim, 2 * inner, bias=False)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(inner, dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = Linear(dim, hidden, bias=False), Linear(hidden, dim, bias=False)

    def forward(self, latents: Tensor, media: Tensor) -> Tensor:
        seen = self.latent_norm(latents)
        k, v = self._heads(self.kv(torch.cat([self.media_norm(media), seen], 1))).chunk(2, 1)
        out = attend(self.q_norm(self._heads(self.q(seen))), self.k_norm(k), v)
        latents = latents + self.proj(out.transpose(1, 2).flatten(2))
        found: Tensor = latents + self.fc2(self.act(self.fc1(self.norm(latents))))
        return found

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, H * Dh) -> (N, H, L, Dh)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Resampler(nn.Module):
    """Media (N, S, D) -> `num_latents` tokens (N, R, D).

    As in transformers' IDEFICS; the paper's feed-forward has a squared ReLU instead of a ReLU.

    Args:
        dim: width D.
        num_latents: tokens R that come out; they begin as normal(1).
        depth: layers.
        num_heads: heads H.
        head_dim: width of a head.
        hidden: width of the feed-forward, 4 D by default.
        act: of the feed-forward.
        qk_norm: norm queries and keys, head by head.
    """

    def __init__(
        self,
        dim: int,
        num_latents: int = 64,
        *,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        hidden: int | None = None,
        act: Callable[[Tensor], Tensor] = F.relu,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            ResamplerLayer(dim, num_heads, head_dim, hidden or 4 * dim, act, qk_norm=qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, media: Tensor) -> Tensor:
        latents = self.latents.to(media.dtype).expand(len(media), -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        found: Tensor = self.norm(latents)
        return found
