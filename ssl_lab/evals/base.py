"""What an evaluator is, and the round in which evaluators share one extraction of features."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from ssl_lab.errors import UserError
from ssl_lab.evals.features import Features, gather_rows, unique_rows
from ssl_lab.types import Batch

Split = Literal["train", "test"]
Precision = Callable[[], AbstractContextManager[Any]]


class Data(Protocol):
    """What evaluators read of a data module."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, empty for unlabelled data."""
        ...

    def eval_loader(self, split: Split, limit: int | None = None) -> Iterable[Batch]:
        """This rank's share of a split, in order, without augmentation; `limit` rows of the split, evenly spread."""
        ...

    def train_dataloader(self, first: int | None = None) -> Iterable[Batch]:
        """The endless, augmented training stream from batch number `first` on; None = where training stands."""
        ...

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finish a training batch on its device, where augmentation happens there (Lightning's hook)."""
        ...


class Skip(Exception):
    """An evaluator has nothing to say about these data; the message gives the reason and the round goes on."""


class Evaluator(Protocol):
    """Judges a method by what it can do. A new one is a class with these members and a YAML in conf/eval."""

    @property
    def every(self) -> int:
        """Training steps between two runs; 0 = only at the end."""
        ...

    @property
    def needs(self) -> type:
        """The capability it asks of a method, a runtime-checkable Protocol such as `types.Embeds`."""
        ...

    @property
    def protocol(self) -> dict[str, Any]:
        """Every setting that the values depend on, in plain types: it stands beside each value in metrics.json."""
        ...

    def run(self, round: "Round") -> dict[str, float]:
        """Name -> value. Names with a slash are details: recorded, but left out of the table.

        Raises:
            Skip: these data cannot be judged (no labels, ...).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every evaluator can be told.

    Args:
        limit: use so many rows of each split, evenly spread; None = all.
        every: training steps between two runs, 0 = only at the end.
    """

    limit: int | None = None
    every: int = 0


class Watch:
    """Told what a round is doing; this one keeps it to itself."""

    def begin(self, evaluator: str) -> None:
        """An evaluator starts."""

    def rows(self, split: Split, done: int, limit: int | None) -> None:
        """So many rows of a split (of `limit` of its rows) have gone through the network on this rank."""


class Round:
    """One evaluation of one method: features are extracted when first asked for, then shared by all evaluators.

    Args:
        method: in eval mode, on the device where it is to run; must `embed` if features are asked for.
        data: where the splits come from.
        precision: makes the autocast context of a forward pass. It is entered afresh for each batch and does not
            cover the evaluators' own arithmetic, which stays in float32.
        watch: told how far the extraction is.
    """

    def __init__(
        self, method: nn.Module, data: Data, precision: Precision = nullcontext, watch: Watch | None = None
    ) -> None:
        self.method, self.data, self.precision, self.watch = method, data, precision, watch or Watch()
        self.samples: dict[str, int] = {}  # rows handed out per split; the runner clears it between evaluators
        self.notes: list[str] = []  # what an evaluator left out, and why; the runner says and clears it
        self._cache: dict[tuple[Split, int | None], Features] = {}
        self._cache_images: dict[tuple[Split, int | None], Features] = {}

    @property
    def device(self) -> torch.device:
        """Where the method lives."""
        held = next(chain(self.method.parameters(), self.method.buffers()), None)
        return torch.device("cpu") if held is None else held.device

    @property
    def dtype(self) -> torch.dtype | None:
        """What a method with weights of a lower precision (bf16-true) wants for input; None = as it comes."""
        kinds = {p.dtype for p in self.method.parameters() if p.is_floating_point()}
        return kinds.pop() if len(kinds) == 1 else None

    def features(self, split: Split, limit: int | None = None) -> Features:
        """Features of a split (of `limit` of its rows) from every rank, each row once, on the CPU."""
        if (split, limit) not in self._cache:
            self._cache[split, limit] = self.extract(self.method.embed, split, limit)  # type: ignore[arg-type]
        found = self._cache[split, limit]
        self.samples[split] = len(found.y)
        return found

    def image_embeddings(self, split: Split, limit: int | None = None) -> Features:
        """The same of `embed_image`: images in the space that they share with texts."""
        if (split, limit) not in self._cache_images:
            self._cache_images[split, limit] = self.extract(self.method.embed_image, split, limit)  # type: ignore[arg-type]
        found = self._cache_images[split, limit]
        self.samples[split] = len(found.y)
        return found

    def at_hand(self, split: Split, limit: int) -> Features:
        """The most features of a split that somebody asked for before, if these are `limit` or all; else of so many."""
        known = [n for s, n in self._cache if s == split and (n is None or n >= limit)]
        return self.features(split, limit if not known else None if None in known else max(n for n in known if n))

    def images_at_hand(self, split: Split) -> int | None:
        """The limit of the most image embeddings of a split that somebody asked for; None = all, if nobody did too."""
        known = [n for s, n in self._cache_images if s == split]
        return None if not known or None in known else max(n for n in known if n)

    def labelled(self, split: Split, limit: int | None = None) -> Features:
        """The rows of `features` that have a class, on the method's device.

        Raises:
            Skip: there are none.
        """
        return self.only_labelled(self.features(split, limit), split).to(self.device)

    def only_labelled(self, features: Features, split: Split) -> Features:
        """Drop rows without a class and count the others in `samples`; Skip if none is left."""
        rows = features.y >= 0
        if not rows.any():
            raise Skip(f"the {split} split has no labels")
        self.samples[split] = int(rows.sum())
        return features if rows.all() else features.at(rows)

    def extract(self, forward: Callable[[Batch], Tensor], split: Split, limit: int | None = None) -> Features:
        """Run `forward` (batch -> (B, D)) over a split without gradient; not cached.

        Raises:
            UserError: the split is empty, its rows are packed, or a feature is not finite.
        """
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        done = 0
        with torch.no_grad():
            for batch in self.data.eval_loader(split, limit):
                # conversations are packed in another order, even where each has a row of its own
                if "segments" in batch and ("image_rows" in batch or len(batch["segments"]) != len(batch["index"])):
                    raise UserError("evaluation goes row by row: set data.eval_views.pack=null")
                with self.precision():
                    x = forward(moved(batch, self.device, self.dtype))
                parts.append((x.float().cpu(), batch["target"].cpu(), batch["index"].cpu()))
                self.watch.rows(split, done := done + len(x), limit)
        if not any(len(y) for _, y, _ in parts):
            raise UserError(f"the {split} split is empty: nothing to evaluate; check data and limit={limit}")
        x, y, index = (gather_rows(torch.cat(part), self.device) for part in zip(*parts, strict=True))
        if not x.isfinite().all():
            bad = index[~x.isfinite().all(1)]
            raise UserError(
                f"features of {len(bad)} of {len(x)} {split} rows are not finite (first row {int(bad[0])}): "
                f"the weights have diverged; evaluate an earlier checkpoint"
            )
        found = unique_rows(x, y, index)
        self.samples[split] = len(found.y)
        return found


def moved(batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """The batch with its tensors on `device`; floating-point ones as `dtype` if given."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {key: move(value) for key, value in batch.items()}  # type: ignore[return-value]


def require_head(scores: Tensor, classes: Sequence[str]) -> None:
    """Raise `Skip` where scores (N, C) leave out some of the data's classes."""
    if scores.shape[1] < len(classes):
        raise Skip(f"the method's head tells {scores.shape[1]} classes, and these data have {len(classes)}")


def accuracy(scores: Tensor, y: Tensor) -> dict[str, float]:
    """Scores (N, C) and classes (N,) -> percent {"top1", "top5"}; top5 only where there are more than 5 classes."""
    C = scores.shape[1]
    return {
        f"top{k}": 100.0 * float(multiclass_accuracy(scores, y, C, top_k=k, average="micro", validate_args=False))
        for k in (1, 5)
        if k == 1 or k < C
    }


def require(evaluators: Mapping[str, Evaluator], method: nn.Module) -> None:
    """Check before any work that `method` can do what each evaluator needs.

    Raises:
        UserError: naming the evaluator, the method and the missing capability.
    """
    for name, evaluator in evaluators.items():
        if not isinstance(method, evaluator.needs):
            missing = [m for m in vars(evaluator.needs) if not m.startswith("_") and not hasattr(method, m)]
            raise UserError(
                f"evaluator {name!r} needs {evaluator.needs.__name__}, but method {type(method).__name__} has no "
                f"{', '.join(missing)}: leave {name} out of eval=[...], or give the method that function"
            )
