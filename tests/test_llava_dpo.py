"""Preference tuning: the loss is the paper's, the reference stays where training began, and pairs are told apart."""

import functools
import json
import math
import types

import pytest
import torch
from parity import gap, images
from ranks import on_ranks, part
from test_flamingo import made as gated_model
from test_llava import TINY
from test_vlm import MARK, ids, small
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import to_pil_image
from training import run, same_end

from ssl_lab.cli.main import main
from ssl_lab.data.shapes import Shapes
from ssl_lab.errors import UserError
from ssl_lab.evals.results import read
from ssl_lab.losses.preference import dpo
from ssl_lab.methods.llava_dpo import LLaVADPO
from ssl_lab.nn.adapters import Adapters
from ssl_lab.nn.lora import LoRA, fuse_, merge_, without_updates

BETA = 0.3
PROMPTS = [[1, MARK, 2], [5, 6], [8, MARK, MARK, 9], [3]]
CHOSEN, REJECTED = [[3, 4], [7], [10, 11, 12], [4, 4]], [[4], [7, 8, 9, 10], [11], [5]]


def scored(prompts, answers):
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[-100] * (len(p) - 1) + a + [-100] for p, a in zip(prompts, answers, strict=True)]
    tokens, valid = ids(*rows)
    return tokens, ids(*labels, pad=-100)[0], valid


def batch(rows=slice(0, 4), with_images=True):
    chosen, rejected = (scored(PROMPTS[rows], answers[rows]) for answers in (CHOSEN, REJECTED))
    found = dict(zip(("tokens", "labels", "valid"), chosen, strict=True))
    found |= dict(zip(("rejected", "rejected_labels", "rejected_valid"), rejected, strict=True))
    counts = [prompt.count(MARK) for prompt in PROMPTS]
    before, own = sum(counts[: rows.start]), sum(counts[rows])
    return found | ({"images": images(batch=3)[before : before + own]} if own else {})


def moved(method, seed=3):
    """As after some training: what learns is elsewhere than the reference."""
    g = torch.Generator().manual_seed(seed)
    for p in method.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return method


