"""Other libraries on the same work: their published classes, built at the size of our method, on the same batch."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.bench.step import TrainStep
from ssl_lab.errors import UserError
from ssl_lab.methods.base import Method
from ssl_lab.methods.mae import MAE
from ssl_lab.methods.supervised import Supervised
from ssl_lab.nn.block import Transformer
from ssl_lab.types import Batch


@dataclass(frozen=True)
class Variant:
    """How a peer runs. As shipped: the library's own attention, AdamW as its recipes call it, no compilation.

    Args:
        label: shown behind the peer's name.
        matmul: attention written out as matrix products instead of torch's SDPA.
        fused: AdamW(fused=True).
        compiled: torch.compile on the whole model.
    """

    label: str
    matmul: bool = False
    fused: bool = False
    compiled: bool = False


SHIPPED = Variant("as shipped")
STRENGTHENED = (
    Variant("fused AdamW", fused=True),
    Variant("matmul attention, fused AdamW", matmul=True, fused=True),
    Variant("compiled, fused AdamW", fused=True, compiled=True),
    Variant("compiled, matmul attention, fused AdamW", matmul=True, fused=True, compiled=True),
)


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and hidden width of a stack of pre-norm blocks."""

    dim: int
    depth: int
    num_heads: int
    hidden: int


@dataclass(frozen=True)
class Images:
    """What the encoder reads."""

    image_size: int
    patch_size: int
    in_chans: int


Loss = Callable[[], Tensor]
Peer = Callable[[Any, Batch, Variant], tuple[nn.Module, Loss]]


def size_of(stack: Transformer) -> Size:
    """Read off the objects themselves, so that both sides do the same work.

    Raises:
        UserError: the blocks are not the plain attention and MLP that every peer has.
    """
    try:
        attention, mlp = stack.blocks[0]["attn"].fn, stack.blocks[0]["mlp"].fn  # type: ignore[index]
        plain = isinstance(attention.q_norm, nn.Identity) and attention.num_kv_heads == attention.num_heads
        size = Size(attention.proj.out_features, len(stack.blocks), attention.num_heads, mlp.fc1.out_features)
    except (KeyError, AttributeError):
        plain = False
    if not plain:
        raise UserError("against= needs a plain ViT, blocks of attention and MLP without qk_norm; leave against= out")
    return size


def encoder_of(method: Method) -> tuple[Images, Size]:
    """The encoder as the peers need to know it; `UserError` when they have nothing like it."""
    encoder = getattr(method, "encoder", None)
    if not isinstance(encoder, ViT) or encoder.cls_token is None or encoder.registers is not None:
        raise UserError("against= needs a ViT with a class token and no registers; leave against= out")
    embed = encoder.patch_embed
    return Images(encoder.grid[0] * embed.patch_size, embed.patch_size, embed.proj.in_channels), size_of(encoder)


def _transformers(config_class: type, images: Images, size: Size, variant: Variant, **more: Any) -> Any:
    return config_class(
        image_size=images.image_size,
        patch_size=images.patch_size,
        num_channels=images.in_chans,
        hidden_size=size.dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=size.hidden,
        attn_implementation="eager" if variant.matmul else "sdpa",
        **more,
    )


