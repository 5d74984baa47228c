"""The DataModule of sound: one sampling rate, and batches of clips of like length."""

from typing import TYPE_CHECKING

from ssl_lab.data.audio import check_rate
from ssl_lab.data.audio_order import Bucketed
from ssl_lab.data.module import DataModule
from ssl_lab.data.source import Source, Subset
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError

if TYPE_CHECKING:
    from ssl_lab.data.tokenizer import Tokenizer


class AudioModule(DataModule):
    """Feeds a method from two sources of sound; see `DataModule`.

    Args:
        train: what is trained on.
        test: what is evaluated on.
        views: from clips to the keys of a training batch.
        eval_views: the same for evaluation.
        batch_size: clips per batch on one process.
        sampling_rate: in Hz, of sources, views and backbone.
        bucket: batches whose clips are sorted by length together, so that each batch pads little; 1 = plain order.
        num_workers: processes that make batches ahead.
        seed: ties the order of the rows and the augmentation together with the position.
        rows: train on some rows only; see `DataModule`.
        path: where the sources come from, for the reader of a configuration; the sources have it already.
        tokenizer: of the transcripts, likewise.

    Raises:
        UserError: a source with another sampling rate.
    """

    def __init__(
        self,
        train: Source,
        test: Source,
        views: Views,
        *,
        batch_size: int,
        eval_views: Views,
        sampling_rate: int = 16000,
        bucket: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        rows: float | None = None,
        path: str | None = None,
        tokenizer: "Tokenizer | str | None" = None,
    ):
        self.sampling_rate = check_rate(sampling_rate)
        for name, source in (("train", train), ("test", test)):
            rate = getattr(source, "sampling_rate", None)
            if rate is None:
                raise UserError(f"data.{name} is no source of sound: these data are for audio, not for {source.unit}")
            if rate != sampling_rate:
                raise UserError(f"data.{name}.sampling_rate is {rate}, and data.sampling_rate {sampling_rate}: set one")
        if bucket < 1:
            raise UserError(f"data.bucket is {bucket}: it must be at least 1, the plain order")
        self.bucket = bucket
        super().__init__(
            train,
            test,
            views,
            batch_size=batch_size,
            eval_views=eval_views,
            num_workers=num_workers,
            seed=seed,
            rows=rows,
            path=path,
            tokenizer=tokenizer,
        )

    def _ordered(self, world_size: int) -> Source:
        """Clips of like length together, where their lengths are known."""
        some = self.train.rows if isinstance(self.train, Subset) else slice(None)
        whole = self.train.source if isinstance(self.train, Subset) else self.train
        lengths = getattr(whole, "lengths", None) if self.bucket > 1 else None
        if lengths is None:
            return self.train
        return Bucketed(self.train, lengths[some], self.batch_size * world_size, self.bucket)
