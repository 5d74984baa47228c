"""How a text model knows the order of its tokens: by what is added to them, by rotation, or by a bias of the scores.

A model asks for all three; each kind answers one of them. `at` are the positions of the tokens, (L,) or (B, L) int64.
"""

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.bias import RelativeBias, alibi_bias
from ssl_lab.nn.rope import Rope, Scaling, rope_1d


class Positions(nn.Module):
    """No positions at all; the base of the others.

    Args:
        dim: width D of the tokens.
        num_heads: heads of the model.
        max_length: positions that exist.

    Attributes:
        absolute: a position means the same whatever stands before it, so packed documents must count from their own
            beginning; where only distances matter, they need not.
    """

    absolute = False

    def __init__(self, dim: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.dim, self.num_heads, self.max_length = dim, num_heads, max_length

    def lengthen(self, extra: int) -> None:
        """Make room for `extra` more positions where they are computed; a learned table keeps its size."""
        self.max_length += extra

    def added(self, at: Tensor) -> Tensor | None:
        """(L | B x L, D) to add to the tokens."""
        return None

    def rope(self, at: Tensor) -> Rope | None:
        """cos and sin (L | B x 1 x L, Dh) for queries and keys."""
        return None

    def bias(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """(1, H, L, S) to add to the scores of the last L of S positions."""
        return None


class Learned(Positions):
    """A learned table, as in BERT and GPT-2; normal(0.02)."""

    absolute = True

    def __init__(self, dim: int, num_heads: int, max_length: int) -> None:
        super().__init__(dim, num_heads, max_length)
        self.weight = nn.Parameter(torch.empty(max_length, dim))
        nn.init.normal_(self.weight, std=0.02)

    def lengthen(self, extra: int) -> None:
        pass

    def added(self, at: Tensor) -> Tensor:
        return nn.functional.embedding(at, self.weight)


class Sinusoidal(Positions):
    """The fixed waves of the Transformer (arXiv:1706.03762, section 3.5).

    Sines and cosines alternate by channel, as in the paper; with `halves` all sines come first, as in Marian.
    """

    absolute = True
    table: Tensor

    def __init__(self, dim: int, num_heads: int, max_length: int, *, halves: bool = False) -> None:
        super().__init__(dim, num_heads, max_length)
        self.halves = halves
        self.register_buffer("table", self.waves().float(), persistent=False)

    def lengthen(self, extra: int) -> None:
        super().lengthen(extra)
        self.table = self.waves().float().to(self.table)

    def waves(self) -> Tensor:
        """(max_length, D) float64."""
        rate = 10000.0 ** -(torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angle = torch.arange(self.max_length, dtype=torch.float64)[:, None] * rate
        waves = [angle.sin(), angle.cos()]
        return torch.cat(waves, 1) if self.halves else torch.stack(waves, 2).flatten(1)

    def added(self, at: Tensor) -> Tensor:
        return nn.functional.embedding(at, self.table)


class Rotary(Positions):
    """Rotation of queries and keys (RoFormer, arXiv:2104.09864), as in LLaMA.

    Args:
        dim: width of the model.
        num_heads: query heads.
        max_length: positions that exist.
        base: theta of the slowest wave.
        head_dim: width that is rotated; dim // num_heads by default.
        scaling: stretches a trained table to longer texts, see `ssl_lab.nn.rope.YaRN` and its kin.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_length: int,
        *,
        base: float = 10000.0,
        head_dim: int | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__(dim, num_heads, max_length)
        self.base, self.head_dim, self.scaling = base, head_dim or dim // num_heads, scaling
        cos, sin = self._waves()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def lengthen(self, extra: int) -> None:
        super().lengthen(extra)
        cos, sin = self._waves()
        self.cos, self.sin = cos.to(self.cos), sin.to(self.sin)

    def _waves(self) -> Rope:
        return rope_1d(torch.arange(self.max_length), self.head_dim, base=self.base, scaling=self.scaling)

    def rope(self, at: Tensor) -> Rope:
        cos, sin = self.cos[at], self.sin[at]
        return (cos, sin) if at.dim() == 1 else (cos[:, None], sin[:, None])


class ALiBi(Positions):
    """A penalty that grows with the distance, steeper in some heads than in others (arXiv:2108.12409)."""

    def bias(self, queries: int, keys: int, device: torch.device) -> Tensor:
        return alibi_bias(self.num_heads, queries, keys, device=device)


class Relative(Positions):
    """T5's learned bias by bucketed distance, one for all layers; see `RelativeBias`.

    Args:
        dim: width D of the model.
        num_heads: heads of the model.
        max_length: positions that fit; the bias itself knows no end.
        num_buckets: buckets of distance.
        max_distance: distances from here on share the last bucket.
        bidirectional: tell before from after; False for a decoder.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_length: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, max_length)
        self.table = RelativeBias(num_heads, num_buckets, max_distance, bidirectional)

    def bias(self, queries: int, keys: int, device: torch.device) -> Tensor:
        return self.table(queries, keys)


def since_start(segments: Tensor) -> Tensor:
    """Ids (B, L) of packed documents -> (B, L) int64 positions that begin at 0 in each of them."""
    at = torch.arange(segments.shape[1], device=segments.device)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return at - torch.where(first, at, 0).cummax(1).values


def require_room(positions: Positions, length: int, prompt: int = 0) -> None:
    """Raise before a table ends.

    Raises:
        UserError: `length` positions, `prompt` of them for a learned prompt, are more than there are.
    """
    most = positions.max_length
    if length > most and prompt:
        raise UserError(
            f"{length - prompt} tokens and {prompt} of tuning=prompt are longer than the model's context of {most}: "
            f"set its max_length to {length}, or leave it at {most} and set data.train.length at most {most - prompt}"
        )
    if length > most:
        raise UserError(
            f"{length} tokens are longer than the model's context of {most}: shorten the text, generate fewer tokens, "
            "or choose a model with a larger max_length"
        )
