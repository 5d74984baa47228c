"""Image classification with labels: the yardstick of pre-training and its fine-tuning (ViT, DeiT: arXiv:2012.12877)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.pool import features
from ssl_lab.types import Backbone, Batch, Pooling, Step


class Supervised(Method):
    """Backbone, pooling, linear head, cross-entropy.

    Args:
        encoder: any backbone.
        num_classes: width of the head.
        pooling: what the head sees, "cls" or "mean" of the normed tokens; None lets the backbone choose.
        label_smoothing: share of the target spread over all classes.
        mixup: makes timm's Mixup / CutMix from num_classes; None = off.
        freeze_encoder: train the head alone; the encoder then runs as for evaluation, without dropout.

    Raises:
        UserError: there are no classes.
    """

    def __init__(
        self,
        encoder: Backbone,
        num_classes: int,
        *,
        pooling: Pooling | None = None,
        label_smoothing: float = 0.0,
        mixup: Callable[..., Mixup] | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(
                "there are no classes to learn: the data set has no labels; use class sub-folders or labels"
            )
        self.encoder = encoder
        self.pooling, self.label_smoothing = pooling, label_smoothing
        self.mixup = mixup(num_classes=num_classes, label_smoothing=label_smoothing) if mixup else None
        self.head = Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder and isinstance(encoder, nn.Module):
            encoder.requires_grad_(False)

    def step(self, batch: Batch, progress: float) -> Step:
        if self.freeze_encoder and isinstance(self.encoder, nn.Module):
            self.encoder.eval()  # `train` reaches it too: nothing is dropped, and running statistics stay
        image, target = batch["image"], batch["target"]
        if self.mixup is None:
            logits = self.classify(batch)
            loss = F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)
            return Step(loss, {"top1": (logits.argmax(-1) == target).float().mean()})
        image, soft = self.mixup(image, target)
        logits = self.classify(Batch(image=image))
        return Step(F.cross_entropy(logits.float(), soft.to(logits.device)))

    def classify(self, batch: Batch) -> Tensor:
        """(B, num_classes) logits."""
        return self.head(self.embed(batch))

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features that the head sees."""
        return features(self.encoder, batch["image"], self.pooling)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """(B,) most likely class."""
        return self.classify(batch).argmax(-1)
