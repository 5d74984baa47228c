"""From images with captions to what a method of pairs sees: a view of the image, and one of its captions as tokens."""

from typing import Literal

from torch import Tensor

from ssl_lab.data.pairs_text import Captioned
from ssl_lab.data.views import Views
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

_CAPTION = 0xCA97  # keeps the choice of the caption apart from the draws of the image


class PairViews:
    """Images with captions -> the keys of `image`, and `tokens` (B, L) int64, `valid` (B, L) bool of one caption each.

    Args:
        image: views of the images alone, such as `Crop`, `Resize` or `MultiView`.
        caption: "any" draws one by (seed, position), "first" takes the first one.
        stats: mean and deviation of the images; None = those of `image`, which they must equal.

    Raises:
        UserError: `stats` differ from those of `image`, or the data have no captions.
    """

    def __init__(self, image: Views, *, caption: Literal["any", "first"] = "any", stats: str | None = None):
        own = getattr(image, "stats", None)
        if caption not in ("any", "first"):
            raise UserError(f"caption={caption}: take any or first")
        if stats is not None and stats != own:
            raise UserError(f"stats={stats}, but the views of the image have {own}: set both, or neither")
        self.image, self.caption, self.stats = image, caption, own

    def __call__(self, data: Captioned, position: Tensor, seed: int) -> Batch:
        if not isinstance(data, Captioned):
            raise UserError("these views need images with captions: choose e.g. data=shapes_captions or data=pairs")
        batch = self.image(data.images, position, seed)
        texts = [captions[0] for captions in data.captions]
        if self.caption == "any":
            draws = uniform(fold(seed, _CAPTION), position.cpu(), 1)[:, 0].tolist()
            texts = [x[min(int(u * len(x)), len(x) - 1)] for u, x in zip(draws, data.captions, strict=True)]
        batch.update(data.encode(texts))
        return batch
