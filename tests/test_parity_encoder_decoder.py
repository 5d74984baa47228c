"""The encoder-decoder is transformers' T5 and Marian, and torch's Transformer of 2017, to rounding in float64."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from parity import gap, gradients, randomise, weigh

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.positions import Positions, Relative, Sinusoidal
from ssl_lab.nn.recipes import rms_norm, t5_block, transformer_block
from ssl_lab.weights.rename import Drop, Fuse, rename
from ssl_lab.weights.tables import hf_t5

VOCAB, START = 31, 0


def ids(*shape, seed=0):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padding(rows=2, length=11):
    valid = torch.ones(rows, length, dtype=torch.bool)
    valid[1, length // 2 :] = False
    return valid


def shifted(labels):
    """What the decoder is given for these labels."""
    begin = torch.full_like(labels[:, :1], START)
    return torch.cat([begin, labels[:, :-1].clamp(min=0)], 1)


def labels(length=7):
    wanted = ids(2, length, seed=1)
    wanted[0, -2:] = -100
    return wanted


def without_rounding(model):
    """transformers takes the mean square in float32 whatever the model's type; not here."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = types.MethodType(forward, module)
    return model


# ---- T5

T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}


def t5_theirs(gated, tied):
    transformers = pytest.importorskip("transformers")
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {}
    config = transformers.T5Config(
        vocab_size=VOCAB, decoder_start_token_id=START, relative_attention_max_distance=20, **T5, **more
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # transformers unties v1.1 only when a checkpoint says so
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 32))
    return without_rounding(randomise(model))


def t5_ours(gated, tied):
    return EncoderDecoder(
        VOCAB, 32, (2, 3), 4, tied=tied, scaled="none" if gated else "head", norm=rms_norm,
        positions=functools.partial(Relative, max_distance=20),
        block=functools.partial(t5_block, head_dim=6, hidden=48, gated=gated),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize(("gated", "tied"), [(False, True), (True, True), (True, False)])
def test_t5_is_transformers(gated, tied):
    theirs, ours = t5_theirs(gated, tied), t5_ours(gated, tied)
    table = hf_t5.table({"gated": gated, "tied": tied})
    ours.load_state_dict(rename(theirs.state_dict(), table))
    source, valid, wanted = ids(2, 40), padding(length=40), labels()
    a = ours(source, shifted(wanted), valid=valid)
    b = theirs(source, attention_mask=valid, labels=wanted)
    memory = ours.encode(source, valid=valid)
    assert gap(memory.tokens[valid], b.encoder_last_hidden_state[valid]) <= 1e-10
    assert gap(ours.logits(a.tokens), b.logits) <= 1e-10
    loss = F.cross_entropy(ours.logits(a.tokens).flatten(0, 1), wanted.flatten())
    assert gap(loss, b.loss) <= 1e-10
    (loss + weigh(a.tokens)).backward()
    scale = 32**-0.5 if not gated else 1.0
    hidden = theirs(source, attention_mask=valid, labels=wanted, output_hidden_states=True).decoder_hidden_states[-1]
    (b.loss + weigh(hidden * scale)).backward()
    found, expected = gradients(ours), rename(gradients(theirs), table)
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) for key in found) <= 1e-10


def test_t5_weights_go_back():
    theirs = t5_theirs(gated=True, tied=False)
    table = hf_t5.table({"gated": True, "tied": False})
    back = rename(rename(theirs.state_dict(), table), table, back=True)
    duplicates = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert back.keys() == theirs.state_dict().keys() - duplicates
    assert all(torch.equal(back[key], theirs.state_dict()[key]) for key in back)


# ---- the Transformer of 2017


DUPLICATES = [f"{side}.embed_{what}" for side in ("encoder", "decoder") for what in ("tokens", "positions")]


def marian_table():
    def stack(name, attentions):
        rows = []
        for ours, theirs in attentions.items():
            parts = {"attn": "qkv", "cross": "kv"}[ours]
            at, there = f"{name}.blocks.#.{ours}", f"model.{name}.layers.#.{theirs}"
            rows += [Fuse(f"{at}.fn.{parts}.*", tuple(f"{there}.{part}_proj.*" for part in parts))]
            rows += [(f"{at}.fn.q.*", f"{there}.q_proj.*")] if ours == "cross" else []
            rows += [(f"{at}.fn.proj.*", f"{there}.out_proj.*"), (f"{at}.norm.*", f"{there}_layer_norm.*")]
        mlp = [(f"{name}.blocks.#.mlp.fn.{fc}.*", f"model.{name}.layers.#.{fc}.*") for fc in ("fc1", "fc2")]
        return [*rows, *mlp, (f"{name}.blocks.#.mlp.norm.*", f"model.{name}.layers.#.final_layer_norm.*")]

    return [
        ("embed.weight", "model.shared.weight"),
        *stack("encoder", {"attn": "self_attn"}),
        *stack("decoder", {"attn": "self_attn", "cross": "encoder_attn"}),
        *(
            Drop(f"model.{name}.embed_{what}.weight")
            for name in ("encoder", "decoder")
            for what in ("tokens", "positions")
        ),
        Drop("lm_head.weight"),
        Drop("final_logits_bias"),
    ]


