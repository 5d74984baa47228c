"""From one sequence to another: translation by the Transformer (Vaswani et al., 2017, arXiv:1706.03762), or speech."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.speech_transformer import SpeechTransformer
from ssl_lab.errors import UserError
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.losses.experts import with_experts
from ssl_lab.losses.lm import IGNORE, mean_over_tokens, token_nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.experts import balance_, forget_
from ssl_lab.types import Batch, Encoded, Step


class Seq2Seq(Method):
    """Mean cross-entropy of the target's tokens, each from the source and the target before it.

    Args:
        model: encoder and decoder, which reads tokens or, a `SpeechTransformer`, sound.
        start_token: what the decoder reads first; in YAML -1 = the padding token of the data's tokenizer, as in T5.
        end_token: what a transcript ends with; in YAML -1 = the end token of the data's tokenizer, if it has one.
        augment: of features of sound in training, such as `SpecAugment`; None = none.
        label_smoothing: share of the target that is spread evenly over all V tokens (section 5.4). Implementations that
            spread e over the V - 1 others do the same as this with e * V / (V - 1). Padding is never scored.

    Raises:
        UserError: no such start token.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        start_token: int = 0,
        *,
        end_token: int | None = None,
        augment: nn.Module | None = None,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if start_token < 0:
            raise UserError(f"start_token={start_token} is no token: give the id of one, such as that of the padding")
        self.model, self.augment, self.label_smoothing = model, augment, label_smoothing
        self.start_token, self.end_token = start_token, end_token

    def step(self, batch: Batch, progress: float) -> Step:
        if "labels" not in batch:
            raise UserError("there is nothing to write: choose data with two texts or with transcripts")
        labels, hidden = batch["labels"], self._hidden(batch, self.augment)
        nll = token_nll(hidden, self.model.head_weight, labels, label_smoothing=self.label_smoothing)
        return with_experts(mean_over_tokens(nll, labels), self.model)

    def after_step(self, progress: float) -> None:
        balance_(self.model)

    def after_skip(self) -> None:
        forget_(self.model)

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L) float32 of every label without smoothing, 0 where none is scored."""
        return token_nll(self._hidden(batch), self.model.head_weight, batch["labels"])

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) mean of what the encoder says of the source's tokens."""
        return self._source(batch).pooled("mean")

    def translate(self, batch: Batch, eos: int, *, num_beams: int, alpha: float, max_tokens: int) -> Tensor:
        """(B, T) int64, T <= max_tokens: the best of a beam search (section 6.1), `eos` from its end on."""
        beams = beam_search(
            self.model,
            _rows(batch, _key(self.model)),
            max_new_tokens=max_tokens,
            beam=Beam(num_beams, alpha, "gnmt"),
            eos=eos,
            pad=eos,
            start=self.start_token,
        )
        return beams.tokens[:, 0]

    def transcribe(self, batch: Batch, *, num_beams: int = 1) -> list[list[int]]:
        """Token ids of what is said in each row of `audio`, without the end; no more than the encoder has tokens of it.

        Raises:
            UserError: the model was trained without an end token, and so never ends.
        """
        model = self.model
        if self.end_token is None or not isinstance(model, SpeechTransformer):
            raise UserError("this model writes down no speech: train a speech_transformer with data.train.end=true")
        audio, valid = batch["audio"], batch.get("audio_valid")
        samples = torch.full((len(audio),), audio.shape[1]) if valid is None else valid.sum(1).cpu()
        heard = (-(-model.front.frames(samples) // model.stem.stride)).clamp(1, model.target_positions.max_length - 1)
        longest = int(heard.max())
        found = self.translate(batch, self.end_token, num_beams=num_beams, alpha=1.0, max_tokens=longest)
        # a row that does not end goes on beside a longer one, but not in its transcript
        rows = zip(found.tolist(), heard.tolist(), strict=True)
        return [_until(row[:length], self.end_token) for row, length in rows]

    def _source(self, batch: Batch, augment: nn.Module | None = None) -> Encoded:
        key = _key(self.model)
        if key not in batch:
            other = "data=speech or digits_connected" if key == "audio" else "data=multi30k or captions_translation"
            raise UserError(f"this model reads {key}, and the data have none: choose e.g. {other}")
        if not isinstance(self.model, SpeechTransformer):
            return self.model.encode(batch["tokens"], valid=batch.get("valid"))
        x, valid = batch["audio"], batch.get("audio_valid")
        if augment is not None:
            x, valid = self.model.front(x, valid)
            x = augment(x, valid)
        return self.model.encode(x, valid=valid)

    def _hidden(self, batch: Batch, augment: nn.Module | None = None) -> Tensor:
        labels = batch["labels"]
        target, memory = shift_right(labels, self.start_token), self._source(batch, augment)
        return self.model.decode(target, memory, valid=labels != IGNORE).tokens


def _key(model: EncoderDecoder) -> str:
    return "audio" if isinstance(model, SpeechTransformer) else "tokens"


def _rows(batch: Batch, key: str) -> list[Tensor]:
    """The sources of a batch without their padding."""
    whole = cast(Tensor, batch[key])  # type: ignore[literal-required]
    valid = cast("Tensor | None", batch.get("audio_valid" if key == "audio" else "valid"))
    return [row if valid is None else row[valid[i]] for i, row in enumerate(whole)]


def _until(row: Sequence[int], end: int) -> list[int]:
    return list(row[: row.index(end)] if end in row else row)


def shift_right(labels: Tensor, start: int) -> Tensor:
    """Labels (B, L) -> what the decoder reads (B, L): `start` first, then every label but the last.

    Labels that are not scored (-100) are read as `start`; they are padding, which stands last and is seen by no scored
    position.
    """
    shifted = labels.roll(1, 1)
    shifted[:, 0] = start
    return shifted.where(shifted != IGNORE, start)
