"""Masked autoencoder (He et al., 2021, arXiv:2111.06377)."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT, layer_norm
from ssl_lab.errors import UserError
from ssl_lab.losses.reconstruct import masked_mse, patch_statistics, standardize
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import image_of
from ssl_lab.nn.block import Block, Context, Transformer, encoder_block
from ssl_lab.nn.embed import patchify, sincos_2d, unpatchify
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.masking import put_back, random_mask, take
from ssl_lab.nn.pool import features
from ssl_lab.types import Batch, Pooling, Step


class Decoder(Transformer):
    """Light ViT from visible tokens to the pixels of hidden patches.

    Args:
        encoder_dim: width of the encoder's tokens.
        grid: patches (rows, columns).
        num_outputs: values per patch, C * p * p.
        dim: width.
        depth: number of blocks.
        num_heads: attention heads.
        block: recipe of a block, as in `ViT`.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        num_outputs: int,
        *,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        block: Callable[..., Block] = encoder_block,
    ) -> None:
        super().__init__(functools.partial(block, dim, num_heads, norm=layer_norm), depth, dim, norm=layer_norm)
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid, prefix=1)[None], requires_grad=False)
        self.head = Linear(dim, num_outputs)

    def forward(self, prefix: Tensor, visible: Tensor, keep: Tensor, drop: Tensor) -> Tensor:
        """Class token (B, 1, E), visible tokens (B, K, E) and their places -> pixels (B, N - K, C * p * p) at `drop`.

        Only hidden patches are predicted: the loss needs no other.
        """
        positions = self.pos_embed
        tokens = put_back(self.embed(visible), keep, self.mask_token[0, 0], positions.shape[1] - 1)
        x = torch.cat([self.embed(prefix), tokens], 1) + positions
        hidden, _ = self.encode(x, Context(), rows=drop + 1)  # the class token stands first
        return self.head(self.norm(hidden))


def init_weights(network: ViT | Decoder) -> None:
    """The paper's: Xavier-uniform Linear (query, key and value as one matrix) and patches, tokens normal(0.02)."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d):  # the patch projection, as the matrix that it is
            nn.init.xavier_uniform_(module.weight.data.view(len(module.weight), -1))
    for name, token in network.named_parameters():
        if name in ("cls_token", "mask_token"):
            nn.init.normal_(token, std=0.02)


class MAE(Method):
    """Hide most patches, encode the rest, predict the hidden pixels.

    Args:
        encoder: a ViT with a class token and no registers.
        decoder: makes the decoder from (encoder width, grid, values per patch).
        mask_ratio: share of patches hidden.
        norm_pix: predict pixels normalised per patch.
        pooling: features for evaluation, mean of patch tokens or class token.
    """

    def __init__(
        self,
        encoder: ViT,
        *,
        decoder: Callable[..., Decoder] = Decoder,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, ViT):
            raise UserError("MAE encodes some of the patches, which our ViT alone can: choose backbone=vit_b16 or so")
        if encoder.num_prefix != 1:
            raise UserError(
                "MAE needs an encoder with a class token and no registers: leave method.encoder.num_registers at 0"
            )
        patches = math.prod(encoder.grid)
        if not 0 < int(patches * (1 - mask_ratio)) < patches:
            raise UserError(f"mask_ratio={mask_ratio} of {patches} patches leaves none to see or to predict: try 0.75")
        self.encoder = encoder
        self.mask_ratio, self.norm_pix, self.pooling = mask_ratio, norm_pix, pooling
        self.patch_size = encoder.patch_embed.patch_size
        self.decoder = decoder(encoder.dim, encoder.grid, encoder.patch_embed.proj.weight[0].numel())
        init_weights(self.decoder)
        if not encoder.pretrained:
            init_weights(encoder)

    def step(self, batch: Batch, progress: float) -> Step:
        image = image_of(batch, self.encoder, "MAE", "crop")
        noise = torch.rand(len(image), self.encoder.grid[0] * self.encoder.grid[1], device=image.device)
        loss, _, _, _ = self.reconstruct(image, noise)
        return Step(loss)

    def reconstruct(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, predictions (B, N - K, p * p * C), keep (B, K) and drop (B, N - K) for an image and noise (B, N)."""
        keep, drop = random_mask(noise, self.mask_ratio)
        encoded = self.encoder(image, keep=keep)
        cls = encoded.prefix[:, :1]  # what tuning puts after it stays in the encoder
        predicted = self.decoder(cls, encoded.tokens, keep, drop)
        target = take(patchify(image, self.patch_size, channels_last=True), drop)
        if self.norm_pix:
            target = standardize(target)
        return masked_mse(predicted, target), predicted, keep, drop

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole image."""
        return features(self.encoder, batch["image"], self.pooling)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Columns (B, C, H, W) in the input's own normalisation: input, visible part, reconstruction, both together."""
        image, p = image_of(batch, self.encoder, "MAE", "crop"), self.patch_size
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(len(image), self.encoder.grid[0] * self.encoder.grid[1], generator=generator)
        _, predicted, keep, drop = self.reconstruct(image, noise.to(image.device))
        pixels = patchify(image, p, channels_last=True)
        mean, std = patch_statistics(pixels)
        if self.norm_pix:  # the network says nothing of a patch's own mean and contrast: borrow the true ones
            predicted = predicted.float() * take(std, drop) + take(mean, drop)
        grey = torch.zeros(pixels.shape[-1], device=image.device)
        seen = put_back(take(pixels, keep), keep, grey, pixels.shape[1])
        whole = put_back(predicted.to(pixels.dtype), drop, grey, pixels.shape[1])
        rows = (pixels, seen, whole, seen + whole)
        names = ("input", "visible", "reconstruction", "reconstruction + visible")
        return {n: unpatchify(r, p, self.encoder.grid) for n, r in zip(names, rows, strict=True)}
