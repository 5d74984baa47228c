"""How a model sees pictures, said in the words of other libraries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Stats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation per channel of images in [0, 1]


@dataclass(frozen=True)
class Look:
    """How a picture becomes pixels: its shorter side `resize` long, of that the middle `size` x `size`."""

    size: int
    resize: int
    resample: str  # bilinear, bicubic, ...
    stats: Stats

    def timm(self) -> dict[str, Any]:
        """What stands in a `pretrained_cfg` of timm, which makes the shorter side floor(size / crop_pct) long."""
        share = self.size / self.resize
        if math.floor(self.size / share) != self.resize:
            share = math.nextafter(share, 0)
        return {"crop_pct": share, "crop_mode": "center", "interpolation": self.resample, **self._normal("mean", "std")}

    def open_clip(self) -> dict[str, Any]:
        """A `preprocess_cfg` of open_clip, which crops nothing off the shorter side."""
        return {"interpolation": self.resample, "resize_mode": "shortest", **self._normal("mean", "std")}

    def hf(self, transformers: Any) -> Any:
        """An image processor of transformers; that of CLIP is the one that cuts out the middle."""
        from PIL.Image import Resampling

        return transformers.CLIPImageProcessor(
            size={"shortest_edge": self.resize},
            crop_size={"height": self.size, "width": self.size},
            resample=Resampling[self.resample.upper()],
            **self._normal("image_mean", "image_std"),
        )

    def _normal(self, mean: str, std: str) -> dict[str, list[float]]:
        return {mean: list(self.stats[0]), std: list(self.stats[1])}
