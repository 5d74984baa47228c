"""Every kernel equals `eager`, in value and gradient, for every mask kind it supports."""

import pytest
import torch

from ssl_lab.errors import UserError
from ssl_lab.nn import attend as door
from ssl_lab.nn.attend import KERNELS, attend, choose, supports
from ssl_lab.nn.kernels import products
from ssl_lab.nn.mask import CAUSAL, FULL, AttnMask

B, H, L, DH = 2, 4, 12, 16
VALID = torch.arange(L)[None] < torch.tensor([[L], [7]])
SEGMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 4 + [2] * 5])
MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "valid": AttnMask(valid=VALID),
    "causal_valid": AttnMask(causal=True, valid=VALID),
    "nobody": AttnMask(valid=torch.zeros(B, L, dtype=torch.bool)),
    "segments": AttnMask(segments=SEGMENTS),
    "causal_segments": AttnMask(causal=True, segments=SEGMENTS),
    "window": AttnMask(causal=True, window=3),
    "both_sides": AttnMask(window=3),
    "longformer": AttnMask(window=2, everyone=torch.arange(L)[None] == torch.tensor([[0], [5]]), valid=VALID),
    "sinks": AttnMask(causal=True, window=3, everyone=torch.arange(L)[None].expand(B, L) < 2),
    "prefix": AttnMask(causal=True, prefix=torch.tensor([4, 0])),
    "prefix_window_valid": AttnMask(causal=True, prefix=torch.tensor([4, 2]), window=4, valid=VALID),
}


