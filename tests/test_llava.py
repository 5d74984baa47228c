"""LLaVA: what learns and what does not, answers, ranks without images, runs that go on, and talking to one."""

import functools
import io
import json
import re

import lightning as L
import pytest
import torch
from parity import gap, images, randomise
from ranks import on_ranks
from test_conversations import encoder, several
from test_vlm import ids, small
from torchvision.transforms.v2.functional import to_pil_image
from training import run, same_end

from ssl_lab.cli.main import main
from ssl_lab.data.conversation_table import conversations
from ssl_lab.data.conversation_views import ConversationViews
from ssl_lab.data.module import DataModule
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.source import subset
from ssl_lab.data.views import Resize
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round
from ssl_lab.evals.vqa import VQA, Asks, Looks, balance, different, normalized, score, usual
from ssl_lab.methods.llava import LLaVA, load
from ssl_lab.nn.adapters import Adapters
from ssl_lab.nn.connectors import LinearConnector
from ssl_lab.nn.lora import LoRA
from ssl_lab.train import checkpoint
from ssl_lab.train.optim import Optim

MARK = 98


def batch(with_images=True):
    rows = [[1, MARK, 2, 3, 4], [5, 6, 7], [8, MARK, MARK, 9]] if with_images else [[1, 2, 3], [4, 5, 6]]
    tokens, valid = ids(*rows)
    labels = torch.full_like(tokens, -100)
    labels[:, 1:3] = tokens.roll(-1, 1)[:, 1:3]
    labels[(labels == MARK) | ~valid] = -100
    found = {"tokens": tokens, "valid": valid, "labels": labels}
    return found | ({"images": images(batch=3)} if with_images else {})


@pytest.mark.parametrize(("stage", "learns"), [("align", {"connector"}), ("instruct", {"connector", "decoder"})])
def test_what_does_not_learn_has_no_gradient_no_state_and_drops_nothing(stage, learns):
    method = LLaVA(small(), stage=stage).train()
    optimizer = Optim().build(method.param_groups(), 8)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    method.step(batch(), 0.5).loss.backward()
    assert {name.split(".")[1] for name, p in method.named_parameters() if p.grad is not None} == learns
    optimizer.step()
    held = {id(p) for p in optimizer.state}
    names = {name for name, p in method.named_parameters() if id(p) in held}
    assert {name.split(".")[1] for name in names} == learns
    assert {name.split(".")[1] for name, p in method.named_parameters() if not torch.equal(p, before[name])} == learns
    assert {part for part in ("vision", "connector", "decoder") if method.model.get_submodule(part).training} == learns
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    size = sum(p.numel() for part in learns for p in method.model.get_submodule(part).parameters())
    assert state == 2 * size  # the two averages of Adam, of what learns and of nothing else


def test_parts_are_named():
    assert {n.split(".")[1] for n, p in LLaVA(small(), train=["vision"]).named_parameters() if p.requires_grad} == {
        "vision"
    }
    for wrong in ({"train": ["language"]}, {"train": []}, {"stage": "dpo"}):
        with pytest.raises(UserError, match=r"train=|stage="):
            LLaVA(small(), **wrong)


def test_features_of_a_frozen_encoder_are_computed_once(caplog):
    plain, kept = LLaVA(small()).train(), LLaVA(small(), cache_features=True).train()
    given = batch() | {"image_ids": torch.tensor([4, 2, 4])}
    given["images"] = given["images"][[0, 1, 0]]
    calls = []
    kept.model.vision.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        kept.zero_grad(), plain.zero_grad()
        one, other = (method.step(given, 0.5).loss for method in (plain, kept))
        one.backward(), other.backward()
        assert gap(one, other) < 1e-12
        assert gap(plain.model.connector.fc1.weight.grad, kept.model.connector.fc1.weight.grad) < 1e-12
    assert len(calls) == 2 and "KiB an image" in caplog.text
    kept.step(batch(with_images=False), 0.5)
    kept.eval().step(given, 0.5)
    assert len(calls) == 4  # an empty image for the connector, and evaluation, which has images of its own
    with pytest.raises(UserError, match="draw nothing"):
        kept.train().step(batch(), 0.5)
    with pytest.raises(UserError, match="does not learn"):
        LLaVA(small(), train=["vision"], cache_features=True)


