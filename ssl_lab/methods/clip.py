"""CLIP (Radford et al., 2021, arXiv:2103.00020): image and text meet in one space, by contrast within the batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl_lab.backbones.tower import Tower
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.losses.pairs import Gather, clip_loss
from ssl_lab.methods.base import Method
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.masking import random_mask
from ssl_lab.nn.norm import l2_normalize
from ssl_lab.spread import feature_std
from ssl_lab.types import Batch, Step

KEYS = {"image": ("image", ""), "text": ("tokens", "valid")}  # what a tower reads: the batch's input and its mask


@torch.no_grad()
def init_weights(vit: ViT) -> None:
    """OpenAI's, of the image tower: class token and positions normal(1 / sqrt(D)), query, key and value Xavier-uniform.

    Other matrices and the patches are as torch makes them.
    """
    for token in (vit.cls_token, vit.registers, vit.pos_embed):
        if token is not None and token.requires_grad:
            nn.init.normal_(token, std=vit.dim**-0.5)
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for module in vit.blocks.modules():
        if isinstance(module, Attention):
            nn.init.xavier_uniform_(module.qkv.weight)
            for bias in (module.qkv.bias, module.proj.bias):
                if bias is not None:
                    nn.init.zeros_(bias)


class CLIP(Method):
    """Towers of two modalities or more; every sample must find itself in each other modality.

    Args:
        image: reads `image`.
        text: reads `tokens` and `valid`.
        others: more towers by the batch key that they read; `<key>_valid` is its mask, if there is one.
        gather: how ranks compare, see `clip_loss`.
        keep: share of the patches that the image tower sees in training (FLIP, arXiv:2212.00794).
        chunk: samples that go through a tower at a time; the batch first passes without a graph, and again chunk by
            chunk once the loss has said what it wants of each embedding (GradCache, arXiv:2101.06983). A batch of any
            size then needs the activations of one chunk, and its gradients are the same. None = all at once.
        weights: start all towers and the scale from these, see `ssl_lab.weights.pairs.load`.

    Raises:
        UserError: towers of different widths, or `keep` for an image encoder that cannot leave patches out.
    """

    small_steps = "logit_scale"
    first_scale = math.log(1 / 0.07)
    scale_range = (0.0, math.log(100.0))

    def __init__(
        self,
        image: Tower,
        text: Tower,
        *,
        others: Mapping[str, Tower] | None = None,
        gather: Gather = "local",
        keep: float = 1.0,
        chunk: int | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"image": image, "text": text, **(others or {})})
        widths = {name: tower.embed_dim for name, tower in self.towers.items()}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise UserError(f"towers must meet in one width, and these do not ({told}): set embed_dim alike for all")
        if keep < 1 and not isinstance(image.backbone, ViT):
            raise UserError(f"keep={keep} leaves patches out, which needs a ViT: set keep=1 for this image tower")
        if not 0 < keep <= 1 or (chunk is not None and chunk < 1):
            raise UserError(f"keep={keep} must lie in (0, 1], and chunk={chunk} must be null or at least 1")
        self.gather, self.keep, self.chunk = gather, keep, chunk
        self.logit_scale = nn.Parameter(torch.tensor(self.first_scale))
        for tower in self.towers.values():
            self.init_tower(cast(Tower, tower))
        if weights is not None:
            from ssl_lab.weights.pairs import load

            load(self, weights)

    def init_tower(self, tower: Tower) -> None:
        """New weights of a tower that does not start from others'."""
        if isinstance(tower.backbone, ViT) and not tower.backbone.pretrained:
            init_weights(tower.backbone)

    @property
    def encoder(self) -> nn.Module:
        """The image tower's backbone."""
        return cast(Tower, self.towers["image"]).backbone

    def step(self, batch: Batch, progress: float) -> Step:
        keep = self._kept(batch["image"]) if self.keep < 1 else None
        z = {name: self.project(name, batch, keep if name == "image" else None) for name in self.towers}
        spread = {f"{name}_std": feature_std(each.detach()) for name, each in z.items()}
        return Step(self.loss(list(z.values())), {"logit_scale": self.logit_scale.detach().exp(), **spread})

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Of one modality's (B, E) each, in the order of the towers -> scalar."""
        return clip_loss(embeddings, self.logit_scale.exp(), gather=self.gather)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """The logarithm of the scale stays within `scale_range`: the scale of CLIP within [1, 100]."""
        self.logit_scale.clamp_(*self.scale_range)

    def project(self, name: str, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """(B, E) of a tower, not normalised; `keep` (B, K) are the only patches seen."""
        tower, (x, valid) = cast(Tower, self.towers[name]), self._read(name, batch)
        if self.chunk is None or not torch.is_grad_enabled():
            return tower(x, valid=valid, keep=keep)
        pieces = [slice(i, i + self.chunk) for i in range(0, len(x), self.chunk)]

        def part(rows: slice) -> Tensor:
            given: dict[str, Any] = {
                name: None if each is None else each[rows] for name, each in (("valid", valid), ("keep", keep))
            }
            if tower.frozen:  # nothing to go back for
                return tower.features(x[rows], **given)
            return checkpoint(tower, x[rows], use_reentrant=False, **given)

        whole = torch.cat([part(rows) for rows in pieces])
        return tower.projection(whole) if tower.frozen else whole

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the image tower, before the projection."""
        return cast(Tower, self.towers["image"]).features(batch["image"])

    def embed_image(self, batch: Batch) -> Tensor:
        """(B, E) of unit length."""
        return l2_normalize(self.project("image", batch))

    def embed_text(self, batch: Batch) -> Tensor:
        """(B, E) of unit length."""
        return l2_normalize(self.project("text", batch))

    @property
    def others(self) -> tuple[str, ...]:
        """Batch keys of the modalities beside image and text."""
        return tuple(name for name in self.towers if name not in KEYS)

    def embed_other(self, name: str, batch: Batch) -> Tensor:
        """(B, E) of unit length, of a modality that `others` names."""
        return l2_normalize(self.project(name, batch))

    def _read(self, name: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
        key, mask = KEYS.get(name, (name, f"{name}_valid"))
        if key not in batch:
            raise UserError(f"the {name} tower reads {key}, and the data have none: choose data of pairs")
        return batch[key], batch.get(mask)  # type: ignore[literal-required, return-value]

    def _kept(self, image: Tensor) -> Tensor:
        """(B, K) random patches to keep."""
        vit = cast(ViT, self.encoder)
        count = math.prod(side // vit.patch_embed.patch_size for side in image.shape[2:])
        kept = random_mask(torch.rand(len(image), count, device=image.device), 1 - self.keep)[0]
        if not kept.shape[1]:
            raise UserError(f"keep={self.keep} of {count} patches leaves none: set a larger method.keep, such as 0.5")
        return kept
