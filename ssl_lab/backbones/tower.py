"""One modality in a space that several share: a backbone, one vector per sample, and a map to the common width."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.errors import UserError
from ssl_lab.nn.linear import Linear
from ssl_lab.types import Encoded, Pooling


class Tower(nn.Module):
    """Input of one modality -> (B, E).

    Args:
        backbone: a ViT or any image encoder, a `TextEncoder`, a `Decoder`, or another backbone.
        embed_dim: width E.
        pooling: as `Encoded.pooled`, or what makes a module (tokens (B, L, D), valid) -> (B, D) from D. None = "last"
            where tokens see only earlier ones, else the backbone's choice.
        projection: to E: without bias ("linear"), with one ("affine"), or none, which needs E to be the backbone's D.
        frozen: the backbone and its pooling do not learn (LiT, arXiv:2111.07991); a projection does.
        padding: "masked": padding is not seen; "seen": it is, as SigLIP's text tower was trained, and the last position
            is the last of the row.

    Attributes:
        pool: the module that pools, if any.

    Raises:
        UserError: no projection, and a backbone of another width than E.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_dim: int = 512,
        *,
        pooling: Pooling | Callable[[int], nn.Module] | None = None,
        projection: Literal["linear", "affine", "none"] = "linear",
        frozen: bool = False,
        padding: Literal["masked", "seen"] = "masked",
    ) -> None:
        super().__init__()
        self.backbone, self.embed_dim, self.frozen, self.padding = backbone, embed_dim, frozen, padding
        dim = self.dim = cast(int, backbone.dim)
        self.causal = isinstance(backbone, Decoder | HFDecoder) or bool(getattr(backbone, "causal", False))
        self.pool = pooling(dim) if callable(pooling) else None
        self.pooling: Pooling | None = None if callable(pooling) else pooling
        if pooling is None and self.causal:
            self.pooling = "last"
        if projection == "none" and embed_dim != dim:
            raise UserError(
                f"a tower without projection gives {dim} numbers, not embed_dim={embed_dim}: set embed_dim={dim}, or "
                "projection=linear"
            )
        self.projection: nn.Module = nn.Identity()
        if projection != "none":
            self.projection = Linear(dim, embed_dim, bias=projection == "affine")
            nn.init.normal_(self.projection.weight, std=dim**-0.5)
            if self.projection.bias is not None:
                nn.init.zeros_(self.projection.bias)
        if frozen:
            for part in self._held():
                part.requires_grad_(False).eval()  # a run may begin without anybody calling `train`

    def forward(self, x: Tensor, *, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """(B, E), not normalised; arguments as `features`."""
        return self.projection(self.features(x, valid=valid, keep=keep))

    def features(self, x: Tensor, *, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """(B, D) pooled output of the backbone.

        Args:
            x: images (B, C, H, W), token ids (B, L) int64, or whatever the backbone reads.
            valid: (B, L) bool, False = padding, which stands at the end.
            keep: (B, K) int64, the only patches that are encoded (FLIP, arXiv:2212.00794).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            encoded = self._encoded(x, valid, keep)
            return encoded.pooled(self.pooling) if self.pool is None else self.pool(encoded.tokens, encoded.valid)

    def train(self, mode: bool = True) -> "Tower":
        """As nn.Module, but frozen parts stay as they are for evaluation: they drop nothing."""
        super().train(mode)
        if self.frozen:
            for part in self._held():
                part.eval()
        return self

    def _held(self) -> list[nn.Module]:
        return [self.backbone] if self.pool is None else [self.backbone, self.pool]

    def _encoded(self, x: Tensor, valid: Tensor | None, keep: Tensor | None) -> Encoded:
        options: dict[str, Any] = {} if keep is None else {"keep": keep}
        last = self.pool is None and self.pooling == "last"
        if self.padding == "seen":
            valid = None
        if valid is not None and self.causal and last and x.device.type == "cpu":
            length = int(valid.sum(1).max())  # nobody sees what follows the last valid token
            x, valid = x[:, :length], valid[:, :length]
        if isinstance(self.backbone, TextEncoder) and last:
            # A causal mask hides the padding, which follows, by itself.
            at = x.new_full((len(x), 1), x.shape[1] - 1) if valid is None else _last(valid)
            return self.backbone(x, valid=None if self.causal else valid, rows=at)
        if not isinstance(self.backbone, Decoder | HFDecoder):
            options["tokens"] = self.pool is not None or self.pooling in ("mean", "last")
        if valid is None:
            return self.backbone(x, **options)
        encoded: Encoded = self.backbone(x, valid=valid, **options)
        encoded.valid = valid if encoded.valid is None and encoded.tokens.shape[1] == valid.shape[1] else encoded.valid
        return encoded


def _last(valid: Tensor) -> Tensor:
    """(B, L) bool -> (B, 1) int64 position of the last valid token."""
    return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(1, keepdim=True)
