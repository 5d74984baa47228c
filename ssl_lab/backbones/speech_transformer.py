"""Speech to text by attention (fairseq's S2T, arXiv:2010.05171): the encoder-decoder of text behind a speech stem."""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block, Context
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.positions import Positions, Sinusoidal
from ssl_lab.nn.recipes import transformer_block
from ssl_lab.types import Encoded

_pre_norm = functools.partial(transformer_block, place="pre")
_RESERVED = 2  # fairseq's positions begin after its padding token, whose id is 1


class Waves(Sinusoidal):
    """Fixed waves as fairseq has them: all sines, then all cosines, from position 2, the slowest of length 20000 pi."""

    def __init__(self, dim: int, num_heads: int, max_length: int) -> None:
        super().__init__(dim, num_heads, max_length, halves=True)

    def waves(self) -> Tensor:
        half = self.dim // 2
        rate = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(1, half - 1))
        angle = torch.arange(_RESERVED, _RESERVED + self.max_length, dtype=torch.float64)[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], 1)


class GatedSubsampling(nn.Module):
    """A quarter of the frames: two convolutions of five frames and stride 2, each with a gated linear unit.

    (B, T, F) -> (B, T', D), T' = ceil(ceil(T / 2) / 2). What lies beyond an utterance counts as 0 in both, so that
    padding changes nothing; token t stands for the frames 4 t - 6 ... 4 t + 6.

    Args:
        num_mels: mel bins F.
        dim: width D.
        channels: of the first convolution, half of which its gates keep.
    """

    stride = 4

    def __init__(self, num_mels: int, dim: int, *, channels: int = 1024) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(num_mels, channels, 5, stride=2, padding=2)
        self.conv2 = nn.Conv1d(channels // 2, 2 * dim, 5, stride=2, padding=2)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, T, F) and their valid frames (B, T) bool, all by default -> (B, T', D) and (B, T') bool."""
        x = features.to(self.conv1.weight.dtype).transpose(1, 2)  # log-mels are exact, weights may be bf16
        lengths = features.new_full((len(x),), x.shape[2], dtype=torch.int64) if valid is None else valid.sum(1)
        real = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        for conv in (self.conv1, self.conv2):
            x = F.glu(conv(x.masked_fill(~real[:, None], 0)), 1)
            lengths = (lengths + 1) // 2
            real = torch.arange(x.shape[2], device=x.device) < lengths[:, None]
        return x.transpose(1, 2), real


class SpeechTransformer(EncoderDecoder):
    """Sound (B, S) and the tokens written so far (B, L) -> `Encoded` of these; `logits` gives the next token.

    Args:
        vocab_size: tokens V.
        dim: width D.
        depth: blocks of each stack, or (encoder, decoder).
        num_heads: attention heads.
        front: waveforms and valid samples -> features (B, T, F) and valid frames; `LogMel()` by default.
        stem: makes the subsampling, called with (mel bins, dim).
        frames: the longest input, in frames.
        max_length: the longest text, in tokens.
        positions: makes the positions of each stack, called with (dim, num_heads, length).
        dropout: of what goes into the stacks; that of the blocks is an argument of `block`.
        block: recipe of a block, called with (dim, num_heads, layer=, cross=).
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int | tuple[int, int] = (12, 6),
        num_heads: int = 4,
        *,
        front: nn.Module | None = None,
        stem: Callable[[int, int], GatedSubsampling] = GatedSubsampling,
        frames: int = 6000,
        max_length: int = 1024,
        positions: Callable[[int, int, int], Positions] = Waves,
        dropout: float = 0.0,
        block: Callable[..., Block] = _pre_norm,
    ) -> None:
        super().__init__(
            vocab_size, dim, depth, num_heads, max_length=max_length, positions=positions, dropout=dropout, block=block
        )
        self.front: LogMel = front or LogMel()  # type: ignore[assignment]
        self.stem, self.frames = stem(self.front.num_mels, dim), frames
        self.source_positions = positions(dim, num_heads, -(-frames // self.stem.stride))

    def encode(self, x: Tensor, *, valid: Tensor | None = None) -> Encoded:
        """Waveforms (B, S) or features (B, T, F), `valid` (B, S | T) bool False = padding -> the memory of `decode`.

        Raises:
            UserError: an input longer than `frames`, or neither waveforms nor features of `front.num_mels` bins.
        """
        if x.dim() == 2:
            x, valid = self.front(x, valid)
        elif x.dim() != 3 or x.shape[2] != self.front.num_mels:
            raise UserError(
                f"a SpeechTransformer reads mono waveforms (B, S) or features (B, T, {self.front.num_mels}), not "
                f"{tuple(x.shape)}"
            )
        if x.shape[1] > self.frames:
            seconds = self.front.hop / self.front.sampling_rate
            raise UserError(
                f"an input of {x.shape[1] * seconds:.1f} s is longer than the {self.frames * seconds:.1f} s that this "
                "model has positions for: cut it, or raise frames of the backbone"
            )
        tokens, real = self.stem(x, valid)
        tokens = tokens * math.sqrt(self.dim)
        if self.prompt is not None:  # the decoder looks at what becomes of it too
            tokens, real = self.prompt.before(tokens), F.pad(real, (len(self.prompt), 0), value=True)
        padded = x.device.type != "cpu" or not bool(real.all())  # elsewhere asking would make the host wait
        ctx = Context(mask=AttnMask(valid=real if padded else None))
        out = self._run(self.encoder, self.source_positions, tokens, ctx)
        return Encoded(out, out[:, :0], valid=real, has_cls=False)
