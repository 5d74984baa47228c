"""Classification of texts or pairs of texts, from scratch or from pre-trained weights (BERT, arXiv:1810.04805)."""

from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.read import text_features
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import IGNORE, mean_over_known, nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.heads import PoolerHead
from ssl_lab.types import Batch, Pooling, Step


class TextClassification(Method):
    """Network, pooling, BERT's classifier (a tanh layer, dropout, classes), cross-entropy.

    Args:
        encoder: a text encoder, or a decoder.
        num_classes: classes.
        pooling: what the head sees; None = the class token of an encoder, the last valid token of a decoder.
        dropout: before the last layer.
        label_smoothing: share of the target spread over all classes.
        freeze_encoder: train the head alone; the encoder then runs as for evaluation, without dropout.

    Raises:
        UserError: there are no classes.
    """

    def __init__(
        self,
        encoder: TextEncoder | Decoder,
        num_classes: int,
        *,
        pooling: Pooling | None = None,
        dropout: float = 0.1,
        label_smoothing: float = 0.0,
        freeze_encoder: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError("there are no classes to learn: the data set has no labels; choose one with a label column")
        self.encoder, self.pooling, self.label_smoothing = encoder, pooling, label_smoothing
        self.head = PoolerHead(encoder.dim, num_classes, dropout=dropout)
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            encoder.requires_grad_(False)

    def step(self, batch: Batch, progress: float) -> Step:
        if self.freeze_encoder:
            self.encoder.eval()  # `train` reaches it too: nothing is dropped
        logits, target = self.classify(batch), batch["target"]
        known = target >= 0
        labels = target.where(known, IGNORE)  # rows without a class are left out
        loss = mean_over_known(nll(logits, labels, label_smoothing=self.label_smoothing), labels)
        return Step(loss, {"top1": (logits.argmax(-1) == target).sum() / known.sum().clamp(min=1)})

    def classify(self, batch: Batch) -> Tensor:
        """(B, num_classes) logits."""
        return self.head(self.embed(batch))

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) pooled output of the encoder."""
        return text_features(self.encoder, batch, self.pooling)
