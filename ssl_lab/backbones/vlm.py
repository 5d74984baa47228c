"""A language model that sees: image encoder, connector and decoder, joined as in LLaVA (arXiv:2304.08485)."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import IGNORE
from ssl_lab.nn.block import places
from ssl_lab.types import Encoded

Part = Literal["vision", "connector", "decoder"]
PARTS: tuple[Part, ...] = ("vision", "connector", "decoder")


@dataclass(slots=True)
class Spliced:
    """Rows of text with the tokens of their images in the places of the markers.

    `embedded` (B, L', D); `valid` (B, L') bool, None = all; `segments` (B, L') int64 of packed rows, -1 = padding;
    `labels` (B, L') int64 of the next token; `prefix` (B,) int64, the part at the beginning that all may see.
    """

    embedded: Tensor
    valid: Tensor | None = None
    segments: Tensor | None = None
    labels: Tensor | None = None
    prefix: Tensor | None = None


class VisionLanguage(nn.Module):
    """Images (N, C, H, W) and tokens (B, L) in which a marker stands for each image -> `Encoded`.

    Every marker is replaced by the Q tokens that the connector makes of its image. The first image belongs to the first
    marker, row by row. A row may have no image, or several.

    Args:
        vision: image encoder; or, with `layer=None`, whatever gives tokens of something else, such as a `Conformer` of
            waveforms (N, S) of one length, which then stand wherever images do.
        connector: makes the connector, called with (width of `vision`, width of `decoder`).
        decoder: language model.
        image_token: id of the marker; it needs no row in the decoder's embedding.
        layer: block whose output counts, negative = from the end, None = the normed output. Of a ViT the blocks after
            it and the norm are taken away. LLaVA reads the last but one: the last is made for CLIP's own loss.
        drop_prefix: leave class and register tokens out.
        prefix_lm: all positions up to the end of a row's first image see each other (as in PaliGemma,
            arXiv:2407.07726), if none of them is to be predicted.

    Raises:
        UserError: a layer that the encoder has not, or, when it sees, one of another width than its output.
    """

    def __init__(
        self,
        vision: nn.Module,
        connector: Callable[[int, int], nn.Module],
        decoder: Decoder | HFDecoder,
        *,
        image_token: int,
        layer: int | None = -2,
        drop_prefix: bool = True,
        prefix_lm: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer if layer is None else _shortened(vision, layer)
        self.vision, self.decoder = vision, decoder
        self.connector = connector(cast(int, vision.dim), decoder.dim)
        self.image_token, self.drop_prefix, self.prefix_lm = image_token, drop_prefix, prefix_lm
        self.frozen: tuple[Part, ...] = ()

    def freeze(self, *parts: Part) -> "VisionLanguage":
        """These parts, and no others, do not learn: no gradients, and they drop nothing in training."""
        self.frozen = parts
        for name in PARTS:
            self.get_submodule(name).requires_grad_(name not in parts)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "VisionLanguage":
        """As nn.Module, but frozen parts stay as they are for evaluation."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    @property
    def vision_learns(self) -> bool:
        """Whether anything of the image encoder does: all of it, or what a tuning put into a frozen one."""
        return any(p.requires_grad for p in self.vision.parameters())

    def with_parts(self, parts: Mapping[str, nn.Module]) -> "VisionLanguage":
        """The same with other modules in the place of some of its parts; all the rest is shared, not copied."""
        other = copy.copy(self)
        other._modules = {**self._modules, **parts}
        return other

    def forward(
        self,
        tokens: Tensor,
        images: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Encoded, Tensor | None]:
        """Encode rows and their images.

        Args:
            tokens: (B, L) int64, with the marker in the place of each image.
            images: (N, C, H, W) float, normalised, of all rows in order of appearance; None or N = 0: there are none.
                Then the connector, where it learns, works on one empty image and adds exactly nothing, so that all
                processes have the same gradients to exchange.
            valid: (B, L) bool, False = padding on either side.
            segments: (B, L) int64 conversation of each token of a packed row, -1 = padding.
            labels: (B, L) int64 of the next token, -100 = not scored.

        Returns:
            Tokens (B, L', D), L' with the images, and their labels (B, L').

        Raises:
            UserError: as many markers as images are wanted, and packed rows have no prefix.
        """
        visual = self.see(images) if images is not None and len(images) else self.nothing(images)
        return self.spliced(tokens, visual, valid=valid, segments=segments, labels=labels)

    def spliced(
        self,
        tokens: Tensor,
        visual: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Encoded, Tensor | None]:
        """As `forward`, of images (N, Q, D) that have been seen."""
        x = self.splice(tokens, visual, valid=valid, segments=segments, labels=labels)
        return self.decoder(x.embedded, valid=x.valid, segments=x.segments, prefix=x.prefix), x.labels

    def see(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> what the decoder reads of each image (N, Q, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_learns):
            patches = self.patches(images)
        out: Tensor = self.connector(patches)
        return out

    def patches(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> what the connector reads of each image (N, P, Dv)."""
        images = images.to(next(self.vision.parameters()).dtype)
        if self.layer is None or isinstance(self.vision, ViT):
            encoded = self.vision(images)
            parts = [encoded.tokens] if self.drop_prefix else [encoded.prefix, encoded.tokens]
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        hidden: Tensor = self.vision(images, layers=[self.layer]).hidden[self.layer]
        if hidden.shape[-1] != self.vision.dim:
            raise UserError(
                f"layer={self.layer} of the image encoder is {hidden.shape[-1]} wide, its output {self.vision.dim}: "
                "set method.model.layer=null"
            )
        return hidden[:, int(getattr(self.vision, "num_prefix", 0)) :] if self.drop_prefix else hidden

    def splice(
        self,
        tokens: Tensor,
        visual: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        labels: Tensor | None = None,
        side: Literal["left", "right"] = "right",
    ) -> Spliced:
        """Put images (N, Q, D) in the places of their markers; other arguments as in `forward`.

        A marker's label is what follows the image: the last of its tokens has to say it. `side` is where short rows
        are filled up.

        Raises:
            UserError: as in `forward`.
        """
        real = segments >= 0 if segments is not None else torch.ones_like(tokens, dtype=torch.bool)
        real = real if valid is None else real & valid
        marked = (tokens == self.image_token) & real
        self._require(int(marked.sum()), visual)
        width = torch.where(marked, visual.shape[1], 1) * real
        end = width.cumsum(1)
        total = end[:, -1:]
        length = int(total.max())
        if side == "left":
            end = end + (length - total)
        at = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
        source = torch.searchsorted(end, at.contiguous(), right=True).clamp(max=tokens.shape[1] - 1)
        inside = at < total if side == "right" else at >= length - total
        image = marked.gather(1, source) & inside
        ids = tokens.gather(1, source).masked_fill(image | ~inside, 0)
        embedded = self.decoder.embed(ids)
        embedded = embedded.masked_scatter(image[..., None], visual.to(embedded.dtype))
        out = Spliced(embedded, None if bool(inside.all()) else inside)
        if segments is not None:
            out.segments, out.valid = segments.gather(1, source).masked_fill(~inside, -1), None
        if labels is not None:
            last = (end.gather(1, source) - 1 == at) & inside
            out.labels = labels.gather(1, source).masked_fill(~last, IGNORE)
        if self.prefix_lm:
            out.prefix = self._prefix(marked, end, segments, labels)
        return out

    def _prefix(self, marked: Tensor, end: Tensor, segments: Tensor | None, labels: Tensor | None) -> Tensor:
        """(B,) positions up to the end of the first image; 0 without one, or where one of them is to be predicted."""
        if segments is not None:
            raise UserError("prefix_lm=true is for rows of one conversation: set data.views.pack=null")
        first = marked.long().argmax(1, keepdim=True)
        told = marked.any(1)
        if labels is not None:
            before = torch.arange(marked.shape[1], device=marked.device) < first
            told = told & ~(before & (labels != IGNORE)).any(1)
        return end.gather(1, first)[:, 0] * told

    def _require(self, markers: int, visual: Tensor) -> None:
        if markers == len(visual):
            return
        what = "a prompt without its image" if markers > len(visual) else "an image that no prompt mentions"
        raise UserError(
            f"{what}: {markers} image markers stand in the text, and there are {len(visual)} images; write one marker "
            "for each image, in their order"
        )

    def nothing(self, images: Tensor | None = None) -> Tensor:
        """(0, Q, D), a part of the graph where connector or image encoder learn: their gradients are 0, not missing.

        Raises:
            UserError: neither `images` (0, C, H, W) nor a ViT tell how large one would be.
        """
        weight = self.decoder.embed.weight
        learns = self.vision_learns or any(p.requires_grad for p in self.connector.parameters())
        if not torch.is_grad_enabled() or not learns:
            return weight.new_zeros(0, 1, self.decoder.dim)
        if images is not None and images.dim() > 1:
            shape = images.shape[1:]
        elif isinstance(self.vision, ViT):
            side = self.vision.grid[0] * self.vision.patch_embed.patch_size
            shape = torch.Size([self.vision.patch_embed.proj.in_channels, side, side])
        else:
            raise UserError("a batch without images must say how large one would be: give images of shape (0, C, H, W)")
        return self.see(weight.new_zeros(1, *shape))[:0]


def _shortened(vision: nn.Module, layer: int) -> int:
    """Take away what comes after block `layer` of a ViT; gives the block's number from the end of what is left."""
    if isinstance(vision, Timm) and hasattr(vision.model, "feature_info"):
        places([layer], vision.depth, "method.model.layer")
    if not isinstance(vision, ViT):
        return layer
    place = places([layer], len(vision.blocks), "method.model.layer")[layer]
    vision.blocks = vision.blocks[: place + 1]
    vision.norm = nn.Identity()
    return -1
