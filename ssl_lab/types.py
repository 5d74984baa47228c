"""The types that parts agree on: what a batch holds, what a backbone and a training step give back.

Letters used in every docstring: B batch, C H W image, V views, L query length, S key length, N patches, K kept
patches, P prefix tokens, D model width, E shared embedding width, Dh head width, T F audio frames and mel bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from ssl_lab.nn.mask import AttnMask

Pooling = Literal["cls", "mean", "last"]


class Batch(TypedDict, total=False):
    """Named tensors of one training or evaluation batch; a method reads the keys it needs."""

    image: Tensor  # (B, C, H, W) float, normalised
    images: Tensor  # (N, C, H, W) float, normalised: of all conversations, in order of appearance
    image_rows: Tensor  # (N,) int64 row of `tokens` that each of `images` belongs to
    image_ids: Tensor  # (N,) int64 number of each of `images` in its set, where views draw nothing
    image_given: Tensor  # (N,) bool which of `image_ids` are in `images`, where known ones are not read again
    views: list[Tensor]  # V x (B, C, Hv, Wv) float, global views first
    audio: Tensor  # (B, S) float32 mono samples in about [-1, 1], zeros at the end
    audio_valid: Tensor  # (B, S) bool, False = padding
    tokens: Tensor  # (B, L) int64 token ids; of the source where there is a target sequence
    labels: Tensor  # (B, L) int64 token ids to predict, of a transcript beside `audio`; -100 = not scored
    valid: Tensor  # (B, L) bool, False = padding
    segments: Tensor  # (B, L) int64 document of each token of a packed row
    types: Tensor  # (B, L) int64 token types: first or second sentence
    rejected: Tensor  # (B, Lr) int64 token ids with a worse answer than `tokens` have
    rejected_labels: Tensor  # (B, Lr) int64, as `labels`
    rejected_valid: Tensor  # (B, Lr) bool, as `valid`
    target: Tensor  # (B,) int64 class
    span: Tensor  # (B, 2) int64 first and last token of an answer, both 0 = none
    index: Tensor  # (B,) int64 row in the data set
    position: Tensor  # (B,) int64 place in the endless training stream


@dataclass(slots=True)
class Step:
    """What a training step gives back: a scalar loss and the values to log beside it."""

    loss: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)


@dataclass(slots=True)
class Encoded:
    """What every backbone gives back.

    `tokens` (B, L, D) are normed and without the prefix; `prefix` (B, P, D) holds class and register tokens (P may be
    0), the class token first if `has_cls`; `valid` (B, L) marks real tokens;
    `hidden` holds the outputs (B, P + L, D) of the layers that were asked for.
    """

    tokens: Tensor
    prefix: Tensor
    valid: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    has_cls: bool = True

    def pooled(self, how: Pooling | None = None) -> Tensor:
        """(B, D): class token, mean over valid tokens, or last valid token. None = cls if there is one, else mean."""
        from ssl_lab.nn.pool import pool

        return pool(self, how)


class Backbone(Protocol):
    """Anything that turns one modality into tokens; `dim` is their width D."""

    dim: int

    def __call__(
        self,
        x: Tensor,
        *,
        keep: Tensor | None = None,
        mask: "AttnMask" = ...,
        layers: Sequence[int] = (),
        tokens: bool = True,
    ) -> Encoded:
        """Encode `x`; `keep` (B, K) int64 selects tokens before the blocks, `layers` asks for hidden states.

        `tokens=False` promises that only the prefix will be read, so that work for the tokens may be left out.
        """
        ...


@runtime_checkable
class Embeds(Protocol):
    """A method whose frozen features can be judged: kNN, linear probe, collapse measures."""

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of `batch["image"]`."""
        ...


@runtime_checkable
class Classifies(Protocol):
    """A method with a classifier of its own: test accuracy."""

    def classify(self, batch: Batch) -> Tensor:
        """(B, num_classes) logits."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A language model: perplexity."""

    def nll(self, batch: Batch) -> Tensor:
        """(B, L) float32: nats of every label, 0 where none is scored."""
        ...


@runtime_checkable
class Locates(Protocol):
    """A method that answers with a span of the text: SQuAD."""

    def locate(self, batch: Batch) -> Tensor:
        """(B, L, 2) scores of the first and the last token of the answer."""
        ...


@runtime_checkable
class Translates(Protocol):
    """A method that writes a sequence for another one: BLEU."""

    def translate(self, batch: Batch, eos: int, *, num_beams: int, alpha: float, max_tokens: int) -> Tensor:
        """(B, T) int64, T <= max_tokens: for each source the best sequence found, `eos` from its end on."""
        ...


@runtime_checkable
class Answers(Protocol):
    """A method that answers questions about images: VQA."""

    def answer(self, batch: Batch, end: int, *, max_tokens: int) -> Tensor:
        """(B, T) int64, T <= max_tokens: the likeliest words in the place of a row's first answer, `end` from its end.

        The first answer of `labels` is where the prompt stops; nothing of it is seen.
        """
        ...


@runtime_checkable
class Prefers(Protocol):
    """A method that learned which of two answers is the better: preference."""

    def rewards(self, batch: Batch) -> Tensor:
        """(B, 2) float32 at least: what the chosen and the rejected answer are worth."""
        ...


@runtime_checkable
class Transcribes(Protocol):
    """A method that writes down speech: word error rate."""

    def transcribe(self, batch: Batch, *, num_beams: int = 1) -> list[list[int]]:
        """Token ids of what is said in each row of `batch["audio"]`."""
        ...


@runtime_checkable
class EmbedsPairs(Protocol):
    """A method with images and texts in one space: zero-shot classification, retrieval across both."""

    def embed_image(self, batch: Batch) -> Tensor:
        """(B, E) of unit length, of `batch["image"]`."""
        ...

    def embed_text(self, batch: Batch) -> Tensor:
        """(B, E) of unit length, of `batch["tokens"]`, of which `batch["valid"]` are real."""
        ...
