"""wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477): raw waveforms to tokens, convolutions before a transformer."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_lab.backbones.text import post_norm
from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KernelName
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, Residual, Transformer
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.ffn import MLP
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.recipes import layer_norm
from ssl_lab.nn.waveform import ConvFeatures, ConvPositions
from ssl_lab.types import Encoded


def wav2vec2_block(
    dim: int,
    num_heads: int,
    *,
    place: Literal["pre", "post"] = "post",
    mlp_ratio: float = 4.0,
    eps: float = 1e-5,
    layer: int = 0,
    kernel: KernelName = "auto",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> Block:
    """Attention and an MLP with exact GELU; norms after the sums (Base) or before the branches (Large).

    Dropout acts inside the MLP and on what each branch gives.
    """
    branch = functools.partial(Residual, dim, norm=functools.partial(layer_norm, eps=eps), place=place, dropout=dropout)
    attention = Attention(dim, num_heads, dropout=attention_dropout, kernel=kernel, layer=layer)
    return Block(attn=branch(attention), mlp=branch(MLP(dim, int(dim * mlp_ratio), dropout=dropout)))


class Wav2Vec2(Transformer):
    """Waveforms (B, S) -> `Encoded`: convolutions, projection, positions by convolution, blocks; no class token.

    Where the blocks are post-norm (Base), a norm follows the positions; else (Large) it follows the blocks.

    Args:
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        front: waveforms and valid samples -> features (B, T, C) and valid frames; `ConvFeatures()` by default.
        positions: makes the positions from D.
        dropout: of the projected features, and of the tokens before the blocks.
        block: recipe of a block, called with (dim, num_heads, layer=).
        weights: start from these: hf:<folder or repository> of a wav2vec 2.0, a file or a run, see
            `ssl_lab.weights.wav2vec2`.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        front: nn.Module | None = None,
        positions: Callable[[int], nn.Module] = ConvPositions,
        dropout: float = 0.0,
        block: Callable[..., Block] = wav2vec2_block,
        weights: str | None = None,
    ) -> None:
        super().__init__(lambda layer: block(dim, num_heads, layer=layer), depth, dim, norm=layer_norm)
        self.dim = dim
        self.front: ConvFeatures = front or ConvFeatures()  # type: ignore[assignment]
        self.feature_norm, self.proj = layer_norm(self.front.channels), Linear(self.front.channels, dim)
        self.positions, self.dropout = positions(dim), Dropout(dropout)
        self.embed_norm: nn.Module = nn.Identity()
        if post_norm(self):
            self.embed_norm, self.norm = self.norm, nn.Identity()
        self.init_weights()
        self.pretrained = weights is not None
        if weights is not None:
            from ssl_lab.weights.wav2vec2 import load

            load(self, weights)

    def init_weights(self) -> None:
        """Blocks as BERT's, normal(0.02) with biases 0; the rest as its layers do."""
        for name, parameter in self.blocks.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def seconds(self) -> float:
        """From one token to the next."""
        return self.front.hop / self.front.sampling_rate

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] = (),
        tokens: bool = True,
    ) -> Encoded:
        """Encode waveforms (B, S) or features (B, T, C) of `front`.

        Args:
            x: the input.
            valid: (B, S) or (B, T) bool, False = padding, which stands at the end; `Encoded.valid` are the tokens that
                saw none of it, and the others mean nothing.
            masked: (B, T) bool and a token (D,) that takes the place of the projected features marked.
            layers: blocks whose outputs are wanted.
            tokens: there is nothing else to read; every value does the same.

        Raises:
            UserError: neither waveforms nor features of `front.channels` channels.
        """
        if x.dim() == 2:
            x, valid = self.front(x, valid)
        elif x.dim() != 3 or x.shape[2] != self.front.channels:
            raise UserError(
                f"wav2vec 2.0 reads mono waveforms (B, S) or features (B, T, {self.front.channels}), "
                f"not {tuple(x.shape)}"
            )
        return self.contextualise(self.feature_norm(x), valid, masked=masked, layers=layers)

    def contextualise(
        self,
        features: Tensor,
        valid: Tensor | None = None,
        *,
        masked: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Projection, positions and blocks over features (B, T, C) that `feature_norm` has seen."""
        valid = features.new_ones(features.shape[:2], dtype=torch.bool) if valid is None else valid
        embedded = self.dropout(self.proj(features))
        if masked is not None:
            hidden_tokens, token = masked
            embedded = torch.where(hidden_tokens[..., None], token.to(embedded.dtype), embedded)
        embedded = embedded.masked_fill(~valid[..., None], 0)
        embedded = self.dropout(self.embed_norm(embedded + self.positions(embedded)))
        padded = embedded.device.type != "cpu" or not bool(valid.all())  # elsewhere asking would make the host wait
        ctx = Context(mask=AttnMask(valid=valid if padded else None))
        out, hidden = self.encode(embedded, ctx, layers)
        out = self.norm(out)
        return Encoded(out, out[:, :0], valid=valid, hidden=hidden, has_cls=False)
