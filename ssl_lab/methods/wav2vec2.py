"""wav2vec 2.0 (Baevski et al., 2020, arXiv:2006.11477): find the true code of hidden sound among others."""

import torch
from torch import Tensor, nn

from ssl_lab.backbones.hear import hear
from ssl_lab.backbones.wav2vec2 import Wav2Vec2 as Encoder
from ssl_lab.errors import UserError
from ssl_lab.losses.speech import contrastive, diversity, mean_over_frames, perplexity, sample_negatives
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.quantize import GumbelQuantizer
from ssl_lab.nn.spec_augment import span_mask
from ssl_lab.types import Batch, Step


class Wav2Vec2(Method):
    """Spans of the features become a learned token; what the network makes of it is compared with quantised features.

    The loss is the mean over hidden frames of all ranks of the contrastive loss (equation 3), plus `diversity` times
    the share of codes that is not in use, plus `penalty` times the mean square of the features (fairseq's recipe).

    Args:
        encoder: on waveforms.
        codes: the quantiser's groups and entries in each; (2, 320) in the paper.
        code_dim: width of a joined code.
        dim: width in which predictions and codes are compared.
        mask_p: probability that a span begins at a frame.
        mask_length: frames of a span.
        negatives: other hidden frames of the utterance, for each hidden frame.
        temperature: of the cosines.
        gumbel: temperature of the choice of codes at the beginning and at the end of training, geometric in between;
            that of the paper is at its end after two thirds.
        loss_weights: of diversity and penalty.
        feature_grad: factor on the gradient of the convolutions, which else learn too fast.

    Raises:
        UserError: fewer than two codes, nothing to compare with, or another encoder than a wav2vec 2.0.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        codes: tuple[int, int] = (2, 320),
        code_dim: int = 256,
        dim: int = 256,
        mask_p: float = 0.065,
        mask_length: int = 10,
        negatives: int = 100,
        temperature: float = 0.1,
        gumbel: tuple[float, float] = (2.0, 0.5),
        loss_weights: tuple[float, float] = (0.1, 10.0),
        feature_grad: float = 0.1,
    ) -> None:
        super().__init__()
        groups, entries = codes
        if groups < 1 or entries < 2 or negatives < 1:
            raise UserError(f"codes={list(codes)}, negatives={negatives}: there is nothing to tell apart")
        if not (hasattr(encoder, "contextualise") and hasattr(encoder.front, "channels")):
            raise UserError(
                f"wav2vec2 needs a wav2vec 2.0, not a {type(encoder).__name__}: choose backbone=wav2vec2_small"
            )
        self.encoder, self.mask_p, self.mask_length = encoder, mask_p, mask_length
        self.negatives, self.temperature, self.gumbel = negatives, temperature, tuple(gumbel)
        self.loss_weights, self.feature_grad = tuple(loss_weights), feature_grad
        self.mask_token = nn.Parameter(torch.rand(encoder.dim))
        self.quantizer = GumbelQuantizer(encoder.front.channels, groups=groups, entries=entries, width=code_dim)
        self.predict_code, self.project_code = Linear(encoder.dim, dim), Linear(code_dim, dim)

    def step(self, batch: Batch, progress: float) -> Step:
        if "audio" not in batch:
            raise UserError("this method hears, and the data are no sound: choose e.g. data=tones, data=audio")
        features, valid = self.encoder.front(batch["audio"], batch.get("audio_valid"))
        hidden = span_mask(valid, self.mask_p, self.mask_length)
        negatives = sample_negatives(hidden.nonzero()[:, 0], self.negatives)
        return self.predict(features, valid, hidden, negatives, progress)

    def predict(
        self,
        features: Tensor,
        valid: Tensor,
        hidden: Tensor,
        negatives: Tensor,
        progress: float = 0.0,
        noise: Tensor | None = None,
    ) -> Step:
        """Loss over the hidden frames of all ranks, M of them here, in the order of `hidden.nonzero()`.

        Args:
            features: (B, T, C) of the encoder's front.
            valid: (B, T) bool.
            hidden: (B, T) bool, valid ones.
            negatives: (M, K) int64 among the M frames.
            progress: through training, for the temperature of the choice.
            noise: (M, G, V) of the choice, see `GumbelQuantizer`.
        """
        if features.requires_grad:
            features.register_hook(lambda grad: grad * self.feature_grad)
        exact = features.to(torch.promote_types(features.dtype, torch.float32))
        penalty = mean_over_frames(exact.square().mean(-1)[valid])
        features = self.encoder.feature_norm(features)
        encoded = self.encoder.contextualise(features, valid, masked=(hidden, self.mask_token))
        start, end = self.gumbel
        warmth = start * (end / start) ** progress
        joined, codes, chosen = self.quantizer(features[hidden], temperature=warmth, noise=noise)
        predicted, targets = self.predict_code(encoded.tokens[hidden]), self.project_code(joined)
        nll, found = contrastive(predicted, targets, codes, negatives, temperature=self.temperature)
        own, others = mean_over_frames(nll), diversity(chosen)
        loss = own + self.loss_weights[0] * others + self.loss_weights[1] * penalty
        logs: dict[str, Tensor | float] = {
            "contrastive": own.detach(),
            "diversity": others.detach(),
            "penalty": penalty.detach(),
            "masked_top1": found.float().sum() / max(1, len(found)),
            "masked": hidden.sum() / valid.sum().clamp(min=1),
            "code_perplexity": perplexity(chosen.detach()).mean(),  # 1: collapsed
            "gumbel": warmth,
        }
        return Step(loss, logs)

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of the encoder's valid tokens."""
        return hear(self.encoder, batch).pooled("mean")
