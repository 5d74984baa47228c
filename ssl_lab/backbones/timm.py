"""Any timm model in the place of a backbone: convolutional nets, hierarchical transformers, other ViTs."""

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.block import places
from ssl_lab.nn.mask import FULL, AttnMask
from ssl_lab.types import Encoded
from ssl_lab.weights.sources import check_timm_name, first_line


class Timm(nn.Module):
    """A timm model without its head: image (B, C, H, W) -> `Encoded`.

    The tokens are timm's `forward_features`: the sequence of a ViT without its prefix, or the last map flattened row by
    row. Models that norm only after pooling give them unnormed.

    Args:
        name: timm's name, e.g. `resnet50.a1_in1k`; see `timm.list_models()`.
        pretrained: start from timm's weights (downloaded once).
        image_size: side in pixels, for models that are built for one size; others take any size.
        small_stem: for images of 32 px or so: the 7x7 convolution of stride 2 and the pooling at the beginning of a
            ResNet become one 3x3 convolution of stride 1 (SimCLR, arXiv:2002.05709, appendix B.9).
        **kwargs: further arguments of `timm.create_model`, e.g. `drop_path_rate`, `in_chans`; None = as if not given.

    Raises:
        UserError: unknown name or argument, weights that cannot be had, or `small_stem` of another architecture.
    """

    model: Any

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        image_size: int | None = None,
        small_stem: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_timm_name(name)
        self.arguments: dict[str, Any] = {"name": name, "image_size": image_size, **kwargs}
        sized = image_size is not None and built_for_one_size(name)
        try:
            more = {"img_size": image_size, **kwargs} if sized else kwargs
            model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **more)
        except Exception as error:
            what = "its weights (is there a network?)" if pretrained else "it"
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            hint = f"; leave it out with method.encoder.{unknown[1]}=null" if unknown else ""
            raise UserError(f"timm cannot give {what} for {name!r}: {first_line(error)}{hint}") from error
        if small_stem:
            self.arguments["small_stem"] = True
            _shrink_stem(model, name)
        self.model = model
        self.dim: int = model.num_features
        self.num_prefix: int = getattr(model, "num_prefix_tokens", 0)
        self.has_cls = getattr(model, "cls_token", None) is not None

    @property
    def depth(self) -> int:
        """How many layers there are to be asked for: blocks of a ViT, stages of other models."""
        return len(self.model.feature_info)

    def forward(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        mask: AttnMask = FULL,
        layers: Sequence[int] = (),
        tokens: bool = True,
    ) -> Encoded:
        """Encode (B, C, H, W); `layers` indexes blocks of a ViT or stages of other models (negative = from the end).

        The tokens are there whatever `tokens` says.

        Raises:
            UserError: `keep` or a mask, which timm models cannot serve; no intermediate layers, or not these.
        """
        if keep is not None or mask is not FULL:
            what = "encode a part of the patches (keep=)" if keep is not None else "restrict attention (mask=)"
            raise UserError(f"timm's {self.arguments['name']} cannot {what}; use a ViT, e.g. backbone=vit_s16")
        if not layers:
            prefix, patches = self._split(self.model.forward_features(x))
            return Encoded(patches, prefix, has_cls=self.has_cls)
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"timm's {self.arguments['name']} does not give intermediate layers (layers=)")
        at = places(layers, self.depth)
        wanted = sorted(set(at.values()))
        extra = {"return_prefix_tokens": True} if self.num_prefix else {}
        last, maps = self.model.forward_intermediates(x, indices=wanted, output_fmt="NCHW", **extra)
        found = dict(zip(wanted, (_joined(m) for m in maps), strict=True))
        prefix, patches = self._split(last)
        return Encoded(patches, prefix, hidden={i: found[place] for i, place in at.items()}, has_cls=self.has_cls)

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix (B, P, D) and tokens (B, L, D) of what `forward_features` gives."""
        if out.dim() == 4:
            out = out.flatten(1, 2) if _channels_last(self.model) else out.flatten(2).transpose(1, 2)
        return out[:, : self.num_prefix], out[:, self.num_prefix :]


def _shrink_stem(model: Any, name: str) -> None:
    old = getattr(model, "conv1", None)
    if not isinstance(model, ResNet) or not isinstance(old, nn.Conv2d):
        raise UserError(f"small_stem=true is for ResNets with one convolution at the beginning, and {name} has another")
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    setattr(model, "conv1", new)  # noqa: B010 - timm declares another type
    setattr(model, "maxpool", nn.Identity())  # noqa: B010


def built_for_one_size(name: str) -> bool:
    """Whether timm must be told the image size when it makes the model."""
    if ":" in name:
        return True
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(config and config.fixed_input_size)


def _channels_last(model: nn.Module) -> bool:
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """(B, P + L, D) from a map (B, D, H, W), or from a pair of map and prefix."""
    if isinstance(out, Tensor):
        return out.flatten(2).transpose(1, 2)
    return torch.cat([out[1], out[0].flatten(2).transpose(1, 2)], 1)
