"""From conversations to what a vision-language model reads: images, tokens, labels; padded, or packed into rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_lab.data.conversation_text import Encoded
from ssl_lab.data.conversations import Talks, image_rows
from ssl_lab.data.text_pad import IGNORE, padded, padding
from ssl_lab.data.views import Resize, Views
from ssl_lab.errors import UserError
from ssl_lab.types import Batch

_APART = 1 << 40  # between the positions of a conversation's images, which then have draws of their own


class ConversationViews:
    """Conversations -> `images` (N, 3, H, W), `image_rows` (N,), `tokens`, `labels` (B, L) int64, and which are real.

    That is `valid` (B, L) bool; or, of packed rows, `segments` (R, L) int64: the number of the conversation, -1 =
    padding. A marker stands for each image, labels are of the next token and -100 but for answers. Images whose marker
    was cut off are left out. Where the view of the image draws nothing, `image_ids` (N,) tell the images apart. Where
    images were not read, `image_given` (N,) bool tells which ones `images` holds.

    Args:
        image: views of the images alone, such as `Resize` or `Crop`.
        pack: put conversations together into rows of at most so many tokens; None = each has a row of its own.
        image_length: tokens that an image counts for in `pack`: what the connector makes of it.
        stats: mean and deviation of the images; None = those of `image`, which they must equal.

    Raises:
        UserError: `stats` differ from those of `image`, or the data are no conversations.
    """

    def __init__(
        self, image: Views, *, pack: int | None = None, image_length: int = 1, stats: str | None = None
    ) -> None:
        own = getattr(image, "stats", None)
        if stats is not None and stats != own:
            raise UserError(f"stats={stats}, but the views of the image have {own}: set both, or neither")
        if pack is not None and pack < 2:
            raise UserError(f"pack={pack}: a row has at least 2 tokens; null = each conversation has its own")
        self.image, self.pack, self.image_length, self.stats = image, pack, image_length, own

    def __call__(self, data: Talks, position: Tensor, seed: int) -> Batch:
        if not isinstance(data, Talks):
            raise UserError("these views need conversations: choose e.g. data=shapes_questions or data=conversations")
        rows = [data.encode(messages) for messages in data.messages]
        fill = padding(data.encode.tokenizer)
        batch = Batch(image_rows=image_rows([row.images for row in rows]))
        batch["images"], given = self._images(data, rows, position, seed)
        if data.given is not None:
            batch["image_given"] = torch.tensor(given, dtype=torch.bool)
        if isinstance(self.image, Resize):
            ids = [i for row, numbers in zip(rows, data.numbers, strict=True) for i in numbers[: row.images]]
            batch["image_ids"] = torch.tensor(ids, dtype=torch.int64)
        if self.pack is None:
            batch["tokens"] = padded([row.tokens for row in rows], fill)
            batch["labels"] = padded([row.labels for row in rows], IGNORE)
            lengths = torch.tensor([len(row.tokens) for row in rows])
            batch["valid"] = torch.arange(batch["tokens"].shape[1]) < lengths[:, None]
            return batch
        bins = packed([len(row.tokens) + row.images * (self.image_length - 1) for row in rows], self.pack)
        for name, value in (("tokens", fill), ("labels", IGNORE)):
            batch[name] = padded([[x for i in one for x in getattr(rows[i], name)] for one in bins], value)  # type: ignore[literal-required]
        batch["segments"] = padded([[n for n, i in enumerate(one) for _ in rows[i].tokens] for one in bins], -1)
        order = [i for one in bins for i in one]
        firsts = [sum(row.images for row in rows[:i]) for i in range(len(rows))]
        picked = [firsts[i] + k for i in order for k in range(rows[i].images)]
        for name in ("image_given", "image_ids"):
            if name in batch:
                batch[name] = batch[name][picked]  # type: ignore[literal-required]
        batch["images"] = batch["images"][[sum(given[:i]) for i in picked if given[i]]]
        row_of = {i: number for number, one in enumerate(bins) for i in one}
        batch["image_rows"] = torch.tensor([row_of[i] for i in order for _ in range(rows[i].images)], dtype=torch.int64)
        return batch

    def _images(self, data: Talks, rows: Sequence[Encoded], position: Tensor, seed: int) -> tuple[Tensor, list[bool]]:
        """(M, 3, H, W) of those that are mentioned and were read, each with draws of its own; which ones those are."""
        kept, places, given = list[int](), list[int](), list[bool]()
        first = before = 0  # of the images that are listed, and of those that were read
        for row, numbers, place in zip(rows, data.numbers, position.tolist(), strict=True):
            for k in range(len(numbers)):
                new = data.given is None or data.given[first + k]
                if k < row.images:
                    given.append(new)
                    if new:
                        kept.append(before)
                        places.append(place + k * _APART)
                before += new
            first += len(numbers)
        if not kept:
            side = int(getattr(self.image, "size", 1))
            return torch.zeros(0, *getattr(self.image, "shape", (3, side, side))), given
        pictures = data.images[kept] if isinstance(data.images, Tensor) else [data.images[i] for i in kept]
        return self.image(pictures, torch.tensor(places), seed)["image"], given


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of sequences, row by row: the longest first, each into the first row that has room for it.

    One that is longer than `room` has a row of its own.
    """
    bins: list[tuple[list[int], int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((k for k, (_, used) in enumerate(bins) if used + lengths[i] <= room), None)
        if place is None:
            bins.append(([i], lengths[i]))
        else:
            bins[place] = ([*bins[place][0], i], bins[place][1] + lengths[i])
    return [sorted(one) for one, _ in bins]
