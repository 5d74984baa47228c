"""Fine-tuning: what the weights are worth as a start, not as fixed features."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab import dist
from ssl_lab.backbones.hear import SpeechEncoder, hear
from ssl_lab.backbones.read import read
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, accuracy, moved
from ssl_lab.nn.float8 import ordinary_
from ssl_lab.rng import fold
from ssl_lab.train.optim import Optim
from ssl_lab.types import Batch, Embeds, Encoded, Pooling

_PATIENCE = 10_000  # rows of the stream, of which not one has a label: there is none, as far as one can tell


class Classifier(nn.Module):
    """Encoder, pooling, linear head that starts at 0: a batch of images, text or sound -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, dim: int, classes: int, pooling: Pooling | None) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, classes)."""
        out: Tensor = self.head(self._encoded(batch).pooled(self.pooling))
        return out

    def _encoded(self, batch: Batch) -> Encoded:
        if "audio" in batch:
            return hear(cast(SpeechEncoder, self.encoder), batch)
        if "tokens" in batch:
            return read(self.encoder, batch)
        encoded: Encoded = self.encoder(image_of(batch))
        return encoded


@dataclass(frozen=True)
class Finetune(Common):
    """Train a copy of `method.encoder` (or `decoder`) and a linear head on the augmented, labelled training stream.

    The method itself is left as it is. A copy of weights in 16 bits is in float32 and trained under autocast, since 16
    bits would round its steps away. For mixup and longer recipes train the `supervised` method instead.

    Args:
        optim: recipe; `layer_decay` is usual (BEiT, arXiv:2106.08254; MAE, arXiv:2111.06377).
        steps: batches of the data's training stream.
        pooling: what the head sees; None = class token if there is one, else the mean.
        label_smoothing: share of the target spread over all classes.
        seed: of drop-path and other randomness in the encoder.
    """

    optim: Optim
    steps: int = 1000
    pooling: Pooling | None = "mean"
    label_smoothing: float = 0.1
    seed: int = 0
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"eval.finetune.steps={self.steps} trains nothing: take at least 1, or leave finetune out")

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        names = ("name", "lr", "scale_lr", "warmup", "min_lr", "layer_decay", "schedule")
        optim = {name: getattr(self.optim, name) for name in names}
        return {
            "optim": optim | {"weight_decay": str(self.optim.weight_decay)},
            "steps": self.steps,
            "pooling": self.pooling or "default",
            "label_smoothing": self.label_smoothing,
            "seed": self.seed,
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows top1, top5; as a detail the mean loss of the last tenth of the steps."""
        encoder = getattr(round.method, "encoder", getattr(round.method, "decoder", None))
        classes = len(round.data.classes)
        if not isinstance(encoder, nn.Module):
            raise Skip(f"{type(round.method).__name__} has no encoder to train")
        if not classes:
            raise Skip("the data have no classes")
        model = Classifier(ordinary_(copy.deepcopy(encoder)), encoder.dim, classes, self.pooling)  # type: ignore[arg-type]
        half = round.dtype if round.dtype in (torch.bfloat16, torch.float16) else None
        model.to(round.device, round.dtype if half is None else torch.float32)
        precision = round.precision if half is None else partial(torch.autocast, round.device.type, half)
        own = Round(model, round.data, precision, round.watch)
        own.samples = round.samples
        losses = self._train(model, own)
        model.eval()
        test = own.extract(model, "test", self.limit)
        test = round.only_labelled(test, "test")
        return accuracy(test.x, test.y) | {"train/loss": sum(losses) / len(losses)}

    def _train(self, model: Classifier, round: Round) -> list[float]:
        """Losses of the last tenth of the steps."""
        model.train()
        optimizer: torch.optim.Optimizer | None = None
        losses, seen, total = [], 0, 0.0
        for step, batch in zip(range(self.steps), endless(round), strict=False):
            y = batch["target"]
            if optimizer is None:
                optimizer = self.optim.build(model.named_parameters(), len(y) * dist.world_size())
            # labels may be few: ranks divide by their mean number, so averaged gradients are those of one rank
            labelled = dist.all_reduce_mean((y >= 0).sum().float())
            total += float(labelled)
            if not total and seen >= _PATIENCE:
                break
            self.optim.update(optimizer, step / self.steps)
            torch.manual_seed(fold(self.seed, step, dist.rank()))
            with torch.enable_grad():
                with round.precision():
                    logits = model(batch)
                nll = F.cross_entropy(
                    logits.float(), y, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing
                )
                loss = nll / labelled.where(labelled > 0, 1.0)
                loss.backward()
            for p in model.parameters():
                p.grad = None if p.grad is None else dist.all_reduce_mean(p.grad)
            optimizer.step()
            optimizer.zero_grad()
            seen += len(y) * dist.world_size()
            if step >= int(0.9 * self.steps):
                losses.append(loss.detach())
        if not total:
            raise Skip("the training stream has no labels")
        round.samples["train"] = seen
        return [float(loss) for loss in losses]


def endless(round: Round) -> Iterator[Batch]:
    """Batches of the training stream from its beginning, wherever training stands, on the method's device."""
    empty = False
    while not empty:
        empty = True
        for batch in round.data.train_dataloader(first=0):
            empty = False
            yield round.data.on_after_batch_transfer(moved(batch, round.device, round.dtype), 0)
    raise UserError("the training stream is empty: nothing to fine-tune on; check data")


def image_of(batch: Batch) -> Tensor:
    """(B, C, H, W): the image, or the first view where the stream makes several."""
    return batch["image"] if "image" in batch else batch["views"][0]
