"""Block recipes of the text models against transformers' layers, and the biases of attention scores."""

import functools

import pytest
import torch
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.nn.attend import attend
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.bias import RelativeBias, alibi_bias, alibi_slopes
from ssl_lab.nn.block import Context
from ssl_lab.nn.kernels.eager import attention_map
from ssl_lab.nn.mask import CAUSAL, FULL, AttnMask
from ssl_lab.nn.recipes import bert_block, gpt_block, llama_block, t5_block, transformer_block
from ssl_lab.nn.rope import rope_1d
from tests.parity import gap, gradients, randomise, weigh

D, H, L = 32, 4, 7


def hf():
    return pytest.importorskip("transformers", reason="the reference is transformers")


def tokens(length: int = L, width: int = D) -> torch.Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def causal_mask(length: int = L) -> torch.Tensor:
    return torch.full((length, length), -1e30, dtype=torch.float64).triu(1)[None, None]


def copy(ours: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    ours.double().eval().load_state_dict(state)
    return ours


def same_gradients(ours, theirs, x, out, reference):
    """Gradients of the input through both."""
    a, b = (torch.autograd.grad(weigh(o), x)[0] for o in (out, reference))
    assert b.abs().max() > 1e-3
    return gap(a, b)


def linears(theirs: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Ours by name: theirs under another one; several, joined by '+', are stacked."""
    return {ours: torch.cat([theirs[n] for n in names_.split("+")]) for ours, names_ in names.items()}


def test_gpt_block():
    module = __import__("transformers.models.gpt2.modeling_gpt2", fromlist=["GPT2Block"]) if hf() else None
    config = hf().GPT2Config(n_embd=D, n_head=H, n_layer=1, n_positions=L, attn_implementation="eager")
    theirs = randomise(module.GPT2Block(config, layer_idx=0))
    state = {k: v.t() if "c_" in k and k.endswith("weight") else v for k, v in theirs.state_dict().items()}
    names = {
        "attn.norm": "ln_1", "mlp.norm": "ln_2", "attn.fn.qkv": "attn.c_attn", "attn.fn.proj": "attn.c_proj",
        "mlp.fn.fc1": "mlp.c_fc", "mlp.fn.fc2": "mlp.c_proj",
    }  # fmt: skip
    ours = copy(gpt_block(D, H), {f"{a}.{p}": state[f"{b}.{p}"] for a, b in names.items() for p in ("weight", "bias")})
    x = tokens().requires_grad_()
    reference = theirs(x, attention_mask=causal_mask())
    reference = reference[0] if isinstance(reference, tuple) else reference
    out = ours(x, Context(mask=CAUSAL))
    assert gap(out, reference) < 1e-12 and same_gradients(ours, theirs, x, out, reference) < 1e-12


def test_llama_block():
    from_ = __import__("transformers.models.llama.modeling_llama", fromlist=["LlamaDecoderLayer"]) if hf() else None
    config = hf().LlamaConfig(
        hidden_size=D, num_attention_heads=H, num_key_value_heads=2, intermediate_size=48, head_dim=12,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = randomise(from_.LlamaDecoderLayer(config, layer_idx=0))
    state = linears(theirs.state_dict(), {
        "attn.norm.weight": "input_layernorm.weight", "mlp.norm.weight": "post_attention_layernorm.weight",
        "attn.fn.qkv.weight": "self_attn.q_proj.weight+self_attn.k_proj.weight+self_attn.v_proj.weight",
        "attn.fn.proj.weight": "self_attn.o_proj.weight", "mlp.fn.gate.weight": "mlp.gate_proj.weight",
        "mlp.fn.up.weight": "mlp.up_proj.weight", "mlp.fn.down.weight": "mlp.down_proj.weight",
    })  # fmt: skip
    ours = copy(llama_block(D, H, num_kv_heads=2, head_dim=12, hidden=48), state)
    x = tokens().requires_grad_()
    embedding = from_.LlamaRotaryEmbedding(config)(x, torch.arange(L)[None])
    reference = theirs(x, attention_mask=causal_mask(), position_embeddings=embedding)
    reference = reference[0] if isinstance(reference, tuple) else reference
    out = ours(x, Context(mask=CAUSAL, rope=rope_1d(torch.arange(L), 12)))
    assert gap(out, reference) < 2e-6  # their norm works in float32 at any precision
    assert same_gradients(ours, theirs, x, out, reference) < 5e-6


def test_bert_block():
    from_ = __import__("transformers.models.bert.modeling_bert", fromlist=["BertLayer"]) if hf() else None
    config = hf().BertConfig(hidden_size=D, num_attention_heads=H, intermediate_size=48, attn_implementation="eager")
    theirs = randomise(from_.BertLayer(config))
    names = {
        "attn.fn.qkv": "attention.self.query+attention.self.key+attention.self.value",
        "attn.fn.proj": "attention.output.dense", "attn.norm": "attention.output.LayerNorm",
        "mlp.fn.fc1": "intermediate.dense", "mlp.fn.fc2": "output.dense", "mlp.norm": "output.LayerNorm",
    }  # fmt: skip
    state = linears(theirs.state_dict(), {
        f"{a}.{p}": "+".join(f"{n}.{p}" for n in b.split("+")) for a, b in names.items() for p in ("weight", "bias")
    })  # fmt: skip
    ours = copy(bert_block(D, H, hidden=48), state)
    valid = torch.arange(L)[None] < torch.tensor([[L], [4]])
    x = tokens().requires_grad_()
    reference = theirs(x, attention_mask=torch.where(valid, 0.0, -1e30).double()[:, None, None])
    reference = reference[0] if isinstance(reference, tuple) else reference
    out = ours(x, Context(mask=AttnMask(valid=valid)))
    assert gap(out, reference) < 1e-12 and same_gradients(ours, theirs, x, out, reference) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_t5_block(gated, cross):
    from_ = __import__("transformers.models.t5.modeling_t5", fromlist=["T5Block"]) if hf() else None
    config = hf().T5Config(
        d_model=D, d_kv=12, d_ff=48, num_heads=H, is_decoder=cross, attn_implementation="eager",
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    theirs = randomise(from_.T5Block(config, has_relative_attention_bias=True, layer_idx=0))
    last = "layer.2" if cross else "layer.1"
    attn, feed = "layer.0.SelfAttention", f"{last}.DenseReluDense"
    names = {
        "attn.fn.qkv.weight": f"{attn}.q.weight+{attn}.k.weight+{attn}.v.weight",
        "attn.fn.proj.weight": f"{attn}.o.weight", "attn.norm.weight": "layer.0.layer_norm.weight",
        "mlp.norm.weight": f"{last}.layer_norm.weight",
    }  # fmt: skip
    if cross:
        names |= {
            "cross.fn.q.weight": "layer.1.EncDecAttention.q.weight",
            "cross.fn.kv.weight": "layer.1.EncDecAttention.k.weight+layer.1.EncDecAttention.v.weight",
            "cross.fn.proj.weight": "layer.1.EncDecAttention.o.weight",
            "cross.norm.weight": "layer.1.layer_norm.weight",
        }
    inner = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"fc1": "wi", "fc2": "wo"}
    names |= {f"mlp.fn.{a}.weight": f"{feed}.{b}.weight" for a, b in inner.items()}
    ours = copy(t5_block(D, H, head_dim=12, hidden=48, gated=gated, cross=cross), linears(theirs.state_dict(), names))
    bias = RelativeBias(H, bidirectional=not cross).double()
    bias.load_state_dict({"weight": theirs.state_dict()[f"{attn}.relative_attention_bias.weight"]})
    x, memory = tokens().requires_grad_(), tokens(5) * 0.5
    seen = causal_mask() if cross else torch.zeros(1, 1, L, L, dtype=torch.float64)
    more = {"encoder_hidden_states": memory} if cross else {}
    reference = theirs(x, attention_mask=seen, **more)
    reference = reference[0] if isinstance(reference, tuple) else reference
    out = ours(x, Context(mask=CAUSAL if cross else FULL, bias=bias(L, L), memory=memory))
    assert gap(out, reference) < 2e-6  # their norm works in float32 at any precision
    assert same_gradients(ours, theirs, x, out, reference) < 5e-6


@pytest.mark.parametrize("cross", [False, True])
def test_transformer_block(cross):
    """torch's own layer is the one of 2017: norms after the sums, ReLU."""
    make = nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer
    theirs = randomise(make(D, H, 48, dropout=0.0, batch_first=True))
    names = {"attn.fn.qkv": "self_attn.in_proj_", "attn.fn.proj": "self_attn.out_proj.", "attn.norm": "norm1."}
    names |= {"mlp.fn.fc1": "linear1.", "mlp.fn.fc2": "linear2.", "mlp.norm": "norm3." if cross else "norm2."}
    names |= {"cross.fn.proj": "multihead_attn.out_proj.", "cross.norm": "norm2."} if cross else {}
    given = theirs.state_dict()
    state = {f"{a}.{p}": given[b + p] for a, b in names.items() for p in ("weight", "bias")}
    for p in ("weight", "bias") if cross else ():
        both = given[f"multihead_attn.in_proj_{p}"]
        state[f"cross.fn.q.{p}"], state[f"cross.fn.kv.{p}"] = both[:D], both[D:]
    ours = copy(transformer_block(D, H, hidden=48, cross=cross), state)
    x, memory, mask = tokens(), tokens(5) * 0.5, causal_mask()[0, 0]
    reference = theirs(x, memory, tgt_mask=mask) if cross else theirs(x, src_mask=mask)
    assert gap(ours(x, Context(mask=CAUSAL, memory=memory)), reference) < 1e-12


@pytest.mark.parametrize("recipe", [gpt_block, llama_block, bert_block, transformer_block, t5_block])
def test_dropout_acts_in_training_alone(recipe):
    torch.manual_seed(0)
    block, x, ctx = recipe(D, H, dropout=0.5), tokens().float(), Context(mask=CAUSAL)
    assert not torch.equal(block(x, ctx), block(x, ctx))
    block.eval()
    assert torch.equal(block(x, ctx), block(x, ctx))
    still = recipe(D, H).eval()
    still.load_state_dict(block.state_dict())
    assert torch.equal(block(x, ctx), still(x, ctx))


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_alibi_slopes_equal_blooms(heads):
    from_ = __import__("transformers.models.bloom.modeling_bloom", fromlist=["build_alibi_tensor"]) if hf() else None
    theirs = from_.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, atol=1e-7, rtol=1e-6)
    # under a causal softmax their slope * j and our -slope * (i - j) are the same, up to a constant per query
    q, k = torch.randn(2, 1, heads, 5, 8, dtype=torch.float64)
    columns = (theirs[:, None] * torch.arange(5))[None, :, None].double()
    ours = attention_map(q, k, CAUSAL, 0.3, bias=alibi_bias(heads, 5, 5))
    assert gap(ours, attention_map(q, k, CAUSAL, 0.3, bias=columns.expand(1, heads, 5, 5))) < 1e-7


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20)])
def test_t5_buckets_equal_transformers(bidirectional, buckets, far):
    from_ = __import__("transformers.models.t5.modeling_t5", fromlist=["T5Attention"]) if hf() else None
    offset = torch.arange(-300, 301)
    theirs = from_.T5Attention._relative_position_bucket(offset, bidirectional, buckets, far)
    assert torch.equal(RelativeBias(2, buckets, far, bidirectional).bucket(offset), theirs)


