"""Encoder and decoder joined by cross-attention: the Transformer of 2017 and T5 are recipes of blocks and positions."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_lab.backbones.text import post_norm
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, NormType, Transformer
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.linear import Linear, linear
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.positions import Positions, Relative, Sinusoidal, require_room
from ssl_lab.nn.prompt import Prompt
from ssl_lab.nn.recipes import layer_norm, transformer_block
from ssl_lab.types import Encoded


class EncoderDecoder(nn.Module):
    """Source ids (B, S) and target ids so far (B, L) -> `Encoded` of the target; `logits` gives the next token.

    Source, target and, if `tied`, the output share one embedding.

    Args:
        vocab_size: tokens V of both sides.
        dim: width D.
        depth: blocks of each stack, or (encoder, decoder).
        num_heads: attention heads.
        max_length: tokens that fit on each side.
        positions: makes the positions of each stack, called with (dim, num_heads, max_length).
        scaled: where the embedding is multiplied: by sqrt(D) where tokens enter (arXiv:1706.03762, section 3.4), or by
            1 / sqrt(D) where it is the output layer (T5).
        tied: the output layer is the embedding; else it is a matrix of its own (T5 v1.1).
        dropout: of the embedded tokens, and of the output where a final norm gives it.
        block: recipe of a block, called with (dim, num_heads, layer=, cross=).
        norm: final norm of each stack, left out where the blocks are post-norm.
        weights: start from these, see `ssl_lab.weights.text.load`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 512,
        depth: int | tuple[int, int] = 6,
        num_heads: int = 8,
        *,
        max_length: int = 512,
        positions: Callable[[int, int, int], Positions] = Sinusoidal,
        scaled: Literal["embedding", "head", "none"] = "embedding",
        tied: bool = True,
        dropout: float = 0.0,
        block: Callable[..., Block] = transformer_block,
        norm: NormType = layer_norm,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.vocab_size, self.scaled = dim, vocab_size, scaled
        first, second = (depth, depth) if isinstance(depth, int) else depth
        self.embed = nn.Embedding(vocab_size, dim)
        self.encoder = Transformer(lambda layer: block(dim, num_heads, layer=layer, cross=False), first, dim, norm=norm)
        self.decoder = Transformer(lambda layer: block(dim, num_heads, layer=layer, cross=True), second, dim, norm=norm)
        for stack in (self.encoder, self.decoder):
            if post_norm(stack):
                stack.norm = nn.Identity()
        self.source_positions = positions(dim, num_heads, max_length)
        self.target_positions = positions(dim, num_heads, max_length)
        if isinstance(self.target_positions, Relative):
            self.target_positions.table.bidirectional = False
        self.head = None if tied else Linear(dim, vocab_size, bias=False)
        self.prompt: Prompt | None = None
        self.dropout = Dropout(dropout)
        self.init_weights()
        if weights is not None:
            from ssl_lab.weights.text import load

            load(self, weights)

    @torch.no_grad()
    def init_weights(self) -> None:
        """T5's where scores are not scaled, so that the queries are the smaller; else Xavier's uniform, biases 0.

        T5: embedding normal(1), matrices normal(1 / sqrt(inputs)), queries by another 1 / sqrt(Dh). Otherwise the
        embedding is normal(1 / sqrt(D)).
        """
        unscaled = any(isinstance(m, Attention) and m.scale == 1.0 for m in self.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if unscaled:
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Relative):
                nn.init.normal_(module.table.weight, std=self.dim**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                queries, *others = _matrices(module)
                if unscaled:
                    queries.mul_(module.head_dim**-0.5)
                else:  # each on its own: their fusion has the fan-out of one
                    for matrix in (queries, *others):
                        nn.init.xavier_uniform_(matrix)
        nn.init.normal_(self.embed.weight, std=1.0 if unscaled else self.dim**-0.5)

    def forward(self, x: Tensor, target: Tensor, *, valid: Tensor | None = None) -> Encoded:
        """Source (B, S) with its padding `valid`, target (B, L) from the start token on -> `Encoded` of the target."""
        return self.decode(target, self.encode(x, valid=valid))

    def encode(self, x: Tensor, *, valid: Tensor | None = None) -> Encoded:
        """Source ids (B, S) int64, `valid` (B, S) bool with False = padding -> the memory of `decode`.

        Raises:
            UserError: more tokens than `max_length`.
        """
        mask, tokens = AttnMask(valid=valid), self._embedded(x)
        if self.prompt is not None:  # the decoder looks at what becomes of it too
            mask, tokens = mask.after(len(self.prompt)), self.prompt.before(tokens)
            valid = mask.valid
        out = self._run(self.encoder, self.source_positions, tokens, Context(mask=mask))
        return Encoded(out, out[:, :0], valid=valid, has_cls=False)

    def decode(
        self, x: Tensor, memory: Encoded, *, valid: Tensor | None = None, cache: KVCache | None = None
    ) -> Encoded:
        """Target ids (B, L) int64, each seeing itself, earlier ones and the memory -> (B, L, D) for `head_weight`.

        Padding comes last, where no real id sees it; layers of experts are told of it by `valid` (B, L) bool. With
        `cache` only the new ids are given; it keeps the keys and values of the past and of the memory.

        Raises:
            UserError: more tokens than `max_length`.
        """
        far = AttnMask(valid=memory.valid)
        ctx = Context(mask=AttnMask(causal=True), memory=memory.tokens, memory_mask=far, cache=cache, real=valid)
        out = self._run(self.decoder, self.target_positions, self._embedded(x), ctx)
        if self.scaled == "head":
            out = out * self.dim**-0.5
        return Encoded(out, out[:, :0], has_cls=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output layer."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, tokens: Tensor) -> Tensor:
        """(..., D) of `decode` -> (..., V) scores of the next token."""
        return linear(tokens, self.head_weight)

    def _embedded(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x)
        return tokens * math.sqrt(self.dim) if self.scaled == "embedding" else tokens

    def _run(self, stack: Transformer, positions: Positions, tokens: Tensor, ctx: Context) -> Tensor:
        """The blocks and the norm of a stack over what goes in, (B, L, D)."""
        past, length = 0 if ctx.cache is None else len(ctx.cache), tokens.shape[1]
        prompt = self.prompt if stack is self.encoder else None
        require_room(positions, past + length, 0 if prompt is None else len(prompt))
        at = torch.arange(past, past + length, device=tokens.device)
        if (added := positions.added(at)) is not None:
            tokens = tokens + added.to(tokens.dtype)
        ctx = replace(ctx, rope=positions.rope(at), bias=positions.bias(length, past + length, tokens.device))
        out, _ = stack.encode(self.dropout(tokens), ctx)
        return out if isinstance(stack.norm, nn.Identity) else self.dropout(stack.norm(out))


def _matrices(attention: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the query, key and value matrices."""
    if attention.cross:
        keys, values = attention.kv.weight.chunk(2)
        return attention.q.weight, keys, values
    width, narrow = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
    queries, keys, values = attention.qkv.weight.split([width, narrow, narrow])
    return queries, keys, values
