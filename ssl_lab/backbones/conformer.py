"""Conformer (Gulati et al., 2020, arXiv:2005.08100): speech to tokens by attention and convolution."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_lab.backbones.text import post_norm
from ssl_lab.errors import UserError
from ssl_lab.nn.block import Block, Context, Transformer
from ssl_lab.nn.conv import ConvSubsampling
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.prompt import Prompt
from ssl_lab.nn.recipes import conformer_block
from ssl_lab.nn.relative import relative_waves
from ssl_lab.nn.rope import rope_1d
from ssl_lab.types import Encoded

layer_norm = functools.partial(nn.LayerNorm, eps=1e-5)


class Conformer(Transformer):
    """Waveforms (B, S) or features (B, T, F) -> `Encoded`: front end, subsampling by 4, blocks; no class token.

    Parameters begin as torch's layers do, as in the public implementations; the paper says nothing of it.

    Args:
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        front: waveforms and valid samples -> features (B, T, F) and valid frames; `LogMel()` by default.
        stem: makes the subsampling, called with (mel bins, dim).
        positions: distances as in Transformer-XL, rotation of queries and keys, or none.
        dropout: of the tokens before the blocks; that of the blocks is an argument of `block`.
        chunk: tokens that attention sees together; None = the whole utterance. With a chunk a token sees its own chunk
            and earlier ones: together with causal convolutions and a front end that does not normalise by utterance,
            what comes later changes nothing (streaming). The weights are the same for every chunk.
        history: with a chunk, how many tokens back a token sees, itself included; None = all. Without one, how many to
            each side.
        block: recipe of a block, called with (dim, num_heads, positions=, layer=).
        weights: start from these, see `ssl_lab.weights.io.load`.

    Raises:
        UserError: a history shorter than the chunk.
    """

    def __init__(
        self,
        dim: int = 256,
        depth: int = 16,
        num_heads: int = 4,
        *,
        front: nn.Module | None = None,
        stem: Callable[[int, int], ConvSubsampling] = ConvSubsampling,
        positions: Literal["relative", "rope", "none"] = "relative",
        dropout: float = 0.0,
        chunk: int | None = None,
        history: int | None = None,
        block: Callable[..., Block] = conformer_block,
        weights: str | None = None,
    ) -> None:
        if chunk and history and history < chunk:
            raise UserError(f"history={history} is shorter than a chunk of {chunk} tokens: choose at least {chunk}")
        make = functools.partial(block, dim, num_heads, positions=positions)
        super().__init__(lambda layer: make(layer=layer), depth, dim, norm=layer_norm)
        if post_norm(self):
            self.norm = nn.Identity()
        self.dim, self.head_dim, self.positions = dim, dim // num_heads, positions
        self.chunk, self.history = chunk, history
        self.front: LogMel = front or LogMel()  # type: ignore[assignment]
        self.embed, self.dropout = stem(self.front.num_mels, dim), Dropout(dropout)
        self.prompt: Prompt | None = None
        self.pretrained = weights is not None
        if weights is not None:
            from ssl_lab.weights.io import load

            load(self, weights)

    @property
    def seconds(self) -> float:
        """From one token to the next; token t has its middle at (t + 1) * seconds, up to some milliseconds."""
        return self.embed.stride * self.front.hop / self.front.sampling_rate

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] = (),
        tokens: bool = True,
    ) -> Encoded:
        """Encode waveforms (B, S) or features (B, T, F).

        Args:
            x: the input.
            valid: (B, S) or (B, T) bool, False = padding, which stands at the end; `Encoded.valid` are the tokens that
                saw none of it, and the others mean nothing.
            masked: (B, T') bool and a token (D,) that takes the place of the embedded frames marked.
            layers: blocks whose outputs are wanted.
            tokens: there is nothing else to read; every value does the same.
        """
        embedded, valid = self.stem(x, valid)
        return self.contextualise(embedded, valid, masked=masked, layers=layers)

    def stem(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the blocks begin with, (B, T', D), and the tokens (B, T') bool that are real; for `contextualise`.

        Raises:
            UserError: neither waveforms nor features of `front.num_mels` bins.
        """
        if x.dim() == 2:
            x, valid = self.front(x, valid)
        elif x.dim() != 3 or x.shape[2] != self.front.num_mels:
            raise UserError(
                f"a Conformer reads mono waveforms (B, S) or features (B, T, {self.front.num_mels}), "
                f"not {tuple(x.shape)}"
            )
        embedded: Tensor
        embedded, valid = self.embed(x, valid)
        return embedded, valid

    def contextualise(
        self,
        embedded: Tensor,
        valid: Tensor,
        *,
        masked: tuple[Tensor, Tensor] | None = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """The blocks over what `stem` gave."""
        if masked is not None:
            hidden_tokens, token = masked
            embedded = torch.where(hidden_tokens[..., None], token.to(embedded.dtype), embedded)
        embedded = self.dropout(embedded)
        length, device = embedded.shape[1], embedded.device
        padded = device.type != "cpu" or not bool(valid.all())  # elsewhere asking would make the host wait
        mask = AttnMask(
            causal=self.chunk is not None, chunk=self.chunk, window=self.history, valid=valid if padded else None
        )
        first = 0
        if self.prompt is not None:
            first = len(self.prompt)
            length, embedded, mask = first + length, self.prompt.before(embedded), mask.after(first)
        ctx = Context(
            mask=mask,
            rope=rope_1d(torch.arange(length, device=device), self.head_dim) if self.positions == "rope" else None,
            waves=relative_waves(length, self.dim, device=device) if self.positions == "relative" else None,
        )
        out, hidden = self.encode(embedded, ctx, layers)
        out = self.norm(out)[:, first:]
        hidden = {layer: each[:, first:] for layer, each in hidden.items()}
        return Encoded(out, out[:, :0], valid=valid, hidden=hidden, has_cls=False)
