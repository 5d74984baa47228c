"""What was heard and what was written of it: a spectrogram with the tokens and the words below it, at their times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssl_lab.analysis.attention import heat
from ssl_lab.analysis.neighbours import OTHER, SAME

_WIDTH, _MEL, _LEFT, _RIGHT = 1100, 120, 64, 16  # pixels of a sheet, of the mels' height, of its margins
_HEAD, _TRACK, _AXIS, _GAP = 26, 24, 22, 18  # of the heading, of tokens and of words, of the times, between utterances
_MOST = 6  # pixels of a frame
_RANGE = 10.0  # e-folds of energy below the loudest that are shown: 43 dB
_INK, _FAINT, _TOKEN, _WORD = (30, 30, 30), (150, 150, 150), (222, 235, 247), (158, 202, 225)
_STEPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between the times that are written


@dataclass(frozen=True)
class Span:
    """A token or a word, and when it was said, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One row of the sheet.

    Args:
        energies: (T, F) log-mel energies, lowest bin first.
        tokens: what was found, in order.
        words: the same in words.
        said: what the recording says, None = unknown.
    """

    energies: Tensor
    tokens: Sequence[Span]
    words: Sequence[Span]
    said: str | None = None


def alignments(utterances: Sequence[Utterance], hop: float, top: float) -> Tensor:
    """Utterances below each other, all at one scale of time.

    Args:
        utterances: at least one.
        hop: seconds from one frame to the next.
        top: Hz of the highest mel bin's upper end, for the label.

    Returns:
        A picture (3, H, W) uint8.
    """
    longest = max(len(u.energies) for u in utterances)
    scale = max(1, min(_MOST, (_WIDTH - _LEFT - _RIGHT) // longest))
    height = _HEAD + _MEL + 2 * _TRACK + _AXIS + _GAP
    width = max(_LEFT + _RIGHT + longest * scale, _WIDTH // 2)
    sheet = Image.new("RGB", (width, len(utterances) * height), "white")
    for i, one in enumerate(utterances):
        _draw(sheet, one, i * height, scale, hop, top)
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)


def _draw(sheet: Image.Image, one: Utterance, y: int, scale: int, hop: float, top: float) -> None:
    """One utterance from `y` on, a frame `scale` pixels wide."""
    rate = scale / hop
    draw, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    written = " ".join(word.text for word in one.words)
    if one.said is None:
        draw.text((_LEFT, y + _HEAD / 2), written, fill=_INK, font=large, anchor="lm")
    else:
        draw.text((_LEFT, y + _HEAD / 2), one.said, fill=_INK, font=large, anchor="lm")
        right = one.said.split() == written.split()
        told = "written as said" if right else f"written: {written or 'nothing'}"
        place = _LEFT + large.getlength(one.said) + 24
        draw.text((place, y + _HEAD / 2), told, fill=SAME if right else OTHER, font=large, anchor="lm")
    y += _HEAD
    values = one.energies.double().T.flip(0)
    values = (values - (values.max() - _RANGE)).clamp(min=0)
    image = Image.fromarray(heat(values, values.shape).permute(1, 2, 0).contiguous().cpu().numpy())
    image = image.resize((scale * len(one.energies), _MEL), Image.Resampling.BILINEAR)
    sheet.paste(image, (_LEFT, y))
    draw.text((_LEFT - 6, y + 2), f"{top / 1000:g} kHz", fill=_FAINT, font=small, anchor="rt")
    draw.text((_LEFT - 6, y + _MEL - 2), "mels", fill=_FAINT, font=small, anchor="rb")
    seconds = image.width / rate
    y += _MEL
    for spans, colour, name in ((one.tokens, _TOKEN, "tokens"), (one.words, _WORD, "words")):
        draw.text((_LEFT - 6, y + _TRACK / 2), name, fill=_FAINT, font=small, anchor="rm")
        for span in spans:
            a, b = (_LEFT + min(x, seconds) * rate for x in (span.start, span.end))
            draw.rectangle((a, y + 3, max(b - 2, a + 1), y + _TRACK - 3), fill=colour)
        for span in spans:  # after all boxes: a letter may be wider than its own
            middle = _LEFT + min((span.start + span.end) / 2, seconds) * rate
            text = "_" if span.text.isspace() else span.text.strip()
            draw.text((middle, y + _TRACK / 2), text, fill=_INK, font=small, anchor="mm")
        y += _TRACK
    _times(draw, y, seconds, rate, small)


def _times(
    draw: ImageDraw.ImageDraw, y: float, seconds: float, rate: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    step = next((s for s in _STEPS if s * rate >= 60), _STEPS[-1])
    draw.line((_LEFT, y, _LEFT + seconds * rate, y), fill=_FAINT)
    for i in range(int(seconds / step + 1e-6) + 1):
        x = _LEFT + i * step * rate
        draw.line((x, y, x, y + 4), fill=_FAINT)
        draw.text((x, y + 6), f"{i * step:g} s", fill=_FAINT, font=font, anchor="mt")
