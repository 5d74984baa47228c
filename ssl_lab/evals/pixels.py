"""The baseline that no encoder should fall below."""

from torch import Tensor, nn

from ssl_lab.types import Batch


class Pixels(nn.Module):
    """Raw pixels as features, judged by the same evaluators as a trained method."""

    def embed(self, batch: Batch) -> Tensor:
        """(B, C, H, W) -> (B, C * H * W)."""
        return batch["image"].flatten(1)
