"""DINO (Caron et al., 2021, arXiv:2104.14294): a student predicts its own average's assignments across crops."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssl_lab.losses.distill import Center, cross_views, entropy, information
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import views_of
from ssl_lab.nn.heads import DINOHead
from ssl_lab.nn.multicrop import by_size
from ssl_lab.nn.pool import features
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Cosine, Schedule, as_schedule
from ssl_lab.train.optim import clip_each_
from ssl_lab.types import Backbone, Batch, Pooling, Step


class DINO(Method):
    """The teacher sees the global views, the student all of them.

    Args:
        encoder: any backbone; drop path acts in the student alone.
        head: makes the head from the encoder's width.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, a number or a schedule; lower is sharper.
        momentum: of the teacher, a number or a schedule.
        momentum_batch: global batch that `momentum` is meant for, see `scaled_momentum`; None = any.
        center_momentum: of the running mean of the teacher's logits.
        global_views: how many views, the first ones, the teacher sees.
        clip: largest norm of the gradient of each parameter tensor; None = none.
        freeze_prototypes: share of training at the beginning in which the prototypes do not move.
        pooling: class token or mean of the patches; None = the backbone's choice.
    """

    small_steps = "teacher"

    def __init__(
        self,
        encoder: Backbone,
        *,
        head: Callable[..., DINOHead] = DINOHead,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        momentum: float | Schedule = Cosine(0.996, 1.0),
        momentum_batch: int | None = None,
        center_momentum: float = 0.9,
        global_views: int = 2,
        clip: float | None = 3.0,
        freeze_prototypes: float = 0.01,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.student, self.student_head = encoder, head(encoder.dim)
        self.encoder, self.head = follower(encoder), follower(self.student_head)  # type: ignore[type-var]
        self.center = Center(self.head.prototypes.out_features, center_momentum)
        self.student_temperature, self.teacher_temperature = student_temperature, as_schedule(teacher_temperature)
        self.momentum, self.momentum_batch = as_schedule(momentum), momentum_batch
        self.global_views, self.clip, self.freeze_prototypes = global_views, clip, freeze_prototypes
        self.pooling = pooling

    def step(self, batch: Batch, progress: float) -> Step:
        T = self.global_views
        views = views_of(batch, "DINO", "dino", least=max(2, T))
        temperature = self.teacher_temperature(progress)
        with torch.no_grad():
            logits = self.head(self._encode(self.encoder, views[:T]))
            targets = self.center(logits, temperature)
            if self.training:
                self.center.collect(logits)
        student = self.student_head(self._encode(self.student, views)).chunk(len(views))
        loss = cross_views(student, targets.unflatten(0, (T, -1)), self.student_temperature)
        floor = entropy(targets).mean()  # what is left of the loss when the student agrees in all
        logs: dict[str, Tensor | float] = {
            "kl": loss.detach() - floor,
            "teacher_entropy": floor,
            "teacher_information": information(targets),
            "teacher_temperature": temperature,
        }
        return Step(loss, logs)

    def after_backward(self, progress: float) -> None:
        if self.clip is not None:
            clip_each_(self.parameters(), self.clip)
        if progress < self.freeze_prototypes:
            for parameter in (self.student_head.prototypes.weight, self.student_head.length):
                parameter.grad = None

    def after_step(self, progress: float) -> None:
        self.center.update()
        momentum = scaled_momentum(self.momentum(progress), self.samples_per_step, self.momentum_batch)
        follow_(self.encoder, self.student, momentum)  # type: ignore[arg-type]
        follow_(self.head, self.student_head, momentum)

    def after_skip(self) -> None:
        self.center.forget()

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole image, from the teacher."""
        return features(self.encoder, batch["image"], self.pooling)

    def _encode(self, encoder: Backbone, views: Sequence[Tensor]) -> Tensor:
        """(V * B, D), view by view."""
        return torch.cat(by_size(lambda image: features(encoder, image, self.pooling), views))
