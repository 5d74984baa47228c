"""Dropout on a CPU: its probability, its expectation, its gradient, and that a seed repeats it."""

import pytest
import torch

from ssl_lab.nn.attend import attend
from ssl_lab.nn.dropout import Dropout, dropout, kept
from ssl_lab.nn.kernels.eager import attention_map
from ssl_lab.nn.mask import CAUSAL, FULL, AttnMask


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_share_and_expectation(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(1000, 999, dtype=dtype), p)
    assert out.dtype == dtype
    assert abs(float((out == 0).double().mean()) - p) < 4 * (p * (1 - p) / out.numel()) ** 0.5
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=5e-3 if dtype == torch.bfloat16 else 5e-5)


def test_neighbours_are_independent() -> None:
    """Four elements come from one draw: none may follow from another."""
    torch.manual_seed(0)
    mask, _ = kept(torch.Size([400_000, 4]), 0.3, torch.float64)
    assert (torch.corrcoef(mask.T) - torch.eye(4)).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([mask[:-1, 3], mask[1:, 0]]))[0, 1].abs() < 0.01


def test_gradient_follows_the_same_elements() -> None:
    x = torch.rand(7, 5, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.4)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())


def test_seed_repeats_it_and_evaluation_leaves_it_out() -> None:
    x, layer = torch.rand(33, 3), Dropout(0.5)
    first, second = _seeded(layer, x), _seeded(layer, x)
    assert torch.equal(first, second) and not torch.equal(first, layer(x))
    assert layer.eval()(x) is x and dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_attention_equals_the_definition_with_the_same_weights_dropped(mask: AttnMask) -> None:
    """Values and gradients of the fused training step against autograd through the mask that it drew."""
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.manual_seed(3)
    ours = attend(q, k, v, mask, dropout_p=0.3, kernel="eager")
    grads = torch.autograd.grad(ours.sin().sum(), (q, k, v))
    torch.manual_seed(3)
    keep, share = kept(torch.Size([8, 9, 9]), 0.3, torch.float64)
    with torch.enable_grad():
        weights = attention_map(q, k, mask, 8**-0.5) * keep.view(2, 4, 9, 9) / share
        wanted = weights @ v
    torch.testing.assert_close(ours, wanted)
    for one, other in zip(grads, torch.autograd.grad(wanted.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other)


def _seeded(layer: Dropout, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    return layer(x)
