"""Weights into a wav2vec 2.0: its own, or transformers'."""

from typing import Any

import torch
from torch import nn

from ssl_lab.backbones.wav2vec2 import Wav2Vec2
from ssl_lab.errors import UserError
from ssl_lab.weights import io, sources
from ssl_lab.weights.rename import State, rename
from ssl_lab.weights.tables import hf_wav2vec2


def load(backbone: Wav2Vec2, spec: str) -> None:
    """Fill a wav2vec 2.0 with the weights named by `spec`, every tensor or none.

    Args:
        backbone: the network.
        spec: `hf:<folder or repository>` of a Wav2Vec2Model or of what holds one (pre-training, CTC), a .safetensors or
            .ckpt file, or a run. Heads and quantisers are left behind.

    Raises:
        UserError: nothing there, another architecture, or tensors that do not fit.
    """
    kind, colon, name = spec.partition(":")
    if not colon or kind != "hf":
        io.load(backbone, spec)
        return
    state = _from_hf(backbone, name)
    if problems := io.differences(backbone.state_dict(), state):
        raise UserError(f"{spec} does not fit this wav2vec 2.0: {'; '.join(problems[:4])}; choose its size by theirs")
    backbone.load_state_dict(state)


def _from_hf(backbone: Wav2Vec2, name: str) -> State:
    transformers, config = sources.hf_config(name)
    if config.model_type != "wav2vec2":
        raise UserError(f"hf:{name} is a {config.model_type!r}, not a wav2vec2: choose another backbone for it")
    post, ours = isinstance(backbone.norm, nn.Identity), backbone.front
    if post == config.do_stable_layer_norm:
        place = "pre" if config.do_stable_layer_norm else "post"
        raise UserError(f"hf:{name} has its norms elsewhere: set method.encoder.block.place={place}")
    facts: dict[str, tuple[Any, Any]] = {
        "strides": (list(config.conv_stride), [conv.stride[0] for conv in ours.convs]),  # type: ignore[index]
        "heads": (config.num_attention_heads, io.num_heads(backbone)),
        "activation": (config.hidden_act, "gelu"),
        "activation of features": (config.feat_extract_activation, "gelu"),
        "adapter": (bool(config.add_adapter or config.adapter_attn_dim), False),
    }
    if wrong := [f"{fact} {there} there, {here} here" for fact, (there, here) in facts.items() if there != here]:
        raise UserError(f"hf:{name} does not fit this wav2vec 2.0: {'; '.join(wrong)}")
    try:
        with sources.quiet():
            model, info = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise UserError(f"hf:{name}: the weights cannot be read ({sources.first_line(error)})") from error
    if missing := sorted(set(info["missing_keys"]) - {"masked_spec_embed"}):
        raise UserError(f"hf:{name}: the weights lack {missing[0]!r} ({len(missing)} missing); is the file complete?")
    for part in (backbone.blocks, backbone.feature_norm, backbone.embed_norm, backbone.norm):
        for module in part.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps
    return rename(model.state_dict(), hf_wav2vec2.table(post=post))
