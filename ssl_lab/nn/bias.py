"""Order by a bias of the attention scores: ALiBi's penalty on distance, T5's learned buckets of distance."""

import math

import torch
from torch import Tensor, nn


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """(H,) float32, 2 ** (-8 h / H) for h = 1..H (ALiBi, arXiv:2108.12409, section 3).

    Where H is no power of two: the slopes of the power below, then every second one of the power above.
    """
    lower = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * h / lower) for h in range(1, lower + 1)]
    slopes += [2.0 ** (-8 * h / (2 * lower)) for h in range(1, 2 * (num_heads - lower), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def alibi_bias(num_heads: int, L: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
    """(1, H, L, S) float32: minus slope times |i - j|, for queries i that are the last L of S positions."""
    return (alibi_slopes(num_heads, device=device)[:, None, None] * -_offsets(L, S, device).abs())[None]


class RelativeBias(nn.Module):
    """T5's bias by bucketed distance, learned per head (arXiv:1910.10683, section 2.1); one is shared by all layers.

    Half of the buckets count single positions, the others widen logarithmically up to `max_distance`.

    Args:
        num_heads: query heads H.
        num_buckets: buckets, of which each direction has half if `bidirectional`.
        max_distance: distances from here on share the last bucket.
        bidirectional: tell before from after; else all that comes after counts as distance 0 (causal decoders).
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, L: int, S: int) -> Tensor:
        """(1, H, L, S) for queries that are the last L of S positions."""
        bucket = self.bucket(_offsets(L, S, self.weight.device))
        return nn.functional.embedding(bucket, self.weight).permute(2, 0, 1)[None]

    def bucket(self, offset: Tensor) -> Tensor:
        """Bucket of each key position minus query position, int64."""
        buckets = self.num_buckets
        if self.bidirectional:
            buckets //= 2
            first, distance = (offset > 0) * buckets, offset.abs()
        else:
            first, distance = torch.zeros_like(offset), (-offset).clamp(min=0)
        exact = buckets // 2
        ratio = (distance.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


def _offsets(L: int, S: int, device: torch.device | str | None) -> Tensor:
    """(L, S) int64: key position minus query position."""
    return torch.arange(S, device=device)[None] - torch.arange(S - L, S, device=device)[:, None]
