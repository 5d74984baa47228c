"""Cross-entropy of tokens: the hand-written derivative for half precision, and rows that are not scored."""

import pytest
import torch
import torch.nn.functional as F

from ssl_lab.errors import UserError
from ssl_lab.losses import lm


def logits(rows=37, classes=50):
    g = torch.Generator().manual_seed(0)
    wanted = torch.randint(classes, (rows,), generator=g)
    wanted[[0, 5]] = lm.IGNORE
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=g), wanted, torch.rand(rows, generator=g)


def test_the_written_out_derivative_is_that_of_cross_entropy(monkeypatch):
    """In float64 and in pieces of three rows."""
    monkeypatch.setattr(lm, "_rows_at_once", lambda _: 3)
    x, wanted, weight = logits()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = lm._NLL.apply(ours, wanted), F.cross_entropy(theirs, wanted, reduction="none")
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.backward(weight.double())
    b.backward(weight.double())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_half_precision_logits_lose_nothing_but_their_rounding():
    x, wanted, weight = logits()
    half = x.bfloat16().requires_grad_()
    exact = half.detach().double().requires_grad_()
    a, b = lm.nll(half, wanted), lm.nll(exact, wanted)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    a.backward(weight)
    b.backward(weight.double())
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)


def test_only_scored_tokens_count():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=g), torch.randn(11, 8, generator=g)
    labels = torch.randint(11, (2, 5), generator=g)
    labels[0, 2:] = lm.IGNORE
    found = lm.token_nll(hidden, weight, labels)
    wanted = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lm.mean_over_tokens(found, labels), wanted.sum() / 7)
    with pytest.raises(UserError, match="no token of this batch is scored"):
        lm.mean_over_tokens(found * 0, labels * 0 + lm.IGNORE)