def _timm_vit(images: Images, size: Size, variant: Variant, num_classes: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return _written_out(
        VisionTransformer(
            img_size=images.image_size,
            patch_size=images.patch_size,
            in_chans=images.in_chans,
            embed_dim=size.dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=size.hidden / size.dim,
            num_classes=num_classes,
        ),
        variant,
    )


def _written_out(model: nn.Module, variant: Variant) -> nn.Module:
    """Attention modules of timm keep the choice as a flag of their own."""
    for module in model.modules():
        if variant.matmul and hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    return model


def mae_transformers(method: MAE, batch: Batch, variant: Variant) -> tuple[nn.Module, Loss]:
    """ViTMAEForPreTraining; its loss covers the hidden patches, its decoder's head all of them."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images, size = encoder_of(method)
    decoder = size_of(method.decoder)
    config = _transformers(
        ViTMAEConfig, images, size, variant,
        decoder_hidden_size=decoder.dim,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=decoder.hidden,
        mask_ratio=method.mask_ratio,
        norm_pix_loss=method.norm_pix,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    return model, lambda: model(pixel_values=batch["image"]).loss


class LightlyMAE(nn.Module):
    """lightly's parts put together in the order of its documentation: mask, encode, refill, decode, predict, MSE."""

    def __init__(self, method: MAE, variant: Variant) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        images, size = encoder_of(method)
        decoder = size_of(method.decoder)
        self.encoder = MaskedVisionTransformerTIMM(vit=_timm_vit(images, size, variant, num_classes=0))
        self.embed = nn.Linear(size.dim, decoder.dim)
        self.decoder = _written_out(
            MaskedVisionTransformerDecoderTIMM(
                num_patches=self.encoder.sequence_length - 1,
                embed_dim=decoder.dim,
                depth=decoder.depth,
                num_heads=decoder.num_heads,
                mlp_ratio=decoder.hidden / decoder.dim,
            ),
            variant,
        )
        self.head = nn.Linear(decoder.dim, images.in_chans * images.patch_size**2)
        self.patch_size, self.mask_ratio, self.norm_pix = images.patch_size, method.mask_ratio, method.norm_pix

    def forward(self, image: Tensor) -> Tensor:
        from lightly.models import utils

        length = self.encoder.sequence_length
        kept, hidden = utils.random_token_mask((len(image), length), self.mask_ratio, device=image.device)
        visible = self.embed(self.encoder.encode(images=image, idx_keep=kept))
        tokens = utils.set_at_index(visible.new_zeros(len(image), length, visible.shape[-1]), kept, visible)
        decoded = utils.get_at_index(self.decoder(tokens, idx_mask=hidden), hidden)
        target = utils.get_at_index(utils.patchify(image, self.patch_size), hidden - 1)
        if self.norm_pix:
            target = F.layer_norm(target, target.shape[-1:])
        return F.mse_loss(self.head(decoded), target)


def mae_lightly(method: MAE, batch: Batch, variant: Variant) -> tuple[nn.Module, Loss]:
    """The masked ViT and decoder modules of lightly."""
    model = LightlyMAE(method, variant)
    return model, lambda: model(batch["image"])


def supervised_timm(method: Supervised, batch: Batch, variant: Variant) -> tuple[nn.Module, Loss]:
    """VisionTransformer with its head."""
    images, size = encoder_of(method)
    model = _timm_vit(images, size, variant, num_classes=method.head.out_features)
    return model, partial(_classify, method, batch, model)


def supervised_transformers(method: Supervised, batch: Batch, variant: Variant) -> tuple[nn.Module, Loss]:
    """ViTForImageClassification."""
    from transformers import ViTConfig, ViTForImageClassification

    images, size = encoder_of(method)
    config = _transformers(ViTConfig, images, size, variant, num_labels=method.head.out_features)
    model = ViTForImageClassification(config)
    return model, partial(_classify, method, batch, lambda x: model(pixel_values=x).logits)


def _classify(method: Supervised, batch: Batch, network: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of our own step, with its mixup and smoothing, over another network's logits."""
    return method.score(batch, network).loss


PEERS: dict[str, dict[type[Method], Peer]] = {
    "transformers": {MAE: mae_transformers, Supervised: supervised_transformers},
    "timm": {Supervised: supervised_timm},
    "lightly": {MAE: mae_lightly},
}


def missing(name: str, method: Method) -> str | None:
    """Why the peer cannot be timed here, in one line; None when it can.

    Raises:
        UserError: no peer has that name.
    """
    if name not in PEERS:
        raise UserError(f"against={name}: there is no such peer; there are {', '.join(PEERS)}")
    if type(method) not in PEERS[name]:
        return f"{name} has nothing that does the work of {type(method).__name__}"
    if importlib.util.find_spec(name) is None:
        return f"{name} is not installed: pip install 'ssl-lab[peers]'"
    return None


def peer_step(
    name: str, method: Method, batch: Batch, variant: Variant, *, device: torch.device, precision: str | int
) -> TrainStep:
    """A training step of a peer at the size of `method` on the same batch, with AdamW."""
    model, loss = PEERS[name][type(method)](method, batch, variant)
    if variant.compiled:
        model.compile()

    def optimizer() -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        more = {"fused": True} if variant.fused else {}
        b1, b2 = method.optim.betas
        return torch.optim.AdamW(parameters, lr=method.optim.lr, betas=(b1, b2), **more)

    return TrainStep(model, loss, optimizer, device=device, precision=precision)
