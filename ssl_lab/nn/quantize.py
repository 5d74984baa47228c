"""Codes for sound without labels: BEST-RQ's random projection, and wav2vec 2.0's learned codebooks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.linear import Linear


class RandomQuantizer(nn.Module):
    """Features (B, T, F) -> codes (B, T', C) int64: the entry nearest to a random projection (arXiv:2202.01855).

    Projection and codebooks are drawn once from `seed` and never trained: they are buffers, alike on all ranks. A code
    stands for the middle frames among those that one token of a subsampling by 4 sees (`ConvSubsampling`), stacked and
    normalised per dimension over their utterance, without which few entries are ever the nearest.

    Args:
        num_features: mel bins F.
        codebooks: C, each with a projection of its own.
        entries: of a codebook.
        dim: width in which entries live.
        stack: frames to a code.
        stride: frames from one code to the next.
        receptive: frames that a token sees.
        seed: of the draws.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        codebooks: int = 1,
        entries: int = 8192,
        dim: int = 16,
        stack: int = 4,
        stride: int = 4,
        receptive: int = 7,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.entries, self.stack, self.stride, self.receptive = entries, stack, stride, receptive
        generator = torch.Generator().manual_seed(seed)
        wide = num_features * stack
        bound = (6 / (wide + dim)) ** 0.5  # Xavier's uniform
        projection = (torch.rand(codebooks, wide, dim, generator=generator) * 2 - 1) * bound
        codebook = torch.randn(codebooks, entries, dim, generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))

    @torch.no_grad()
    def forward(self, features: Tensor, valid: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Features and their valid frames (B, T) bool, all by default; codes of other frames mean nothing.

        With `at` (B, T') bool only those M codes are looked for: (M, C).
        """
        stacked = self.stacked(features).flatten(2)
        count = stacked.shape[1]
        if valid is None:
            real = stacked.new_ones(stacked.shape[:2], dtype=torch.bool)
        else:
            seen = (valid.sum(1) - self.receptive).div(self.stride, rounding_mode="floor") + 1
            real = torch.arange(count, device=valid.device) < seen[:, None]
        with torch.autocast(features.device.type, enabled=False):
            stacked = _standardized(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), real[..., None])
            stacked = stacked if at is None else stacked[at]
            projected = torch.einsum("...f,cfd->...cd", stacked, self.projection.to(stacked.dtype))
            near = torch.einsum("...cd,ced->...ce", projected, self.codebook.to(stacked.dtype))
            return near.argmax(-1)  # entries have length 1, so the length of the projection decides nothing

    def stacked(self, frames: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T', stack, ...): the frames of each code; too few are filled up with 0."""
        rest = frames.dim() - 2
        frames = F.pad(frames, (*(0, 0) * rest, 0, max(0, self.receptive - frames.shape[1])))
        count = (frames.shape[1] - self.receptive) // self.stride + 1
        cut = frames[:, (self.receptive - self.stack) // 2 :].unfold(1, self.stack, self.stride)
        return cut[:, :count].movedim(-1, 2)


def _standardized(x: Tensor, real: Tensor) -> Tensor:
    """(B, T', F) with mean 0 and deviation 1 over the frames of each utterance that are real (B, T', 1)."""
    count = real.sum(1, keepdim=True).clamp(min=1)
    centred = x - x.masked_fill(~real, 0).sum(1, keepdim=True) / count
    variance = centred.masked_fill(~real, 0).square().sum(1, keepdim=True) / count
    return centred * (variance + 1e-7).rsqrt()


class GumbelQuantizer(nn.Module):
    """Learned codes (arXiv:2006.11477, section 2): each of G groups picks one of V entries, all are joined.

    In training the choice is drawn by Gumbel noise and the gradient passes straight through to the probabilities; else
    it is the likeliest entry.

    Args:
        dim: width of the input.
        groups: G.
        entries: V of each group.
        width: of the joined entries; a multiple of G.

    Raises:
        UserError: a width that is no such multiple.
    """

    def __init__(self, dim: int, *, groups: int = 2, entries: int = 320, width: int = 256) -> None:
        super().__init__()
        if width % groups:
            raise UserError(f"codes of width {width} cannot be joined of groups={groups}: choose a multiple")
        self.groups, self.entries = groups, entries
        self.proj = Linear(dim, groups * entries)
        self.codebook = nn.Parameter(torch.empty(groups, entries, width // groups))
        nn.init.normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        nn.init.uniform_(self.codebook)

    def forward(
        self, x: Tensor, *, temperature: float = 2.0, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(M, D) -> joined entries (M, width), codes (M, G) int64, and (M, G, V) to judge diversity by.

        The last are probabilities in training, without the noise, and the choices themselves else.

        Args:
            x: the input.
            temperature: of the choice in training; the paper lowers it from 2 to 0.5, by 0.999995 in each step.
            noise: (M, G, V) of Gumbel's distribution; by default it is drawn, see `gumbel`.
        """
        scores = self.proj(x).unflatten(-1, (self.groups, self.entries))
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.training:
            noise = gumbel(exact) if noise is None else noise
            soft = ((exact + noise) / temperature).softmax(-1)
            hard = F.one_hot(soft.argmax(-1), self.entries).to(soft.dtype)
            chosen, judged = hard - soft.detach() + soft, exact.softmax(-1)
        else:
            judged = chosen = F.one_hot(exact.argmax(-1), self.entries).to(exact.dtype)
        joined = torch.einsum("mgv,gvw->mgw", chosen.to(self.codebook.dtype), self.codebook).flatten(1)
        return joined, chosen.argmax(-1), judged


def gumbel(like: Tensor) -> Tensor:
    """Draws of Gumbel's distribution in the shape, dtype and place of `like`."""
    return -torch.empty_like(like, memory_format=torch.contiguous_format).exponential_().log()


def code_usage(codes: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Of codes (M, C): share of the entries that occur, and perplexity of their frequencies, both the mean over C."""
    counts = torch.stack([column.bincount(minlength=entries) for column in codes.t()]).float()
    frequency = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return (counts > 0).float().mean(), (-torch.xlogy(frequency, frequency).sum(-1)).exp().mean()
