"""FlashAttention-3 and -4 in the place of torch's flash kernel, by stand-ins: for one pass each, then put back."""

import pytest
import torch
from test_attend_packed import H, L, assert_equals_eager, tensors
from torch.nn import attention
from torch.utils.checkpoint import checkpoint

from ssl_lab.errors import UserError
from ssl_lab.nn.attend import KERNELS
from ssl_lab.nn.mask import CAUSAL, FULL


class Exchange:
    """Stands for FlashAttention-3 or -4: while active, torch's flash operators have kernels for CPU, and no longer."""

    def __init__(self):
        self.calls = []

    def __call__(self):
        self.library = torch.library.Library("aten", "IMPL", "CPU")
        self.library.impl("_scaled_dot_product_flash_attention", self.forward, "CPU")
        self.library.impl("_scaled_dot_product_flash_attention_backward", self.backward, "CPU")
        return self

    def remove(self):
        self.library = None

    def scores(self, q, k, causal, scale):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
        after = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        return scores.masked_fill(after, float("-inf")) if causal else scores

    def forward(self, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        self.calls.append("forward")
        scores = self.scores(q, k, is_causal, scale)
        out = scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        nothing = torch.zeros((), dtype=torch.uint64)
        return out, scores.logsumexp(-1), None, None, q.shape[2], k.shape[2], nothing, nothing, nothing

    def backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
    ):
        self.calls.append("backward")
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        weights = (self.scores(q, k, is_causal, scale) - lse[..., None]).exp()
        groups = q.shape[1] // k.shape[1]
        of_weights = grad @ v.repeat_interleave(groups, 1).mT
        of_scores = weights * (of_weights - (grad * out).sum(-1, keepdim=True)) * scale
        of_q = of_scores @ k.repeat_interleave(groups, 1)
        of_k, of_v = (x.unflatten(1, (-1, groups)).sum(2) for x in (of_scores.mT @ q, weights.mT @ grad))
        return of_q, of_k, of_v


EXCHANGED = {"flash3": "FA3", "flash4": "FA4"}


@pytest.fixture
def exchange(monkeypatch):
    made = {known: Exchange() for known in EXCHANGED.values()}
    for known, one in made.items():
        monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, known, one)
    yield made
    attention.restore_flash_attention_impl(_raise_warn=False)


@pytest.mark.parametrize("kernel", EXCHANGED)
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("queries", [L, 5, 1])
def test_exchanged_kernels_equal_eager(exchange, kernel, mask, kv_heads, queries):
    def run(q, k, v, mask, scale):
        return KERNELS[kernel](q, k, v, mask, scale, 0.0, None)

    assert_equals_eager(run, mask, kv_heads=kv_heads, queries=queries)
    assert exchange[EXCHANGED[kernel]].calls == ["forward", "backward"]


def test_the_exchange_lasts_for_one_pass(exchange):
    q, k, v = tensors()
    out = KERNELS["flash3"](q, k, v, CAUSAL, 0.3, 0.0, None)
    assert attention.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError):  # the operator itself has lost its kernel again
        torch.ops.aten._scaled_dot_product_flash_attention(q.detach(), k.detach(), v.detach())
    out.sum().backward()
    assert attention.current_flash_attention_impl() is None
    assert exchange["FA3"].calls == ["forward", "backward"]


def test_what_was_active_before_comes_back(exchange, monkeypatch):
    attention.activate_flash_attention_impl("FA4")
    q, k, v = tensors()
    KERNELS["flash3"](q, k, v, FULL, 0.3, 0.0, None).sum().backward()
    assert attention.current_flash_attention_impl() == "FA4"
    monkeypatch.setattr(exchange["FA3"], "scores", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        KERNELS["flash3"](q, k, v, FULL, 0.3, 0.0, None)
    assert attention.current_flash_attention_impl() == "FA4"

    def broken():
        raise RuntimeError("the module does not expose kernels\nnowhere")

    monkeypatch.setitem(attention._registry._FLASH_ATTENTION_IMPLS, "FA3", broken)
    with pytest.raises(UserError, match=r"torch cannot activate FA3: the module does not expose kernels$"):
        KERNELS["flash3"](q, k, v, FULL, 0.3, 0.0, None)
    assert attention.current_flash_attention_impl() == "FA4"


def test_exchanged_kernels_are_recomputed_by_checkpoints(exchange):
    def run(q, k, v, mask, scale):
        return checkpoint(KERNELS["flash3"], q, k, v, mask, scale, 0.0, None, use_reentrant=False)

    assert_equals_eager(run, CAUSAL)
    assert exchange["FA3"].calls == ["forward", "forward", "backward"]
