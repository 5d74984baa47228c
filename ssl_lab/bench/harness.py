"""Our steps for an outside timing harness: `make(family, cfg, inputs)` gives one step as a call, or None.

A harness that times several libraries side by side makes the batch and names the sizes; we build the same network and
do the whole step on it: every term of the loss, fused AdamW, autocast in bf16.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.vit import ViT
from ssl_lab.bench.step import MethodStep, TrainStep, dtypes
from ssl_lab.generation.generate import generate
from ssl_lab.losses.lm import IGNORE
from ssl_lab.methods.base import Method
from ssl_lab.methods.causal_lm import CausalLM
from ssl_lab.methods.clip import CLIP
from ssl_lab.methods.dino import DINO
from ssl_lab.methods.mae import MAE
from ssl_lab.methods.mae import Decoder as PixelDecoder
from ssl_lab.methods.moco_v3 import MoCoV3
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.conv import ConvModule
from ssl_lab.nn.heads import DINOHead
from ssl_lab.nn.positions import Rotary
from ssl_lab.nn.recipes import conformer_block, llama_block, rms_norm
from ssl_lab.train.optim import Optim
from ssl_lab.types import Batch, Step
from ssl_lab.weights.pair_facts import towers as pair_towers


def make(
    family: str, cfg: Mapping[str, Any], inputs: Mapping[str, Any]
) -> "TrainStep | InferStep | GenerateStep | None":
    """One step of a family as a call that gives its loss; None where there is none of ours.

    Args:
        family: mae, dino, moco, vit, vit_infer, clip, conformer (relative positions; those of `make_rotary` rotate,
            `make_unplaced` has none), llama or llama_gen (a text, greedily); moco is MoCo v3, without the frozen patch
            projection, which other libraries train.
        cfg: `img`, `patch`, `dim`, `depth`, `heads`, `device`, `precision` (fp32 | bf16), `lr`; for mae `dec_dim`,
            `dec_depth`, `dec_heads`, `mask`; for dino `hidden`, `bottleneck`, `protos`, `n_global`; for moco `hidden`,
            `out`, `T`; for vit and vit_infer `classes`; for clip `tdim`, `tdepth`, `theads`, `ctx`, `vocab`, `emb`.
            In the place of the image sizes: for conformer `ffn` and `kernel`, for llama `ffn`, `vocab` and `seq`, for
            llama_gen `prompt` and `new` tokens instead of `seq`.
        inputs: `images` (B, 3, H, W) float32, and `labels` (B,) int64 for vit; for dino lists `global` and `local` of
            views, for moco a list `views`, for conformer `x` (B, T, D) as a subsampling gives it, for llama and
            llama_gen `ids` (B, L) int64, for clip `text` (B, L) int64 with the end token last.
    """
    if family not in ("mae", "dino", "moco", "vit", "vit_infer", "clip", "conformer", "llama", "llama_gen"):
        return None
    if family == "conformer":
        return _conformer(cfg, inputs["x"], "relative")
    if family == "llama_gen":
        return GenerateStep(llama(cfg, cfg["prompt"] + cfg["new"]), cfg, inputs["ids"])
    device, precision = torch.device(cfg["device"]), "bf16-mixed" if cfg["precision"] == "bf16" else "32-true"
    if family == "llama":
        ids = inputs["ids"]
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)
        language = CausalLM(llama(cfg, cfg["seq"]))
        language.optim = Optim(lr=cfg["lr"], weight_decay=0.05)
        return MethodStep(language, Batch(tokens=ids, labels=labels), device=device, precision=precision)
    if family == "clip":
        pair = clip(cfg)
        pair.optim = Optim(lr=cfg["lr"], weight_decay=0.05)
        batch = Batch(image=inputs["images"], tokens=inputs["text"])
        return MethodStep(pair, batch, device=device, precision=precision)
    encoder = ViT(
        cfg["dim"],
        cfg["depth"],
        cfg["heads"],
        image_size=cfg["img"],
        patch_size=cfg["patch"],
        positions="sincos" if family in ("mae", "moco") else "learned",
    )
    if family == "vit_infer":
        batch = Batch(image=inputs["images"])
        return InferStep(Supervised(encoder, cfg["classes"]), batch, device=device, precision=precision)
    method, batch = _method(family, encoder, cfg, inputs)
    method.optim = Optim(lr=cfg["lr"], weight_decay=0.05)
    return MethodStep(method, batch, device=device, precision=precision)


def make_rotary(family: str, cfg: Mapping[str, Any], inputs: Mapping[str, Any]) -> TrainStep | None:
    """As `make`, a Conformer with rotated queries and keys; None for any other family."""
    return _conformer(cfg, inputs["x"], "rope") if family == "conformer" else None


def make_unplaced(family: str, cfg: Mapping[str, Any], inputs: Mapping[str, Any]) -> TrainStep | None:
    """As `make`, a Conformer whose attention knows no positions; None for any other family."""
    return _conformer(cfg, inputs["x"], "none") if family == "conformer" else None


def clip(cfg: Mapping[str, Any]) -> CLIP:
    """CLIP of the sizes in `cfg`, with exact GELU as in open_clip."""
    towers = {
        "image": {"image_size": cfg["img"], "patch_size": cfg["patch"]},
        "text": {"vocab_size": cfg["vocab"], "max_length": cfg["ctx"]},
    }
    widths = {"image": (cfg["dim"], cfg["depth"], cfg["heads"]), "text": (cfg["tdim"], cfg["tdepth"], cfg["theads"])}
    for name, (dim, depth, heads) in widths.items():
        recipe = {"num_heads": heads, "hidden": 4 * dim, "act": "gelu", "eps": 1e-5}
        towers[name] |= {"dim": dim, "depth": depth, **recipe}
    pair = pair_towers({"family": "clip", "embed_dim": cfg["emb"], **towers})
    return CLIP(pair["image"], pair["text"])


def llama(cfg: Mapping[str, Any], max_length: int) -> Decoder:
    """The LLaMA-like decoder of the sizes in `cfg`, with an output layer of its own."""
    return Decoder(
        cfg["vocab"],
        cfg["dim"],
        cfg["depth"],
        cfg["heads"],
        max_length=max_length,
        positions=Rotary,
        tied=False,
        block=partial(llama_block, hidden=cfg["ffn"]),
        norm=rms_norm,
    )


def _conformer(cfg: Mapping[str, Any], x: Tensor, positions: Literal["relative", "rope", "none"]) -> TrainStep:
    conv = partial(ConvModule, kernel_size=cfg["kernel"])
    block = partial(conformer_block, mlp_ratio=cfg["ffn"] / cfg["dim"], conv=conv)
    encoder = Conformer(cfg["dim"], cfg["depth"], cfg["heads"], positions=positions, block=block)
    encoder.embed = torch.nn.Identity()  # type: ignore[assignment]
    method = _MeanSquare(encoder)
    method.optim = Optim(lr=cfg["lr"], weight_decay=0.05)
    precision = "bf16-mixed" if cfg["precision"] == "bf16" else "32-true"
    return MethodStep(method, Batch(image=x), device=torch.device(cfg["device"]), precision=precision)


class _MeanSquare(Method):
    """Blocks alone, whose mean square output is the loss, as other libraries' encoders are timed."""

    def __init__(self, encoder: Conformer) -> None:
        super().__init__()
        self.encoder = encoder

    def step(self, batch: Batch, progress: float) -> Step:
        x = batch["image"]
        found = self.encoder.contextualise(x, x.new_ones(x.shape[:2], dtype=torch.bool))
        return Step(found.tokens.float().square().mean())


