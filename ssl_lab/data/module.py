"""The one LightningDataModule: endless training data whose position follows from the step, ordered evaluation."""

import functools
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch

from ssl_lab import dist
from ssl_lab.data.batches import EvalBatches, Loader, TrainBatches, augment
from ssl_lab.data.source import Source, subset
from ssl_lab.data.stream import eval_rows
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError
from ssl_lab.types import Batch

if TYPE_CHECKING:
    from ssl_lab.data.tokenizer import Tokenizer


class DataModule(L.LightningDataModule):
    """Feeds a method from two sources.

    Args:
        train: what is trained on.
        test: what is evaluated on.
        views: from stored pixels to the image keys of a training batch.
        eval_views: the same for evaluation.
        batch_size: samples per batch on one process.
        image_size: side in pixels of the images that the views give.
        num_workers: processes that make batches ahead; 0 makes them in the main process, best for sets in memory.
        augment_on_device: move stored uint8 pixels and run `views` on the training device.
        seed: ties the order of the rows and the augmentation together with the position.
        rows: train on the first so many rows only, or on a share below 1 with equally many of each class,
            drawn from the seed; None = all.
        path: where the sources come from, for the reader of a configuration; the sources have it already.
        tokenizer: of the sources of text, likewise.

    Nothing is saved in a checkpoint: the position is global_step x accumulate_grad_batches x batch_size x world_size.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        views: Views,
        *,
        batch_size: int,
        eval_views: Views,
        image_size: int = 32,
        num_workers: int = 0,
        augment_on_device: bool = False,
        seed: int = 0,
        rows: float | None = None,
        path: str | None = None,
        tokenizer: "Tokenizer | str | None" = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}: it must be at least 1")
        if rows is not None and (rows <= 0 or (isinstance(rows, float) and rows >= 1)):  # 1.0: all, or the first?
            raise UserError(f"data.rows is {rows}: give a whole number, or a share above 0 and below 1")
        self.train, self.test = train if rows is None else subset(train, rows, seed), test
        self.views, self.eval_views = views, eval_views
        self.batch_size, self.image_size = batch_size, image_size
        self.num_workers, self.augment_on_device = num_workers, augment_on_device
        self.seed, self.path = seed, path

    @property
    def num_train(self) -> int:
        """Number of training samples: one epoch."""
        return len(self.train)

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the targets; empty without labels."""
        return self.train.classes

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """Of text; None for anything else."""
        return getattr(self.train, "tokenizer", None)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the views give."""
        return 3, self.image_size, self.image_size

    def train_dataloader(self, first: int | None = None) -> Loader:
        """Endless batches with `image` or `views`, `target`, `index`, `position`.

        They begin with batch number `first`, None = that of the trainer's present step.
        """
        rank, world_size = self._place()
        views = None if self.augment_on_device else self.views
        source: Any = self._ordered(world_size)
        reader: Any = getattr(self.trainer, "lightning_module", None)
        if getattr(reader, "cache_features", False) and hasattr(source, "without"):
            source = source.without(reader.known_images)  # it keeps what it made of an image
        batches = TrainBatches(source, views, self.batch_size, self.seed, rank, world_size)
        self._fill(self.train)
        numbers = self._numbers if first is None else functools.partial(itertools.count, first)
        return Loader(batches, numbers, self.num_workers)

    def eval_loader(self, split: Literal["train", "test"], limit: int | None = None) -> Loader:
        """This rank's share of a split, once and in order, with `image`, `target`, `index`.

        `limit` keeps so many images of the whole split, evenly spread. Every rank gets the same number of batches;
        where that needs repeated images, drop those whose `index` was seen.
        """
        if limit is not None and limit < 1:
            raise UserError(f"limit is {limit}: evaluate at least one image, or all of them with null")
        source = self.train if split == "train" else self.test
        rows = eval_rows(len(source), limit, dist.rank(), dist.world_size())
        self._fill(source)
        batches = EvalBatches(source, self.eval_views, self.batch_size, rows)
        return Loader(batches, lambda: range(-(-len(rows) // self.batch_size)), self.num_workers)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Stop a run whose data has lost step: better no result than one that cannot be repeated."""
        trainer = self.trainer
        if trainer is not None and trainer.training and "position" in batch:
            per_step = trainer.accumulate_grad_batches * self.batch_size * trainer.world_size
            first = int(batch["position"][0])
            if first // per_step != trainer.global_step:
                raise RuntimeError(
                    f"position {first} of the data belongs to step {first // per_step}, but this is step "
                    f"{trainer.global_step}: the loader was made before the checkpoint was read (by a call of "
                    "trainer.estimated_stepping_batches?), or accumulate_grad_batches changed during the run"
                )
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Run the views here if the batch came as stored pixels."""
        if "image" not in batch or batch["image"].dtype != torch.uint8:
            return batch
        kept: dict[str, Any] = {key: value for key, value in batch.items() if key != "image"}
        made = augment(self.views, batch["image"], batch["position"], self.seed)
        if self.trainer is not None:
            made = self.trainer.precision_plugin.convert_input(made)  # Lightning did so while these were bytes
        return {**kept, **made}  # type: ignore[typeddict-item]

    def _numbers(self) -> Iterable[int]:
        """Batch numbers from the present step on."""
        trainer = self.trainer
        return itertools.count(trainer.global_step * trainer.accumulate_grad_batches if trainer is not None else 0)

    def _ordered(self, world_size: int) -> Source:
        """What is trained on, with its own order of rows if it has one."""
        return self.train

    def _place(self) -> tuple[int, int]:
        """(rank, number of ranks) that share the stream."""
        trainer = self.trainer
        return (dist.rank(), dist.world_size()) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _fill(self, source: Source) -> None:
        """Let a source that renders or caches do so once, here, and not again in every worker."""
        if self.num_workers:
            source.read([0])
