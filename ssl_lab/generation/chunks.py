"""A long recording in overlapping chunks: what is said of its parts, put together as if it had been heard at once."""

from collections.abc import Callable

import torch
from torch import Tensor


def in_chunks(emit: Callable[[Tensor], Tensor], audio: Tensor, *, step: int, chunk: int, overlap: int) -> Tensor:
    """Frames (T, V) of a recording (S,) of any length.

    Every frame comes from a chunk in which it is at least about half of `overlap` away from the edges, but for those
    of the recording itself. So the work grows with S, not with its square.

    Args:
        emit: samples (S',) -> frames (T', V), of which frame t reads the samples from t * `step` on.
        audio: (S,).
        step: samples from one frame to the next.
        chunk: samples of a chunk.
        overlap: samples that two chunks have in common.

    Raises:
        ValueError: chunks that do not advance, or give too few frames for their overlap.
    """
    if len(audio) <= chunk:
        return emit(audio)
    kept, shared = (chunk - overlap) // step, overlap // step
    if kept < 1:
        raise ValueError(f"chunks of {chunk} samples with {overlap} in common do not advance")
    size, parts, done, start = (kept + shared) * step, list[Tensor](), 0, 0
    while True:
        last = start * step + size >= len(audio)
        if last:  # it begins earlier, to be as long as the others: features are normalised over a chunk
            start = -(-(len(audio) - size) // step)
        frames = emit(audio[start * step : start * step + size])
        until = len(frames) if last else kept + shared // 2
        if len(frames) < until:
            raise ValueError(f"a chunk of {size} samples gave {len(frames)} frames, and {until} were needed")
        parts.append(frames[done - start : until])
        if last:
            return torch.cat(parts)
        done, start = start + until, start + kept


def at_pauses(audio: Tensor, longest: int, window: int) -> list[tuple[int, int]]:
    """Cut (S,) into (from, to) of at most `longest` samples, each where the second half of it is quietest.

    Args:
        audio: (S,).
        longest: samples of a part.
        window: samples over which loudness is measured; a cut lies in the middle of the quietest such stretch.
    """
    power = torch.nn.functional.pad(audio.double().square().cumsum(0), (1, 0))
    found, start = [], 0
    while len(audio) - start > longest:
        half = start + longest // 2
        last = max(half + 1, start + longest - window)
        loud = power[half + window : last + window] - power[half:last]
        end = min(half + int(loud.argmin()) + window // 2, start + longest)
        found.append((start, end))
        start = end
    return [*found, (start, len(audio))]
