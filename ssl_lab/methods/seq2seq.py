"""From one sequence to another: translation by the Transformer (Vaswani et al., 2017, arXiv:1706.03762)."""

from torch import Tensor

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.errors import UserError
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.losses.experts import with_experts
from ssl_lab.losses.lm import IGNORE, mean_over_tokens, token_nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.experts import balance_
from ssl_lab.types import Batch, Encoded, Step


class Seq2Seq(Method):
    """Mean cross-entropy of the target's tokens, each from the source and the target before it.

    Args:
        model: encoder and decoder.
        start_token: what the decoder reads first; in YAML -1 = the padding token of the data's tokenizer, as in T5.
        label_smoothing: share of the target that is spread evenly over all V tokens (section 5.4). Implementations that
            spread e over the V - 1 others do the same as this with e * V / (V - 1). Padding is never scored.

    Raises:
        UserError: no such start token.
    """

    def __init__(self, model: EncoderDecoder, start_token: int = 0, *, label_smoothing: float = 0.1) -> None:
        super().__init__()
        if start_token < 0:
            raise UserError(f"start_token={start_token} is no token: give the id of one, such as that of the padding")
        self.model, self.start_token, self.label_smoothing = model, start_token, label_smoothing

    def step(self, batch: Batch, progress: float) -> Step:
        labels, hidden = batch["labels"], self._hidden(batch)
        nll = token_nll(hidden, self.model.head_weight, labels, label_smoothing=self.label_smoothing)
        return with_experts(mean_over_tokens(nll, labels), self.model)

    def after_step(self, progress: float) -> None:
        balance_(self.model)

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L) float32 of every label without smoothing, 0 where none is scored."""
        return token_nll(self._hidden(batch), self.model.head_weight, batch["labels"])

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of what the encoder says of the source's tokens."""
        return self._source(batch).pooled("mean")

    def translate(self, batch: Batch, eos: int, *, num_beams: int, alpha: float, max_tokens: int) -> Tensor:
        """(B, T) int64, T <= max_tokens: the best of a beam search (section 6.1), `eos` from its end on."""
        valid = batch.get("valid")
        sources = [row if valid is None else row[valid[i]] for i, row in enumerate(batch["tokens"])]
        beams = beam_search(
            self.model,
            sources,
            max_new_tokens=max_tokens,
            beam=Beam(num_beams, alpha, "gnmt"),
            eos=eos,
            pad=eos,
            start=self.start_token,
        )
        return beams.tokens[:, 0]

    def _source(self, batch: Batch) -> Encoded:
        return self.model.encode(batch["tokens"], valid=batch.get("valid"))

    def _hidden(self, batch: Batch) -> Tensor:
        return self.model.decode(shift_right(batch["labels"], self.start_token), self._source(batch)).tokens


def shift_right(labels: Tensor, start: int) -> Tensor:
    """Labels (B, L) -> what the decoder reads (B, L): `start` first, then every label but the last.

    Labels that are not scored (-100) are read as `start`; they are padding, which stands last and is seen by no scored
    position.
    """
    shifted = labels.roll(1, 1)
    shifted[:, 0] = start
    return shifted.where(shifted != IGNORE, start)
