"""Small random language models, theirs and ours with the same weights, and prompts for them."""

import functools

import pytest
import torch

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.generation.batch import pad_left
from ssl_lab.nn.positions import Rotary
from ssl_lab.nn.recipes import llama_block, rms_norm
from ssl_lab.weights.families import make
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_gpt2, hf_llama, hf_t5

transformers = pytest.importorskip("transformers")
V, NEW, PAD = 61, 12, 2  # transformers fills with the end where its padding is 0
TABLES = {"gpt2": hf_gpt2, "llama": hf_llama, "mistral": hf_llama, "t5": hf_t5}
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}


def shaken(module, seed=0, std=0.3):
    """Random weights, large enough that the text does not settle on one token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * std
            p.copy_(noise if p.ndim > 1 else p.double() + noise)
    return module.eval()


@functools.cache
def pair(family, dtype=torch.float64):
    """The same random model, theirs and ours."""
    sizes = {"vocab_size": V, "attn_implementation": "sdpa", **IDS}
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, **sizes)
    elif family == "llama":
        config = transformers.LlamaConfig(**llama, num_key_value_heads=2, max_position_embeddings=64)
    elif family == "mistral":
        config = transformers.MistralConfig(
            **llama, num_key_value_heads=2, max_position_embeddings=64, sliding_window=7
        )
    else:
        width = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**width, **(sizes | {"decoder_start_token_id": 0, "eos_token_id": 1}))
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    theirs = shaken(auto.from_config(config), std=0.6 if family == "t5" else 0.3).to(dtype)
    table = TABLES[family]
    facts = table.facts(theirs.config)
    ours = make(facts).to(dtype).eval()
    ours.load_state_dict(
        rename({k.removeprefix(table.PREFIX): v for k, v in theirs.state_dict().items()}, table.table(facts))
    )
    return theirs, ours


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator) for n in lengths]


def of_theirs(theirs, rows, **more):
    tokens, valid = pad_left(rows, PAD)
    mask = torch.ones_like(tokens) if valid is None else valid.long()
    with torch.no_grad():
        out = theirs.generate(tokens, attention_mask=mask, **({"max_new_tokens": NEW, "do_sample": False} | more))
    return out[:, tokens.shape[1] :]


def tiny(**more):
    """A LLaMA-like decoder of V tokens."""
    given = {"max_length": 64, "positions": Rotary, "block": llama_block, "norm": rms_norm} | more
    return Decoder(V, 32, **({"depth": 2, "num_heads": 4} | given))