@pytest.mark.parametrize("bias", [RelativeBias(H, 8, 20), functools.partial(alibi_bias, H)], ids=["t5", "alibi"])
def test_a_bias_of_the_last_queries_is_the_last_rows(bias):
    assert bias(9, 9).shape == (1, H, 9, 9)
    assert torch.equal(bias(2, 9), bias(9, 9)[:, :, -2:])
    assert not torch.equal(bias(9, 9)[:, 0], bias(9, 9)[:, 1])


@pytest.mark.parametrize("mask", [FULL, CAUSAL, AttnMask(causal=True, valid=torch.arange(L)[None] > 2)])
@pytest.mark.parametrize("length", [1, L])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_kernels_agree_on_a_bias(mask, length, kv_heads):
    torch.manual_seed(0)
    grads = []
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((H, length), (kv_heads, L), (kv_heads, L)))
    bias = torch.randn(1, H, length, L, dtype=torch.float64)
    whole = k.repeat_interleave(H // kv_heads, 1), v.repeat_interleave(H // kv_heads, 1)
    scores = q @ whole[0].mT * 0.7 + bias
    allowed = mask.dense(length, L, "cpu")
    weights = scores if allowed is None else scores.masked_fill(~allowed, -1e30)
    written = weights.softmax(-1) @ whole[1]
    if mask.valid is not None:  # the first queries see nobody
        written = written * (allowed.any(-1, keepdim=True))
    for kernel in ("eager", "sdpa", "auto"):
        leaf = bias.clone().requires_grad_()
        out = attend(q, k, v, mask, bias=leaf, scale=0.7, kernel=kernel)
        assert gap(out, written) < 1e-12
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].abs().max() > 1e-3 and all(gap(g, grads[0]) < 1e-12 for g in grads)


def test_a_kernel_without_bias_says_so():
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UserError, match="takes no score bias"):
        attend(q, q, q, bias=torch.zeros(1, 1, 2, 2), kernel="flex")


def test_a_bias_forbids_leaving_out_positions():
    assert not bert_block(D, H).narrows(Context(bias=torch.zeros(1, H, L, L)))
    assert bert_block(D, H).narrows(Context())


def test_heads_of_any_width_and_the_scale():
    attention = randomise(Attention(D, H, head_dim=20, scale=1.0))
    assert attention.qkv.weight.shape == (3 * 80, D) and attention.proj.weight.shape == (D, 80)
    scaled = Attention(D, H, head_dim=20).double()
    scaled.load_state_dict(attention.state_dict())
    with torch.no_grad():
        scaled.qkv.weight[:80] *= 20**0.5
        scaled.qkv.bias[:80] *= 20**0.5
    out = attention(tokens(), Context())
    assert gap(out, scaled(tokens(), Context())) < 1e-12
    weigh(out).backward()
    assert all(g.abs().max() > 0 for g in gradients(attention).values())
