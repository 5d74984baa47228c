"""Speed perturbation: the same recording played faster or slower (Ko et al., Interspeech 2015)."""

from bisect import bisect_left
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

_LARGEST = 1 << 28
_SMOOTH = sorted(  # lengths that a Fourier transform is fast for
    x for a in range(29) for b in range(18) for c in range(13) if (x := 2**a * 3**b * 5**c) <= _LARGEST
)
_MARGIN = 64  # zeros after the last sample, so that it does not meet the first


def change_speed(samples: Tensor, factor: float) -> Tensor:
    """(S,) float32 -> (round(S / factor),) float32, `factor` times as fast; pitch and duration change together.

    Band-limited: the spectrum is cut or continued with zeros. One thread and one clip at a time, so that the result
    does not depend on the batch or the machine's number of cores. `factor` is taken as a ratio of small numbers.
    """
    ratio = Fraction(factor).limit_denominator(100)
    if ratio == 1 or not len(samples):
        return samples
    wanted = -(-(len(samples) + _MARGIN) // ratio.numerator)
    blocks = _SMOOTH[bisect_left(_SMOOTH, wanted)]
    before, after = blocks * ratio.numerator, blocks * ratio.denominator
    spectrum = np.fft.rfft(samples.numpy(), before)[: (min(before, after) + 1) // 2]  # without the last, if it is half
    found = np.fft.irfft(spectrum, after)[: max(1, round(len(samples) / ratio))] * (after / before)
    return torch.from_numpy(found.astype(np.float32))
