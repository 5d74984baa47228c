import pytest
import torch
import torch.nn.functional as F

from ssl_lab.nn import linear as module
from ssl_lab.nn.linear import Linear, linear

onednn = pytest.mark.skipif(not module._AVAILABLE, reason="this processor has no AVX-512, or torch no oneDNN")


def results(function, x, weight, bias):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@onednn
@pytest.mark.parametrize("mkl_is_slow", [False, True])
@pytest.mark.parametrize("shape", [(5, 24, 7), (3, 8, 40), (1, 16, 16)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_onednn_is_the_same_map(shape, lead, mkl_is_slow, monkeypatch):
    rows, dim, width = shape
    monkeypatch.setattr(module, "_SMALLEST", 1)
    monkeypatch.setattr(module, "MKL_IS_SLOW", mkl_is_slow)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, rows, dim, generator=generator)
    weight, bias = torch.randn(width, dim, generator=generator), torch.randn(width, generator=generator)
    ours, theirs = results(linear, x, weight, bias), results(F.linear, x, weight, bias)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    calls = []
    monkeypatch.setattr(module, "_product", lambda *_: calls.append(1) or torch.zeros(*lead, rows, width))
    linear(x, weight, bias)
    assert calls


@pytest.mark.parametrize(
    ("name", "avx_vnni", "half"),
    [("AMD EPYC 9575F", True, True), ("AMD EPYC 9654", False, False), ("Intel(R) Xeon(R)", True, False)],
)
def test_mkl_is_slow_where_it_uses_half_of_amds_vectors(name, avx_vnni, half):
    assert module._half_used({"cpu_name": name, "avx_vnni": avx_vnni}) is half and not module._half_used({})


@onednn
def test_strides_do_not_matter(monkeypatch):
    monkeypatch.setattr(module, "_SMALLEST", 1)
    x, weight = torch.randn(6, 4, 8).transpose(0, 1), torch.randn(8, 12).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)


@onednn
@pytest.mark.parametrize("slow", [False, True])
def test_onednn_never_sees_gradients_with_gaps(slow, monkeypatch):
    monkeypatch.setattr(module, "_SMALLEST", 1)
    monkeypatch.setattr(module, "MKL_IS_SLOW", slow)
    product, seen = module._product, []

    def dense(x, weight, bias=None):
        seen.append([x.is_contiguous() or x.t().is_contiguous(), weight.is_contiguous() or weight.t().is_contiguous()])
        return product(x, weight, bias)

    monkeypatch.setattr(module, "_product", dense)
    x = torch.randn(6, 16)[:, :8].requires_grad_()
    weights = [torch.randn(12, 8, requires_grad=True) for _ in range(2)]
    (
        linear(x.clone(), weights[0]).sum() + torch.cat([linear(x.clone(), w) for w in weights], -1).square().sum()
    ).backward()
    assert len(seen) == (3 * 3 if slow else 3 * 2) and all(map(all, seen))
    gaps = torch.randn(12, 16)[:, :8]
    torch.testing.assert_close(linear(x, gaps), F.linear(x, gaps))
    assert len(seen) == (3 * 3 if slow else 3 * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_and_small_maps_are_torchs_own(dtype):
    x, layer = torch.randn(3, 8, dtype=dtype), Linear(8, 4).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@onednn
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("given", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_bfloat16_is_the_same_map_without_a_pass_for_the_bias(given, held, biased, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(40, 96, bias=biased).to(getattr(torch, held))
    x, weigh = torch.randn(2, 50, 40, generator=generator).to(getattr(torch, given)), torch.linspace(-1, 1, 96)
    monkeypatch.setattr(module, "F", None)  # torch's own is not asked
    found = []
    for own in (True, False):
        layer.zero_grad()
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=held == "float32"):
            out = layer(y) if own else F.linear(y, layer.weight, layer.bias)
        (out.float() * weigh).square().mean().backward()
        found.append([out.detach(), y.grad, *(p.grad.clone() for p in layer.parameters())])
    assert found[0][0].dtype == torch.bfloat16
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2**-7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=held == "float32"):
        assert torch.equal(layer(x), found[0][0])


@onednn
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_autocast_leaves_or_narrows_otherwise_is_torchs_own(dtype):
    x, layer = torch.randn(2, 50, 40), Linear(40, 96)
    with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16):
        given, weight, bias = (t if dtype == torch.float16 else t.to(dtype) for t in (x, layer.weight, layer.bias))
        assert torch.equal(linear(given, weight, bias), F.linear(given, weight, bias))


def test_an_empty_batch_gives_an_empty_result():
    layer = Linear(8, 4)
    out = layer(torch.zeros(0, 8, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 4) and not layer.weight.grad.any()


def test_frozen_parts_get_no_gradient():
    x, layer = torch.randn(3, 8, requires_grad=True), Linear(8, 4).requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
