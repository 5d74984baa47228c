"""SigLIP (Zhai et al., 2023, arXiv:2303.15343): every pair of image and text is a yes or no of its own."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssl_lab.backbones.text import TextEncoder
from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.losses.pairs import sigmoid_loss
from ssl_lab.methods.clip import CLIP
from ssl_lab.nn.attention import Attention
from ssl_lab.types import Batch, Step


@torch.no_grad()
def init_weights(tower: Tower) -> None:
    """big_vision's: Xavier-uniform matrices, biases 0, patches, tokens and positions normal(1 / sqrt(inputs))."""
    backbone = tower.backbone
    modules = [*backbone.modules(), *([] if tower.pool is None else tower.pool.modules())]
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in modules:  # each on its own: their fusion has another fan-out
        if isinstance(module, Attention):
            for matrix in module.kv.weight.chunk(2) if module.cross else module.qkv.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
    if isinstance(backbone, ViT):
        nn.init.normal_(backbone.patch_embed.proj.weight, std=backbone.patch_embed.proj.weight[0].numel() ** -0.5)
        if backbone.patch_embed.proj.bias is not None:
            nn.init.zeros_(backbone.patch_embed.proj.bias)
        tables = [backbone.pos_embed]
    else:
        tables = [p for name, p in backbone.named_parameters() if name in ("embed.weight", "positions.weight")]
    for table in tables:
        if table.requires_grad:
            nn.init.normal_(table, std=tower.dim**-0.5)


class SigLIP(CLIP):
    """As CLIP, with the sigmoid loss.

    Args:
        image: as in `CLIP`.
        text: as in `CLIP`.
        others: as in `CLIP`.
        keep: as in `CLIP`.
        chunk: samples that go through a tower at a time, see `CLIP`.
        loss_chunk: rows and columns that the loss looks at at a time, see `sigmoid_loss`; None = one matrix.
        weights: as in `CLIP`.
    """

    first_scale = math.log(10.0)
    scale_range = (-math.inf, math.inf)
    first_bias = -10.0

    def __init__(
        self,
        image: Tower,
        text: Tower,
        *,
        others: Mapping[str, Tower] | None = None,
        keep: float = 1.0,
        chunk: int | None = None,
        loss_chunk: int | None = 1024,
        weights: str | None = None,
    ) -> None:
        super().__init__(image, text, others=others, keep=keep, chunk=chunk)
        if loss_chunk is not None and loss_chunk < 1:
            raise UserError(f"loss_chunk={loss_chunk} must be null or at least 1")
        self.loss_chunk = loss_chunk
        self.logit_bias = nn.Parameter(torch.tensor(self.first_bias))
        if weights is not None:
            from ssl_lab.weights.pairs import load

            load(self, weights)

    def init_tower(self, tower: Tower) -> None:
        if isinstance(tower.backbone, ViT | TextEncoder) and not tower.backbone.pretrained:
            init_weights(tower)

    def step(self, batch: Batch, progress: float) -> Step:
        step = super().step(batch, progress)
        step.logs["logit_bias"] = self.logit_bias.detach()
        return step

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        return sigmoid_loss(embeddings, self.logit_scale.exp(), self.logit_bias, chunk=self.loss_chunk)
