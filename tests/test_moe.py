"""Mixtures of experts: routing equals transformers', what keeps the load even, and how it reaches a method."""

import copy
import functools

import pytest
import torch
from torch import nn

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.losses.lm import IGNORE
from ssl_lab.methods.seq2seq import Seq2Seq
from ssl_lab.nn.block import Block, Context, Transformer
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.experts import aux_loss, balance_, forget_
from ssl_lab.nn.mask import CAUSAL, AttnMask
from ssl_lab.nn.mla import MLA
from ssl_lab.nn.moe import DeepSeekMoE, SwitchFFN
from ssl_lab.nn.positions import Relative
from ssl_lab.nn.recipes import deepseek_block, rms_norm, switch_block
from ssl_lab.nn.rope import rope_1d
from ssl_lab.types import Batch
from tests.parity import gap, gradients, randomise, weigh

D, H, L, E = 32, 4, 12, 8
VALID = torch.arange(L)[None] < torch.tensor([[L], [7]])


def hf():
    return pytest.importorskip("transformers", reason="the reference is transformers")


def tokens(length: int = L) -> torch.Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def spread(module: nn.Module) -> nn.Module:
    """Random weights, with a router that decides clearly: float32 must not change a choice."""
    randomise(module)
    with torch.no_grad():
        module.router.mul_(10)
    return module


