"""A batch of sound through an encoder, with its features changed in between where a method wants that."""

from typing import Protocol

from torch import Tensor, nn

from ssl_lab.backbones.ast import AST
from ssl_lab.errors import UserError
from ssl_lab.types import Batch, Encoded


class SpeechEncoder(Protocol):
    """A backbone that takes waveforms (B, S), or the features (B, T, F) that its `front` makes of them."""

    dim: int

    @property
    def front(self) -> nn.Module:
        """Makes features (B, T, F) and valid frames (B, T) of waveforms."""
        ...

    def __call__(self, x: Tensor, *, valid: Tensor | None = None) -> Encoded:
        """Encode; `valid` (B, S) or (B, T) bool tells what is no padding."""
        ...


def hear(encoder: SpeechEncoder, batch: Batch, augment: nn.Module | None = None) -> Encoded:
    """`audio` and `audio_valid` of a batch -> `Encoded`.

    Args:
        encoder: of sound.
        batch: with `audio`.
        augment: features (B, T, F) and their valid frames (B, T) -> features; None = as they are.

    Raises:
        UserError: there is no sound in the batch.
    """
    if "audio" not in batch:
        raise UserError("this method hears, and the data are no sound: choose e.g. data=tones, data=audio, data=speech")
    audio, valid = batch["audio"], batch.get("audio_valid")
    if augment is None:
        return encoder(audio, valid=valid)
    features, valid = encoder.front(audio, valid)
    return encoder(augment(features, valid), valid=valid)


def require_frames(encoder: SpeechEncoder, method: str) -> None:
    """Refuse an encoder whose tokens do not follow one another in time.

    Raises:
        UserError: an AST; the message begins with the name of the `method`.
    """
    if isinstance(encoder, AST):
        raise UserError(
            f"{method} needs a token for each frame, and those of an AST are patches in rows of equal frequency: "
            "choose backbone=conformer_small"
        )
