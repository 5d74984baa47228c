"""What the kernels of packed rows share: layout, window, and which masks they can express."""

from torch import Tensor

from ssl_lab.nn.kernels.case import Case
from ssl_lab.nn.mask import AttnMask


def flat(x: Tensor) -> Tensor:
    """(B, H, L, Dh) -> (B * L, H, Dh), the rows of a batch one after another."""
    return x.transpose(1, 2).flatten(0, 1)


def unflat(x: Tensor, rows: int) -> Tensor:
    """(B * L, H, Dh) -> (B, H, L, Dh) of B `rows`."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2)


def span(mask: AttnMask) -> tuple[int, int]:
    """How many keys a query sees to its left and to its right besides its own, -1 = all; both count from the ends."""
    left = -1 if mask.window is None else mask.window - 1
    return left, 0 if mask.causal else left


def inexpressible(case: Case) -> str | None:
    """Why spans and the bounds of documents cannot express this mask, or None."""
    mask = case.mask
    other = {
        "padding": mask.valid is not None,
        "a prefix that all see": mask.causal and mask.prefix is not None,
        "positions outside of the window": mask.window is not None and mask.everyone is not None,
        "chunks": mask.causal and mask.chunk is not None,
        "cross-attention by ids": mask.asked is not None,
        "learned positions that all see": mask.free > 0 and not mask.plain,
    }
    if found := [what for what, there in other.items() if there]:
        return f"it takes causal masks, windows and packed rows, not {' and '.join(found)}"
    if mask.segments is not None and case.lengths is not None and case.lengths[0] != case.lengths[1]:
        return "packed rows have as many queries as keys here, not {} and {}".format(*case.lengths)
    return None
