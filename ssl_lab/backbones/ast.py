"""Audio Spectrogram Transformer (Gong et al., 2021, arXiv:2104.01778): a ViT over overlapping patches of log-mels."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block, encoder_block
from ssl_lab.nn.embed import PatchEmbed
from ssl_lab.nn.mask import FULL, AttnMask
from ssl_lab.nn.mel import LogMel
from ssl_lab.types import Encoded

MEAN, STD = -4.2677393, 2 * 4.5689974  # of AudioSet's log-mels; the paper divides by two deviations


class SpectrogramPatches(PatchEmbed):
    """Overlapping patches of one channel, (B, 1, F, T) -> (B, N, D); the weight keeps the convolution's shape.

    Args:
        patch_size: side p of a patch, in bins and in frames.
        dim: width D.
        stride: from one patch to the next, in both directions.
    """

    def __init__(self, patch_size: int, dim: int, *, stride: int = 10) -> None:
        super().__init__(patch_size, dim, in_chans=1)
        self.stride = stride

    def grid(self, bins: int, frames: int) -> tuple[int, int]:
        """Patches in frequency and in time; what is left over at the end is not seen."""
        return (bins - self.patch_size) // self.stride + 1, (frames - self.patch_size) // self.stride + 1

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        cut = x[:, 0].unfold(1, self.patch_size, self.stride).unfold(2, self.patch_size, self.stride)
        return cut.flatten(3).flatten(1, 2), (cut.shape[1], cut.shape[2])

    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(patches.to(self.proj.weight.dtype))  # log-mels are exact, weights may be bf16


class AST(ViT):
    """Waveforms (B, S) or features (B, T, F) -> `Encoded`: log-mels, patches, positions, ViT.

    The class token of what it gives is the mean of its class and its distillation token, which the paper classifies by;
    `hidden` has them apart, in front. Patches that reach beyond the valid frames are not attended to, except that the
    first ones of an utterance shorter than a patch are filled up with zeros. Parameters begin as a ViT's do.

    Args:
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        front: waveforms and valid samples -> features (B, T, F) and valid frames; by default the paper's, 128 Kaldi
            log-mels at 16 kHz, normalised by the mean and two deviations of AudioSet.
        frames: the longest input in frames, which the table of positions is made for; shorter ones use its beginning.
        patch_size: side of a patch.
        stride: from one patch to the next.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        block: recipe of a block, called with (dim, num_heads, layer=, drop_path=).
        weights: start from these: an AST (hf:<folder or repository>, a run), or any ViT of images that
            `ssl_lab.weights.io.load` reads, see `ssl_lab.weights.spectrogram`.

    Raises:
        UserError: `frames` or the mel bins are fewer than a patch holds.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        front: nn.Module | None = None,
        frames: int = 1024,
        patch_size: int = 16,
        stride: int = 10,
        drop_path: float = 0.0,
        block: Callable[..., Block] = encoder_block,
        weights: str | None = None,
    ) -> None:
        stem = functools.partial(SpectrogramPatches, stride=stride)
        super().__init__(
            dim, depth, num_heads, image_size=patch_size, patch_size=patch_size, stem=stem, num_registers=1,
            drop_path=drop_path, block=block,
        )  # fmt: skip
        default = functools.partial(LogMel, num_mels=128, window="hann", norm="global", mean=MEAN, std=STD)
        self.front: LogMel = front or default()  # type: ignore[assignment]
        self.frames = frames
        if min(frames, self.front.num_mels) < patch_size:
            raise UserError(
                f"patches of {patch_size} do not fit into {self.front.num_mels} mel bins and {frames} frames: "
                "choose a smaller patch_size"
            )
        self.grid = self.stem.grid(self.front.num_mels, frames)
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pretrained = weights is not None
        if weights is not None:
            from ssl_lab.weights.spectrogram import load

            load(self, weights)

    @property
    def stem(self) -> SpectrogramPatches:
        """What cuts and projects the patches."""
        assert isinstance(self.patch_embed, SpectrogramPatches)
        return self.patch_embed

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        layers: Sequence[int] = (),
        tokens: bool = True,
    ) -> Encoded:
        """Encode waveforms (B, S) or features (B, T, F).

        Args:
            x: the input.
            valid: (B, S) or (B, T) bool, False = padding, which stands at the end; `Encoded.valid` (B, N) are the
                patches without it, N in rows of equal frequency.
            layers: blocks whose outputs are wanted.
            tokens: False promises that only the class token will be read; the last block then leaves the patches out.

        Raises:
            UserError: an input longer than `frames`, or neither waveforms nor features.
        """
        if x.dim() == 2:
            x, valid = self.front(x, valid)
        elif x.dim() != 3 or x.shape[2] != self.front.num_mels:
            raise UserError(
                f"an AST reads mono waveforms (B, S) or features (B, T, {self.front.num_mels}), not {tuple(x.shape)}"
            )
        elif valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        size, stride = self.stem.patch_size, self.stem.stride
        length = x.shape[1] if valid is None else int(valid.sum(1).max())
        if length > self.frames:
            seconds = self.front.hop / self.front.sampling_rate
            raise UserError(
                f"an input of {length * seconds:.1f} s is longer than the {self.frames * seconds:.1f} s that this AST "
                "has positions for: cut it, or raise frames of the backbone"
            )
        spectrogram = nn.functional.pad(x[:, : self.frames], (0, 0, 0, max(0, size - x.shape[1])))[:, None]
        rows, columns = self.stem.grid(x.shape[2], spectrogram.shape[2])
        real, mask = None, FULL
        if valid is not None:
            frames = valid.sum(1, keepdim=True)
            last = torch.arange(columns, device=x.device) * stride + size
            real = (last <= frames) | ((last == size) & (frames > 0))
            real = real.repeat(1, rows)
            if x.device.type != "cpu" or not bool(real.all()):
                mask = AttnMask(valid=torch.cat([real.new_ones(len(x), self.num_prefix), real], 1))
        encoded = super().forward(spectrogram.transpose(2, 3), mask=mask, layers=layers, tokens=tokens)
        pooled = encoded.prefix[:, :2].mean(1, keepdim=True)  # tokens of a prompt may follow
        return Encoded(encoded.tokens, pooled, valid=real, hidden=encoded.hidden)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The table's own, of the first `grid[1]` columns: a patch stands for the same time whatever follows it."""
        table = self.pos_embed[:, 1:].unflatten(1, self.grid)[:, :, : grid[1]]
        return self.pos_embed[:, :1], table.flatten(1, 2)
