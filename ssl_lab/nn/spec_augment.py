"""What is hidden from a spectrogram: SpecAugment's bands and stretches, and spans for masked prediction."""

import torch
from torch import Tensor, nn


class SpecAugment(nn.Module):
    """Set random bands of frequency and stretches of time to 0 (SpecAugment, arXiv:1904.08779); training only.

    Features should be normalised, so that 0 is their mean. Draws depend on the valid length, not on the padding.

    Args:
        freq_masks: how many bands of each utterance.
        freq_width: a band is 0 to so many bins wide, each width alike.
        time_masks: how many stretches.
        time_width: a stretch is 0 to so many frames long.
        max_share: nor longer than this share of the valid frames (arXiv:1912.05533 lets this alone decide: Conformer
            has 10 stretches of at most 0.05).
    """

    def __init__(
        self,
        freq_masks: int = 2,
        freq_width: int = 27,
        time_masks: int = 10,
        time_width: int = 100,
        max_share: float = 0.05,
    ) -> None:
        super().__init__()
        self.freq_masks, self.freq_width = freq_masks, freq_width
        self.time_masks, self.time_width, self.max_share = time_masks, time_width, max_share

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Features (B, T, F), valid (B, T) bool -> (B, T, F)."""
        if not self.training:
            return features
        rows, frames, bins = features.shape
        whole = torch.full((rows,), frames, device=features.device)
        lengths = whole if valid is None else valid.sum(1)
        bands = torch.full((rows,), bins, device=features.device)
        widest = (lengths * self.max_share).clamp(max=self.time_width)
        hidden = _stretches(self.freq_masks, bands.clamp(max=self.freq_width), bands, bins)[:, None]
        hidden = hidden | _stretches(self.time_masks, widest, lengths, frames)[:, :, None]
        return features.masked_fill(hidden, 0)


def _stretches(count: int, widest: Tensor, lengths: Tensor, size: int) -> Tensor:
    """(B, size) bool: inside one of `count` stretches per row, each 0 to int(widest) (B) long and within `lengths` (B).

    Two uniform numbers decide each stretch, its width and its place.
    """
    width, place = torch.rand(2, len(lengths), count, device=lengths.device)
    width = (width * (widest[:, None].floor() + 1)).floor()
    start = (place * (lengths[:, None] - width + 1).clamp(min=0)).floor()
    at = torch.arange(size, device=lengths.device)
    return ((at >= start[..., None]) & (at < (start + width)[..., None])).any(1)


def span_mask(valid: Tensor, probability: float, length: int, *, least: int = 1) -> Tensor:
    """Frames to predict, (B, T) bool: spans that may overlap, as wav2vec 2.0 and BEST-RQ choose them.

    Every valid frame begins a span with `probability`; at least `least` do in every row that has frames, so that no
    utterance is without a target. A span ends with the valid frames.

    Args:
        valid: (B, T) bool, False = padding.
        probability: wav2vec 2.0 has 0.065 of frames 20 ms apart, BEST-RQ 0.01 of frames 10 ms apart.
        length: frames of a span; wav2vec 2.0 has 10, BEST-RQ 40.
        least: spans of each row.
    """
    noise = torch.rand(valid.shape, device=valid.device).masked_fill(~valid, 2.0)
    lowest = noise.argsort(1).argsort(1) < least
    starts = ((noise < probability) | lowest) & valid
    inside = starts.to(torch.int32).cumsum(1)
    gone = torch.nn.functional.pad(inside, (length, 0))[:, : valid.shape[1]]
    return (inside > gone) & valid
