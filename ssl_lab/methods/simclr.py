"""SimCLR (Chen et al., 2020, arXiv:2002.05709): two views of an image attract, those of other images repel."""

import torch
from torch import Tensor

from ssl_lab.losses.contrastive import nt_xent
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import views_of
from ssl_lab.nn.heads import mlp_head
from ssl_lab.nn.pool import features
from ssl_lab.spread import feature_std
from ssl_lab.types import Backbone, Batch, Pooling, Step


class SimCLR(Method):
    """Encoder, projector, NT-Xent over both views of the global batch.

    Args:
        encoder: any backbone.
        hidden: width of the projector.
        projection: width E in which views are compared.
        depth: Linear layers of the projector.
        temperature: of the loss.
        pooling: class token or mean of the patches, for training and evaluation; None = the backbone's choice.
    """

    def __init__(
        self,
        encoder: Backbone,
        *,
        hidden: int = 2048,
        projection: int = 128,
        depth: int = 2,
        temperature: float = 0.1,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.pooling = encoder, temperature, pooling
        self.projector = mlp_head([encoder.dim, *[hidden] * (depth - 1), projection], last_norm="affine")

    def step(self, batch: Batch, progress: float) -> Step:
        views = views_of(batch, "SimCLR", "simclr", most=2, alike=2)
        # One pass: batch statistics cover both views, as in the official code.
        z = self.projector(features(self.encoder, torch.cat(views), self.pooling))
        z1, z2 = z.chunk(2)
        return Step(nt_xent(z1, z2, self.temperature), {"projection_std": feature_std(z)})

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole image, before the projector."""
        return features(self.encoder, batch["image"], self.pooling)
