"""MoCo v3 (Chen et al., 2021, arXiv:2104.02057): contrastive learning of ViTs with a momentum encoder, no queue."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.losses.contrastive import info_nce
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import views_of
from ssl_lab.nn.heads import mlp_head
from ssl_lab.nn.pool import features
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Cosine, Schedule, as_schedule
from ssl_lab.spread import feature_std
from ssl_lab.types import Backbone, Batch, Pooling, Step


class MoCoV3(Method):
    """Each view's query finds the other view's key among those of the global batch; both ways.

    Args:
        encoder: a ViT, or any backbone.
        hidden: width of projector and predictor.
        projection: width E in which views are compared.
        temperature: of the loss.
        momentum: of the key encoder, a number or a schedule.
        momentum_batch: global batch that `momentum` is meant for, see `scaled_momentum`; None = any.
        freeze_patch_embed: keep a ViT's patch projection as initialised, which makes training stable (section 4.1).
        pooling: class token or mean of the patches; None = the backbone's choice.
    """

    small_steps = "key encoder"

    def __init__(
        self,
        encoder: Backbone,
        *,
        hidden: int = 4096,
        projection: int = 256,
        temperature: float = 0.2,
        momentum: float | Schedule = Cosine(0.99, 1.0),
        momentum_batch: int | None = None,
        freeze_patch_embed: bool = True,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        if isinstance(encoder, ViT):
            if not encoder.pretrained:
                init_weights(encoder)
            if freeze_patch_embed:
                encoder.patch_embed.requires_grad_(False)
        self.encoder, self.temperature, self.pooling = encoder, temperature, pooling
        # A ResNet's projector is shallower and its predictor ends without a norm, as in the official code.
        transformer, norm = isinstance(encoder, ViT), "plain" if isinstance(encoder, ViT) else "none"
        widths = [encoder.dim, *[hidden] * (2 if transformer else 1), projection]
        self.projector = mlp_head(widths, last_norm="plain")
        self.predictor = mlp_head([projection, hidden, projection], last_norm=norm)  # type: ignore[arg-type]
        self.momentum, self.momentum_batch = as_schedule(momentum), momentum_batch
        self.key_encoder, self.key_projector = follower(encoder), follower(self.projector)  # type: ignore[type-var]

    def step(self, batch: Batch, progress: float) -> Step:
        views = views_of(batch, "MoCo v3", "byol", most=2)
        with torch.no_grad():
            keys = self._project(self.key_encoder, self.key_projector, views)
        projected = self._project(self.encoder, self.projector, views)
        queries = [self.predictor(z) for z in projected]
        (q1, q2), (k1, k2) = queries, keys
        loss = info_nce(q1, k2, self.temperature) + info_nce(q2, k1, self.temperature)
        # The factor makes the gradient's size independent of the temperature (their pseudocode, algorithm 1).
        return Step(2 * self.temperature * loss, {"projection_std": feature_std(torch.cat(queries))})

    def after_step(self, progress: float) -> None:
        """The keys of a step are made by the average of the weights up to that step, as in the official code."""
        momentum = scaled_momentum(self.momentum(progress), self.samples_per_step, self.momentum_batch)
        follow_(self.key_encoder, self.encoder, momentum)  # type: ignore[arg-type]
        follow_(self.key_projector, self.projector, momentum)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole image, from the query encoder as in the paper."""
        return features(self.encoder, batch["image"], self.pooling)

    def _project(self, encoder: Backbone, projector: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """Views one by one: batch statistics are those of one view."""
        return [projector(features(encoder, view, self.pooling)) for view in views]


def init_weights(encoder: ViT) -> None:
    """The official one: query, key and value Xavier-uniform each by itself, other Linear too, patches by their fan."""
    for name, module in encoder.blocks.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith("qkv"):
                nn.init.uniform_(module.weight, -(bound := math.sqrt(3 / module.in_features)), bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = encoder.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + encoder.dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