@pytest.mark.parametrize("capacity", [2, L])
def test_switch_equals_transformers(capacity):
    hf()
    from transformers.models.switch_transformers import modeling_switch_transformers as reference

    config = hf().SwitchTransformersConfig(
        d_model=D, d_ff=48, num_experts=E, expert_capacity=capacity, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs = reference.SwitchTransformersSparseMLP(config).double()
    ours = spread(SwitchFFN(D, E, 48, capacity=capacity * E / L, jitter=0.0, balance=1.0, z=0.0)).train()
    state = {"router.classifier.weight": ours.router}
    for e in range(E):
        state |= {
            f"experts.expert_{e}.wi.weight": ours.experts.up[e],
            f"experts.expert_{e}.wo.weight": ours.experts.down[e],
        }
    theirs.load_state_dict(state)
    x = tokens().requires_grad_()
    out, expected = ours(x, Context()), theirs(x)
    assert gap(out, expected) < 1e-6
    dropped = (out == 0).all(-1)
    assert torch.equal(dropped, (expected == 0).all(-1)) and dropped.any() == (capacity == 2)
    a, b = (torch.autograd.grad(weigh(o), x, retain_graph=True)[0] for o in (out, expected))
    assert b.abs().max() > 1e-3 and gap(a, b) < 1e-5
    logits = ours.logits(x)
    balance = reference.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    assert gap(ours.aux, balance) < 1e-6
    ours.balance, ours.z = 0.0, 1.0
    ours(x, Context())
    assert gap(ours.aux, reference.router_z_loss_func(logits)) < 1e-6


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_deepseek_equals_transformers(groups, top_groups):
    hf()
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

    config = hf().DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=16, n_routed_experts=E, num_experts_per_tok=3, n_group=groups,
        topk_group=top_groups, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    theirs = reference.DeepseekV3MoE(config).double()
    ours = spread(DeepSeekMoE(D, E, 16, top_k=3, num_groups=groups, top_groups=top_groups, num_shared=2, scaling=2.5))
    ours.bias.copy_(torch.linspace(-0.3, 0.3, E))
    given = {"gate.weight": ours.router, "gate.e_score_correction_bias": ours.bias}
    given |= {"experts.gate_up_proj": ours.experts.up, "experts.down_proj": ours.experts.down}
    given |= {f"shared_experts.{n}_proj.weight": getattr(ours.shared, n).weight for n in ("gate", "up", "down")}
    theirs.load_state_dict(given)
    x = tokens().requires_grad_()
    out, expected = ours(x, Context()), theirs(x)
    assert gap(out, expected) < 1e-5
    a, b = (torch.autograd.grad(weigh(o), x)[0] for o in (out, expected))
    assert b.abs().max() > 1e-3 and gap(a, b) < 1e-4
    ours.bias.zero_()
    assert gap(ours(x, Context()), expected) > 1e-2  # the bias selects


def test_sequence_balance_loss_is_the_papers():
    layer = spread(DeepSeekMoE(D, E, 16, top_k=2, balance=1.0)).train()
    x = tokens()
    layer(x, Context(mask=AttnMask(valid=VALID)))
    total = 0.0
    for row, length in zip(x, (L, 7), strict=True):
        affinity = (row[:length] @ layer.router.T).sigmoid()
        chosen = affinity.topk(2, -1).indices
        for e in range(E):
            f = E / (2 * length) * int((chosen == e).sum())
            p = (affinity[:, e] / affinity.sum(-1)).mean()
            total = total + f * p / 2
    assert gap(layer.aux, total) < 1e-12
    assert layer.load.sum() == 2 * (L + 7)


def test_an_even_load_costs_one():
    layer = SwitchFFN(D, E, 16, balance=1.0, z=0.0, jitter=0.0)
    nn.init.zeros_(layer.router)
    assert layer.train()(tokens().float(), Context()).shape == (2, L, D)
    assert layer.aux.item() == pytest.approx(1.0)


def test_padding_takes_no_room():
    layer = spread(SwitchFFN(D, E, 16, jitter=0.0)).train()
    x = tokens()
    out = layer(x, Context(mask=AttnMask(valid=VALID)))
    aux = layer.aux
    x[1, 7:] = 100.0
    again = layer(x, Context(mask=AttnMask(valid=VALID)))
    assert torch.equal(out, again) and torch.equal(aux, layer.aux) and out[1, 7:].abs().sum() == 0


def test_padding_of_packed_rows_is_no_token():
    segments = torch.where(VALID, 3, -1)
    for make in (SwitchFFN, DeepSeekMoE):
        layer = spread(make(D, E, 16)).train()
        layer.jitter = 0.0
        found = []
        for mask in (AttnMask(valid=VALID), AttnMask(segments=segments)):
            layer(tokens(), Context(mask=mask))
            found.append(layer.aux)
        layer(tokens(), Context())
        assert torch.equal(*found) and not torch.equal(found[0], layer.aux)


def test_the_auxiliary_losses_of_a_batch_are_the_means_of_its_parts():
    layer = spread(SwitchFFN(D, E, 16, jitter=0.0, z=1.0)).train()
    parts = []
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        layer(tokens()[rows], Context(mask=AttnMask(valid=VALID[rows])))
        parts.append(layer.aux)
    assert gap((parts[0] + parts[1]) / 2, parts[2]) < 1e-12
    layer(tokens(), Context(mask=AttnMask(valid=torch.zeros(2, L, dtype=torch.bool))))
    assert layer.aux == 0


def test_room_of_an_expert_does_not_depend_on_padding():
    layer = spread(SwitchFFN(D, E, 16, jitter=0.0, capacity=1.25, eval_capacity=1.25)).eval()
    with torch.no_grad():
        layer.router.copy_(torch.zeros_like(layer.router))  # all take the first expert
    x = tokens()
    alone = layer(x, Context())
    padded = torch.cat([x, torch.randn(2, 3 * L, D, dtype=torch.float64)], 1)
    valid = torch.arange(4 * L)[None].expand(2, -1) < L
    assert gap(layer(padded, Context(mask=AttnMask(valid=valid)))[:, :L], alone) < 1e-12
    assert (alone == 0).all(-1).sum() == 2 * (L - 1)  # 1.25 * 12 / 8: room for one
    nobody = Context(mask=AttnMask(valid=torch.zeros(2, L, dtype=torch.bool)))
    assert not layer(x, nobody).any()


def test_jitter_is_for_training_and_for_the_router_alone():
    torch.manual_seed(0)
    layer = spread(SwitchFFN(D, E, 16, jitter=0.5, capacity=None, eval_capacity=None)).train()
    assert not torch.equal(layer(tokens(), Context()), layer(tokens(), Context()))
    layer.eval()
    assert torch.equal(layer(tokens(), Context()), layer(tokens(), Context())) and layer.aux is None


def test_the_router_works_in_float32_under_autocast():
    layer = spread(DeepSeekMoE(D, E, 16)).float()
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        half = layer.logits(x)
    assert half.dtype == torch.float32 and torch.equal(half, layer.logits(x))


@pytest.mark.parametrize("make", [SwitchFFN, DeepSeekMoE])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_reaches_every_parameter(make, autocast):
    torch.manual_seed(0)
    layer, x = make(D, 4, 16).train(), torch.randn(4, 40, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x, Context())
    (out.float().square().sum() + aux_loss(layer)).backward()
    assert all(g.abs().sum() > 0 for g in gradients(layer).values())


def model(checkpointing: bool, bias_rate: float = 0.05) -> Transformer:
    torch.manual_seed(0)
    moe = functools.partial(DeepSeekMoE, num_experts=4, hidden=16, balance=0.5, bias_rate=bias_rate)
    latent = functools.partial(MLA, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8)
    out = Transformer(lambda layer: deepseek_block(D, H, layer=layer, attention=latent, moe=moe), 3, D, norm=rms_norm)
    for block in out.blocks:
        assert isinstance(block, Block)
        block.checkpointing = checkpointing
    return out.double().train()


def deepseek_context(cache: KVCache | None = None, rows: slice = slice(None)) -> Context:
    return Context(mask=CAUSAL, rope=tuple(t[rows] for t in rope_1d(torch.arange(L), 4)), cache=cache)


def test_losses_survive_checkpointing():
    results = []
    for on in (False, True):
        net = model(on)
        x = tokens().requires_grad_()
        loss = weigh(net.encode(x, deepseek_context())[0]) + 3 * aux_loss(net)
        before = [m.mlp.fn.aux for m in list(net.blocks)[1:]]
        loss.backward()
        assert all(a is b for a, b in zip(before, (m.mlp.fn.aux for m in list(net.blocks)[1:]), strict=True))
        results.append([loss, x.grad, *gradients(net).values(), *(m.mlp.fn.load for m in list(net.blocks)[1:])])
        assert net.blocks[1].mlp.fn.load.sum() == 2 * 2 * L  # counted once
    assert all(gap(a, b) < 1e-12 for a, b in zip(*results, strict=True))
    assert aux_loss(nn.Linear(2, 2)) == 0


def test_the_auxiliary_loss_reaches_the_router():
    net = model(True)
    net.encode(tokens(), deepseek_context())
    aux_loss(net).backward()
    assert all(m.mlp.fn.router.grad.abs().sum() > 0 for m in list(net.blocks)[1:])


def test_a_model_with_a_loss_can_be_copied():
    net = model(False)
    net.encode(tokens(), deepseek_context())
    assert copy.deepcopy(net).blocks[1].mlp.fn.aux is None and net.blocks[1].mlp.fn.aux is not None


def test_biases_even_out_the_load():
    torch.manual_seed(0)
    layer, x = DeepSeekMoE(D, 8, 16, bias_rate=0.02), torch.randn(4, 64, D) + 1  # a common direction: a few win
    nn.init.normal_(layer.router, std=0.3)
    counts = []
    for _ in range(60):
        layer(x, Context())
        counts.append(layer.load.clone())
        expected = layer.bias + 0.02 * (layer.load.float().mean() - layer.load).sign()
        balance_(layer)
        assert torch.equal(layer.bias, expected) and layer.load.sum() == 0
    spread_ = [float(c.max() / c.float().mean()) for c in counts]
    assert spread_[0] > 2 and spread_[-1] < 1.4


def test_micro_batches_count_as_one_step():
    whole, parts = model(False), model(False)
    x = tokens()
    whole.encode(x, deepseek_context())
    for row in x:
        parts.encode(row[None], deepseek_context())
    for net in (whole, parts):
        balance_(net)
    assert torch.equal(whole.blocks[1].mlp.fn.bias, parts.blocks[1].mlp.fn.bias)
    assert whole.blocks[1].mlp.fn.bias.abs().max() > 0


@pytest.mark.parametrize("recipe", ["deepseek", "switch"])
def test_cached_decoding_equals_the_whole(recipe):
    if recipe == "deepseek":
        net = model(False).eval()
    else:
        moe = functools.partial(SwitchFFN, num_experts=4, eval_capacity=None)
        net = Transformer(lambda layer: switch_block(D, H, layer=layer, moe=moe, hidden=16), 4, D, norm=rms_norm)
        assert [isinstance(b.mlp.fn, SwitchFFN) for b in net.blocks] == [False, True, False, True]
    randomise(net)
    x, cache = tokens(), KVCache()
    rope = slice(None)
    with torch.no_grad():
        if recipe == "switch":
            whole = net.encode(x, Context(mask=CAUSAL))[0]
            parts = [net.encode(x[:, i : i + 1], Context(mask=CAUSAL, cache=cache))[0] for i in range(L)]
        else:
            whole = net.encode(x, deepseek_context(rows=rope))[0]
            parts = [net.encode(x[:, i : i + 1], deepseek_context(cache, slice(i, i + 1)))[0] for i in range(L)]
    assert gap(torch.cat(parts, 1), whole) < 1e-12


def test_impossible_groups_are_named():
    with pytest.raises(ValueError, match="is impossible"):
        DeepSeekMoE(D, 8, top_k=3, num_groups=4, top_groups=1)


def test_the_load_of_a_step_that_is_left_out_moves_no_bias():
    layer = DeepSeekMoE(D, E, 16, top_k=2).train()
    layer(tokens().float(), Context())
    assert layer.load.any()
    forget_(layer)
    assert not layer.load.any()
    balance_(layer)
    assert not layer.bias.any()


@pytest.mark.parametrize("block", [deepseek_block, switch_block])
def test_the_last_matrix_of_each_branch_begins_smaller_and_a_router_by_its_own_rule(block):
    torch.manual_seed(0)
    decoder = Decoder(64, 64, 8, 4, block=block)
    spreads = {name: float(p.detach().std()) for name, p in decoder.named_parameters() if p.ndim > 1}
    ends = ("proj.weight", "fc2.weight", "shared.down.weight", "mlp.fn.down.weight", "experts.down")
    for name, found in spreads.items():
        wanted = 0.1 / 8 if name.endswith("router") else 0.02 / 4 if name.endswith(ends) else 0.02
        assert found == pytest.approx(wanted, rel=0.15), name
    assert any(name.endswith("experts.down") for name in spreads)


def test_padding_of_targets_is_no_token_to_experts_of_an_encoder_decoder():
    block = functools.partial(switch_block, every=1, moe=functools.partial(SwitchFFN, jitter=0.0))
    model = EncoderDecoder(31, D, 1, H, max_length=64, positions=Relative, block=block, norm=rms_norm)
    method = Seq2Seq(model.double(), 1)
    randomise(method)
    ids = torch.randint(2, 31, (2, L), generator=torch.Generator().manual_seed(5))
    labels = ids.where(VALID, IGNORE)
    short = Batch(tokens=ids, labels=labels)
    long = Batch(tokens=ids, labels=torch.cat([labels, torch.full((2, 20), IGNORE)], 1))
    found = []
    for batch in (short, long):
        loss = method.train().step(batch, 0.0).loss
        found.append(torch.stack([loss, aux_loss(model)]))
    assert gap(*found) < 1e-12
