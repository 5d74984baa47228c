"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193): DINO on images, iBOT on patches, KoLeo against crowding."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.losses.distill import Center, cross_entropy, cross_views, entropy, information, koleo, sinkhorn
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import views_of
from ssl_lab.nn.heads import DINOHead
from ssl_lab.nn.masking import block_counts, block_mask
from ssl_lab.nn.multicrop import by_size
from ssl_lab.nn.pool import features
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Cosine, Schedule, as_schedule
from ssl_lab.train.optim import clip_each_
from ssl_lab.types import Batch, Pooling, Step


class DINOv2(Method):
    """The student sees masked global and plain local views, the teacher the whole global ones.

    The loss is DINO's over class tokens, plus iBOT's (arXiv:2111.07832) over masked patches, plus `koleo_weight` times
    KoLeo of the class tokens of each global view.

    Args:
        encoder: a ViT with a class token; registers are welcome. Drop path acts in the student alone.
        head: makes a head from the encoder's width; class tokens and patches have one each, or share.
        shared_head: whether they share.
        centering: how assignments are kept from collapsing, a running centre or Sinkhorn-Knopp.
        teacher_temperature: a number or a schedule.
        momentum: of the teacher, a number or a schedule.
        momentum_batch: global batch that `momentum` is meant for, see `scaled_momentum`; None = any.
        mask_ratio: least and largest share of patches hidden in a masked view; half of the global views are masked.
        koleo_weight: 0 = off.
        clip: largest norm of the gradient of each parameter tensor; None = none.
        freeze_prototypes: share of training at the beginning in which the prototypes do not move.
    """

    small_steps = "teacher"
    student_temperature = 0.1
    global_views = 2
    pooling: Pooling = "cls"

    def __init__(
        self,
        encoder: ViT,
        *,
        head: Callable[..., DINOHead] = DINOHead,
        shared_head: bool = True,
        centering: Literal["center", "sinkhorn"] = "center",
        teacher_temperature: float | Schedule = 0.07,
        momentum: float | Schedule = Cosine(0.992, 1.0),
        momentum_batch: int | None = None,
        mask_ratio: Sequence[float] = (0.1, 0.5),
        koleo_weight: float = 0.1,
        clip: float | None = 3.0,
        freeze_prototypes: float = 0.01,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, ViT):
            raise UserError("DINOv2 hides patches, which our ViT alone can: choose backbone=vit_b16 or so")
        if encoder.cls_token is None:
            raise UserError("DINOv2 compares class tokens: set method.encoder.cls_token=true")
        self.student, self.student_head = encoder, head(encoder.dim)
        self.student_patch_head = None if shared_head else head(encoder.dim)
        self.mask_token = nn.Parameter(torch.zeros(encoder.dim))
        self.encoder, self.head = follower(encoder), follower(self.student_head)
        self.patch_head = None if self.student_patch_head is None else follower(self.student_patch_head)
        K = self.head.prototypes.out_features
        self.center, self.patch_center = (Center(K) if centering == "center" else None for _ in range(2))
        self.teacher_temperature = as_schedule(teacher_temperature)
        self.momentum, self.momentum_batch = as_schedule(momentum), momentum_batch
        self.mask_ratio, self.koleo_weight = (float(mask_ratio[0]), float(mask_ratio[1])), koleo_weight
        self.clip, self.freeze_prototypes = clip, freeze_prototypes

    def step(self, batch: Batch, progress: float) -> Step:
        views = views_of(batch, "DINOv2", "dinov2", alike=2)
        masked = self.draw_masks(2 * len(views[0]), views[0].shape[-2:], views[0].device)
        return self.distill(views, masked, progress)

    def draw_masks(self, count: int, size: Sequence[int], device: torch.device) -> Tensor:
        """Masks (count, N) bool for images of `size` (H, W): half of the rows have none."""
        p = self.encoder.patch_embed.patch_size
        grid = (size[0] // p, size[1] // p)
        return block_mask(grid, block_counts(count, grid[0] * grid[1], ratio=self.mask_ratio)).to(device)

    def distill(self, views: Sequence[Tensor], masked: Tensor, progress: float) -> Step:
        """Loss for given masks (2 * B, N) bool of the two global views."""
        T, temperature = self.global_views, self.teacher_temperature(progress)
        images, rows = torch.cat(list(views[:T])), masked.flatten().nonzero()[:, 0]
        with torch.no_grad():
            whole = self.encoder(images)
            image_targets = self._assign(self.center, self.head(whole.pooled("cls")), temperature)
            hidden = whole.tokens.flatten(0, 1).index_select(0, rows)
            patch_targets = self._assign(self.patch_center, (self.patch_head or self.head)(hidden), temperature)
        seen = self.student(images, masked=(masked, self.mask_token))
        classes = [seen.pooled("cls")]
        if len(views) > T:
            classes += by_size(lambda image: features(self.student, image, "cls"), views[T:])
        logits = self.student_head(torch.cat(classes)).chunk(len(views))
        dino = cross_views(logits, image_targets.unflatten(0, (T, -1)), self.student_temperature)
        # Each masked image counts alike however many of its patches are hidden; the mean is over all images.
        hidden_counts = masked.sum(1)
        share = 1 / (hidden_counts.clamp(min=1) * len(masked)).to(patch_targets.dtype)
        weight = share.repeat_interleave(hidden_counts)
        patches = seen.tokens.flatten(0, 1).index_select(0, rows)
        predicted = (self.student_patch_head or self.student_head)(patches)
        ibot = cross_entropy(predicted, patch_targets, weight, self.student_temperature)
        loss, uncertainty = dino + ibot, entropy(image_targets).mean()
        floor = uncertainty + (weight * entropy(patch_targets)).sum()  # left when the student agrees in all
        logs: dict[str, Tensor | float] = {"kl": loss.detach() - floor, "dino": dino.detach(), "ibot": ibot.detach()}
        if self.koleo_weight:
            crowding = torch.stack([koleo(part) for part in classes[0].chunk(T)]).sum()
            loss, logs["koleo"] = loss + self.koleo_weight * crowding, crowding.detach()
        logs |= {"teacher_entropy": uncertainty, "teacher_information": information(image_targets)}
        logs["teacher_temperature"] = temperature
        return Step(loss, logs)

    def after_backward(self, progress: float) -> None:
        if self.clip is not None:
            clip_each_(self.parameters(), self.clip)
        if progress < self.freeze_prototypes:
            for head in filter(None, (self.student_head, self.student_patch_head)):
                head.prototypes.weight.grad = head.length.grad = None

    def after_step(self, progress: float) -> None:
        for center in filter(None, (self.center, self.patch_center)):
            center.update()
        momentum = scaled_momentum(self.momentum(progress), self.samples_per_step, self.momentum_batch)
        follow_(self.encoder, self.student, momentum)
        follow_(self.head, self.student_head, momentum)
        if self.patch_head is not None and self.student_patch_head is not None:
            follow_(self.patch_head, self.student_patch_head, momentum)

    def after_skip(self) -> None:
        for center in filter(None, (self.center, self.patch_center)):
            center.forget()

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) class token of the whole image, from the teacher."""
        return features(self.encoder, batch["image"], self.pooling)

    def _assign(self, center: Center | None, logits: Tensor, temperature: float) -> Tensor:
        if center is None:
            return sinkhorn(logits, temperature)
        if self.training:
            center.collect(logits)
        return center(logits, temperature)
