"""Conversations about sound: questions on spoken words, and clips in the place that pictures have elsewhere."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ssl_lab.data.audio_views import WholeAudio
from ssl_lab.data.conversation_builders import Asked, dialogues
from ssl_lab.data.conversation_text import ConversationEncoder
from ssl_lab.data.conversations import Conversations
from ssl_lab.data.source import Source
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import Kind as Letters
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError
from ssl_lab.rng import fold, uniform
from ssl_lab.types import Batch

Kind = Literal["said", "first", "last", "count", "presence"]
_ASKED: dict[Kind, str] = {
    "said": "what is said?",
    "first": "what is the first word?",
    "last": "what is the last word?",
    "count": "how many words are said?",
    "presence": "is {} said?",
}
_MOST = 1000  # transcripts that a tokenizer is trained on


class Spoken(Source, Protocol):
    """Clips with what is said in them: `Joined` without a tokenizer, `Clips` of single words, `Tones`."""

    sampling_rate: int

    def transcripts(self, rows: Sequence[int]) -> list[str]:
        """The words at each of these rows, with blanks between them."""
        ...


class SoundViews:
    """Clips (Si,) -> `image` (N, S) float32: waveforms in the slot of the pictures, all of one length.

    What is shorter ends in silence and counts as heard, as in Whisper (arXiv:2212.04356), so that every clip becomes as
    many tokens. Nothing is drawn.

    Args:
        sampling_rate: in Hz.
        seconds: of every clip; a longer one is cut to its middle.
    """

    def __init__(self, sampling_rate: int, seconds: float) -> None:
        self.whole = WholeAudio(sampling_rate, seconds=seconds, fixed=True, shortest=min(0.2, seconds))
        self.shape = (round(seconds * sampling_rate),)  # of one where there is none

    def __call__(self, clips: list[Tensor], position: Tensor, seed: int) -> Batch:
        """`position` and `seed` are not needed."""
        return {"image": self.whole(clips, position, seed)["audio"]}


def words(
    source: Spoken,
    encode: ConversationEncoder,
    *,
    kinds: Sequence[Kind] = ("said", "first", "last", "count", "presence"),
    turns: int | None = 1,
    seed: int = 0,
) -> Conversations:
    """Questions about what is said in the clips of `source`.

    Whether a word is said is asked of one that is and of one that is not, by turns of a coin: yes and no are alike.

    Args:
        source: clips of words.
        encode: makes tokens of conversations.
        kinds: what is asked: all that is `said`, the `first` or `last` word, their `count`, the `presence` of one.
        turns: questions of a clip that are asked in one conversation, in an order of its own; None = all of them.
        seed: of the words that are asked for.

    Raises:
        UserError: an unknown kind, or a clip without a transcript.
    """
    for kind in kinds:
        if kind not in get_args(Kind):
            raise UserError(f"kinds={kind}: take some of {', '.join(get_args(Kind))}")
    said = _transcripts(source)
    if (silent := next((row for row, text in enumerate(said) if not text.split()), None)) is not None:
        raise UserError(
            f"clip {silent} has neither a transcript nor a class, so nothing can be asked about it: name transcripts, "
            "sort the clips into folders of classes, or take it out"
        )
    known = sorted({word for text in said for word in text.split()})
    draws = uniform(fold(seed, 0x4EA2), torch.arange(len(said)), 2).tolist()
    pairs = [_questions(text.split(), kinds, known, u) for text, u in zip(said, draws, strict=True)]
    return Conversations(source, dialogues(pairs, encode, turns), encode, origin="the questions about sound")


def trained(source: Spoken, kind: Letters = "bpe", vocab_size: int = 512) -> Tokenizer:
    """A tokenizer for the questions and answers of `words`, with the tokens <pad> (id 0) and <eos>.

    Raises:
        UserError: a vocabulary smaller than the alphabet, or a source without transcripts.
    """
    texts = [*_ASKED.values(), "yes", "no", *map(str, range(10)), *_transcripts(source, _MOST)]
    return Tokenizer(train(texts, kind, vocab_size, ["<pad>", "<eos>"], origin="the transcripts"))


def _questions(said: list[str], kinds: Sequence[Kind], known: list[str], u: Sequence[float]) -> list[Asked]:
    absent = [word for word in known if word not in said]
    present = u[0] < 0.5 or not absent
    named = (said if present else absent)[int(u[1] * len(said if present else absent))]
    answers: dict[Kind, Any] = {
        "said": " ".join(said),
        "first": said[0],
        "last": said[-1],
        "count": str(len(said)),
        "presence": "yes" if present else "no",
    }
    return [(_ASKED[kind].format(named), answers[kind], ()) for kind in kinds]


def _transcripts(source: Spoken, most: int | None = None) -> list[str]:
    if not hasattr(source, "transcripts"):
        raise UserError("questions are asked about what is said, and the source has no transcripts: choose data=tones")
    return source.transcripts(range(len(source) if most is None else min(most, len(source))))