def remembered(folder, workers, rows=None, **more):
    """Losses of passes over pictures that are gone after the first; how often the encoder ran; images read here."""
    folder.mkdir()
    for i in range(8):
        to_pil_image(torch.full((3, 32, 32), 30 * i, dtype=torch.uint8)).save(folder / f"{i}.png")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
    told = [{"image": f"{i}.png", "conversations": turns} for i in range(8)]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(told))
    source, views = conversations(folder, encoder()), ConversationViews(Resize(32))
    data = DataModule(source, source, views, batch_size=4, eval_views=views, num_workers=workers, rows=rows)
    method = speaking(data).float().train()
    method.cache_features, method.optim, losses, calls, asked = bool(more), Optim(lr=1e-2), [], [], []
    method.model.freeze("vision").vision.register_forward_hook(lambda *_: calls.append(1))
    read = source.images.read
    source.images.read = lambda numbers: asked.extend(numbers) or read(numbers)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(float(outputs["loss"]))
            if more and trainer.global_step == 2 + workers * 2:  # what is made ahead may still be read
                for file in folder.glob("*.png"):
                    file.unlink()

    trainer = L.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(method, data)
    return losses, len(calls), len(asked)


@pytest.mark.parametrize(("workers", "rows"), [(0, None), (1, None), (0, 4)])
def test_an_image_whose_features_are_kept_is_never_read_again(tmp_path, workers, rows):
    plain, often, _ = remembered(tmp_path / "plain", 0, rows)
    kept, once, read = remembered(tmp_path / "kept", workers, rows, cache_features=True)
    assert once == (rows or 8) and often == 10 and len(kept) == 10
    assert workers or read <= once + 2 * 4  # two batches may be ahead
    assert kept == pytest.approx(plain, rel=1e-4)


def test_answers_are_what_the_logits_say_of_one_row_alone():
    method = LLaVA(small()).eval()
    given = batch()
    found = method.answer(given, 97, max_tokens=4)
    firsts = (given["labels"] != -100).long().argmax(1)
    begin = 0
    for row, first in enumerate(firsts.tolist()):
        tokens = given["tokens"][row, : first + 1]
        count = int((tokens == MARK).sum())
        pictures = given["images"][begin : begin + count]
        begin += int((given["tokens"][row] == MARK).sum())
        for step in range(4):
            with torch.no_grad():
                out = method.model(tokens[None], pictures)[0].tokens[:, -1]
            token = method.model.decoder.logits(out).argmax(-1)
            assert int(found[row, step]) == int(token)
            tokens = torch.cat([tokens, token])
    with pytest.raises(UserError, match="pack=null"):
        method.answer(given | {"segments": given["tokens"]}, 97, max_tokens=2)
    with pytest.raises(UserError, match="no answer"):
        method.answer(given | {"labels": torch.full_like(given["tokens"], -100)}, 97, max_tokens=2)
    fitting = method.answer(given, -1, max_tokens=200)  # as many as the context of 128 holds
    longest = max(
        len(row[: first + 1]) + 15 * int((row[: first + 1] == MARK).sum())
        for row, first in zip(given["tokens"], firsts.tolist(), strict=True)
    )
    assert fitting.shape[1] == 128 - longest and torch.equal(fitting[:, :4], method.answer(given, -1, max_tokens=4))
    long = {
        name: torch.nn.functional.pad(given[name], (130, 0), value=v) for name, v in (("tokens", 1), ("labels", -100))
    }
    with pytest.raises(UserError, match="no room in the model's context of 128"):
        method.answer(given | long, 97, max_tokens=2)


def test_the_second_stage_begins_with_the_first_and_refuses_other_connectors(tmp_path):
    first = LLaVA(small(), stage="align")
    file = tmp_path / "step=1.ckpt"
    state = {"state_dict": randomise(first, 5).state_dict(), "global_step": 1}
    checkpoint.write(state, file)
    second = LLaVA(small(), weights=str(file))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), first.parameters(), strict=True))
    with pytest.raises(UserError, match=r"has another connector: .*set method\.model\.connector"):
        LLaVA(small(LinearConnector), weights=str(file))
    with pytest.raises(UserError, match="no run folder"):
        load(small(), str(tmp_path / "none"))
    checkpoint.write(state | {"state_dict": {"encoder.weight": torch.zeros(1)}}, file)
    with pytest.raises(UserError, match="no run of llava"):
        load(small(), str(file))


