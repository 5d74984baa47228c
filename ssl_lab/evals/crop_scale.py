"""Robustness to crop scale: is an image still recognised when only its centre is seen?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor

from ssl_lab.errors import UserError
from ssl_lab.evals.base import Common, Round, Skip, accuracy
from ssl_lab.evals.features import num_classes
from ssl_lab.evals.knn import knn_votes, require_vote
from ssl_lab.types import Batch, Embeds


@dataclass(frozen=True)
class CropScale(Common):
    """kNN accuracy of test images cropped to their centre, against the bank of full training images.

    The crop is taken from the image as the encoder would see it and brought back to its size (bicubic), so objects
    appear larger and coarser. Scale 1 is plain kNN and shares its features; every other one extracts the test split
    again, the bank is never extracted again.

    Args:
        scales: shares of the area that the crop keeps, each in (0, 1].
        k: neighbours that vote; all of them if the bank is smaller.
        temperature: of the vote.
    """

    scales: Sequence[float] = (1.0, 0.5, 0.25, 0.1)
    k: int = 20
    temperature: float = 0.07
    needs: ClassVar[type] = Embeds

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise UserError(f"crop_scale.scales={list(self.scales)}: give shares of the area in (0, 1]")
        require_vote("crop_scale", self.k, self.temperature)

    @property
    def protocol(self) -> dict[str, Any]:
        """Settings that the values depend on."""
        return {
            "crop": "centre, resized back (bicubic)",
            "scales": [float(scale) for scale in self.scales],
            "similarity": "cosine",
            "k": self.k,
            "temperature": self.temperature,
            "limit": self.limit,
        }

    def run(self, round: Round) -> dict[str, float]:
        """Percent of test rows, by share of the area: `top1_100pct`, `top1_50pct`, ..."""
        bank = round.labelled("train", self.limit)
        embed, values = cast(Embeds, round.method).embed, {}
        for scale in self.scales:

            def cropped(batch: Batch, scale: float = scale) -> Tensor:
                if "image" not in batch:
                    raise Skip("a crop needs images")
                return embed({**batch, "image": centre(batch["image"], scale)})

            found = round.features("test", self.limit) if scale == 1 else round.extract(cropped, "test", self.limit)
            test = round.only_labelled(found, "test").to(round.device)
            votes = knn_votes(bank.x, bank.y, test.x, num_classes(bank, test), self.k, self.temperature)
            values[f"top1_{100 * scale:g}pct"] = accuracy(votes, test.y)["top1"]
        return values


def centre(image: Tensor, scale: float) -> Tensor:
    """Images (B, C, H, W) -> the centre with `scale` of the area, resized to (B, C, H, W) by a bicubic filter.

    Raises:
        Skip: these are no images.
    """
    if image.dim() != 4:
        raise Skip(f"a crop needs images (B, C, H, W), not {tuple(image.shape)}")
    H, W = image.shape[2:]
    h, w = (max(1, round(side * scale**0.5)) for side in (H, W))
    if (h, w) == (H, W):
        return image
    top, left = (H - h) // 2, (W - w) // 2
    part = image[:, :, top : top + h, left : left + w].float()
    return F.interpolate(part, (H, W), mode="bicubic", align_corners=False, antialias=True).to(image.dtype)