def tensors(kv_heads: int = H, length: int = L, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, length, DH), (B, kv_heads, L, DH), (B, kv_heads, L, DH)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def naive(q, k, v, mask):
    """Double loop over queries and keys, straight from the definition of the mask."""
    out = torch.zeros_like(q)
    allowed = torch.zeros(B, L, L, dtype=torch.bool)
    for b in range(B):
        for i in range(L):
            for j in range(L):
                ok = mask.window is None or abs(i - j) < mask.window
                ok = ok or (mask.everyone is not None and bool(mask.everyone[b, i] or mask.everyone[b, j]))
                if mask.causal:
                    ok = ok and j <= i
                    ok = ok or (mask.prefix is not None and j < int(mask.prefix[b]))
                if mask.valid is not None:
                    ok = ok and bool(mask.valid[b, j])
                if mask.segments is not None:
                    ok = ok and bool(mask.segments[b, i] == mask.segments[b, j])
                allowed[b, i, j] = ok
            for h in range(H):
                keys = allowed[b, i].nonzero()[:, 0]
                if len(keys):
                    w = (k[b, h, keys] @ q[b, h, i] * DH**-0.5).softmax(0)
                    out[b, h, i] = w @ v[b, h, keys]
    return out


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_eager_is_the_definition(mask):
    q, k, v = (t.detach() for t in tensors())
    torch.testing.assert_close(attend(q, k, v, mask, kernel="eager"), naive(q, k, v, mask), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in ("eager", "flex")])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_kernels_equal_eager(kernel, mask, kv_heads):
    if reason := supports(kernel, dtype=torch.float64, head_dim=DH, mask=mask):
        pytest.skip(reason)
    if kernel == "flash" and kv_heads != H:
        pytest.skip("torch's CPU flash kernel takes as many key as query heads")
    ours, theirs = tensors(kv_heads), tensors(kv_heads)
    weight = torch.randn(B, H, L, DH, dtype=torch.float64)
    a, b = attend(*ours, mask, kernel=kernel), attend(*theirs, mask, kernel="eager")
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flex_equals_eager(mask):
    q, k, v = (t.detach().float() for t in tensors())
    with torch.no_grad():
        out = attend(q, k, v, mask, kernel="flex")
        torch.testing.assert_close(out, attend(q, k, v, mask, kernel="eager"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_scores_made_some_samples_at_a_time_are_the_same(mask, biased, monkeypatch):
    bias = torch.randn(1, H, L, L, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) if biased else None
    found = []
    for limit in (1 << 24, 1):
        monkeypatch.setattr(products, "AT_A_TIME", limit)
        leaves = [*tensors(kv_heads=2), *([bias.clone().requires_grad_()] if biased else [])]
        out = attend(*leaves[:3], mask, bias=leaves[3] if biased else None, kernel="eager")
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(found[0], found[1])
    assert "Cat" in str(out.grad_fn) and "Training" in str(found[0][0].grad_fn)
    if biased:  # a bias that nobody needs afterwards, as relative attention gives it
        leaves = [*tensors(kv_heads=2), bias.clone().requires_grad_()]
        out = attend(*leaves[:3], mask, bias=leaves[3].expand(B, -1, -1, -1) * 1, overwrite_bias=True, kernel="eager")
        torch.testing.assert_close([out, *torch.autograd.grad(out.square().sum(), leaves)], found[0])


def test_padding_of_as_many_rows_as_queries_is_each_rows_own():
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(L, H, L, DH, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = AttnMask(valid=torch.arange(L)[None] < torch.arange(1, L + 1)[:, None])
    outs = [attend(q, k, v, mask, kernel=kernel) for kernel in ("eager", "sdpa")]
    weight = torch.randn(outs[0].shape, generator=g, dtype=torch.float64)
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in outs]
    assert torch.allclose(*outs, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_queries_are_the_last_positions(kernel):
    """With a cache the L queries are the last of S: the same rows as in the whole."""
    q, k, v = (t.detach() for t in tensors())
    whole = attend(q, k, v, CAUSAL, kernel=kernel)
    torch.testing.assert_close(attend(q[:, :, -3:], k, v, CAUSAL, kernel=kernel), whole[:, :, -3:])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("last", [1, 5])
def test_every_mask_holds_for_the_last_queries(mask, last):
    """Also where a cache has dropped keys that nobody sees any more."""
    whole = mask.dense(L, L, "cpu")
    whole = torch.ones(1, 1, L, L, dtype=torch.bool) if whole is None else whole.expand(-1, -1, L, -1)
    part = mask.dense(last, L, "cpu")
    part = torch.ones(1, 1, last, L, dtype=torch.bool) if part is None else part
    expected = whole[:, :, -last:] if mask.causal else part.expand(len(whole), 1, last, L)
    assert torch.equal(part.expand_as(expected), expected)
    if mask.causal and mask.window and mask.prefix is None and mask.everyone is None:
        size = mask.window - 1 + last
        kept = mask.dense(last, size, "cpu")
        kept = torch.ones(1, 1, last, size, dtype=torch.bool) if kept is None else kept
        assert torch.equal(kept.expand_as(expected[..., -size:]), expected[..., -size:])
        assert not expected[..., :-size].any()


def test_an_impossible_kernel_says_why():
    q, k, v = tensors()
    with pytest.raises(UserError, match="CUDA only"):
        attend(q, k, v, kernel="cudnn")
    with pytest.raises(UserError, match="no such kernel"):
        attend(q, k, v, kernel="flesh")
    with pytest.raises(UserError, match="no backward on CPU"):
        attend(q, k, v, kernel="flex")


def test_auto_is_a_fixed_rule(monkeypatch):
    short, photo, long, thin = (torch.zeros(1, 3, *shape) for shape in ((50, 64), (197, 64), (513, 64), (197, 16)))
    for slow, training, scoring in ((True, "sdpa", "sdpa"), (False, "eager", "sdpa")):
        monkeypatch.setattr(door, "MKL_IS_SLOW", slow)
        assert choose(photo, photo, FULL) == training
        with torch.no_grad():
            assert choose(short, short, FULL) == "eager" and choose(photo, photo, FULL) == scoring
        assert choose(short, short, FULL) == "eager"
        assert choose(long, long, FULL) == choose(thin, thin, FULL) == "sdpa"
        assert choose(photo.bfloat16(), photo.bfloat16(), FULL) == "eager"


def test_half_precision_softmax_is_computed_in_float32():
    q, k, v = tensors(dtype=torch.bfloat16)
    exact = attend(*(t.detach().double() for t in (q, k, v)), kernel="eager")
    torch.testing.assert_close(attend(q, k, v, kernel="eager").double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "eager"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gpu_kernels_equal_eager(kernel, mask):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := supports(kernel, dtype=torch.bfloat16, device="cuda", head_dim=64, mask=mask):
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(B, H, L, 64, generator=generator, device="cuda").bfloat16() for _ in range(3))
    moved = AttnMask(
        **{f: t.cuda() if isinstance(t := getattr(mask, f), torch.Tensor) else t for f in mask.__dataclass_fields__}
    )
    out = attend(q, k, v, moved, kernel=kernel)
    torch.testing.assert_close(out, attend(q, k, v, moved, kernel="eager"), atol=2e-2, rtol=2e-2)