def gradients_of(rank):
    """Of one step in which only the first process has images."""
    method = LLaVA(small())
    wrapped = torch.nn.parallel.DistributedDataParallel(Loss(method))
    for _ in range(2):  # a process that waits for a gradient would hang in the second
        method.zero_grad()
        loss = wrapped(batch(with_images=rank == 0))
        loss.backward()
    return loss.item(), {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


class Loss(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, given):
        return self.method.step(given, 0.5).loss


def test_a_rank_without_images_waits_for_nobody_and_adds_nothing(tmp_path):
    (first, left), (second, right) = on_ranks(gradients_of, tmp_path)
    method = LLaVA(small())
    whole, texts = batch(), batch(with_images=False)
    width = whole["tokens"].shape[1] - texts["tokens"].shape[1]
    pad = functools.partial(torch.nn.functional.pad, pad=(0, width))
    joined = {
        "tokens": torch.cat([whole["tokens"], pad(texts["tokens"])]),
        "valid": torch.cat([whole["valid"], pad(texts["valid"])]),
        "labels": torch.cat([whole["labels"], pad(texts["labels"], value=-100)]),
        "images": whole["images"],
    }
    loss = method.step(joined, 0.5).loss
    loss.backward()
    assert abs((first + second) / 2 - loss.item()) < 1e-9
    want = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert left.keys() == right.keys() == want.keys()
    assert all(gap(left[name], value) < 1e-9 and gap(right[name], value) < 1e-9 for name, value in want.items())


def test_answers_are_compared_as_in_the_challenge():
    assert normalized("A  Red, star.") == "red star" and normalized("two") == "2" and normalized("1.5") == "1.5"
    assert score("red.", ("Red",)) == 1 and score("blue", ("red",)) == 0
    assert normalized("a T-shirt/top") == "t shirt top" and normalized("10,000") == "10000"
    assert normalized("don't") == normalized("dont")
    assert score("ring", ("ring", "ring", "circle", "ring")) == 1
    ten = ("ring",) * 3 + ("circle",) * 7  # 3 of 10: of the ten sets of nine people, seven hold 3 and three hold 2
    assert score("ring", ten) == pytest.approx(0.9) and score("circle", ten) == 1 and score("star", ten) == 0
    assert score("circle", ("ring", "ring", "circle", "ring")) == pytest.approx(1 / 3)
    found = balance(["yes", "yes", "no", "red"], ["yes", "no", "no", "blue"])
    assert found == {
        "yes_no/accuracy": pytest.approx(75), "yes_no/said_yes": pytest.approx(200 / 3),
        "yes_no/are_yes": pytest.approx(100 / 3),
    }  # fmt: skip
    assert balance(["red"], ["blue"]) == {}


class Data:
    """Conversations as a data module has them."""

    classes = ()

    def __init__(self):
        self.train = self.test = several(encoder())
        self.tokenizer = self.test.tokenizer

    def eval_loader(self, split, limit=None):
        samples = self.test.read([0, 1, 2, 3])
        views = ConversationViews(Resize(32))
        yield views(samples.data, torch.arange(4), 0) | {"target": samples.targets, "index": samples.rows}


def speaking(data):
    model = small()
    model.decoder.embed = torch.nn.Embedding(data.tokenizer.vocab_size, 48, dtype=torch.float64)
    model.decoder.head, model.image_token = None, data.test.encode.image
    model.decoder.vocab_size = data.tokenizer.vocab_size
    return LLaVA(model).eval()


def test_questions_are_evaluated_beside_what_no_image_tells():
    data = Data()
    method = speaking(data)
    round = Round(method, data)
    found = VQA(max_tokens=3, shown=2).run(round)
    # "sure?" and "is it a circle?" are answered with yes, which is also the most frequent answer.
    assert found["majority"] == 50 and found["question_only"] == 100 and found["questions/count"] == 4
    assert usual(data.train)[0] == "yes" and len(round.notes) == 2 and 0 <= found["accuracy"] <= 100
    looks = Looks().run(round)
    given = next(iter(data.eval_loader("test")))
    seen = torch.tensor([True, False, True, True])
    nats = method.nll(given)[seen].sum() / (given["labels"][seen] != -100).sum()
    assert looks["right"] == pytest.approx(nats.item(), rel=1e-5)
    assert looks["gain"] == pytest.approx(looks["shuffled"] - looks["right"]) and looks["none"] != looks["right"]


def test_baselines_know_the_rows_of_training_alone():
    data, whole = Data(), several(encoder())
    data.train = subset(whole, 2, 0)
    round = Round(speaking(data), data)
    known = {whole.question(row)[0] for row in range(2)}
    assert isinstance(data.train, Asks) and data.train.question(1) == whole.question(1)
    assert set(usual(data.train)[1]) == known != set(usual(whole)[1])
    assert VQA(max_tokens=3).run(round)["question_only"] < 100  # with the test answers it would be all of them
    assert not isinstance(subset(Shapes("train", 4), 2, 0), Asks)


def test_another_picture_is_never_the_same_one():
    a, b, c = (torch.full((3, 2, 2), float(i)) for i in range(3))
    found = different(torch.stack([a, a, a, b, b]), torch.arange(5))
    assert found.tolist() == [3, 3, 3, 0, 0]
    assert different(torch.stack([a, b, c]), torch.tensor([0, 0, 1])).tolist() == [2, 2, 0]  # not that of its own row
    assert different(torch.stack([a, a]), torch.arange(2)).tolist() == [-1, -1]
    assert different(torch.empty(0, 3, 2, 2), torch.empty(0)).tolist() == []


def test_the_wrong_picture_of_several_questions_is_another_one():
    """Questions about one picture stand side by side: the next of the batch is mostly the same one."""
    data = Data()
    method = speaking(data)
    given = next(iter(data.eval_loader("test")))
    image = given["images"][:1]
    twice = {**given, "images": torch.cat([image, image, *given["images"][2:].unsqueeze(1)])}

    class Same(Data):
        def eval_loader(self, split, limit=None):
            yield twice

    found = Looks().run(Round(method, Same()))
    wrong = {**twice, "images": twice["images"][different(twice["images"], twice["image_rows"])]}
    assert not any(torch.equal(x, y) for x, y in zip(wrong["images"], twice["images"], strict=True))
    seen = torch.tensor([True, False, True, True])
    nats = method.nll(wrong)[seen].sum() / (given["labels"][seen] != -100).sum()
    assert found["shuffled"] == pytest.approx(nats.item(), rel=1e-5)
    with pytest.raises(UserError, match="pack=null"):
        twice["segments"] = given["tokens"]
        Looks().run(Round(method, Same()))


@pytest.mark.parametrize(
    "tune", [functools.partial(LoRA, rank=2, targets=["qkv"]), functools.partial(Adapters, hidden=4)]
)
def test_what_a_tuning_puts_into_a_frozen_image_encoder_learns(tune):
    method = LLaVA(small())
    tune(parts=["model.vision"])(method)
    for given in (batch(), batch(with_images=False)):
        method.zero_grad()
        method.train().step(given, 0.5).loss.backward()
        new = [p for p in method.model.vision.parameters() if p.requires_grad]
        assert new and all(p.grad is not None for p in new)
        assert any(p.grad.abs().sum() > 0 for p in new) == ("images" in given)
    method.cache_features = True
    with pytest.raises(UserError, match="does not learn"):
        method.train().step(batch() | {"image_ids": torch.arange(3)}, 0.5)


TINY = [
    "experiment=llava_shapes", "eval=[vqa]", "optim=adamw", "data.batch_size=4", "data.train.length=24",
    "data.test.length=4", "method.model.vision.dim=16", "method.model.vision.depth=2",
    "method.model.vision.num_heads=2", "method.model.vision.patch_size=8",
    "method.model.decoder.dim=16", "method.model.decoder.depth=1",
    "method.model.decoder.num_heads=2", "trainer.precision=32-true", "trainer.log_every_n_steps=1", "duration=6steps",
    "trainer.enable_progress_bar=false", "eval.vqa.max_tokens=2", "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["[connector]", "[connector,decoder]"])
def test_a_killed_run_ends_as_one_left_alone(tmp_path, learns):
    words = [*TINY, f"method.train={learns}", "save_steps=2"]
    assert run([*words, f"out={tmp_path / 'whole'}"]) == 0
    assert run([*words, f"out={tmp_path / 'again'}"], ("backward", 4)) == -9
    assert run([*words, f"out={tmp_path / 'again'}"]) == 0
    same_end(tmp_path / "whole", tmp_path / "again")


def test_train_then_chat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frozen = ["tuning=nothing", "tuning.parts=[model.vision,model.decoder]", "method.train=[connector]"]
    assert main([*TINY, *frozen, "out=align"]) == 0
    state = checkpoint.read(checkpoint.find("align"))["state_dict"]
    assert {name.split(".")[1] for name in state} == {"connector"}  # the rest is the seed's, or its weights'
    to_pil_image(Shapes("test", 1).read([0]).data[0]).save("scene.png")
    capsys.readouterr()
    chat = ["chat", "ckpt=align", "max_new_tokens=3"]
    asked = 'prompt="what shape is the largest object?"'
    assert main([*chat, "image=scene.png", asked]) == 0
    told = capsys.readouterr()
    assert re.search(r"\d+ tokens, [\d.,]+ tokens/s", told.err)
    assert main([*chat, asked]) == 0  # of nothing
    lines = "what shape is the largest object?\nis there a ring in the picture?\n/image scene.png\nhow?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    assert main([*chat, "image=scene.png"]) == 0
    assert capsys.readouterr().err.count("tokens/s") == 3
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for words, message in [
        (["image=none.png", asked], "image=none.png does not exist"),
        (["image=broken.png", asked], "image=broken.png cannot be read: it is no image"),
        (['prompt="<image> what?"'], "mentions 1 pictures (<image>), and there are 0"),
        (["image=scene.png", 'prompt="<image> or <image>?"'], "mentions 2 pictures"),
    ]:
        assert main([*chat, *words]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert main(["chat", "ckpt=nowhere", asked]) == 2
    assert main([*TINY, "method.weights=align", "method.model.connector.merge=2", "out=other"]) == 2
    assert "another connector" in capsys.readouterr().err
