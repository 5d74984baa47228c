"""I-JEPA (Assran et al., 2023, arXiv:2301.08243): predict the representations of blocks of an image from a context."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT, layer_norm
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import image_of
from ssl_lab.nn.block import Block, Context, Transformer, encoder_block
from ssl_lab.nn.embed import sincos_2d
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.masking import MultiBlock, take
from ssl_lab.nn.pool import features
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Linear as Straight
from ssl_lab.schedules import Schedule, as_schedule
from ssl_lab.types import Batch, Step


class Predictor(Transformer):
    """Narrow ViT from the tokens of a context to those of target blocks.

    Args:
        encoder_dim: width E of the encoder's tokens.
        grid: patches (rows, columns).
        dim: width.
        depth: number of blocks.
        num_heads: attention heads; as many as the encoder's in the paper.
        block: recipe of a block, as in `ViT`.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        *,
        dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        block: Callable[..., Block] = encoder_block,
    ) -> None:
        super().__init__(functools.partial(block, dim, num_heads, norm=layer_norm), depth, dim, norm=layer_norm)
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid)[None], requires_grad=False)
        self.head = Linear(dim, encoder_dim)

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Context tokens (B, K, E), their places (B, K) and those of M targets (B, M, T) -> (B, M, T, E).

        Every target block is predicted by itself: its mask tokens see the context and each other, no other block.
        """
        (B, M, T), K = targets.shape, context.shape[1]
        positions = self.pos_embed[0]
        seen = self.embed(tokens) + F.embedding(context, positions)
        asked = (self.mask_token + F.embedding(targets, positions)).to(seen.dtype)
        x = torch.cat([seen[:, None].expand(-1, M, -1, -1), asked], 2).flatten(0, 1)
        rows = torch.arange(K, K + T, device=x.device).expand(B * M, -1)
        hidden, _ = self.encode(x, Context(), rows=rows)
        return self.head(self.norm(hidden)).unflatten(0, (B, M))


def init_weights(network: ViT | Predictor) -> None:
    """The authors': truncated normal(0.02) for all weights and the mask token, biases 0."""
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif name == "mask_token" or (p.ndim > 1 and name.endswith("weight")):
            nn.init.trunc_normal_(p, std=0.02)


class IJEPA(Method):
    """The student encodes a context; from it a predictor finds what the averaged encoder says of the target blocks.

    Class and register tokens, if there are any, take part in attention only.

    Args:
        encoder: a ViT; the paper's has no class token and sin-cos positions.
        predictor: makes the predictor from (encoder width, grid).
        masks: sampler of contexts and targets.
        momentum: of the averaged encoder, a number or a schedule.
        momentum_batch: global batch that `momentum` is meant for, see `scaled_momentum`; None = any.

    Attributes:
        encoder: the averaged one, which makes the targets and is evaluated.
        student: the trained one.

    Raises:
        UserError: the encoder is no ViT, or its grid is too small for the blocks.
    """

    small_steps = "averaged encoder"

    def __init__(
        self,
        encoder: ViT,
        *,
        predictor: Callable[..., Predictor] = Predictor,
        masks: MultiBlock = MultiBlock(),  # noqa: B008 - frozen
        momentum: float | Schedule = Straight(0.996, 1.0),
        momentum_batch: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, ViT):
            raise UserError(
                "I-JEPA encodes a part of the patches, which only our ViT can: choose backbone=vit_b16 or so"
            )
        masks.check(encoder.grid)
        self.predictor = predictor(encoder.dim, encoder.grid)
        init_weights(self.predictor)
        if not encoder.pretrained:
            init_weights(encoder)
        self.student, self.encoder = encoder, follower(encoder)
        self.masks, self.momentum, self.momentum_batch = masks, as_schedule(momentum), momentum_batch

    def step(self, batch: Batch, progress: float) -> Step:
        image = image_of(batch, self.encoder, "I-JEPA", "ijepa")
        context, targets = self.masks(len(image), self.encoder.grid, image.device)
        return Step(self.predict(image, context, targets))

    def predict(self, image: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Loss for places of the context (B, K) and of targets (B, M, T).

        Smooth L1 between predictions and targets; a target is a token of the whole image, its features normalised.
        """
        with torch.no_grad():
            encoded = self.encoder(image).tokens
            exact = encoded.to(torch.promote_types(encoded.dtype, torch.float32))
            wanted = take(F.layer_norm(exact, exact.shape[-1:]), targets.flatten(1)).unflatten(1, targets.shape[1:])
        predicted = self.predictor(self.student(image, keep=context).tokens, context, targets)
        return F.smooth_l1_loss(predicted.to(wanted.dtype), wanted)

    def after_step(self, progress: float) -> None:
        momentum = scaled_momentum(self.momentum(progress), self.samples_per_step, self.momentum_batch)
        follow_(self.encoder, self.student, momentum)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of the averaged encoder's tokens of the whole image."""
        return features(self.encoder, batch["image"], "mean")
