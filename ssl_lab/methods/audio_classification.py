"""Classification of clips by any encoder of sound, from scratch or from pre-trained weights (AST, arXiv:2104.01778)."""

from torch import Tensor, nn

from ssl_lab.backbones.hear import SpeechEncoder, hear
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import IGNORE, mean_over_known, nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.dropout import dropout
from ssl_lab.nn.linear import Linear
from ssl_lab.types import Batch, Encoded, Pooling, Step


class AudioClassification(Method):
    """Encoder, pooling, dropout, linear map to classes, cross-entropy over the clips of all ranks that have a class.

    Args:
        encoder: of sound.
        num_classes: classes.
        pooling: what the head sees; None = the class token where there is one, else the mean of the valid tokens.
        augment: of features in training, such as `SpecAugment`; None = none.
        dropout: before the head.
        label_smoothing: share of the target spread over all classes.
        freeze_encoder: train the head alone; the encoder then runs as for evaluation, without dropout.

    Raises:
        UserError: there are no classes.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        num_classes: int,
        *,
        pooling: Pooling | None = None,
        augment: nn.Module | None = None,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError("there are no classes to learn: the data have no labels; use class sub-folders or labels")
        self.encoder, self.pooling, self.augment = encoder, pooling, augment
        self.dropout, self.label_smoothing = dropout, label_smoothing
        self.head = Linear(encoder.dim, num_classes)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder and isinstance(encoder, nn.Module):
            encoder.requires_grad_(False)

    def step(self, batch: Batch, progress: float) -> Step:
        if self.freeze_encoder and isinstance(self.encoder, nn.Module):
            self.encoder.eval()  # `train` reaches it too: nothing is dropped, and running statistics stay
        logits, target = self._scores(hear(self.encoder, batch, self.augment)), batch["target"]
        known = target >= 0
        labels = target.where(known, IGNORE)  # clips without a class are left out
        loss = mean_over_known(nll(logits, labels, label_smoothing=self.label_smoothing), labels)
        return Step(loss, {"top1": (logits.argmax(-1) == target).sum() / known.sum().clamp(min=1)})

    def classify(self, batch: Batch) -> Tensor:
        """(B, num_classes) logits."""
        return self._scores(hear(self.encoder, batch))

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) pooled output of the encoder."""
        return hear(self.encoder, batch).pooled(self.pooling)

    def _scores(self, encoded: Encoded) -> Tensor:
        return self.head(dropout(encoded.pooled(self.pooling), self.dropout, self.training))
