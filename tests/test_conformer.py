"""Conformer: relative attention, block and convolution equal the references; padding and the future change nothing."""

import functools

import pytest
import torch
import torch.nn.functional as F
from parity import gap, gradients, randomise, weigh
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssl_lab.backbones.conformer import Conformer
from ssl_lab.errors import UserError
from ssl_lab.nn import linear, relative
from ssl_lab.nn.block import Context
from ssl_lab.nn.conv import ConvModule, ConvSubsampling, FrameNorm, depthwise
from ssl_lab.nn.kernels import products
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.prefix import Prefix
from ssl_lab.nn.recipes import conformer_block
from ssl_lab.nn.relative import RelativeAttention, position_bias, relative_waves
from ssl_lab.nn.rope import rope_1d

DIM, HEADS, KERNEL = 16, 4, 5
VALID = torch.arange(9) < torch.tensor([9, 5, 0])[:, None]
SMALL_CONV = functools.partial(ConvModule, kernel_size=KERNEL)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(positions):
    from transformers import Wav2Vec2ConformerConfig

    cfg = Wav2Vec2ConformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=4 * DIM, position_embeddings_type=positions,
        conv_depthwise_kernel_size=KERNEL, hidden_act="swish", hidden_dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, conformer_conv_dropout=0.0,
    )  # fmt: skip
    cfg._attn_implementation = "eager"
    return cfg


