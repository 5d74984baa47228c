"""Causal language modelling (GPT, Radford et al., 2018): predict every next token of packed documents."""

from torch import Tensor

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.read import read, text_features
from ssl_lab.errors import UserError
from ssl_lab.losses.experts import with_experts
from ssl_lab.losses.lm import mean_over_tokens, token_nll
from ssl_lab.methods.base import Method
from ssl_lab.nn.block import places
from ssl_lab.nn.experts import balance_, forget_
from ssl_lab.types import Batch, Pooling, Step


class CausalLM(Method):
    """Mean cross-entropy of the next token, plus what mixtures of experts add.

    Tokens may be the colours of an image in raster order (iGPT, Chen et al., 2020), see `ssl_lab.data.pixels`.

    Args:
        decoder: the language model.
        pooling: features for evaluation, "mean" or "last" token.
        layer: block whose output they are pooled from, negative = from the end; None = the normed output. Of iGPT a
            middle one is best.

    Raises:
        UserError: a layer that the decoder has not.
    """

    def __init__(self, decoder: Decoder, *, pooling: Pooling = "mean", layer: int | None = None) -> None:
        super().__init__()
        if layer is not None:
            if not isinstance(decoder, Decoder):
                raise UserError(f"method.layer={layer}: a model of transformers gives no layers; set it to null")
            places([layer], len(decoder.blocks), "method.layer")
        self.decoder, self.pooling, self.layer = decoder, pooling, layer

    def step(self, batch: Batch, progress: float) -> Step:
        return with_experts(mean_over_tokens(self.nll(batch), batch["labels"]), self.decoder)

    def after_step(self, progress: float) -> None:
        balance_(self.decoder)

    def after_skip(self) -> None:
        forget_(self.decoder)

    def nll(self, batch: Batch) -> Tensor:
        """Nats (B, L) float32 of every label, 0 where none is scored."""
        return token_nll(read(self.decoder, batch).tokens, self.decoder.head_weight, batch["labels"])

    def embed(self, batch: Batch) -> Tensor:
        """(B, D) features of the whole row."""
        if self.layer is None:
            return text_features(self.decoder, batch, self.pooling)
        encoded = read(self.decoder, batch, layers=[self.layer])
        encoded.tokens = encoded.hidden[self.layer]
        return encoded.pooled(self.pooling)
