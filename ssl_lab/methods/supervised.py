"""Image classification with labels: the yardstick of pre-training and its fine-tuning (ViT, DeiT: arXiv:2012.12877)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from ssl_lab import dist
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.pool import features
from ssl_lab.types import Backbone, Batch, Pooling, Step


class Supervised(Method):
    """Backbone, pooling, linear head, cross-entropy over the images of all ranks that have a class.

    Args:
        encoder: any backbone.
        num_classes: width of the head.
        pooling: what the head sees, "cls" or "mean" of the normed tokens; None lets the backbone choose.
        label_smoothing: share of the target spread over all classes.
        mixup: makes timm's Mixup / CutMix from num_classes; None = off. Of an image mixed with one that has no class,
            its own share counts.
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
        # One class more, that of images without one; smoothing comes when it has been taken out.
        self.mixup = mixup(num_classes=num_classes + 1, label_smoothing=0.0) if mixup else None
        self.head = Linear(encoder.dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder and isinstance(encoder, nn.Module):
            encoder.requires_grad_(False)

    def step(self, batch: Batch, progress: float) -> Step:
        if self.freeze_encoder and isinstance(self.encoder, nn.Module):
            self.encoder.eval()  # `train` reaches it too: nothing is dropped, and running statistics stay
        return self.score(batch, lambda image: self.classify(Batch(image=image)))

    def score(self, batch: Batch, network: Callable[[Tensor], Tensor]) -> Step:
        """Loss of the logits (B, num_classes) that a network gives for the images of a batch, after mixup.

        Raises:
            UserError: an odd number of images to mix.
        """
        image, target, classes = batch["image"], batch["target"], self.head.out_features
        known = target >= 0
        filled = target.where(known, classes)
        if self.mixup is None:
            soft = F.one_hot(filled, classes + 1).float()
        elif len(image) % 2:
            raise UserError(
                f"mixup pairs the images of a batch, which has {len(image)}: set an even data.batch_size (of each "
                "process) or method.mixup=null"
            )
        else:
            image, soft = self.mixup(image, filled)
        logits = network(image)
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        soft = soft[:, :classes].to(exact)
        share = soft.sum(1, keepdim=True)
        soft = (1 - self.label_smoothing) * soft + self.label_smoothing / classes * share
        # Every rank divides by the mean of all, so that averaged gradients are those of one process.
        count = dist.all_reduce_mean(share.sum()).clamp(min=1e-6)
        loss = F.cross_entropy(exact, soft, reduction="sum") / count
        if self.mixup is not None:
            return Step(loss)
        return Step(loss, {"top1": (logits.argmax(-1) == target).sum() / known.sum().clamp(min=1)})

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
