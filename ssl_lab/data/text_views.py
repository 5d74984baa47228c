"""From token ids to what a method sees: shifted, masked, corrupted, padded.

Views of text map (`Samples.data`, position, seed) to keys of a batch, as those of images do; all that is random depends
on (seed, position) alone.
"""

from torch import Tensor

from ssl_lab.types import Batch

IGNORE = -100  # a label that is not scored


class NextToken:
    """Every token is to be told from those before it: rows of `Blocks`, (B, L + 1), -> `tokens` and `labels` (B, L).

    The first token of a document cannot be told from another one, so it is no label (-100), and `segments` (B, L) keeps
    documents from seeing each other; it is given where a row holds more than one. `across=True` reads documents as one
    text, as GPT-2 did.
    """

    def __init__(self, *, across: bool = False):
        self.across = across

    def __call__(self, data: tuple[Tensor, Tensor], position: Tensor, seed: int) -> Batch:
        """Nothing is drawn."""
        tokens, segments = data
        batch: Batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
        if not self.across and bool((segments[:, :-1] != 0).any() or (segments[:, -1] != 0).any()):
            batch["labels"] = tokens[:, 1:].masked_fill(segments[:, 1:] != segments[:, :-1], IGNORE)
            batch["segments"] = segments[:, :-1]
        return batch
