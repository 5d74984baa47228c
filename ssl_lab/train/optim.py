"""Optimizers, their parameter groups, and how learning rate and weight decay follow progress."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import timm.optim
import torch
from torch import nn

from ssl_lab.dist import all_reduce_sum, local
from ssl_lab.errors import UserError
from ssl_lab.schedules import Cosine, Linear, Schedule, as_schedule

Named = Iterable[tuple[str, nn.Parameter]]
_STEM = {
    "patch_embed", "pos_embed", "cls_token", "registers", "reg_token", "embed", "positions", "source_positions",
    "target_positions", "types", "embed_norm", "prompt", "front", "feature_norm", "stem",
}  # fmt: skip
_BIASES = (".bias", ".u", ".v")  # u and v of relative attention, one row per head
_PRODUCTS = ("weight", ".lora_a", ".lora_b", ".router")  # matrices that vectors are multiplied by


@dataclass
class Optim:
    """One recipe of optimization: which optimizer, its rate over time, and what decays.

    Args:
        name: AdamW (fused), SGD, LARS (arXiv:1708.03888), Muon with AdamW for embeddings, heads and 1-D parameters, or
            LARC: LARS with a trust of 0.02 whose ratio never lifts a tensor's rate above lr, for small batches.
        lr: peak learning rate, before scaling.
        scale_lr: "linear" multiplies by global batch / 256, "sqrt" by its root, "none" leaves it.
        warmup: share of training in which the rate rises linearly from 0.
        min_lr: rate at the end of the cosine or the line, before scaling.
        betas: of AdamW; the first is the momentum of the others.
        eps: of AdamW.
        weight_decay: a number or a schedule of progress.
        decay: what decays, "matrices" (not biases and other parameters of one dimension) or "all".
        layer_decay: rate factor per layer below the end of its network (BEiT, arXiv:2106.08254).
        patch_lr: rate factor of the patch projection (DINOv2 takes 0.2).
        schedule: after the warm-up "cosine" or "linear" to `min_lr`, "constant", "step": a tenth at 60 % and again at
            80 %, or "inverse_sqrt": sqrt(warmup / progress) (arXiv:1706.03762, section 5.3).
    """

    name: Literal["adamw", "sgd", "lars", "muon", "larc"] = "adamw"
    lr: float = 1e-3
    scale_lr: Literal["linear", "sqrt", "none"] = "none"
    warmup: float = 0.05
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: "float | Schedule" = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    layer_decay: float | None = None
    patch_lr: float = 1.0
    schedule: Literal["cosine", "linear", "constant", "step", "inverse_sqrt"] = "cosine"

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd", "lars", "muon", "larc"):
            raise UserError(f"optim.name={self.name} does not exist; there are adamw, sgd, lars, muon, larc")
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr} would teach nothing: give a rate above 0")
        if self.min_lr < 0:
            raise UserError(f"optim.min_lr={self.min_lr} would climb the loss: give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={list(self.betas)}: give two numbers from 0 to below 1, such as [0.9,0.999]")
        if self.eps < 0 or not 0 <= self.warmup <= 1:
            raise UserError(f"optim.eps={self.eps}, optim.warmup={self.warmup}: eps is 0 or more, warmup a share")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay={self.layer_decay}: give a factor above 0 and up to 1, such as 0.75")
        if isinstance(self.weight_decay, float | int) and self.weight_decay < 0:
            raise UserError(f"optim.weight_decay={self.weight_decay} would make weights grow: give 0 or more")
        if self.schedule == "inverse_sqrt" and self.warmup <= 0:
            raise UserError("optim.schedule=inverse_sqrt falls from the end of the warm-up: set optim.warmup above 0")
        self._weight_decay = as_schedule(self.weight_decay)

    def peak_lr(self, samples_per_step: int) -> float:
        """Learning rate at the end of the warm-up for this global batch (accumulation included)."""
        ratio = samples_per_step / 256
        return self.lr * {"linear": ratio, "sqrt": ratio**0.5, "none": 1.0}[self.scale_lr]

    def lr_factor(self, progress: float) -> float:
        """Rate at `progress` as a share of the peak."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return 0.1 ** ((progress >= 0.6) + (progress >= 0.8))
        if self.schedule == "inverse_sqrt":
            return (self.warmup / progress) ** 0.5
        curve = Linear if self.schedule == "linear" else Cosine
        return curve(1.0, self.min_lr / self.lr)((progress - self.warmup) / max(1e-12, 1 - self.warmup))

    def build(self, named: Named, samples_per_step: int) -> torch.optim.Optimizer:
        """The optimizer over the parameters that require a gradient; `update` sets its rates before every step."""
        groups = list(self._groups(named))
        if not groups:
            raise UserError("nothing to train: no parameter requires a gradient; check method.train and frozen parts")
        lr, betas = self.peak_lr(samples_per_step), (float(self.betas[0]), float(self.betas[1]))
        for group in groups:
            group["peak_lr"] = group["lr"] = lr * group.pop("lr_scale")
        if self.name == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=self.eps, fused=True)
            # Else a loss scaler leaves unscaling to the fused step, and Lightning refuses to clip before it.
            optimizer._step_supports_amp_scaling = False
            return optimizer
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=betas[0])
        if self.name in ("lars", "larc"):
            clips = self.name == "larc"
            return timm.optim.Lars(groups, lr, betas[0], trust_coeff=0.02 if clips else 0.001, trust_clip=clips)
        return timm.optim.Muon(
            groups, lr=lr, momentum=betas[0], betas=betas, eps=self.eps, adjust_lr_fn="match_rms_adamw"
        )

    def update(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Set learning rate and weight decay of every group for a step at `progress`."""
        factor, decay = self.lr_factor(progress), self._weight_decay(progress)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            if group["decays"]:
                group["weight_decay"] = decay

    def _groups(self, named: Named) -> Iterator[dict[str, Any]]:
        """Parameters by (decays?, layer, Muon or not), in a fixed order."""
        named = list(named)
        depths = _depths(name for name, _ in named)  # of those too that are frozen
        named = [(name, p) for name, p in named if p.requires_grad]
        groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, p in named:
            decays = self.decay == "all" or (p.ndim > 1 and not name.endswith(_BIASES))
            scale = 1.0 if self.layer_decay is None else self.layer_decay ** _below(name, depths)
            scale *= self.patch_lr if "patch_embed" in name.split(".") else 1.0
            hidden = self.name == "muon" and p.ndim == 2 and ".blocks." in f".{name}" and name.endswith(_PRODUCTS)
            groups.setdefault((decays, scale, hidden), []).append(p)
        for (decays, scale, hidden), params in groups.items():
            weight_decay = self._weight_decay(0.0) if decays else 0.0
            group = {"params": params, "lr_scale": scale, "decays": decays, "weight_decay": weight_decay}
            if self.name == "muon":
                group["use_fallback"] = not hidden
            if self.name in ("lars", "larc"):  # timm would take a decay of 0 for a sign not to adapt
                group["always_adapt"] = decays
            yield group


def _depths(names: Iterable[str]) -> dict[str, int]:
    """Layers from the first block to the end, by the path of what holds the blocks, e.g. `{"image": 12, "text": 3}`.

    Stages (`stages.0`, `layers.0` of ConvNeXt, Swin) follow one another: the depth of one is that of the next more.
    """
    depths: dict[str, int] = {}
    for name in names:
        path, block = _block(name)
        if block >= 0:
            depths[path] = max(depths.get(path, 0), block + 1)
    for path in reversed(list(depths)):
        kind, _, stage = path.rpartition(".")
        if kind.rpartition(".")[2] in ("stages", "layers") and stage.isdigit():
            depths[path] += depths.get(f"{kind}.{int(stage) + 1}", 0)
    return depths


def _block(name: str) -> tuple[str, int]:
    """Path of the stack in a parameter's name and index of the block, -1 outside of blocks."""
    parts = name.split(".")
    at = parts.index("blocks") if "blocks" in parts else -1
    return (".".join(parts[:at]), int(parts[at + 1])) if at >= 0 else ("", -1)


def _below(name: str, depths: dict[str, int]) -> int:
    """Layers between a parameter and the end of its stack: depth + 1 for the stem, 0 for what follows the blocks."""
    parts, (path, block) = name.split("."), _block(name)
    if "transducer" in parts:  # its prediction network reads tokens, not what the encoder reads
        return 0
    if block >= 0:
        return depths[path] - block
    if "downsample" in parts:  # before the first block of its stage
        return depths.get(".".join(parts[: parts.index("downsample")]), 0)
    # wav2vec 2.0 projects its features directly under the encoder; other parts have a proj of their own.
    stem = "proj" in parts and parts[: parts.index("proj")][-1:] in ([], ["encoder"], ["backbone"])
    # DINOv2's mask token is put among the patches; those of decoders and predictors have a dot before them.
    stem = stem or name == "mask_token" or not _STEM.isdisjoint(parts)
    return 1 + _depth_above(parts, depths) if stem else 0


def _depth_above(parts: list[str], depths: dict[str, int]) -> int:
    """Blocks above a stem: of the stack that holds it, or of the deepest one beside it (T5's embedding has two)."""
    for end in range(len(parts) - 1, -1, -1):
        holder = "".join(f"{part}." for part in parts[:end])
        if beside := [depth for path, depth in depths.items() if f"{path}.".startswith(holder)]:
            return depths.get(holder[:-1], max(beside))
    return 0


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradient of every tensor whose own norm is above `max_norm` down to it, as DINO clips."""
    whole = [p.grad for p in parameters if p.grad is not None]
    grads = [local(grad) for grad in whole]
    if grads:
        norms = torch.stack(torch._foreach_norm(grads))
        if grads[0] is not whole[0]:  # of a part of each
            norms = all_reduce_sum(norms.square()).sqrt()
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))
