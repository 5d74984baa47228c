"""Float8: which maps are converted, and that outputs, gradients and steps of every method stay close.

On a CPU the products are emulated, or computed by definition in the place of the operator that only GPUs have.
"""

import copy
from dataclasses import replace

import pytest
import torch
from test_methods import METHODS, batch, build
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.nn.adapters import Adapters
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, Residual
from ssl_lab.nn.float8 import Float8, learning, ordinary_
from ssl_lab.nn.linear import Linear
from ssl_lab.nn.lora import LoRA
from ssl_lab.nn.relative import RelativeAttention
from ssl_lab.nn.teacher import follow_, follower
from ssl_lab.rng import seed_all
from ssl_lab.train.parallel import Parallel

pytest.importorskip("torchao")
TENSORWISE = Float8("tensorwise", emulate=True)
RECIPES = [TENSORWISE, Float8("rowwise", emulate=True)]


def tiny(dim=64, **kwargs) -> ViT:
    torch.manual_seed(0)
    return ViT(dim, 2, 4, image_size=32, patch_size=8, **kwargs)


def converted(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if type(module).__name__ == "Float8Map"}


def taught(network, images, **kwargs):
    """Output and gradients of a loss that no normalisation makes constant."""
    network.zero_grad()
    out = network(images, **kwargs)
    out = torch.cat([out.prefix, out.tokens], 1)
    goal = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * goal).sum().backward()
    return out.float(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def error(found, exact) -> float:
    return float(((found - exact).norm() / exact.norm()).detach())


def test_maps_of_blocks_alone_are_converted_and_keep_their_names():
    vit = tiny()
    keys, weights = list(vit.state_dict()), {n: id(p) for n, p in vit.named_parameters()}
    names = ("attn.fn.qkv", "attn.fn.proj", "mlp.fn.fc1", "mlp.fn.fc2")
    inside = {f"blocks.{i}.{name}" for i in (0, 1) for name in names}
    assert TENSORWISE.told(vit) == "tensorwise, 8 of 8 linear maps in blocks"
    TENSORWISE(vit)
    assert converted(vit) == inside
    assert list(vit.state_dict()) == keys and {n: id(p) for n, p in vit.named_parameters()} == weights
    TENSORWISE(vit)  # Lightning configures a model twice under an average
    assert converted(vit) == inside


def test_a_decoder_is_converted_but_for_embedding_and_head():
    method = build("causal_lm")
    TENSORWISE(method)
    assert converted(method) == {name for name, module in method.named_modules() if isinstance(module, Linear)} - {
        name for name, module in method.named_modules() if type(module) is Linear
    }
    assert converted(method) and all(".blocks." in name for name in converted(method))
    assert not any(type(m) is Linear for m in method.decoder.blocks.modules())


def test_what_cannot_or_should_not_be_converted_stays():
    odd = tiny(40)  # 120 outputs of qkv, 40 inputs everywhere: 160 is the only multiple of 16
    assert TENSORWISE.told(odd) == "tensorwise, 0 of 8 linear maps in blocks"
    TENSORWISE(odd)
    assert not converted(odd)

    frozen = tiny()
    frozen.blocks[0].requires_grad_(False)
    TENSORWISE(frozen)
    assert len(converted(frozen)) == 4 and all("blocks.1" in name for name in converted(frozen))

    tuned = nn.ModuleDict({"encoder": tiny()})
    LoRA(parts=["encoder"], also=["blocks.1.mlp.*"])(tuned)
    TENSORWISE(tuned)
    assert converted(tuned) == {"encoder.blocks.1.mlp.fn.fc1", "encoder.blocks.1.mlp.fn.fc2"}

    beside = nn.ModuleDict({"encoder": tiny()})
    Adapters(parts=["encoder"])(beside)
    assert not learning(beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("float8", RECIPES, ids=lambda f: f.recipe)
def test_output_and_gradients_are_those_of_the_network_up_to_float8(float8, dtype):
    plain, images = tiny(), torch.randn(3, 3, 32, 32)
    eight = copy.deepcopy(plain)
    float8(eight)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, grads = taught(plain, images)
        near, close = taught(eight, images)
    assert 1e-3 < error(near, out) < 0.03
    assert grads.keys() == close.keys()
    for name, grad in grads.items():
        assert close[name].dtype == torch.float32
        assert error(close[name], grad) < 0.15, name
    assert all(error(close[f"{name}.weight"], grads[f"{name}.weight"]) > 0.01 for name in converted(eight))


def test_activation_checkpointing_changes_no_bit():
    vit, images = tiny(), torch.randn(2, 3, 32, 32)
    TENSORWISE(vit)
    _, grads = taught(vit, images)
    Parallel(checkpoint_blocks=True, float8=TENSORWISE)(vit)
    _, again = taught(vit, images)
    assert all(torch.equal(again[name], grad) for name, grad in grads.items())


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    vit, images = tiny(), torch.randn(2, 3, 32, 32)
    eight = copy.deepcopy(vit)
    TENSORWISE(eight)
    Parallel(compile=True, float8=TENSORWISE)(vit)
    (out, grads), (here, there) = taught(eight, images), taught(vit, images)
    torch.testing.assert_close(here, out, atol=1e-4, rtol=1e-4)
    for name, grad in grads.items():
        assert error(there[name], grad) < 1e-2, name


def test_without_gradients_it_is_an_ordinary_map():
    plain, images = tiny(), torch.randn(2, 3, 32, 32)
    eight = copy.deepcopy(plain)
    TENSORWISE(eight)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(eight(images).tokens, plain(images).tokens)
    assert not torch.equal(eight(images).tokens, plain(images).tokens)


def test_parts_of_the_outputs_are_right():
    torch.manual_seed(0)
    attention = Attention(64, 4)
    x, add = torch.randn(2, 5, 64), torch.randn(192)
    whole = attention.qkv(x)
    eight = copy.deepcopy(attention)
    TENSORWISE(holder := Block(attn=Residual(64, eight)))
    assert converted(holder) == {"attn.fn.qkv", "attn.fn.proj"}
    torch.testing.assert_close(eight.qkv.rows(x, 64), whole[..., 64:])  # a part is not rounded to 8 bits
    torch.testing.assert_close(eight.qkv.rows(x, 8, 24), whole[..., 8:24])
    assert 1e-3 < error(eight.qkv.rows(x, add=add), whole + add) < 0.05
    torch.testing.assert_close(eight.qkv.rows(x, add=add), eight.qkv(x) + add)


def test_leaving_out_unwanted_positions_stays_close():
    plain, images = tiny(), torch.randn(3, 3, 32, 32)
    eight = copy.deepcopy(plain)
    TENSORWISE(eight)
    out, grads = taught(plain, images, tokens=False)
    near, close = taught(eight, images, tokens=False)
    assert near.shape == (3, 1, 64) and 1e-3 < error(near, out) < 0.1
    assert all(error(close[name], grad) < 0.2 for name, grad in grads.items())


def test_relative_attention_asks_for_all_rows_with_a_bias():
    torch.manual_seed(0)
    block = Block(attn=Residual(64, RelativeAttention(64, 4)))
    eight, x = copy.deepcopy(block), torch.randn(2, 7, 64)
    TENSORWISE(eight)
    assert len(converted(eight)) == 3
    assert 1e-4 < error(eight(x, Context()), block(x, Context())) < 0.03


def by_definition(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """`torch._scaled_mm`, with what a GPU asks of its operands; scales are numbers, or of rows and columns."""
    assert a.shape[1] == b.shape[0] and a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0, (a.shape, b.shape)
    assert a.stride(1) == 1 and b.stride(0) == 1, "row-major times column-major"
    assert {a.dtype, b.dtype} in ({torch.float8_e4m3fn}, {torch.float8_e4m3fn, torch.float8_e5m2})
    assert scale_a.numel() in (1, a.shape[0]) and scale_b.numel() in (1, b.shape[1])
    assert bias is None and scale_result is None
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)


@pytest.mark.parametrize("float8", RECIPES, ids=lambda f: f.recipe)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_product_of_a_gpu_is_asked_for_as_it_can_be(monkeypatch, float8, size):
    """17 tokens to a sample: the inner width of a weight's gradient is a multiple of 16 for none but 16 samples."""
    calls = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: calls.append(a[0].shape) or by_definition(*a, **k))
    emulated, images = tiny(), torch.randn(size, 3, 32, 32)
    real = copy.deepcopy(emulated)
    float8(emulated)
    replace(float8, emulate=False)(real)
    out, grads = taught(emulated, images)
    assert not calls
    near, close = taught(real, images)
    assert len(calls) == 3 * 8
    rough = float8.recipe == "rowwise"  # its results are rounded to bfloat16, and then to other numbers of 8 bits
    assert error(near, out) < (2e-2 if rough else 1e-5)
    assert all(error(close[name], grad) < (0.15 if rough else 0.02) for name, grad in grads.items())


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_what_is_emulated(recipe, compiled):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU that multiplies in float8")
    emulated, images = tiny().cuda(), torch.randn(3, 3, 32, 32, device="cuda")
    real = copy.deepcopy(emulated)
    Float8(recipe, emulate=True)(emulated)
    Parallel(compile=compiled, float8=Float8(recipe))(real)
    goal = torch.randn(3, 16, 64, device="cuda")
    found = []
    for network in (emulated, real):
        with torch.autocast("cuda", torch.bfloat16):
            tokens = network(images).tokens
        (tokens.float() * goal).sum().backward()
        found.append((tokens.float(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}))
    (out, grads), (near, close) = found
    assert error(near, out) < 0.02
    assert all(error(close[name], grad) < 0.15 for name, grad in grads.items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step(name):
    method, plain = build(name).train(), build(name).train()
    keys, frozen = list(method.state_dict()), {n for n, p in method.named_parameters() if not p.requires_grad}
    found = []
    TENSORWISE(method)
    assert not frozen or all(f"{layer}.weight" not in frozen for layer in converted(method))
    for each in (method, plain):
        seed_all(0)
        loss = each.step(batch(), 0.5).loss
        loss.backward()
        found.append((float(loss.detach()), {n for n, p in each.named_parameters() if p.grad is not None}))
        each.after_step(0.5)
    (loss, reached), (exact, all_) = found
    assert loss == pytest.approx(exact, rel=0.4) and reached == all_
    assert list(method.state_dict()) == keys and (converted(method) or not learning(plain))


def test_a_teacher_is_not_converted_and_follows_as_before():
    student = tiny()
    pair = nn.ModuleDict({"student": student, "teacher": follower(student)})
    before = copy.deepcopy(pair["teacher"])
    TENSORWISE(pair)
    assert len(converted(pair)) == 8 and not converted(pair["teacher"])
    with torch.no_grad():
        for p in pair["student"].parameters():
            p.add_(1.0)
    follow_(pair["teacher"], pair["student"], 0.9)
    for name, value in pair["teacher"].named_parameters():
        start = before.get_parameter(name)
        torch.testing.assert_close(value, start + 0.1 if student.get_parameter(name).requires_grad else start)


def test_a_state_goes_either_way():
    plain, eight = tiny(), tiny()
    TENSORWISE(eight)
    with torch.no_grad():
        for p in eight.parameters():
            p.mul_(1.5)
    plain.load_state_dict(eight.state_dict())
    other = tiny()
    TENSORWISE(other)
    other.load_state_dict(plain.state_dict())
    assert all(torch.equal(other.state_dict()[n], v) for n, v in eight.state_dict().items())


def test_it_can_be_undone():
    vit = tiny()
    TENSORWISE(vit)
    images = torch.randn(2, 3, 32, 32)
    assert ordinary_(vit) is vit and not converted(vit)
    assert torch.equal(vit(images).tokens, tiny()(images).tokens)
    TENSORWISE(vit)
    assert len(converted(vit)) == 8