ATTENTION = {"proj": "linear_out", "distance": "linear_pos"}
BLOCK = {
    "mlp1.norm": "ffn1_layer_norm", "mlp1.fn.fc1": "ffn1.intermediate_dense", "mlp1.fn.fc2": "ffn1.output_dense",
    "attn.norm": "self_attn_layer_norm", "conv.norm": "conv_module.layer_norm",
    "conv.fn.expand": "conv_module.pointwise_conv1", "conv.fn.depthwise": "conv_module.depthwise_conv",
    "conv.fn.norm": "conv_module.batch_norm", "conv.fn.project": "conv_module.pointwise_conv2",
    "mlp2.fn.0": "ffn2_layer_norm", "mlp2.fn.1.fc1": "ffn2.intermediate_dense",
    "mlp2.fn.1.fc2": "ffn2.output_dense", "mlp2.norm": "final_layer_norm",
    **{f"attn.fn.{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
}  # fmt: skip


def in_our_names(theirs, ours, table, prefix=""):
    """Tensors of a state dict or of gradients, theirs, for every one of `ours`."""
    attention = "self_attn." if prefix else ""
    out = {}
    for name, tensor in ours.items():
        part, _, kind = name.rpartition(".")
        if part == f"{prefix}qkv":
            out[name] = torch.cat([theirs[f"{attention}linear_{each}.{kind}"] for each in "qkv"])
        elif kind in ("u", "v"):
            out[name] = theirs[f"{attention}pos_bias_{kind}"]
        else:
            out[name] = theirs[f"{table[part]}.{kind}"].reshape(tensor.shape)
    return out


def test_waves_are_those_of_transformers():
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

    table = theirs.Wav2Vec2ConformerRelPositionalEmbedding(config("relative"))(torch.zeros(1, 50, DIM))
    torch.testing.assert_close(relative_waves(50, DIM), table[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("lines", "size"), [(128, 1 << 24), (4, 1)])
def test_relative_attention_is_that_of_transformers(lines, size, monkeypatch):
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

    monkeypatch.setattr(relative, "_LINES", lines)
    monkeypatch.setattr(products, "AT_A_TIME", size)
    reference = randomise(theirs.Wav2Vec2ConformerSelfAttention(config("relative")), seed=3)
    ours = RelativeAttention(DIM, HEADS).double()
    ours.load_state_dict(in_our_names(reference.state_dict(), ours.state_dict(), ATTENTION))
    valid, waves = VALID[:2], relative_waves(9, DIM).double()
    x, y = noise(2, 9, DIM).requires_grad_(), noise(2, 9, DIM).requires_grad_()
    out = ours(x, Context(mask=AttnMask(valid=valid), waves=waves))
    hidden = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(~valid[:, None, None], float("-inf"))
    wanted = reference(y, attention_mask=hidden, relative_position_embeddings=waves[None])[0]
    assert gap(out, wanted) < 1e-12
    weigh(out).backward()
    weigh(wanted).backward()
    assert gap(x.grad, y.grad) < 1e-12
    there = in_our_names(gradients(reference), dict(ours.named_parameters()), ATTENTION)
    assert max(gap(grad, there[name]) for name, grad in gradients(ours).items()) < 1e-11
    assert gap(ours(x, Context(mask=AttnMask(valid=valid))), out) < 1e-12  # makes its own waves
    for kernel in ("eager", "sdpa"):
        ours.kernel = kernel
        assert gap(ours(x.detach(), Context(mask=AttnMask(valid=valid), waves=waves)), out) < 1e-12
    with pytest.raises(UserError, match="no score bias"):
        ours.kernel = "math"
        ours(x, Context(waves=waves))


def test_pieces_that_a_prefix_makes_larger_are_divided_again(monkeypatch):
    ours = RelativeAttention(DIM, HEADS).double()
    ours.prefix = Prefix(3, HEADS, DIM // HEADS).double()
    found, x = [], noise(4, 9, DIM)
    for limit in (1 << 24, 2 * HEADS * 9 * 9 * 8 + 8):  # bytes: two samples without the prefix, one with it
        monkeypatch.setattr(products, "AT_A_TIME", limit)
        leaf = x.clone().requires_grad_()
        out = ours(leaf, Context())
        found.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_position_bias_is_the_double_loop(length, monkeypatch):
    monkeypatch.setattr(relative, "_LINES", 3)
    q, far = noise(2, 3, length, 4).requires_grad_(), noise(3, 2 * length - 1, 4, seed=2).requires_grad_()
    wanted = torch.zeros(2, 3, length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            wanted[:, :, i, j] = (q[:, :, i] * far[:, length - 1 - i + j]).sum(-1)
    assert gap(position_bias(q, far), wanted) < 1e-13
    assert gap(relative._slid(q @ far.transpose(1, 2)), wanted) < 1e-13
    assert torch.autograd.gradcheck(position_bias, (q, far))


@pytest.mark.parametrize("head_by_head", [False, True])
def test_large_float32_products_are_the_same_head_by_head(head_by_head, monkeypatch):
    monkeypatch.setattr(linear, "MKL_IS_SLOW", head_by_head and linear._AVAILABLE)
    a, b, plus = noise(3, 40, 30).float(), noise(3, 30, 20, seed=2).float(), noise(3, 40, 20, seed=3).float()
    wanted = torch.baddbmm(plus, a, b, alpha=0.3)
    for smallest in (1, 1 << 20):
        monkeypatch.setattr(products, "_SMALLEST", smallest)
        torch.testing.assert_close(products.product(a, b, alpha=0.3, plus=plus), wanted)
        turned, gaps = a.transpose(1, 2).contiguous().transpose(1, 2), b.repeat(1, 1, 2)[..., :20]
        torch.testing.assert_close(products.product(turned, gaps, alpha=0.3, plus=plus), wanted)


@pytest.mark.parametrize(("length", "width", "turned"), [(144, 36, True), (143, 36, False), (160, 48, False)])
def test_a_large_transposed_product_in_bf16_is_the_same_the_other_way_round(length, width, turned):
    a, b = noise(3, 150, length).bfloat16().transpose(1, 2), noise(3, 150, width, seed=2).bfloat16()
    out = products.product(a, b, alpha=0.3)
    assert (out.stride(1) == 1) is turned
    torch.testing.assert_close(out.double(), 0.3 * a.double() @ b.double(), rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("positions", ["relative", "rotary", None])
def test_block_is_that_of_transformers(positions, training):
    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as theirs

    reference = randomise(theirs.Wav2Vec2ConformerEncoderLayer(config(positions)), seed=4)
    reference.conv_module.batch_norm.running_mean.normal_()
    if positions == "rotary":  # theirs turns x before the projections, so only what commutes with turning is comparable
        for name in "qk":
            a, b = (t.diag() for t in noise(2, DIM // HEADS // 2, seed=ord(name)))
            head = torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)])
            weights = {"weight": torch.block_diag(*[head] * HEADS), "bias": torch.zeros(DIM)}
            getattr(reference.self_attn, f"linear_{name}").load_state_dict(weights)
    kind = {"relative": "relative", "rotary": "rope", None: "none"}[positions]
    ours = conformer_block(DIM, HEADS, positions=kind, conv=functools.partial(SMALL_CONV, bias=False)).double()
    ours.load_state_dict(in_our_names(reference.state_dict(), ours.state_dict(), BLOCK, "attn.fn."))
    ours.train(training), reference.train(training)
    waves, rope = relative_waves(9, DIM).double(), rope_1d(torch.arange(9), DIM // HEADS)
    given = waves[None]
    if positions == "rotary":
        given = theirs.Wav2Vec2ConformerRotaryPositionalEmbedding(config(positions))(torch.zeros(1, 9, DIM)).double()
    x, y = noise(3, 9, DIM).requires_grad_(), noise(3, 9, DIM).requires_grad_()
    out = ours(x, Context(waves=waves, rope=rope if kind == "rope" else None))
    wanted = reference(y, relative_position_embeddings=given)
    assert gap(out, wanted) < (1e-6 if positions == "rotary" else 1e-12)
    weigh(out).backward()
    weigh(wanted).backward()
    assert gap(x.grad, y.grad) < (1e-5 if positions == "rotary" else 1e-11)
    if positions != "rotary":
        there = in_our_names(gradients(reference), dict(ours.named_parameters()), BLOCK, "attn.fn.")
        assert max(gap(grad, there[name]) for name, grad in gradients(ours).items()) < 1e-11
    for name, buffer in ours["conv"].fn.norm.named_buffers():
        torch.testing.assert_close(buffer, getattr(reference.conv_module.batch_norm, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_depthwise_is_conv1d(dtype):
    x, weight, bias = noise(2, 11, 6).to(dtype), noise(6, 1, 5, seed=2).to(dtype), noise(6, seed=3).to(dtype)
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wanted = [t.double().requires_grad_() for t in (x, weight, bias)]
    out = depthwise(*given, padding=2)
    reference = F.conv1d(wanted[0].transpose(1, 2), *wanted[1:], padding=2, groups=6).transpose(1, 2)
    weigh(out.double()).backward()
    weigh(reference).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert out.dtype == dtype and gap(out.double(), reference) < tolerance
    assert max(gap(a.grad.double(), b.grad) for a, b in zip(given, wanted, strict=True)) < tolerance


def test_frame_norm_sees_the_valid_frames_of_all_utterances_and_nothing_else():
    norm, reference = randomise(FrameNorm(DIM)).train(), nn.BatchNorm1d(DIM).double()
    reference.load_state_dict(norm.state_dict())
    x, y = noise(3, 9, DIM).requires_grad_(), noise(3, 9, DIM).requires_grad_()
    out, wanted = norm(x, VALID), reference(y[VALID])
    assert gap(out[VALID], wanted) < 1e-12
    weigh(out[VALID]).backward()
    weigh(wanted).backward()
    assert gap(x.grad, y.grad) < 1e-12 and float(x.grad[~VALID].abs().max()) == 0
    for theirs, ours in zip(reference.state_dict().values(), norm.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    for count in (0, 1):  # no statistics of so few: the running ones serve
        single = torch.arange(9).expand(3, 9) < torch.tensor([count, 0, 0])[:, None]
        wanted = norm.eval()(x)[single]
        assert gap(norm.train()(x, single)[single], wanted) < 1e-12 if count else True
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_recomputed_frames_do_not_count_twice():
    norm, other = FrameNorm(DIM).double().train(), FrameNorm(DIM).double().train()
    x = noise(3, 9, DIM).requires_grad_()
    weigh(checkpoint(norm, x, use_reentrant=False)).backward()
    weigh(other(x)).backward()
    assert gap(norm.running_var, other.running_var) == 0 and gap(norm.running_mean, other.running_mean) == 0


def test_a_token_sees_seven_frames():
    stem = ConvSubsampling(16, DIM, channels=4).double()
    for frames in (0, 1, 6, 7, 10, 11, 30):
        x = noise(1, frames, 16).requires_grad_()
        tokens, valid = stem(x)
        assert tokens.shape[1] == max(1, int(stem.tokens(torch.tensor(frames)))) == max(1, (frames - 3) // 4)
        assert int(valid.sum()) == max(0, (frames - 3) // 4)
    for token in range(int(valid.sum())):
        (grad,) = torch.autograd.grad(tokens[0, token].square().sum(), x, retain_graph=True)
        assert grad[0].abs().amax(1).nonzero()[:, 0].tolist() == list(range(4 * token, 4 * token + 7))


def small(positions="relative", *, norm="batch", causal=False, **more):
    front = LogMel(8000, 16, norm="global", mean=-5.0, std=4.0)
    conv = functools.partial(SMALL_CONV, norm=norm, causal=causal)
    block = functools.partial(conformer_block, conv=conv)
    stem = functools.partial(ConvSubsampling, channels=4)
    torch.manual_seed(0)
    model = Conformer(DIM, 2, HEADS, front=front, stem=stem, positions=positions, block=block, **more)
    return randomise(model)


SAMPLES = (6000, 3500, 1200, 700, 300)


def sound(samples=SAMPLES, padding=0):
    valid = torch.arange(max(samples) + padding) < torch.tensor(samples)[:, None]
    return noise(len(samples), 8000)[:, : valid.shape[1]], valid


@pytest.mark.parametrize(("norm", "training"), [("batch", False), ("layer", True)])
@pytest.mark.parametrize("positions", ["relative", "rope", "none"])
def test_a_batch_of_mixed_lengths_is_each_alone(positions, norm, training):
    model = small(positions, norm=norm).train(training)
    audio, valid = sound()
    out = model(audio, valid=valid)
    assert out.valid.sum(1).tolist() == [17, 9, 2, 1, 0] and bool(out.tokens.isfinite().all())
    for row, length in enumerate(SAMPLES[:4]):
        alone = model(audio[row : row + 1, :length])
        assert bool(alone.valid.all()) and gap(out.tokens[row][out.valid[row]], alone.tokens[0]) < 1e-11
        assert gap(out.pooled()[row], alone.pooled()[0]) < 1e-11
    assert float(out.pooled()[4].detach().abs().max()) == 0


def test_padding_changes_no_training_step_with_batch_norm():
    steps = []
    for padding in (0, 1700):
        model = small().train()
        audio, valid = sound(padding=padding)
        out = model(audio, valid=valid)
        seen = out.tokens[out.valid]
        weigh(seen).backward()
        steps.append([seen, *gradients(model).values(), *(b.double() for b in model.buffers())])
    assert max(gap(a, b) for a, b in zip(*steps, strict=True)) < 1e-10


def test_features_do_for_waveforms_and_masked_tokens_are_replaced():
    model = small()
    audio, valid = sound()
    out = model(audio, valid=valid, layers=(0, -1))
    features, frames = model.front(audio, valid)
    again = model(features, valid=frames)
    assert gap(again.tokens[out.valid], out.tokens[out.valid]) == 0 and torch.equal(again.valid, out.valid)
    assert out.hidden[-1] is not out.hidden[0] and gap(model.norm(out.hidden[-1]), out.tokens) == 0
    embedded, real = model.stem(audio, valid)
    mask, token = noise(*embedded.shape[:2], seed=5) > 0, noise(DIM, seed=6)
    replaced = model.contextualise(torch.where(mask[..., None], token, embedded), real)
    assert gap(model(audio, valid=valid, masked=(mask, token)).tokens, replaced.tokens) == 0
    assert model.seconds == 0.04
    with pytest.raises(UserError, match="mono waveforms"):
        model(features[..., :3])


@pytest.mark.parametrize("positions", ["relative", "rope"])
@pytest.mark.parametrize("history", [None, 4])
def test_with_chunks_the_future_changes_nothing(positions, history):
    model = small(positions, causal=True, chunk=3, history=history)
    audio = sound((6000,))[0]
    whole = model(audio).tokens
    for chunks in (1, 2, 4):
        samples = model.front.length + model.front.hop * (4 * (3 * chunks - 1) + 6)  # up to the last frame of the chunk
        part = model(audio[:, :samples]).tokens
        assert part.shape[1] == 3 * chunks and gap(part, whole[:, : 3 * chunks]) < 1e-11
    model.chunk = model.history = None
    assert gap(model(audio).tokens, whole) > 1e-3
    model.chunk = 100
    unlimited = model(audio).tokens
    model.chunk = None
    assert gap(model(audio).tokens, unlimited) < 1e-11


def test_chunks_are_masked_alike_by_every_kernel():
    mask = AttnMask(causal=True, chunk=4, valid=VALID)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    wanted = ((j // 4) <= (i // 4)) & VALID[:, None, None]
    assert torch.equal(mask.dense(9, 9, "cpu"), wanted)
    rule = mask.mask_mod(9, 9)
    assert all(torch.equal(rule(torch.tensor(b), torch.tensor(0), i, j), wanted[b, 0]) for b in range(3))
    assert not AttnMask(causal=True, chunk=4).plain


def test_bf16_steps_and_mistakes():
    model = small().float().train()
    audio, valid = sound()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(audio.float(), valid=valid)
    out.tokens[out.valid].float().square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    with pytest.raises(UserError, match="odd number"):
        ConvModule(DIM, 4)
    with pytest.raises(UserError, match="at least 8"):
        Conformer(DIM, 1, HEADS, chunk=8, history=4)
