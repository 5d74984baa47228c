"""A batch of text through an encoder or a decoder, whichever a method was given."""

from collections.abc import Sequence

from torch import Tensor, nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.hf_lm import HFDecoder
from ssl_lab.types import Batch, Encoded, Pooling


def read(network: nn.Module, batch: Batch, *, layers: Sequence[int] = (), tokens: bool = True) -> Encoded:
    """`tokens`, `valid`, `segments` and, for an encoder, `types` of a batch -> `Encoded`.

    Args:
        network: a `TextEncoder` or a `Decoder`.
        batch: of text.
        layers: blocks whose outputs are wanted.
        tokens: False promises that only the class token will be read.
    """
    known = {"valid": batch.get("valid"), "segments": batch.get("segments"), "layers": layers}
    if isinstance(network, Decoder | HFDecoder):
        return network(batch["tokens"], **known)
    return network(batch["tokens"], types=batch.get("types"), tokens=tokens, **known)


def text_features(network: nn.Module, batch: Batch, how: Pooling | None = None) -> Tensor:
    """(B, D) pooled output; None = the class token of an encoder, the last valid token of a decoder."""
    if how is None:
        how = "last" if isinstance(network, Decoder | HFDecoder) or getattr(network, "causal", False) else "cls"
    return read(network, batch, tokens=how != "cls").pooled(how)
