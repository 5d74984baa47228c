"""The pictures of a run that hears: what was written at which time, which classes are confused, the embedding."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_lab.analysis.confusion import confusion_counts, confusion_matrix, most_confused
from ssl_lab.analysis.embedding import Projection, projected, scatter
from ssl_lab.analysis.page import Picture, write_page
from ssl_lab.analysis.spectrogram import Span, Utterance, alignments
from ssl_lab.evals.base import Precision, Round
from ssl_lab.generation.ctc import times, words
from ssl_lab.generation.listen import Recogniser
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.mode import evaluating
from ssl_lab.pictures import save_png
from ssl_lab.types import Classifies, Embeds

_SHOWN, _POINTS, _BANK = 6, 2000, 2000  # utterances with their alignment, points of the map, rows that are embedded
_LONGEST = 10.0  # seconds of an utterance that are shown


class SoundGallery:
    """Draws one method in one round, whose features it shares.

    Args:
        round: after the evaluators have run, on data of sound.
        projection: of the map, "pca" or "umap".
        seed: of UMAP.
    """

    def __init__(self, round: Round, projection: Projection = "pca", seed: int = 0) -> None:
        self.round, self.data, self.projection, self.seed = round, round.data, projection, seed
        self.notes: list[str] = []

    def write(self, folder: Path, title: str, table: Sequence[Sequence[str]] = ()) -> Path:
        """Draw into `folder`; gives the page that shows it all, and says there what could not be drawn.

        Raises:
            UserError: UMAP is asked for and not installed.
        """
        pictures = []
        with evaluating(self.round.method), torch.no_grad():
            for part in (self._alignments, self._confusion, self._map):
                for drawn, picture in part():
                    save_png(folder / picture.file, drawn)
                    pictures.append(picture)
        return write_page(folder, title, pictures, notes=self.notes, table=table)

    def _alignments(self) -> Iterator[tuple[Tensor, Picture]]:
        drawn = drawn_alignments(self.round.method, self.data, self.round.precision)
        if drawn is None:
            return
        yield (
            drawn,
            Picture(
                "alignment.png",
                "What was written, and when",
                "Log-mel energies of test utterances, light = loud; below them the tokens and the words that were "
                "written, each at the frames of the likeliest path that says it; _ is a blank between words.",
            ),
        )

    def _confusion(self) -> Iterator[tuple[Tensor, Picture]]:
        method, classes = self.round.method, self.data.classes
        if not isinstance(method, Classifies) or not classes:
            return
        found = self.round.extract(method.classify, "test", None)
        counts = confusion_counts(found.x.argmax(1), found.y, len(classes))
        if not counts.sum():
            return
        right = 100 * float(counts.diagonal().sum() / counts.sum())
        often = "; ".join(most_confused(counts, classes))
        yield (
            confusion_matrix(counts, classes),
            Picture(
                "confusion.png",
                "Which classes are taken for which",
                f"{int(counts.sum()):,} test clips, {right:.2f} % of them right. Rows: what was said; columns: what "
                f"was heard. {f'Most often confused: {often}.' if often else 'No mistakes.'}",
            ),
        )

    def _map(self) -> Iterator[tuple[Tensor, Picture]]:
        if not isinstance(self.round.method, Embeds) or not self.data.classes:
            return
        test = self.round.at_hand("test", _BANK).spread(_POINTS)
        points, axes = projected(test.x, self.projection, self.seed)
        yield (
            scatter(points, test.y, self.data.classes),
            Picture("map.png", "Map of the embedding", f"{len(test.y):,} test clips, coloured by class: {axes}."),
        )


def drawn_alignments(method: nn.Module, data: Any, precision: Precision = nullcontext) -> Tensor | None:
    """Some test utterances with what a method of frames (CTC, transducer) writes of them; None where there is nothing.

    The method is in evaluation mode.

    Args:
        method: that hears.
        data: a data module of sound.
        precision: makes the autocast context of a forward pass.

    Returns:
        A picture (3, H, W) uint8.
    """
    encoder = getattr(method, "encoder", None)
    front, seconds = getattr(encoder, "front", None), getattr(encoder, "seconds", None)
    tokenizer, rate = data.tokenizer, data.sampling_rate
    if not hasattr(method, "emissions") or front is None or seconds is None or tokenizer is None:
        return None
    if not hasattr(front, "energies"):
        front = LogMel(rate, 40).to(next(method.parameters()).device)  # of a network on samples
    recogniser = Recogniser(method, tokenizer, rate)
    rows = torch.linspace(0, len(data.test) - 1, min(_SHOWN, len(data.test))).long()
    batch = data.eval_views(data.test.read(rows.tolist()).data, rows, 0)
    told = data.test.transcripts(rows.tolist()) if hasattr(data.test, "transcripts") else [None] * len(rows)
    device, found = next(method.parameters()).device, []
    for audio, valid, said in zip(batch["audio"], batch["audio_valid"], told, strict=True):
        clip = audio[valid][: round(_LONGEST * rate)]
        with torch.no_grad(), precision():
            ids, spans = recogniser.tokens(clip)
            energies = front.energies(clip[None].to(device))[0].cpu()
        tokens = [Span(tokenizer.decode([i]), *times(span, seconds)) for i, span in zip(ids, spans, strict=True)]
        whole = [Span(word.text, word.start, word.end) for word in words(ids, spans, tokenizer, seconds)]
        found.append(Utterance(energies, tokens, whole, said if len(audio[valid]) == len(clip) else None))
    return alignments(found, front.hop / front.sampling_rate, front.sampling_rate / 2)
