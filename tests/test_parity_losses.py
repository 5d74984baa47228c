"""Losses, heads, averages and schedules of self-supervised methods against libraries and written-out formulas."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_lab.losses.contrastive import info_nce, nt_xent
from ssl_lab.losses.distill import Center, cross_entropy, cross_views, entropy, koleo, sinkhorn
from ssl_lab.nn.heads import DINOHead, mlp_head
from ssl_lab.nn.multicrop import by_size
from ssl_lab.nn.norm import BatchNorm
from ssl_lab.nn.teacher import follow_, follower, scaled_momentum
from ssl_lab.schedules import Cosine, Linear, Stairs, Warmup
from ssl_lab.train.optim import Optim, clip_each_


def rand(*shape, seed=0, grad=False):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=grad)


def same(ours, theirs, at=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=at)


def agree(ours, theirs, inputs, at=1e-10):
    """Value and gradient for every input."""
    same(ours, theirs, at)
    mine, others = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(mine, others, strict=True):
        same(a, b, at)


def naive_nt_xent(z1, z2, tau):
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    total, n = 0.0, len(z)
    for i in range(n):
        similar = [(z[i] @ z[j] / tau).exp() for j in range(n) if j != i]
        total = total - torch.log((z[i] @ z[(i + n // 2) % n] / tau).exp() / sum(similar))
    return total / n


def test_nt_xent():
    z1, z2 = rand(5, 7, grad=True), rand(5, 7, seed=1, grad=True)
    agree(nt_xent(z1, z2, 0.3), naive_nt_xent(z1, z2, 0.3), [z1, z2])
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    agree(nt_xent(z1, z2, 0.3), lightly.NTXentLoss(0.3)(z1, z2), [z1, z2])


def test_info_nce_gives_keys_no_gradient():
    q, k = rand(6, 4, grad=True), rand(6, 4, seed=1, grad=True)
    loss = info_nce(q, k, 0.2)
    logits = F.normalize(q, dim=1) @ F.normalize(k.detach(), dim=1).T / 0.2
    naive = sum(logits[i].logsumexp(0) - logits[i, i] for i in range(6)) / 6
    agree(loss, naive, [q])
    assert torch.autograd.grad(loss, k, allow_unused=True)[0] is None


def naive_dino(student, teacher, tau):
    total, pairs = 0.0, 0
    for t, target in enumerate(teacher):
        for s, logits in enumerate(student):
            if t != s:
                total, pairs = total - (target * F.log_softmax(logits / tau, -1)).sum(-1).mean(), pairs + 1
    return total / pairs


@pytest.mark.parametrize("local", [0, 1, 3])
def test_cross_views_is_the_mean_over_pairs(local):
    student = [rand(4, 9, seed=v, grad=True) for v in range(2 + local)]
    teacher = rand(2, 4, 9, seed=50).mul(4).softmax(-1)
    agree(cross_views(student, teacher, 0.1), naive_dino(student, teacher, 0.1), student)


def test_dino_loss_and_center_equal_lightly():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    theirs, ours = lightly.DINOLoss(9, teacher_temp=0.05, student_temp=0.1).double(), Center(9).double()
    for step in range(3):
        student = [rand(4, 9, seed=10 * step + v, grad=True) for v in range(4)]
        teacher = [rand(4, 9, seed=10 * step + v + 5) for v in range(2)]
        logits = torch.cat(teacher)
        loss = cross_views(student, ours(logits, 0.05).unflatten(0, (2, 4)), 0.1)
        ours.collect(logits)
        ours.update()
        agree(loss, theirs(teacher, student), student, 1e-7)  # theirs holds the temperature in float32
        same(ours.center, theirs.center[0, 0], 1e-12)


def test_a_center_is_updated_once_for_all_that_was_collected():
    once, twice, logits = Center(5).double(), Center(5).double(), rand(8, 5)
    once.collect(logits)
    for part in (logits[:2], logits[2:]):
        twice.collect(part)
    for center in (once, twice):
        center.update()
    same(once.center, twice.center)
    same(once.center, 0.1 * logits.mean(0))
    before = once.center.clone()
    once.update()
    assert torch.equal(once.center, before)
    assert list(once.state_dict()) == ["center"]


def naive_sinkhorn(logits, tau, iterations):
    q = (logits / tau).exp().T.numpy()
    K, B = q.shape
    q /= q.sum()
    for _ in range(iterations):
        for k in range(K):
            q[k] /= q[k].sum() * K
        for b in range(B):
            q[:, b] /= q[:, b].sum() * B
    return torch.from_numpy(q * B).T


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn(iterations):
    logits = rand(12, 6)
    same(sinkhorn(logits, 0.3, iterations), naive_sinkhorn(logits, 0.3, iterations))
    same(sinkhorn(logits, 0.3, 200).sum(0), torch.full((6,), 2.0, dtype=torch.float64), 1e-6)
    assert sinkhorn(100 * logits.float(), 0.04).isfinite().all()  # exp alone would overflow
    lightly = pytest.importorskip("lightly.loss.swav_loss", reason="lightly is not installed")
    same(sinkhorn(logits, 0.3, iterations), lightly.sinkhorn(logits, iterations, 0.3), 1e-8)


def test_cross_entropy_gives_its_gradient():
    logits, weight = rand(5, 7, grad=True), rand(5, seed=2).abs()
    target = rand(5, 7, seed=1).softmax(-1) * rand(5, 1, seed=3).abs()  # rows need not sum to one
    naive = (weight * -(target * F.log_softmax(logits / 0.2, -1)).sum(-1)).sum()
    agree(3 * cross_entropy(logits, target, weight, 0.2), 3 * naive, [logits])
    half = cross_entropy(logits.bfloat16(), target.float(), weight.float(), 0.2)
    torch.testing.assert_close(half.double(), naive.double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("mass", [1, 4])
def test_cross_entropy_in_fp16_survives_the_loss_scale(mass):
    many = 65536  # prototypes, and the scale that GradScaler begins with
    logits = (0.1 * rand(4, many)).half().requires_grad_()
    target = mass * (rand(4, many, seed=1).float() / 0.04).softmax(-1)
    weight = torch.full((4,), 1 / 64)
    naive = (weight * -(target * F.log_softmax(logits.float() / 0.1, -1)).sum(-1)).sum()
    losses = cross_entropy(logits, target, weight, 0.1), naive
    ours, theirs = (torch.autograd.grad(many * loss, logits)[0] for loss in losses)
    assert ours.isfinite().all() and (ours == 0).sum() <= (theirs == 0).sum()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)
    assert ours.double().sum(-1).abs().max() < 1e-3 * ours.double().abs().sum(-1).min()


def test_koleo():
    x = rand(9, 5, grad=True)
    z, total = F.normalize(x, dim=1), 0.0
    for i in range(9):
        total = total - min((z[i] - z[j] + 1e-8).norm() for j in range(9) if j != i).add(1e-8).log() / 9
    agree(koleo(x), total, [x], 1e-8)
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    agree(koleo(x), lightly.KoLeoLoss()(x), [x], 1e-7)


def test_entropy():
    same(entropy(torch.full((3, 8), 1 / 8, dtype=torch.float64)), torch.full((3,), math.log(8), dtype=torch.float64))
    assert entropy(F.one_hot(torch.arange(4)).double()).abs().max() == 0


@pytest.mark.parametrize("norm", [True, False])
def test_dino_head_equals_lightly(norm):
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is not installed")
    theirs = heads.DINOProjectionHead(12, 16, 8, 20, norm_last_layer=norm).double()
    ours = DINOHead(12, 20, hidden=16, bottleneck=8, norm_prototypes=norm).double()
    for i, parameter in enumerate(theirs.parameters()):
        if parameter.requires_grad:
            parameter.data = rand(*parameter.shape, seed=i)
    linears = [m for m in theirs.layers.modules() if isinstance(m, nn.Linear)]
    for mine, other in zip([m for m in ours.mlp if isinstance(m, nn.Linear)], linears, strict=True):
        mine.load_state_dict(other.state_dict())
    tensors = dict(theirs.last_layer.named_parameters())
    length = next(t for name, t in tensors.items() if name.endswith(("weight_g", "original0")))
    vectors = next(t for name, t in tensors.items() if name.endswith(("weight_v", "original1")))
    ours.prototypes.weight.data, ours.length.data = vectors.data.clone(), length.data.clone()
    x, weight = rand(5, 12, seed=90, grad=True), rand(5, 20, seed=91)
    a, b = (head(x) for head in (ours, theirs))
    agree((a * weight).sum(), (b * weight).sum(), [x])
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    same(ours.prototypes.weight.grad, vectors.grad)
    assert ours.length.requires_grad is not norm


def test_prototypes_have_length_one():
    head = DINOHead(12, 20, hidden=16, bottleneck=8)
    head.prototypes.weight.data.mul_(7)
    assert head(torch.randn(64, 12)).abs().max() <= 1 + 1e-6


def test_batch_norm_is_torchs_on_one_process():
    ours, theirs, x = BatchNorm(6).double(), nn.BatchNorm1d(6).double(), rand(10, 6, grad=True)
    agree((ours(x) ** 3).sum(), (theirs(x) ** 3).sum(), [x])
    same(ours.running_var, theirs.running_var)


def test_heads_of_the_papers():
    def plan(head):
        names = {nn.Linear: "L", BatchNorm: "B", nn.ReLU: "r", nn.GELU: "g"}
        return "".join(next(v for k, v in names.items() if isinstance(m, k)) for m in head)

    projector = mlp_head([6, 8, 8, 4], last_norm="plain")  # MoCo v3
    assert plan(projector) == "LBrLBrLB" and not projector[-1].affine
    assert all(m.bias is None for m in projector if isinstance(m, nn.Linear))
    simclr = mlp_head([6, 8, 4], last_norm="affine")
    assert plan(simclr) == "LBrLB" and simclr[-1].affine and simclr[0].bias is None
    v2 = mlp_head([6, 6, 4], norm=False)  # MoCo v2
    assert plan(v2) == "LrL" and all(m.bias is not None for m in v2 if isinstance(m, nn.Linear))
    v1 = mlp_head([6, 4])  # MoCo v1
    assert plan(v1) == "L" and v1[0].bias is not None


def test_views_packed_by_size_equal_views_one_by_one():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    views = [rand(4, 3, n, n, seed=i) for i, n in enumerate([16, 16, 8, 8, 8])]
    calls = []
    packed = by_size(lambda x: (calls.append(len(x)), net(x))[1], views)
    for ours, view in zip(packed, views, strict=True):
        same(ours, net(view), 1e-13)
    assert calls == [8, 12]


def test_a_follower_follows_in_closed_form():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    student[2].requires_grad_(False)  # a frozen part stays the same
    teacher, m = follower(student), 0.9
    start, seen = [p.clone() for p in teacher.parameters()], []
    student(rand(8, 4))
    for step in range(3):
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data.add_(rand(*parameter.shape, seed=step))
        seen.append([p.detach().clone() for p in student.parameters()])
        follow_(teacher, student, m)
    for i, parameter in enumerate(teacher.parameters()):
        closed = m**3 * start[i] + sum(m ** (2 - t) * (1 - m) * seen[t][i] for t in range(3))
        same(parameter, closed, 1e-14)
        assert not parameter.requires_grad
    assert teacher[1].num_batches_tracked == 0  # buffers are its own


def test_momentum_for_another_batch_forgets_as_much_per_sample():
    assert scaled_momentum(0.996, 512, 512) == 0.996 and scaled_momentum(0.996, 64, None) == 0.996
    assert scaled_momentum(0.996, 256, 512) ** 2 == pytest.approx(0.996)
    assert scaled_momentum(1.0, 7, 512) == 1.0


def test_each_tensor_is_clipped_by_its_own_norm():
    small, large = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    small.grad, large.grad = torch.full((4,), 0.5), torch.full((4,), 50.0)
    clip_each_([small, large, nn.Parameter(torch.ones(1))], 3.0)
    assert torch.equal(small.grad, torch.full((4,), 0.5))
    torch.testing.assert_close(large.grad.norm(), torch.tensor(3.0))


# ---- schedules as the official codes write them, at every iteration of a short training


EPOCHS, PER_EPOCH = 20, 5
TOTAL = EPOCHS * PER_EPOCH


def test_dino_momentum_and_decay():
    """cosine_scheduler of DINO without warm-up: final + (base - final) (1 + cos(pi i / n)) / 2."""
    for base, final in ((0.996, 1.0), (0.04, 0.4)):
        golden = [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / TOTAL)) for i in range(TOTAL)]
        assert [Cosine(base, final)(i / TOTAL) for i in range(TOTAL)] == pytest.approx(golden, abs=1e-14)


def test_dino_teacher_temperature_moves_once_per_epoch():
    warm = 6
    golden = np.concatenate([np.linspace(0.04, 0.07, warm), np.full(EPOCHS - warm, 0.07)]).repeat(PER_EPOCH)
    ours = Stairs(Warmup(0.04, 0.07, (warm - 1) / EPOCHS), EPOCHS)
    assert [ours(i / TOTAL) for i in range(TOTAL)] == pytest.approx(golden.tolist(), abs=1e-14)


def test_moco_v3_rate_and_momentum():
    """Fractional epochs: lr e / warm-up, then half a cosine; momentum 1 - (1 + cos(pi e / E)) (1 - m) / 2."""
    warm, optim = 4, Optim(lr=1.0, warmup=4 / EPOCHS)
    for i in range(TOTAL):
        e = i / PER_EPOCH
        rate = e / warm if e < warm else 0.5 * (1 + math.cos(math.pi * (e - warm) / (EPOCHS - warm)))
        assert optim.lr_factor(i / TOTAL) == pytest.approx(rate, abs=1e-12)
        m = 1 - 0.5 * (1 + math.cos(math.pi * e / EPOCHS)) * (1 - 0.99)
        assert Cosine(0.99, 1.0)(i / TOTAL) == pytest.approx(m, abs=1e-14)


def test_ijepa_momentum_is_a_line():
    golden = [0.996 + i * (1.0 - 0.996) / TOTAL for i in range(TOTAL)]
    assert [Linear(0.996, 1.0)(i / TOTAL) for i in range(TOTAL)] == pytest.approx(golden, abs=1e-14)


def test_dinov2_rate_scales_with_the_root_of_the_batch():
    assert Optim(lr=2e-3, scale_lr="sqrt").peak_lr(1024) == pytest.approx(0.004)
    assert Optim(lr=2e-3, scale_lr="sqrt").peak_lr(64) == pytest.approx(0.004 * math.sqrt(64 / 1024))
