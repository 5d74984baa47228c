"""From the patches of an image encoder to the tokens of a language model: what LLaVA trains first.

A connector maps (N, P, Dv) to (N, Q, D); `num_tokens(P)` says how many Q there are of P. Linear maps have torch's
default start, as in LLaVA-1.5 (arXiv:2310.03744).
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.resampler import Resampler


class _OnGrid(nn.Module):
    """What comes before a map of single tokens: neighbours of the square grid become one token.

    Args:
        pool: side of the squares whose mean is taken (average pooling).
        merge: side of the squares whose channels are joined, row by row (space to depth, as in nanoVLM).

    Raises:
        UserError: a side below 1.
    """

    def __init__(self, pool: int, merge: int) -> None:
        super().__init__()
        if pool < 1 or merge < 1:
            raise UserError(f"pool={pool}, merge={merge}: sides of squares, 1 = every patch by itself")
        self.pool, self.merge = pool, merge

    def num_tokens(self, patches: int) -> int:
        """Tokens that so many patches become."""
        return (self._side(patches) // (self.pool * self.merge)) ** 2 if self.pool * self.merge > 1 else patches

    def gathered(self, patches: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, Q, Dv * merge ** 2)."""
        if self.pool * self.merge == 1:
            return patches
        side = self._side(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        if self.pool > 1:
            grid = F.avg_pool2d(grid, self.pool)
        n, _, side, _ = grid.shape
        rows = grid.view(n, -1, side // self.merge, self.merge, side // self.merge, self.merge)
        return rows.permute(0, 2, 4, 3, 5, 1).reshape(n, (side // self.merge) ** 2, -1)

    def _side(self, patches: int) -> int:
        side, square = math.isqrt(patches), self.pool * self.merge
        if side * side != patches or side % square:
            raise UserError(
                f"a connector with pool={self.pool} and merge={self.merge} needs a square grid of patches whose side "
                f"is a multiple of {square}, and the image encoder gives {patches} patches: choose another pool, merge "
                "or image size"
            )
        return side


class LinearConnector(_OnGrid):
    """One linear map (LLaVA, arXiv:2304.08485), (N, P, Dv) -> (N, Q, D).

    Args:
        in_dim: width Dv of the image encoder.
        out_dim: width D of the language model.
        pool: see above; 1 = no pooling.
        merge: see above; 1 = nothing is merged.
        bias: nanoVLM has none.
    """

    def __init__(self, in_dim: int, out_dim: int, *, pool: int = 1, merge: int = 1, bias: bool = True) -> None:
        super().__init__(pool, merge)
        self.fc = Linear(in_dim * merge**2, out_dim, bias)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.fc(self.gathered(patches))
        return out


class MLPConnector(_OnGrid):
    """Two linear maps with an exact GELU between (`mlp2x_gelu` of LLaVA-1.5, arXiv:2310.03744).

    Args:
        in_dim: width Dv of the image encoder.
        out_dim: width D of the language model, and of what lies between.
        pool: see above; 1 = no pooling.
        merge: see above; 1 = nothing is merged.
    """

    def __init__(self, in_dim: int, out_dim: int, *, pool: int = 1, merge: int = 1) -> None:
        super().__init__(pool, merge)
        self.fc1, self.fc2 = Linear(in_dim * merge**2, out_dim), Linear(out_dim, out_dim)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(self.gathered(patches))))
        return out


class ResamplerConnector(nn.Module):
    """A Perceiver resampler at the encoder's width, then a linear map: always `num_latents` tokens.

    Args:
        in_dim: width Dv of the image encoder.
        out_dim: width D of the language model.
        num_latents: tokens of an image.
        depth: layers of the resampler.
        num_heads: heads of a layer.
        head_dim: width of a head.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        num_latents: int = 64,
        depth: int = 2,
        num_heads: int = 8,
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        self.resampler = Resampler(in_dim, num_latents, depth=depth, num_heads=num_heads, head_dim=head_dim)
        self.fc = Linear(in_dim, out_dim)

    def num_tokens(self, patches: int) -> int:
        """As many as there are latents."""
        return len(self.resampler.latents)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.fc(self.resampler(patches))
        return out
