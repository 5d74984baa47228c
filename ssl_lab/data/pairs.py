"""Images with captions, from files of every usual kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from ssl_lab.data.encoded import Encoded
from ssl_lab.data.images import EncodedImages
from ssl_lab.data.pairs_table import open_pairs
from ssl_lab.data.pairs_text import Captioned, CaptionEncoder, spread
from ssl_lab.data.source import Samples
from ssl_lab.data.tokenizer import Tokenizer


class EncodedPairs(Encoded, Protocol):
    """Undecoded images with their captions, by row."""

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """At least one text for each row."""
        ...


class CaptionedImages(EncodedImages):
    """Images with captions; an unreadable image is replaced by another one together with its captions.

    `Samples.data` is a `Captioned`, or the images alone where no `encode` is given.
    """

    table: EncodedPairs

    def __init__(
        self,
        table: EncodedPairs,
        path: str,
        split: str,
        encode: CaptionEncoder | None,
        *,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        super().__init__(table, path, split, in_memory=in_memory, bad_samples=bad_samples)
        self.encode = encode
        if encode is not None:
            several = len(self.captions([0])[0])
            rows = spread(len(self), several)
            found = [text for captions in self.captions(list(rows)) for text in captions]
            encode.report(found, len(self) if len(rows) < len(self) else 0, path)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the captions."""
        return None if self.encode is None else self.encode.tokenizer

    def read(self, rows: Sequence[int]) -> Samples:
        """Images at `rows` with all their captions."""
        samples = super().read(rows)
        if self.encode is not None:
            samples.data = Captioned(samples.data, self.captions(samples.rows.tolist()), self.encode)
        return samples

    def captions(self, rows: Sequence[int]) -> list[list[str]]:
        """All captions of each of these rows."""
        return self.table.captions(rows)


class Pairs(CaptionedImages):
    """The captioned images of one split at `path`.

    `path` is a parquet file or a folder of them, a .csv or .tsv file, or the name of a hub data set. A column holds the
    bytes or the path of an image (relative to the file), another its caption or a list of captions. Rows of a .csv with
    the same image are one image with several captions. Columns are found by type and name unless they are given, and
    splits as in `HFImages`: by the names of files, by a column `split`, else a tenth of the images is held out. Rows
    without a caption are left out. `in_memory` and `bad_samples` as in `EncodedImages`.

    Args:
        path: where the images are.
        tokenizer: of the captions, or its path; None = images only.
        split: train, or what is held out.
        image_column: None = found.
        caption_column: one or several, each with a text or a list of texts; None = found.
        label_column: of classes; None = found, if there are any.
        context_length: tokens of a caption, begin and end included; longer ones are cut.
        fixed: pad to `context_length`, not to the longest of a batch.
        in_memory: keep decoded images.
        bad_samples: a file to list unreadable images in.

    Raises:
        UserError: nothing at `path`, no images, no captions, or more than 1 % of the images unreadable.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer | str | None = None,
        *,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | Sequence[str] | None = None,
        label_column: str | None = None,
        context_length: int = 77,
        fixed: bool = True,
        in_memory: bool | Literal["auto"] = "auto",
        bad_samples: str | Path | None = None,
    ):
        encode = None if tokenizer is None else CaptionEncoder(tokenizer, context_length, fixed=fixed)
        table = open_pairs(str(path), split, image_column, caption_column, label_column)
        super().__init__(table, str(path), split, encode, in_memory=in_memory, bad_samples=bad_samples)
