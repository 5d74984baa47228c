"""Our steps for an outside timing harness: `make(family, cfg, inputs)` gives one step as a call, or None.

A harness that times several libraries side by side makes the batch and names the sizes; we build the same network and
do the whole step on it: every term of the loss, fused AdamW, autocast in bf16.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssl_lab.backbones.vit import ViT
from ssl_lab.bench.step import TrainStep, dtypes, method_step
from ssl_lab.methods.mae import MAE, Decoder
from ssl_lab.methods.supervised import Supervised
from ssl_lab.train.optim import Optim
from ssl_lab.types import Batch


def make(family: str, cfg: Mapping[str, Any], inputs: Mapping[str, Any]) -> "TrainStep | InferStep | None":
    """One step of `family` (mae | vit | vit_infer) as a call that gives its loss; None for any other family.

    Args:
        family: what to do.
        cfg: `img`, `patch`, `dim`, `depth`, `heads`, `device`, `precision` (fp32 | bf16), `lr`; for mae `dec_dim`,
            `dec_depth`, `dec_heads`, `mask`; for vit and vit_infer `classes`.
        inputs: `images` (B, 3, H, W) float32, and `labels` (B,) int64 for vit.
    """
    if family not in ("mae", "vit", "vit_infer"):
        return None
    device, precision = torch.device(cfg["device"]), "bf16-mixed" if cfg["precision"] == "bf16" else "32-true"
    encoder = ViT(
        cfg["dim"],
        cfg["depth"],
        cfg["heads"],
        image_size=cfg["img"],
        patch_size=cfg["patch"],
        positions="sincos" if family == "mae" else "learned",
    )
    batch = Batch(image=inputs["images"])
    if family == "vit_infer":
        return InferStep(Supervised(encoder, cfg["classes"]), batch, device=device, precision=precision)
    method: MAE | Supervised
    if family == "mae":
        decoder = partial(Decoder, dim=cfg["dec_dim"], depth=cfg["dec_depth"], num_heads=cfg["dec_heads"])
        method = MAE(encoder, decoder=decoder, mask_ratio=cfg["mask"])
    else:
        method, batch["target"] = Supervised(encoder, cfg["classes"]), inputs["labels"]
    method.optim = Optim(lr=cfg["lr"], weight_decay=0.05)
    return method_step(method, batch, device=device, precision=precision)


class InferStep:
    """Logits of a batch without gradients; gives their mean."""

    def __init__(self, method: Supervised, batch: Batch, *, device: torch.device, precision: str) -> None:
        _, self.autocast = dtypes(precision)
        self.method, self.batch, self.device = method.to(device).eval(), batch, device
        self.params = sum(p.numel() for p in method.parameters())

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits = self.method.classify(self.batch)
        return logits.float().mean()
