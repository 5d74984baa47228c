"""BEST-RQ (Chiu et al., 2022, arXiv:2202.01855): tell the codes that a random quantiser gives to hidden sound."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lab import dist
from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.hear import hear
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.norm import l2_normalize
from ssl_lab.nn.spec_augment import span_mask
from ssl_lab.types import Batch, Step


class BestRQ(Method):
    """Spans of the features become noise, and the encoder tells the codes of what was there: cross-entropy.

    A code belongs to as many frames as the subsampling makes one token of, from the middle of those that the token
    sees. A token counts if all of its code's frames are hidden. Features should be normalised by utterance, else few
    codes are in use.

    Args:
        encoder: a Conformer; its front end gives features to quantise and to hide.
        num_codes: vectors of the codebook; 8192 in the paper.
        code_dim: their dimension.
        mask_p: probability that a span begins at a frame.
        mask_length: frames of a span; 400 ms in the paper.
        noise: standard deviation of what stands in a hidden frame.

    Raises:
        UserError: fewer than two codes.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(
        self,
        encoder: Conformer,
        *,
        num_codes: int = 8192,
        code_dim: int = 16,
        mask_p: float = 0.01,
        mask_length: int = 40,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        if num_codes < 2:
            raise UserError(f"num_codes={num_codes} leaves nothing to tell: take at least 2")
        self.encoder, self.head = encoder, Linear(encoder.dim, num_codes)
        self.mask_p, self.mask_length, self.noise = mask_p, mask_length, noise
        self.stride = encoder.embed.stride
        self.first = (encoder.embed.receptive - self.stride) // 2  # frame of token 0 that its code begins with
        projection = torch.empty(self.stride * encoder.front.num_mels, code_dim)
        self.register_buffer("projection", nn.init.xavier_uniform_(projection))
        self.register_buffer("codebook", l2_normalize(torch.randn(num_codes, code_dim)))

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
        """Loss over the hidden tokens of all ranks.

        Args:
            features: (B, T, F).
            valid: (B, T) bool.
            hidden: (B, T) bool.
            noise: (B, T, F), what stands in hidden frames.
        """
        encoded = self.encoder(features.where(~hidden[..., None], noise), valid=valid)
        count = encoded.tokens.shape[1]
        codes, scored = self.codes(features, count), self._grouped(hidden, count).all(-1)
        scored = scored if encoded.valid is None else scored & encoded.valid
        logits, wanted = self.head(encoded.tokens[scored]), codes[scored]
        total = dist.all_reduce_mean(scored.sum().to(features.dtype))
        loss = nll(logits, wanted).sum() / total.where(total > 0, 1.0)  # very short clips may have no whole code hidden
        found = logits.detach().argmax(-1) == wanted
        share = torch.bincount(wanted, minlength=len(self.codebook)) / max(1, len(wanted))
        logs: dict[str, Tensor | float] = {
            "masked_top1": found.float().sum() / max(1, len(wanted)),
            "masked": scored.float().mean(),
            "codes": (share > 0).sum().float(),  # in use in this batch
            "code_perplexity": torch.special.entr(share).sum().exp(),  # 1: collapsed
        }
        return Step(loss, logs)

    @torch.no_grad()
    def codes(self, features: Tensor, count: int) -> Tensor:
        """(B, count) int64: the nearest code of each token's frames, features (B, T, F) (equation 1)."""
        with torch.autocast(features.device.type, enabled=False):
            projected = self._grouped(features, count).flatten(2) @ self.projection.to(features.dtype)
            # vectors of length 1: the nearest is the one with the largest product, whatever the length of `projected`
            return (projected @ self.codebook.to(features.dtype).T).argmax(-1)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of the encoder's valid tokens."""
        return hear(self.encoder, batch).pooled("mean")

    def _grouped(self, frames: Tensor, count: int) -> Tensor:
        """(B, T, ...) -> (B, count, stride, ...): the frames of each token's code."""
        need = self.first + count * self.stride
        frames = frames[:, self.first : need]
        if (short := need - self.first - frames.shape[1]) > 0:  # only where there is a token that is not valid
            frames = F.pad(frames, (*(0, 0) * (frames.dim() - 2), 0, short))
        return frames.unflatten(1, (count, self.stride))
