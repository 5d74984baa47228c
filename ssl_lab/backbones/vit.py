"""Vision Transformer (Dosovitskiy et al., 2020, arXiv:2010.11929): class and register tokens, masked encoding."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ssl_lab.nn.block import Block, Context, Transformer, encoder_block
from ssl_lab.nn.embed import PatchEmbed, sincos_2d
from ssl_lab.nn.mask import FULL, AttnMask
from ssl_lab.nn.masking import take
from ssl_lab.types import Encoded

layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)


class ViT(Transformer):
    """Image (B, C, H, W) -> `Encoded`: patches, positions, [class, registers], blocks, norm.

    Args:
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        image_size: side in pixels that the position table is made for; other sizes resample it on the fly.
        patch_size: side of a patch.
        stem: makes the patch projection, called with (patch_size, dim); it may bring a norm before the blocks.
        cls_token: prepend a class token (it has a position, as in timm).
        num_registers: register tokens after it, without position (arXiv:2309.16588).
        positions: learned table, or MAE's fixed sin-cos table.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        block: recipe of a block, called with (dim, num_heads, layer=, drop_path=); the final norm takes its epsilon.
        weights: start from these, see `ssl_lab.weights.io.load`.
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        stem: Callable[..., PatchEmbed] = PatchEmbed,
        cls_token: bool = True,
        num_registers: int = 0,
        positions: Literal["learned", "sincos"] = "learned",
        drop_path: float = 0.0,
        block: Callable[..., Block] = encoder_block,
        weights: str | None = None,
    ) -> None:
        rates = [drop_path * layer / max(1, depth - 1) for layer in range(depth)]
        super().__init__(
            lambda layer: block(dim, num_heads, layer=layer, drop_path=rates[layer]), depth, dim, norm=layer_norm
        )
        norms = [module for module in self.blocks.modules() if isinstance(module, nn.LayerNorm)]
        self.norm = nn.LayerNorm(dim, eps=norms[0].eps) if norms else self.norm
        self.dim, self.grid = dim, (image_size // patch_size, image_size // patch_size)
        self.patch_embed = stem(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None
        self.registers = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        table = sincos_2d(dim, self.grid, prefix=int(cls_token))[None]
        self.pos_embed = nn.Parameter(table, requires_grad=positions == "learned")
        self.pretrained = weights is not None
        self.init_weights()
        if weights is not None:
            from ssl_lab.weights.io import load

            load(self, weights)

    def init_weights(self) -> None:
        """timm's default: Linear and positions normal(0.02), biases 0, class token normal(1e-6), patches as torch."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.registers):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class and registers."""
        return int(self.cls_token is not None) + (0 if self.registers is None else self.registers.shape[1])

    def forward(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        mask: AttnMask = FULL,
        layers: Sequence[int] = (),
        tokens: bool = True,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Encoded:
        """Encode (B, C, H, W); with `keep` (B, K) only those patches are projected and encoded.

        `tokens=False` says that only the prefix is wanted: with a class token, the last block leaves the patches out.
        `masked` (bool (B, N), token (D,)) puts the token in the place of the patches that are marked (BEiT, iBOT).
        """
        patches, grid = self.patch_embed.patches(x)
        prefix_positions, positions = self._positions(grid)
        if keep is not None:
            patches, positions = take(patches, keep), F.embedding(keep, positions[0])
        embedded = self.patch_embed(patches)
        if masked is not None:
            hidden_patches, token = masked
            embedded = torch.where(hidden_patches[..., None], token.to(embedded.dtype), embedded)
        embedded = embedded + positions
        prefix = [t.expand(len(x), -1, -1) for t in self._prefix(prefix_positions)]
        rows = None
        if not tokens and self.cls_token is not None:
            rows = torch.arange(self.num_prefix, device=x.device).expand(len(x), -1)
        sequence = self.patch_embed.norm(torch.cat([*prefix, embedded], 1))
        out, hidden = self.encode(sequence, Context(mask=mask), layers, rows)
        out = self.norm(out)
        return Encoded(
            out[:, self.num_prefix :], out[:, : self.num_prefix], hidden=hidden, has_cls=self.cls_token is not None
        )

    def _prefix(self, positions: Tensor) -> list[Tensor]:
        tokens = [] if self.cls_token is None else [self.cls_token + positions]
        return tokens if self.registers is None else [*tokens, self.registers]

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Table of the prefix (1, 0 | 1, D) and of the patches (1, N, D), resampled to `grid` if need be."""
        prefix = int(self.cls_token is not None)
        table = self.pos_embed
        if grid != self.grid:
            table = resample_abs_pos_embed(table, list(grid), list(self.grid), num_prefix_tokens=prefix)
        return table[:, :prefix], table[:, prefix:]
