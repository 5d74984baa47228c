"""MoCo v1 (He et al., 2019, arXiv:1911.05722) and v2 (Chen et al., 2020, arXiv:2003.04297): negatives from a queue."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_lab.losses.queue_nce import queue_nce
from ssl_lab.methods.base import Method
from ssl_lab.methods.inputs import views_of
from ssl_lab.nn.heads import mlp_head
from ssl_lab.nn.norm import l2_normalize
from ssl_lab.nn.pool import features
from ssl_lab.nn.queue import Queue
from ssl_lab.nn.shuffle import shuffled
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Schedule, as_schedule
from ssl_lab.spread import feature_std
from ssl_lab.types import Backbone, Batch, Pooling, Step


class MoCo(Method):
    """The first view's query is to find the second view's key among the keys of earlier batches.

    v2 has a hidden layer in the head, temperature 0.2 and blur in its views; v1 has none, 0.07, and no blur.

    Args:
        encoder: any backbone.
        head: widths of the MLP after it, the last one that of queries and keys.
        queue_size: keys that wait as negatives, a multiple of the global batch.
        temperature: of the loss.
        momentum: of the key encoder, a number or a schedule.
        momentum_batch: global batch that `momentum` is meant for, see `scaled_momentum`; None = any.
        pooling: class token or mean of the patches; None = the backbone's choice.

    Attributes:
        encoder: the trained one, which makes the queries and is evaluated.
        key_encoder: its average, which makes the keys.
    """

    small_steps = "key encoder"

    def __init__(
        self,
        encoder: Backbone,
        *,
        head: Sequence[int] = (2048, 128),
        queue_size: int = 65536,
        temperature: float = 0.2,
        momentum: float | Schedule = 0.999,
        momentum_batch: int | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, mlp_head([encoder.dim, *head], norm=False)
        self.key_encoder, self.key_head = follower(encoder), follower(self.head)  # type: ignore[type-var]
        self.queue = Queue(queue_size, head[-1])
        self.temperature, self.pooling = temperature, pooling
        self.momentum, self.momentum_batch = as_schedule(momentum), momentum_batch
        self._keys: list[Tensor] = []

    def step(self, batch: Batch, progress: float) -> Step:
        loss, right, query = self.contrast(*views_of(batch, "MoCo", "moco_v2", most=2))
        return Step(loss, {"top1": right, "projection_std": feature_std(query.detach())})

    def contrast(self, query_view: Tensor, key_view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, share of queries that find their key, and queries (B, E), of two views (B, C, H, W)."""
        query = self.head(features(self.encoder, query_view, self.pooling))
        key = l2_normalize(shuffled(self._keys_of, key_view))
        if self.training and torch.is_grad_enabled():
            self._keys.append(key)
        return *queue_nce(query, key, self.queue.items, self.temperature), query

    def after_step(self, progress: float) -> None:
        """The queue takes the keys of the step, and the key encoder follows.

        That is the official order: a step's keys come from the average of the weights up to that step, and they are not
        yet among its negatives. Here it makes a step a function of its seed, and counts once under accumulation.
        """
        for keys in self._keys:
            self.queue.enqueue(keys)
        self._keys.clear()
        momentum = scaled_momentum(self.momentum(progress), self.samples_per_step, self.momentum_batch)
        follow_(self.key_encoder, self.encoder, momentum)  # type: ignore[arg-type]
        follow_(self.key_head, self.head, momentum)

    def after_skip(self) -> None:
        self._keys.clear()

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole image, from the query encoder as in the paper."""
        return features(self.encoder, batch["image"], self.pooling)

    def _keys_of(self, view: Tensor) -> Tensor:
        return self.key_head(features(self.key_encoder, view, self.pooling))
