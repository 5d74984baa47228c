"""BEST-RQ (Chiu et al., 2022, arXiv:2202.01855): tell the codes that a random quantiser gives to hidden sound."""

import torch
from torch import Tensor

from ssl_lab import dist
from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.hear import hear
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.quantize import RandomQuantizer, code_usage
from ssl_lab.nn.spec_augment import span_mask
from ssl_lab.types import Batch, Step


class BestRQ(Method):
    """Spans of the features become noise, and the encoder tells the codes of what was there: cross-entropy.

    A code belongs to as many frames as the subsampling makes one token of, from the middle of those that the token
    sees (`RandomQuantizer`). A token counts if all of its code's frames are hidden.

    Args:
        encoder: a Conformer; its front end gives features to quantise and to hide.
        num_codes: entries of a codebook; 8192 in the paper.
        code_dim: their dimension.
        codebooks: each told by outputs of its own; the loss is their mean (USM, arXiv:2303.01037, has 16).
        mask_p: probability that a span begins at a frame.
        mask_length: frames of a span; 400 ms in the paper.
        noise: standard deviation of what stands in a hidden frame.

    Raises:
        UserError: fewer than two codes, or another encoder than a Conformer.
    """

    def __init__(
        self,
        encoder: Conformer,
        *,
        num_codes: int = 8192,
        code_dim: int = 16,
        codebooks: int = 1,
        mask_p: float = 0.01,
        mask_length: int = 40,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        if num_codes < 2:
            raise UserError(f"num_codes={num_codes} leaves nothing to tell: take at least 2")
        heard, given = getattr(encoder, "embed", None), getattr(encoder, "front", None)
        if not (hasattr(heard, "receptive") and hasattr(given, "num_mels")):
            raise UserError(
                f"best_rq needs a Conformer, not a {type(encoder).__name__}: choose backbone=conformer_small"
            )
        self.encoder, self.head = encoder, Linear(encoder.dim, codebooks * num_codes)
        self.mask_p, self.mask_length, self.noise = mask_p, mask_length, noise
        stem = encoder.embed
        self.quantizer = RandomQuantizer(
            encoder.front.num_mels, codebooks=codebooks, entries=num_codes, dim=code_dim, stack=stem.stride,
            stride=stem.stride, receptive=stem.receptive,
        )  # fmt: skip

    def step(self, batch: Batch, progress: float) -> Step:
        features, valid = self.features(batch)
        hidden = span_mask(valid, self.mask_p, self.mask_length)
        return self.predict(features, valid, hidden, self.noise * torch.randn_like(features))

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T, F) and the valid frames (B, T) bool.

        Raises:
            UserError: there is no sound in the batch.
        """
        if "audio" not in batch:
            raise UserError("this method hears, and the data are no sound: choose e.g. data=tones, data=audio")
        features, valid = self.encoder.front(batch["audio"], batch.get("audio_valid"))
        return features, valid

    def predict(self, features: Tensor, valid: Tensor, hidden: Tensor, noise: Tensor) -> Step:
        """Loss over the hidden tokens of all ranks, of one micro-batch.

        Args:
            features: (B, T, F).
            valid: (B, T) bool.
            hidden: (B, T) bool.
            noise: (B, T, F), what stands in hidden frames.
        """
        encoded = self.encoder(features.where(~hidden[..., None], noise), valid=valid)
        scored = self.quantizer.stacked(hidden).all(-1)
        scored = scored if encoded.valid is None else scored & encoded.valid
        codes = self.quantizer(features, valid, scored)
        wanted = codes.flatten()
        logits = self.head(encoded.tokens[scored]).view(len(wanted), self.quantizer.entries)
        total = dist.all_reduce_mean(features.new_tensor(float(len(wanted))))
        loss = nll(logits, wanted).sum() / total.where(total > 0, 1.0)  # very short clips may have no whole code hidden
        found = (logits.detach().argmax(-1) == wanted).sum() / max(1, len(wanted))
        used, effective = code_usage(codes, self.quantizer.entries)
        logs: dict[str, Tensor | float] = {
            "masked_top1": found,
            "masked": scored.float().mean(),
            "codes": used * self.quantizer.entries,  # in use in this batch
            "code_perplexity": effective,  # 1: collapsed
        }
        return Step(loss, logs)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of the encoder's valid tokens."""
        return hear(self.encoder, batch).pooled("mean")