def _method(family: str, encoder: ViT, cfg: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Method, Batch]:
    if family == "dino":
        sizes = {"prototypes": cfg["protos"], "hidden": cfg["hidden"], "bottleneck": cfg["bottleneck"]}
        dino = DINO(encoder, head=partial(DINOHead, **sizes), global_views=cfg["n_global"])
        return dino, Batch(views=[*inputs["global"], *inputs["local"]])
    if family == "moco":
        sizes = {"hidden": cfg["hidden"], "projection": cfg["out"]}
        moco = MoCoV3(encoder, temperature=cfg["T"], freeze_patch_embed=False, **sizes)
        return moco, Batch(views=inputs["views"])
    if family == "mae":
        decoder = partial(PixelDecoder, dim=cfg["dec_dim"], depth=cfg["dec_depth"], num_heads=cfg["dec_heads"])
        return MAE(encoder, decoder=decoder, mask_ratio=cfg["mask"]), Batch(image=inputs["images"])
    return Supervised(encoder, cfg["classes"]), Batch(image=inputs["images"], target=inputs["labels"])


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


class GenerateStep:
    """So many tokens after the prompts, greedily; gives 0. In bf16 the weights are, as in other libraries."""

    def __init__(self, decoder: Decoder, cfg: Mapping[str, Any], prompts: Tensor) -> None:
        dtype = torch.bfloat16 if cfg["precision"] == "bf16" else torch.float32
        self.decoder, self.prompts, self.new = decoder.to(cfg["device"], dtype).eval(), prompts, cfg["new"]
        self.params = sum(p.numel() for p in decoder.parameters())

    def __call__(self) -> Tensor:
        out = generate(self.decoder, self.prompts, max_new_tokens=self.new)
        assert out.shape[1] == self.new
        return torch.zeros(())