def marian():
    transformers = pytest.importorskip("transformers")
    config = transformers.MarianConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        pad_token_id=START, decoder_start_token_id=START, eos_token_id=1, forced_eos_token_id=1,
        activation_function="relu", scale_embedding=True, dropout=0.0,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    tables = [p for n, p in model.named_parameters() if "embed_positions" in n]
    kept = [table.detach().double() for table in tables]
    randomise(model)
    with torch.no_grad():
        for table, value in zip(tables, kept, strict=True):
            table.copy_(value)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # the start token is their padding, and would get no gradient
    return model


def transformer():
    return EncoderDecoder(
        VOCAB, 32, (2, 3), 4, max_length=64, positions=functools.partial(Sinusoidal, halves=True),
        block=functools.partial(transformer_block, hidden=48),
    ).double().eval()  # fmt: skip


def test_the_transformer_is_marian():
    theirs, ours = marian(), transformer()
    ours.load_state_dict(rename(theirs.state_dict(), marian_table()))
    source, valid, wanted = ids(2, 11), padding(), labels()
    a = ours.logits(ours(source, shifted(wanted), valid=valid).tokens)
    b = theirs(source, attention_mask=valid, decoder_input_ids=shifted(wanted), labels=wanted)
    assert gap(a, b.logits) <= 1e-10
    loss = F.cross_entropy(a.flatten(0, 1), wanted.flatten())
    assert gap(loss, b.loss) <= 1e-10
    weigh(a).backward()
    weigh(b.logits).backward()
    found, expected = gradients(ours), rename(gradients(theirs), marian_table())
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) for key in found) <= 1e-10


class NoPositions(Positions):
    pass


def test_the_transformer_is_torchs_without_its_final_norms():
    theirs = torch.nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True)
    theirs.encoder.norm = theirs.decoder.norm = None
    randomise(theirs)
    ours = EncoderDecoder(
        VOCAB, 32, 2, 4, positions=NoPositions, block=functools.partial(transformer_block, hidden=48)
    )  # fmt: skip
    randomise(ours, seed=3)
    at = [("attn", "self_attn", "norm1"), ("cross", "multihead_attn", "norm2"), ("mlp", "", "norm3")]
    rows = []
    for name, sublayers in (("encoder", [at[0], ("mlp", "", "norm2")]), ("decoder", at)):
        for mine, other, norm in sublayers:
            ours_at, theirs_at = f"{name}.blocks.#.{mine}", f"{name}.layers.#"
            rows.append((f"{ours_at}.norm.*", f"{theirs_at}.{norm}.*"))
            if mine == "mlp":
                rows += [(f"{ours_at}.fn.fc{i}.*", f"{theirs_at}.linear{i}.*") for i in (1, 2)]
            else:
                rows.append((f"{ours_at}.fn.proj.*", f"{theirs_at}.{other}.out_proj.*"))
                key = "qkv" if mine == "attn" else "in"
                rows += [
                    (f"{ours_at}.fn.{key}.{kind}", f"{theirs_at}.{other}.in_proj_{kind}") for kind in ("weight", "bias")
                ]
    state = rename(theirs.state_dict(), rows)
    for key in [key for key in state if ".cross.fn.in." in key]:
        whole = state.pop(key)
        state[key.replace(".in.", ".q.")], state[key.replace(".in.", ".kv.")] = whole[:32], whole[32:]
    state["embed.weight"] = ours.embed.weight
    ours.load_state_dict(state)
    source, valid, target = ids(2, 11), padding(), ids(2, 7, seed=1)
    a = ours(source, target, valid=valid).tokens
    future = torch.nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    embedded = [ours.embed(x) * 32**0.5 for x in (source, target)]
    b = theirs(*embedded, tgt_mask=future, src_key_padding_mask=~valid, memory_key_padding_mask=~valid)
    assert gap(a, b) <= 1e-10


# ---- one token at a time


@pytest.mark.parametrize("make", [transformer, lambda: t5_ours(gated=True, tied=False)], ids=["transformer", "t5"])
def test_a_cache_changes_nothing(make):
    ours = randomise(make())
    source, valid, target = ids(2, 11), padding(), ids(2, 7, seed=1)
    whole = ours(source, target, valid=valid).tokens
    memory, cache = ours.encode(source, valid=valid), KVCache()
    steps = [ours.decode(target[:, a:b], memory, cache=cache).tokens for a, b in ((0, 3), (3, 4), (4, 7))]
    assert gap(torch.cat(steps, 1), whole) <= 1e-12
    assert len(cache) == 7
