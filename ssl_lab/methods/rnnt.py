"""Speech recognition by a transducer (RNN-T; Graves, 2012, arXiv:1211.3711): what was written helps to write on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssl_lab.backbones.hear import SpeechEncoder, hear, require_frames
from ssl_lab.errors import UserError
from ssl_lab.generation.rnnt import RNNTBeam, beam_search, greedy
from ssl_lab.losses.ctc import ctc_loss, packed, share_spoken
from ssl_lab.losses.joint import joint_loss
from ssl_lab.methods.base import Method
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.transducer import LSTMPredictor, Predictor, Transducer
from ssl_lab.types import Batch, Step


class RNNT(Method):
    """Encoder, prediction network and joiner; loss in nats per token of the transcripts of all ranks.

    The loss is exact and sums over all alignments (`ssl_lab.losses.joint` tells its memory). Unlike CTC's it needs no
    more frames than tokens; a row without frames counts for nothing, and `train/too_short` tells the share of such.

    Args:
        encoder: of sound, such as `Conformer`.
        vocab_size: tokens V, the blank among them; in YAML 0 = those of the data's tokenizer.
        predictor: makes the prediction network from V.
        joint_dim: width in which frames and tokens are added.
        augment: of features in training, such as `SpecAugment`; None = none.
        blank: the token that leads to the next frame; that of the padding in the data's tokenizers, 0.
        max_symbols: tokens that one frame may write when speech is written down.
        ctc_weight: of a CTC loss on the encoder's frames that is added in training (arXiv:2201.05420): it makes the
            encoder hear, where the transducer alone first learns long what is said at all and when. `train/spoken` is
            the share of frames that its output does not leave blank. 0 = none.

    Raises:
        UserError: no tokens besides the blank, frames that may write nothing, a negative weight, or an AST.
    """

    def __init__(
        self,
        encoder: SpeechEncoder,
        vocab_size: int,
        *,
        predictor: Callable[[int], Predictor] = LSTMPredictor,
        joint_dim: int = 320,
        augment: nn.Module | None = None,
        blank: int = 0,
        max_symbols: int = 5,
        ctc_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if vocab_size < 2 or not 0 <= blank < vocab_size:
            raise UserError(
                f"vocab_size={vocab_size} with blank={blank} leaves nothing to write: take data with transcripts"
            )
        if max_symbols < 1:
            raise UserError(f"max_symbols={max_symbols} lets no frame write anything: take at least 1")
        if ctc_weight < 0:
            raise UserError(f"ctc_weight={ctc_weight} would teach the encoder to be wrong: take 0 or more")
        require_frames(encoder, "rnnt")
        self.encoder, self.augment, self.blank, self.max_symbols = encoder, augment, blank, max_symbols
        self.transducer = Transducer(encoder.dim, vocab_size, predictor=predictor, joint_dim=joint_dim, blank=blank)
        self.ctc_weight = ctc_weight
        self.ctc_head = Linear(encoder.dim, vocab_size) if ctc_weight > 0 else None

    def step(self, batch: Batch, progress: float) -> Step:
        if "labels" not in batch:
            raise UserError("there is nothing to write down: choose data with transcripts, such as data=speech")
        encoded, net, labels = hear(self.encoder, batch, self.augment), self.transducer, packed(batch["labels"])
        heard, said = net.heard(encoded.tokens), net.said(labels)
        weight, bias = net.out.weight, net.out.bias
        loss, too_short = joint_loss(heard, said, weight, bias, labels, encoded.valid, blank=self.blank)
        logs: dict[str, Tensor | float] = {"too_short": too_short}
        if self.ctc_head is not None:
            logits = self.ctc_head(encoded.tokens)
            aligned, _ = ctc_loss(logits, labels, encoded.valid, blank=self.blank)
            logs |= {"transducer": loss.detach(), "ctc": aligned.detach()}
            logs["spoken"] = share_spoken(logits, encoded.valid, blank=self.blank)
            loss = loss + self.ctc_weight * aligned
        return Step(loss, logs)

    @torch.no_grad()
    def emissions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What `decode` takes, (B, T', J), and the frames of each row (B,) int64."""
        encoded = hear(self.encoder, batch)
        heard = self.transducer.heard(encoded.tokens)
        whole = torch.full((len(heard),), heard.shape[1], device=heard.device)
        return heard, whole if encoded.valid is None else encoded.valid.sum(1)

    def decode(self, frames: Tensor, *, num_beams: int = 1) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of one utterance (T', J), and the first and last frame of each, which are one."""
        frames = frames.to(self.transducer.out.weight)
        if num_beams == 1:
            count = torch.tensor([len(frames)], device=frames.device)
            found = greedy(self.transducer, frames[None], count, max_symbols=self.max_symbols)[0]
        else:
            found = beam_search(self.transducer, frames, RNNTBeam(num_beams, self.max_symbols))[0]
        return found.tokens, [(at, at) for at in found.frames]

    def transcribe(self, batch: Batch, *, num_beams: int = 1) -> list[list[int]]:
        """Token ids of each row: the likeliest at each step, or of a beam search."""
        heard, counts = self.emissions(batch)
        if num_beams == 1:
            return [row.tokens for row in greedy(self.transducer, heard, counts, max_symbols=self.max_symbols)]
        rows = [row[:count] for row, count in zip(heard, counts.tolist(), strict=True)]
        return [self.decode(row, num_beams=num_beams)[0] for row in rows]
