"""Any causal language model of transformers in the place of our decoder, where ours has no recipe for it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_lab.errors import UserError
from ssl_lab.nn.linear import linear
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.positions import since_start
from ssl_lab.types import Encoded
from ssl_lab.weights.sources import first_line, hf_config, quiet


class HFDecoder(nn.Module):
    """Tokens (B, L), or what stands for them (B, L, D) -> `Encoded`, as `Decoder` gives it.

    Args:
        name: a folder of transformers or a repository; its weights are read in float32.
        pretrained: read the weights; else only the architecture is taken over.

    Raises:
        UserError: there is no such model, it is no causal language model, or one whose scores are more than the output
            layer's product (a bias, a cap, a scale), which losses and generation here would leave out.
    """

    model: Any
    window = None

    def __init__(self, name: str, *, pretrained: bool = True) -> None:
        super().__init__()
        name = name.removeprefix("hf:")
        transformers, config = hf_config(name)
        make = transformers.AutoModelForCausalLM
        try:
            with quiet():
                self.model = make.from_pretrained(name, dtype=torch.float32) if pretrained else make.from_config(config)
        except Exception as error:
            raise UserError(f"hf:{name} is no causal language model that can be read ({first_line(error)})") from error
        self.embed = cast(nn.Embedding, self.model.get_input_embeddings())
        self.vocab_size, self.dim = self.embed.weight.shape
        self.max_length = int(getattr(config, "max_position_embeddings", 1 << 30))
        self.sliding = _window(config)
        self._require_plain(name)

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        prefix: Tensor | None = None,
        cache: Any = None,
        layers: Sequence[int] = (),
    ) -> Encoded:
        """As `Decoder.forward`; a `cache` is one of `new_cache`.

        Raises:
            UserError: `layers`, which it does not give, or more tokens than its layers' sliding window.
        """
        if layers:
            raise UserError("a model of transformers does not give its layers here (layers=): use our decoder")
        past, length = 0 if cache is None else int(cache.get_seq_length()), x.shape[1]
        if self.sliding is not None and past + length > self.sliding:
            raise UserError(
                f"{past + length} tokens are more than the window of {self.sliding} of this model of transformers, "
                "which is not kept here: shorten the text (data.max_length), or take weights that our decoder reads"
            )
        tokens = self.embed(x) if x.dim() == 2 else x
        mask = AttnMask(causal=True, valid=valid, segments=segments, prefix=prefix)
        allowed = mask.dense(length, past + length, x.device)
        added = None
        if allowed is not None:
            lowest = torch.finfo(tokens.dtype).min
            added = tokens.new_zeros(()).masked_fill(~allowed, lowest).expand(len(x), 1, length, past + length)
        at = torch.arange(past, past + length, device=x.device).expand(len(x), -1)
        if segments is not None:  # a table of positions begins anew in each document
            at = since_start(segments)
        if valid is not None:
            at = (valid.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = self.model.base_model(
            inputs_embeds=tokens,
            attention_mask=added,
            position_ids=at,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return Encoded(out, out[:, :0], valid=None if valid is None else valid[:, -length:], has_cls=False)

    @torch.no_grad()
    def _require_plain(self, name: str) -> None:
        """Compare the scores of a few tokens with those that the model itself gives."""
        if self.embed.weight.is_meta:
            return
        training, some = self.model.training, torch.arange(min(8, self.vocab_size))[None]
        self.model.eval()
        try:
            ours, theirs = self.logits(self(some).tokens), self.model(input_ids=some).logits
            alike = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"hf:{name} cannot take the place of a decoder here ({first_line(error)})") from error
        self.model.train(training)
        if not alike:
            raise UserError(
                f"hf:{name} makes its scores in a way of its own (a bias, a cap or a scale of the output layer), which "
                "is not kept here: take a model without, e.g. of LLaMA's, Mistral's or Qwen's kin"
            )

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output layer."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    def logits(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., V) scores of the next token."""
        return linear(tokens, self.head_weight)


def _window(config: Any) -> int | None:
    """Tokens that the layers see back, of a model some of whose layers see no further."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) if kinds is None else "sliding_attention" in kinds
    return int(window) if window and used else None
