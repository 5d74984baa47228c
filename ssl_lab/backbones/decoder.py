"""The causal language model: GPT-2, LLaMA, Mistral, DeepSeek, Switch are recipes of its blocks and positions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.block import Block, Context, NormType, Transformer
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear, linear
from ssl_lab.nn.mask import FULL, AttnMask
from ssl_lab.nn.positions import Learned, Positions, require_room, since_start
from ssl_lab.nn.prompt import Prompt
from ssl_lab.nn.recipes import gpt_block, layer_norm
from ssl_lab.types import Encoded


class Decoder(Transformer):
    """Token ids (B, L) -> `Encoded`, every position from itself and earlier ones; `logits` gives the next token.

    Args:
        vocab_size: tokens V.
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        max_length: tokens that fit.
        positions: makes the positions, called with (dim, num_heads, max_length).
        window: a position sees so many keys, itself included; None = all before it (Mistral, arXiv:2310.06825).
        tied: the output layer is the embedding; else it is a matrix of its own.
        dropout: of the embedded tokens.
        block: recipe of a block, called with (dim, num_heads, layer=).
        norm: makes the final norm from D.
        weights: start from these, see `ssl_lab.weights.text.load`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        max_length: int = 1024,
        positions: Callable[[int, int, int], Positions] = Learned,
        window: int | None = None,
        tied: bool = True,
        dropout: float = 0.0,
        block: Callable[..., Block] = gpt_block,
        norm: NormType = layer_norm,
        weights: str | None = None,
    ) -> None:
        super().__init__(lambda layer: block(dim, num_heads, layer=layer), depth, dim, norm=norm)
        self.dim, self.vocab_size, self.window = dim, vocab_size, window
        self.embed, self.positions = nn.Embedding(vocab_size, dim), positions(dim, num_heads, max_length)
        self.prompt: Prompt | None = None
        self.dropout = Dropout(dropout)
        self.head = None if tied else Linear(dim, vocab_size, bias=False)
        self.init_weights()
        if weights is not None:
            from ssl_lab.weights.text import load

            load(self, weights)

    def init_weights(self, std: float = 0.02) -> None:
        """GPT-2's: normal(std), biases 0, the last matrix of each residual branch by 1 / sqrt(2 * depth) smaller.

        Routers of experts keep what they begin with.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1 and not name.endswith(".router"):
                last = name.endswith((".proj.weight", ".fc2.weight", ".down.weight", ".experts.down"))
                nn.init.normal_(p, std=std / math.sqrt(2 * len(self.blocks)) if last else std)

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        prefix: Tensor | None = None,
        cache: KVCache | None = None,
        memory: Tensor | None = None,
        memory_mask: AttnMask = FULL,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """Encode token ids (B, L) int64, or what stands for them (B, L, D).

        Args:
            x: the new tokens.
            valid: (B, S) bool over past and new tokens, False = padding; positions count the valid ones.
            segments: (B, L) documents of a packed row, which do not see each other.
            prefix: (B,) int64 length of a leading part that all positions see (prefix-LM).
            cache: keys and values of the past, extended in place.
            memory: (B, M, D) for cross-attention, where the blocks have one.
            memory_mask: who may be seen there.
            layers: blocks whose outputs are wanted.

        Raises:
            UserError: more tokens than `max_length`.
        """
        prompt, past, length = self.prompt, 0 if cache is None else len(cache), x.shape[1]
        learned = 0 if prompt is None else len(prompt)
        first = learned if past == 0 else 0  # a cache holds them already
        require_room(self.positions, past + first + length, learned)
        at = self._places(past + first - learned, length, x.device, valid, segments)
        tokens = self.embed(x) if x.dim() == 2 else x
        mask = AttnMask(causal=True, valid=valid, segments=segments, prefix=prefix, window=self.window)
        if prompt is not None:
            at, tokens = (prompt.places(at), prompt.before(tokens)) if first else (at + learned, tokens)
            mask = mask.after(learned)
            if first and memory_mask.asked is not None:  # the prompt asks for nothing
                memory_mask = replace(memory_mask, asked=F.pad(memory_mask.asked, (first, 0), value=-2))
        if (added := self.positions.added(at)) is not None:
            tokens = tokens + added.to(tokens.dtype)
        ctx = Context(
            mask=mask,
            rope=self.positions.rope(at),
            bias=self.positions.bias(first + length, past + first + length, x.device),
            memory=memory,
            memory_mask=memory_mask,
            cache=cache,
        )
        out, hidden = self.encode(self.dropout(tokens), ctx, layers)
        out = self.norm(out)[:, first:]
        hidden = {layer: each[:, first:] for layer, each in hidden.items()}
        if valid is not None:
            valid = valid[:, -length:]
        return Encoded(out, out[:, :0], valid=valid, hidden=hidden, has_cls=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output layer."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., V) scores of the next token."""
        return linear(tokens, self.head_weight)

    def _places(
        self, past: int, length: int, device: torch.device, valid: Tensor | None, segments: Tensor | None
    ) -> Tensor:
        """Positions (L,) or (B, L): counted from the first valid token, and for a table from a document's first."""
        if valid is not None:
            return (valid.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        if segments is None or not self.positions.absolute:
            return torch.arange(past, past + length, device=device)
        return since_start(segments)
