"""Flamingo (Alayrac et al., 2022, arXiv:2204.14198): a frozen language model that looks at images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.vlm import Part, VisionLanguage
from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KernelName
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, NormType, Residual
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.ffn import MLP
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.positions import since_start
from ssl_lab.nn.recipes import layer_norm
from ssl_lab.types import Encoded


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) ** 2 (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


def gated_block(
    dim: int,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    hidden: int | None = None,
    norm: NormType = layer_norm,
    layer: int = 0,
    kernel: KernelName = "auto",
) -> Block:
    """Cross-attention to images and a feed-forward, each behind a tanh gate that starts closed (section 3.1.2).

    `hidden` is 4 * dim by default; there are no biases but those of the norms.
    """
    attention = Attention(
        dim, num_heads, head_dim=head_dim, cross=True, qkv_bias=False, proj_bias=False, kernel=kernel, layer=layer
    )
    mlp = MLP(dim, hidden or 4 * dim, act=squared_relu, bias=False)
    return Block(cross=Residual(dim, attention, norm=norm, gate=True), mlp=Residual(dim, mlp, norm=norm, gate=True))


class Gated(nn.Module):
    """A block of the language model, and before it one that looks at `Context.memory` where there is such.

    Args:
        look: see `gated_block`.
        block: the language model's own.
    """

    def __init__(self, look: Block, block: nn.Module) -> None:
        super().__init__()
        self.look, self.block = look, block

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.block(x if ctx.memory is None else self.look(x, ctx), ctx)


class GatedVisionLanguage(VisionLanguage):
    """Images (N, C, H, W) and tokens (B, L) in which a marker stands for each image -> `Encoded` of all L tokens.

    A token sees the last image whose marker stands at or before it, and nothing before the first marker; earlier images
    reach it through the text. While the gates are closed the output is the language model's to the bit. Image encoder
    and language model are frozen, see `freeze`.

    Args:
        vision: image encoder.
        connector: makes the connector, called with (width of `vision`, width of `decoder`); in the paper a Perceiver
            resampler.
        decoder: language model; its blocks are changed in place.
        image_token: id of the marker, which has an embedding of its own that learns.
        every: a gated block stands before block 0, `every`, 2 * `every`, ...
        layer: see `VisionLanguage`; None = the normed output.
        drop_prefix: leave class and register tokens out.
        block: recipe of a gated block, called with (dim, layer=).

    Raises:
        UserError: a language model of another kind.
    """

    decoder: Decoder

    def __init__(
        self,
        vision: nn.Module,
        connector: Callable[[int, int], nn.Module],
        decoder: Decoder,
        *,
        image_token: int,
        every: int = 1,
        layer: int | None = None,
        drop_prefix: bool = True,
        block: Callable[..., Block] = gated_block,
    ) -> None:
        super().__init__(vision, connector, decoder, image_token=image_token, layer=layer, drop_prefix=drop_prefix)
        if not isinstance(decoder, Decoder) or every < 1:
            raise UserError(f"flamingo looks between the blocks of a Decoder of ours, and every={every} is 1 or more")
        own = list(decoder.blocks)
        looks = {i: block(decoder.dim, layer=i) for i in range(0, len(own), every)}
        decoder.blocks = nn.ModuleList(Gated(looks[i], each) if i in looks else each for i, each in enumerate(own))
        self.marker = nn.Parameter(decoder.embed.weight.detach().mean(0))
        self.freeze("vision", "decoder")

    @property
    def looks(self) -> list[Block]:
        """The gated blocks."""
        return [each.look for each in self.decoder.blocks if isinstance(each, Gated)]

    def freeze(self, *parts: Part) -> "GatedVisionLanguage":
        """These parts do not learn; the gated blocks always do."""
        super().freeze(*parts)
        for look in self.looks:
            look.requires_grad_(True)
        return self

    def train(self, mode: bool = True) -> "GatedVisionLanguage":
        """As nn.Module, but frozen parts stay as they are for evaluation."""
        super().train(mode)
        for look in self.looks:
            look.train(mode)
        return self

    def spliced(
        self,
        tokens: Tensor,
        visual: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Encoded, Tensor | None]:
        """As `forward`, of images (N, R, D) that have been seen; rows stay as they are, and so do their labels."""
        memory, mask = self.media(tokens, visual, valid=valid, segments=segments)
        return self.read(tokens, memory, mask, valid=valid, segments=segments), labels

    def media(
        self, tokens: Tensor, visual: Tensor, *, valid: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, AttnMask]:
        """Images (N, R, D) by row, (B, I R, D) with I the most that a row has, and which of them each token sees."""
        real = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments >= 0
        marked = (tokens == self.image_token) & (real if valid is None else real & valid)
        counts = marked.sum(1, keepdim=True)
        self._require(int(counts.sum()), visual)
        number = torch.arange(1, max(1, int(counts.max())) + 1, device=tokens.device)
        owned = number <= counts
        memory = visual.new_zeros(*owned.shape, *visual.shape[1:])
        memory = memory.masked_scatter(owned[..., None, None], visual)
        last = marked.cumsum(1)
        if segments is not None:  # an image of an earlier conversation in the row is none of this one's
            start = torch.arange(tokens.shape[1], device=tokens.device) - since_start(segments)
            last = last * (last > (last - marked.long()).gather(1, start))
        keys = number.where(owned, -1).repeat_interleave(visual.shape[1], 1)
        return memory.flatten(1, 2), AttnMask(segments=keys, asked=last)

    def read(
        self,
        tokens: Tensor,
        memory: Tensor | None,
        mask: AttnMask,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Encoded:
        """Tokens (B, L) beside what `media` gave; other arguments as in `Decoder.forward`."""
        marked = tokens == self.image_token
        embedded = self.decoder.embed(tokens.masked_fill(marked, 0))
        embedded = torch.where(marked[..., None], self.marker.to(embedded.dtype), embedded)
        if memory is not None:
            memory = memory.to(embedded.dtype)
        return self.decoder(embedded, valid=valid, segments=segments, cache=cache, memory=memory, memory_mask=mask)