def said(model, prompt, answer, pictures):
    """Nats of an answer, by one row alone and the logarithm of all probabilities."""
    tokens = torch.tensor([[*prompt, *answer]])
    out, _ = model(tokens, pictures if len(pictures) else None)
    table = model.decoder.logits(out.tokens)[0].log_softmax(-1)
    return table[-len(answer) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()


def by_hand(method, start):
    """Equation 7, pair by pair."""
    losses, firsts = [], [sum(p.count(MARK) for p in PROMPTS[:i]) for i in range(4)]
    for prompt, chosen, rejected, first in zip(PROMPTS, CHOSEN, REJECTED, firsts, strict=True):
        pictures = images(batch=3)[first : first + prompt.count(MARK)]
        with torch.no_grad():
            before = [said(start, prompt, answer, pictures) for answer in (chosen, rejected)]
        now = [said(method.model, prompt, answer, pictures) for answer in (chosen, rejected)]
        margin = BETA * ((now[0] - before[0]) - (now[1] - before[1]))
        losses.append(torch.log(1 + torch.exp(-margin)))
    return sum(losses) / 4


@pytest.mark.parametrize("train", [["connector", "decoder"], ["vision", "connector", "decoder"], ["decoder"]])
def test_loss_and_every_gradient_are_those_of_the_formula(train):
    start, method = small(), LLaVADPO(small(), beta=BETA, train=train)
    moved(method)
    loss = method.step(batch(), 0.5).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    want = by_hand(method, start)
    want.backward()
    assert gap(loss, want) < 1e-12 and abs(loss.item() - math.log(2)) > 1e-3
    assert {name.split(".")[1] for name in found} == set(train)
    assert all(gap(grad, method.get_parameter(name).grad) < 1e-12 for name, grad in found.items())


def test_chosen_answers_stay_likely_by_a_loss_of_their_own():
    """The mean of their nats a token, conversation by conversation."""
    plain, more = (moved(LLaVADPO(small(), beta=BETA, nll_weight=weight)) for weight in (0.0, 0.2))
    losses = [method.step(batch(), 0.5).loss for method in (plain, more)]
    pictures, first, own = images(batch=3), 0, []
    for prompt, chosen in zip(PROMPTS, CHOSEN, strict=True):
        seen = pictures[first : first + prompt.count(MARK)]
        first += prompt.count(MARK)
        own.append(-said(more.model, prompt, chosen, seen) / len(chosen))
    want = losses[0].detach() + 0.2 * sum(own) / 4
    assert gap(losses[1], want) < 1e-12 and losses[1] - losses[0] > 0.1
    found = torch.autograd.grad(losses[1], more.model.connector.parameters())
    base = torch.autograd.grad(losses[0], plain.model.connector.parameters())
    rest = torch.autograd.grad(want, more.model.connector.parameters())
    assert all(gap(f, b + r) < 1e-12 for f, b, r in zip(found, base, rest, strict=True))


def test_the_loss_is_that_of_trl():
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.dpo_trainer import DPOTrainer

    g = torch.Generator().manual_seed(0)
    nats, theirs = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 10, generator=g) < 0.6
    nats.requires_grad_()
    same = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    logs = {"train": {key: [] for key in (
        "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    )}}  # fmt: skip
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=same, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=BETA, use_weighting=False,
        aux_loss_enabled=False, _metrics=logs, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inside = mask[:, 1:]
    outputs = types.SimpleNamespace(
        log_probs=nats * inside, entropy=nats.detach(), mean_logits=nats.detach(), is_top1=inside
    )
    before = (theirs * inside).sum(1).view(2, 3)
    inputs = {"input_ids": torch.zeros(6, 10, dtype=torch.int64), "attention_mask": torch.ones(6, 10)}
    inputs |= {"completion_mask": mask.long(), "ref_chosen_logps": before[0], "ref_rejected_logps": before[1]}
    want = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    (grad,) = torch.autograd.grad(want, nats)
    loss, rewards = dpo((nats * inside).sum(1).view(2, 3), before, beta=BETA)
    (ours,) = torch.autograd.grad(loss, nats)
    assert gap(loss, want) < 1e-15 and gap(ours, grad) < 1e-15
    told = logs["train"]
    assert [told["rewards/chosen"][0], told["rewards/rejected"][0]] == pytest.approx(rewards.mean(1).tolist())
    assert told["rewards/margins"][0] == pytest.approx((rewards[0] - rewards[1]).mean().item())


def lora(**more):
    method = LLaVADPO(small(), beta=BETA, reference="untuned", **more)
    torch.manual_seed(1)
    LoRA(rank=2, targets=["q", "v", "proj"], parts=["model.decoder"])(method)
    return method


@pytest.mark.parametrize("make", [lambda: LLaVADPO(small(), beta=BETA), lora], ids=["copy", "untuned"])
def test_it_begins_with_log_2_and_no_margin_and_learns_what_it_may(make):
    method = make().train()
    first = method.step(batch(), 0.0)
    assert first.loss.item() == math.log(2)
    assert first.logs["rewards/margin"] == first.logs["rewards/chosen"] == first.logs["rewards/accuracy"] == 0
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    start = method.likelihoods(batch())[1]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        step = method.step(batch(), 0.5)
        step.loss.backward()
        optimizer.step()
    changed = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    assert step.loss < 0.5 and step.logs["rewards/margin"] > 0.3 and step.logs["rewards/accuracy"] == 1
    assert torch.equal(method.likelihoods(batch())[1], start)  # the reference has stayed
    assert {name.split(".")[0] for name in changed} == {"model"}
    parts = {name.split(".")[1] for name in changed}
    assert parts == {"connector", "decoder"}
    if method.untuned:
        assert all(".lora_" in name for name in changed if name.startswith("model.decoder"))
        assert set(method.reference) == {"connector"}  # and no second language model


def test_the_reference_of_low_rank_updates_is_the_model_before_them():
    copied, tuned = LLaVADPO(small(), beta=BETA), moved(lora())
    assert gap(copied.likelihoods(batch())[1], tuned.likelihoods(batch())[1]) < 1e-12
    assert gap(*tuned.likelihoods(batch())) > 1e-3
    layer = next(m for m in tuned.modules() if hasattr(m, "lora_a"))
    with without_updates(tuned):
        assert gap(layer.weight, layer._base) == 0
    assert gap(layer.weight, layer._base) > 1e-3
    merge_(tuned)
    with pytest.raises(UserError, match="merged cannot be switched off"), without_updates(tuned):
        pass
    fuse_(tuned)


def test_dropout_of_the_model_is_not_the_references():
    method = lora().train()
    for module in method.model.decoder.modules():
        if hasattr(module, "lora_a"):
            module.dropout = nn.Dropout(0.5)
    one, other = (moved(method, 4).likelihoods(batch())[1] for _ in range(2))
    assert torch.equal(one, other) and method.model.decoder.training and not method.reference.training


def test_an_image_is_encoded_once_for_both_answers_and_both_models():
    for kept in (False, True):
        method = moved(LLaVADPO(small(), beta=BETA, cache_features=kept)).train()
        seen = []
        method.model.vision.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
        given = batch() | {"image_ids": torch.arange(3)}
        losses = [method.step(given, 0.5).loss.item() for _ in range(2)]
        assert losses[0] == losses[1] and sum(seen) == (3 if kept else 6)


def test_low_rank_updates_of_a_frozen_image_encoder_learn_and_the_reference_has_none():
    method = LLaVADPO(small(), beta=BETA, reference="untuned", train=["connector"])
    torch.manual_seed(1)
    LoRA(rank=2, targets=["qkv"], parts=["model.vision"])(method)
    start = method.likelihoods(batch())[1].detach()
    moved(method)
    policy, reference = method.likelihoods(batch())
    assert torch.equal(reference, start) and not torch.equal(policy, reference)
    method.step(batch(), 0.5).loss.backward()
    assert all(p.grad is not None for p in method.model.vision.parameters() if p.requires_grad)


def test_mistakes():
    with pytest.raises(UserError, match="Flamingo"):
        LLaVADPO(gated_model())
    method = LLaVADPO(small())
    given = batch()
    with pytest.raises(UserError, match="data=shapes_preferences"):
        method.step({key: value for key, value in given.items() if "rejected" not in key}, 0.5)
    with pytest.raises(UserError, match="do not pack"):
        method.step(given | {"segments": given["tokens"]}, 0.5)
    with pytest.raises(UserError, match="beta=0"):
        LLaVADPO(small(), beta=0)
    with pytest.raises(UserError, match="nll_weight=-1"):
        LLaVADPO(small(), nll_weight=-1)
    with pytest.raises(UserError, match="copy or untuned"):
        LLaVADPO(small(), reference="teacher")
    with pytest.raises(UserError, match="reference=copy"):
        LLaVADPO(small(), reference="untuned").step(given, 0.5)
    LoRA(rank=2, parts=["model.decoder"])(method)
    with pytest.raises(UserError, match="set reference=untuned"):
        method.step(given, 0.5)
    method = LLaVADPO(small(), beta=BETA)
    Adapters(parts=["model.decoder"])(method)  # their reference is a copy, adapters and all
    assert method.step(given, 0.5).loss.item() == math.log(2)


class Loss(nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, rows):
        return self.method.step(batch(rows), 0.5).loss


def gradients(make, rows, wrap=lambda module: module):
    method = moved(make())
    network = wrap(Loss(method))
    for _ in range(2):  # a process that waits for a gradient would hang in the second
        method.zero_grad()
        loss = network(rows)
        loss.backward()
    return loss.item(), {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


KINDS = ("copy", "untuned", "nll")


def made(kind):
    return lora() if kind == "untuned" else LLaVADPO(small(), beta=BETA, nll_weight=0.2 * (kind == "nll"))


def of_rank(rank):
    own = part(rank, 4)
    return {k: gradients(functools.partial(made, k), own, DistributedDataParallel) for k in KINDS}


def test_two_ranks_are_one(tmp_path):
    ranks = on_ranks(of_rank, tmp_path)
    for kind in KINDS:
        loss, want = gradients(functools.partial(made, kind), slice(0, 4))
        assert abs(sum(found[kind][0] for found in ranks) / 2 - loss) < 1e-9
        for found in ranks:
            assert found[kind][1].keys() == want.keys()
            assert all(gap(found[kind][1][name], grad) < 1e-9 for name, grad in want.items())


SMALL = [word for word in TINY if not word.startswith("eval")]
DPO = [word for word in SMALL if word.split("=")[0] not in ("experiment", "optim")] + ["experiment=llava_shapes_dpo"]
NOBODY = "nobody knows"


def pairs(folder):
    """Pictures with questions; the worse answer is always the same."""
    scenes = Shapes("test", 40).read(range(40)).data
    rows = []
    for i, scene in enumerate(scenes):
        to_pil_image(scene).save(folder / f"{i}.png")
        said = {"chosen": ("a ring", "a star")[i % 2], "rejected": NOBODY}
        rows.append({"image": f"{i}.png", "question": "what is it?", **said})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of llava to begin from."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert main([*SMALL, "eval=[]", f"out={out}"]) == 0
    return out


@pytest.mark.parametrize("way", [[], ["tuning=lora", "method.reference=untuned", "tuning.parts=[model.decoder]"]])
def test_a_short_run_raises_the_margin_of_pairs_it_has_not_seen(start, tmp_path, way, capsys):
    sizes = ["data.batch_size=8", "duration=40steps", "optim.lr=1e-2", "data.image_size=32", "data=preferences"]
    left = [word.split("=")[0] for word in sizes] + ["data.train.length", "data.test.length"]
    words = [*(word for word in DPO if word.split("=")[0] not in left), *sizes, *way, "eval=[preference]"]
    words[words.index("experiment=llava_shapes_dpo")] = "method=llava_dpo"
    words += [f"data.path={pairs(tmp_path)}", "method.model.connector.pool=2", f"method.weights={start}"]
    assert main([*words, f"out={tmp_path / 'run'}"]) == 0
    found = {row.name: row.value for row in read(tmp_path / "run/metrics.json") if row.evaluator == "preference"}
    assert found["margin"] > 0.1 and found["accuracy"] == 100 and found["chosen"] > found["rejected"]
    assert main(["chat", f"ckpt={tmp_path / 'run'}", 'prompt="what is it?"', "max_new_tokens=2"]) == 0
    assert main([*words, "method.model.connector.merge=2", f"out={tmp_path / 'other'}"]) == 2
    assert "another connector" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_ends_as_one_left_alone(start, tmp_path):
    words = [*DPO, f"method.weights={start}", "save_steps=2", "eval=[preference]"]
    assert run([*words, f"out={tmp_path / 'whole'}"]) == 0
    assert run([*words, f"out={tmp_path / 'again'}"], ("backward", 4)) == -9
    assert run([*words, f"out={tmp_path / 'again'}"]) == 0
    same_end(tmp_path / "whole", tmp_path / "again")
