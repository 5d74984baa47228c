"""The text encoder: BERT, CLIP's text tower and T5's encoder are recipes of its blocks, positions and norm."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.nn.block import Block, Context, NormType, Residual, Transformer
from ssl_lab.nn.dropout import Dropout
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.positions import Learned, Positions, require_room, since_start
from ssl_lab.nn.prompt import Prompt
from ssl_lab.nn.recipes import bert_block, layer_norm
from ssl_lab.types import Encoded


class TextEncoder(Transformer):
    """Token ids (B, L) -> `Encoded`: tokens, positions and types, blocks.

    `Encoded.tokens` are all L positions, so that they line up with labels. The first of them is also given as the
    class token (BERT's [CLS]), except under `causal`, where it has seen nothing: there pool by "last" or "mean".

    Args:
        vocab_size: tokens V.
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        max_length: tokens that fit.
        positions: makes the positions, called with (dim, num_heads, max_length).
        num_types: token types, 2 for sentence A and B; 0 = no such embedding.
        causal: a position sees itself and earlier ones (CLIP).
        dropout: of the embedded tokens.
        block: recipe of a block, called with (dim, num_heads, layer=).
        norm: of the embedded tokens where the blocks are post-norm (BERT), else of the output; by default a LayerNorm
            with the epsilon of BERT there, 1e-12, and of CLIP here, 1e-5.
        weights: start from these, see `ssl_lab.weights.text.load`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        max_length: int = 512,
        positions: Callable[[int, int, int], Positions] = Learned,
        num_types: int = 2,
        causal: bool = False,
        dropout: float = 0.0,
        block: Callable[..., Block] = bert_block,
        norm: NormType | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__(lambda layer: block(dim, num_heads, layer=layer), depth, dim, norm=norm or layer_norm)
        self.dim, self.vocab_size, self.causal = dim, vocab_size, causal
        self.embed, self.positions = nn.Embedding(vocab_size, dim), positions(dim, num_heads, max_length)
        self.types = nn.Embedding(num_types, dim) if num_types else None
        self.embed_norm: nn.Module = nn.Identity()
        if post_norm(self):
            self.embed_norm, self.norm = (norm or functools.partial(layer_norm, eps=1e-12))(dim), nn.Identity()
        self.prompt: Prompt | None = None
        self.dropout = Dropout(dropout)
        self.pretrained = weights is not None
        self.init_weights()
        if weights is not None:
            from ssl_lab.weights.text import load

            load(self, weights)

    def init_weights(self) -> None:
        """BERT's normal(0.02) with biases 0; for a causal tower CLIP's, whose deviations follow width and depth."""
        branch = self.dim**-0.5 * (2 * len(self.blocks)) ** -0.5
        clip = {"qkv": self.dim**-0.5, "proj": branch, "fc1": (2 * self.dim) ** -0.5, "fc2": branch}
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1:
                parent = name.split(".")[-2]
                std = 0.01 if parent == "positions" else clip.get(parent, 0.02)
                nn.init.trunc_normal_(p, std=std if self.causal else 0.02)

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        types: Tensor | None = None,
        segments: Tensor | None = None,
        layers: Sequence[int] = (),
        tokens: bool = True,
        rows: Tensor | None = None,
    ) -> Encoded:
        """Encode token ids (B, L) int64, or what stands for them (B, L, D).

        Args:
            x: the tokens.
            valid: (B, L) bool, False = padding, which stands at the end.
            types: (B, L) int64 token types, 0 by default.
            segments: (B, L) documents of a packed row, which do not see each other.
            layers: blocks whose outputs are wanted.
            tokens: False promises that only the class token will be read; the last block leaves the others out.
            rows: (B, M) int64, the only positions that are wanted: `Encoded.tokens` are these.

        Raises:
            UserError: more tokens than `max_length`.
        """
        first = 0 if self.prompt is None else len(self.prompt)
        length = first + x.shape[1]
        require_room(self.positions, length, first)
        at = torch.arange(x.shape[1], device=x.device)
        if segments is not None and self.positions.absolute:
            at = since_start(segments)
        mask = AttnMask(causal=self.causal, valid=valid, segments=segments)
        if self.prompt is not None:
            at, mask = self.prompt.places(at), mask.after(first)
            rows = None if rows is None else rows + first
        ctx = Context(
            mask=mask,
            rope=self.positions.rope(at),
            bias=self.positions.bias(length, length, x.device),
        )
        has_cls = not self.causal and rows is None
        if has_cls and not tokens:
            rows = at.new_full((len(x), 1), first)
        out, hidden = self.encode(self._embedded(x, at, types), ctx, layers, rows)
        out = self.norm(out) if rows is not None else self.norm(out)[:, first:]
        hidden = {layer: each[:, first:] for layer, each in hidden.items()}
        cls = out[:, :1] if has_cls else out[:, :0]
        return Encoded(out, cls, valid=valid if rows is None else None, hidden=hidden, has_cls=has_cls)

    def _embedded(self, x: Tensor, at: Tensor, types: Tensor | None) -> Tensor:
        tokens = self.embed(x) if x.dim() == 2 else x
        if self.prompt is not None:
            tokens = self.prompt.before(tokens)
            types = None if types is None else F.pad(types, (len(self.prompt), 0))
        if (added := self.positions.added(at)) is not None:
            tokens = tokens + added.to(tokens.dtype)
        if self.types is not None:
            tokens = tokens + (self.types.weight[0] if types is None else self.types(types))
        return self.dropout(self.embed_norm(tokens))


def post_norm(stack: Transformer) -> bool:
    """Whether the blocks of `stack` end with a norm, so that none need follow them."""
    return any(isinstance(module, Residual) and module.place == "post" for module in stack.blocks.modules())
