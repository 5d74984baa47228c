"""Known answers for the evaluators of text: accuracy and F1, answers in a text, translations."""

import collections
import dataclasses
import math
import re
import string
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchmetrics.functional.text import squad as squad_score

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError
from ssl_lab.evals.base import Round, Skip
from ssl_lab.evals.bleu import Bleu
from ssl_lab.evals.finetune import Finetune
from ssl_lab.evals.perplexity import Perplexity
from ssl_lab.evals.runner import run_all
from ssl_lab.evals.squad import Squad, best_span
from ssl_lab.evals.text_accuracy import TextAccuracy
from ssl_lab.losses.lm import IGNORE
from ssl_lab.methods.causal_lm import CausalLM
from ssl_lab.methods.masked_lm import MaskedLM
from ssl_lab.train.optim import Optim


class Data:
    """Rows of tokens, and a test source that knows what they are."""

    classes: list[str] = []

    def __init__(self, batch, source=None, tokenizer=None):
        self.batch, self.test, self.tokenizer = batch, source, tokenizer

    def eval_loader(self, split, limit=None):
        count = min(limit or 10**9, len(self.batch["tokens"]))
        for part in torch.arange(count).flip(0).split(3):  # out of order, in several batches
            batch = {key: value[part] for key, value in self.batch.items()}
            yield {"target": torch.full((len(part),), -1), **batch, "index": part}


def values(evaluator, method, data):
    return {row.name: row.value for row in run_all({"it": evaluator}, method, data)}


# ---- perplexity


class Surprised(nn.Module):
    """Each scored token costs three bits."""

    def nll(self, batch):
        return (batch["labels"] != IGNORE) * (3 * math.log(2))


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_bits_per_byte_of_lone_bytes(kind):
    """A masked token of byte-level BPE may be part of a character: it counts as the bytes that it is."""
    text = "na\u00efve \u20ac5"
    tokenizer = Tokenizer(train([text, "zzzzzzzz"], kind, 258))
    tokens = torch.tensor([tokenizer.encode(text)])
    for hidden in (slice(None), slice(0, None, 2), slice(2, 4)):
        labels = torch.full_like(tokens, IGNORE)
        labels[:, hidden] = tokens[:, hidden]
        count = len(tokens[0, hidden])
        size = count if kind == "bpe" else sum(len(text[i].encode()) for i in range(len(text))[hidden])
        found = values(Perplexity(), Surprised(), Data({"tokens": tokens, "labels": labels}, tokenizer=tokenizer))
        assert found["bits_per_byte"] == pytest.approx(3 * count / size)


def test_packed_rows_are_refused_by_every_evaluator_in_one_line():
    class Packed(Data):
        def eval_loader(self, split, limit=None):
            for batch in super().eval_loader(split, limit):
                yield {**batch, "segments": batch["tokens"], "index": torch.arange(2 * len(batch["tokens"]))}

    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(UserError, match=r"set data.eval_views.pack=null"):
        values(Perplexity(), Surprised(), Packed({"tokens": tokens, "labels": tokens}))


# ---- accuracy and F1


class Guesses(nn.Module):
    """Says what the tokens say."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def classify(self, batch):
        return nn.functional.one_hot(batch["tokens"][:, 0], self.classes).float()


def labelled(guesses, target):
    return Data({"tokens": torch.tensor(guesses)[:, None], "target": torch.tensor(target)})


def test_accuracy_and_f1_of_the_second_class():
    data = labelled([1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0, 0, -1])  # the last row has no class
    found = values(TextAccuracy(), Guesses(2), data)
    precision, recall = 2 / 4, 2 / 3
    assert found["accuracy"] == pytest.approx(100 * 4 / 7)
    assert found["f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_f1_of_more_classes_is_their_mean():
    found = values(TextAccuracy(), Guesses(3), labelled([0, 0, 1, 2, 2], [0, 1, 1, 2, 0]))
    assert found["f1"] == pytest.approx(100 * (1 / 2 + 2 / 3 + 2 / 3) / 3)
    with pytest.raises(Skip):
        TextAccuracy().run(Round(Guesses(3), labelled([0], [-1])))
    data = labelled([0, 1], [0, 1])
    data.classes = ["bad", "fair", "good"]
    with pytest.raises(Skip, match="head tells 2 classes, and these data have 3"):
        TextAccuracy().run(Round(Guesses(2), data))


class Labelled(Data):
    """Training rows are test rows."""

    classes = ["one", "two"]

    def train_dataloader(self, first=None):
        return self.eval_loader("train")

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


def test_a_text_encoder_is_finetuned():
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(3, 9, (48, 6), generator=g), torch.arange(48) % 2
    tokens[:, 1] = 1 + target
    valid = torch.ones_like(tokens, dtype=torch.bool)
    data = Labelled({"tokens": tokens, "valid": valid, "types": torch.zeros_like(tokens), "target": target})
    evaluator = Finetune(Optim(lr=1e-2), steps=120, pooling="cls")
    method = MaskedLM(TextEncoder(9, 16, 1, 2, max_length=8))
    assert values(evaluator, method, data)["top1"] > 95
    decoder = CausalLM(Decoder(9, 16, 1, 2, max_length=8))
    assert values(dataclasses.replace(evaluator, pooling="last"), decoder, data)["top1"] > 95


# ---- answers in a text


def test_the_best_span_is_the_best_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    logits, allowed = torch.randn(20, 13, 2, generator=g), torch.rand(20, 13, generator=g) < 0.6
    allowed[0] = False
    score, first, last = best_span(logits, allowed, 4)
    assert score[0] == -torch.inf
    for row in range(1, 20):
        best = max(
            (float(logits[row, i, 0] + logits[row, j, 1]), i, j)
            for i in range(13)
            for j in range(i, min(13, i + 4))
            if allowed[row, i] and allowed[row, j]
        )
        assert (pytest.approx(best[0]), best[1], best[2]) == (float(score[row]), int(first[row]), int(last[row]))


class Points(nn.Module):
    """Scores that the tokens carry: row of (start, end) per token."""

    def locate(self, batch):
        return batch["scores"]


CONTEXTS = ["The quick brown fox", "jumps over it"]


class Source:
    """Two questions; the first is asked of two windows, [CLS] the quick [SEP] and [CLS] brown fox [SEP]."""

    questions = [
        SimpleNamespace(context=CONTEXTS[0], answers=["brown fox", "fox"]),
        SimpleNamespace(context=CONTEXTS[1], answers=["over"]),
        SimpleNamespace(context="nothing", answers=[]),
    ]
    _windows = [(0, [(0, 3), (4, 9)]), (0, [(10, 15), (16, 19)]), (1, [(0, 5), (6, 10)]), (2, [(0, 7)])]

    def question_of(self, row):
        return self._windows[row][0]

    def offsets(self, row):
        return torch.tensor([(-1, -1), *self._windows[row][1], (-1, -1)])


def asked(best):
    """Scores that prefer token `best[row]`, all the more the later the row, and the class token most of all."""
    scores = torch.zeros(4, 5, 2)
    for row, token in enumerate(best):
        scores[row, token] = 1.0 + row
    scores[:, 0] = 9.0
    return Data({"tokens": torch.zeros(4, 5).long(), "scores": scores}, Source())


def test_the_best_window_answers_and_questions_without_an_answer_are_left_out():
    found = values(Squad(), Points(), asked([2, 2, 2, 1]))  # fox, over
    assert found == {"exact_match": 100.0, "f1": 100.0, "questions/count": 2.0}
    found = values(Squad(), Points(), asked([2, 1, 1, 1]))  # brown: half of two words; jumps: wrong
    assert found["exact_match"] == 0.0 and found["f1"] == pytest.approx(100 * (2 / 3) / 2)
    with pytest.raises(Skip, match="no questions"):
        Squad().run(Round(Points(), Data({"tokens": torch.zeros(1, 1)})))


def official(guess, answer):
    """What the script of SQuAD 1.1 does, in our words: words without case, punctuation and articles."""

    def words(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    a, b = words(guess), words(answer)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    f1 = 0.0 if not common else 2 * common / (len(a) + len(b))
    return float(a == b), f1


@pytest.mark.parametrize(
    ("guess", "answers"),
    [
        ("The Cat!", ["cat"]),
        ("a cat, and a dog", ["cat and dog", "the cats"]),
        ("in 1990s", ["1990", "the 1990s"]),
        ("", ["something"]),
        ("über  Alles", ["Über alles."]),
        ("an apple a day", ["apples"]),
    ],
)
def test_torchmetrics_scores_as_the_official_script(guess, answers):
    found = squad_score(
        [{"prediction_text": guess, "id": "0"}],
        [{"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": "0"}],
    )
    exact, f1 = (max(pair) for pair in zip(*(official(guess, answer) for answer in answers)))
    assert float(found["exact_match"]) == pytest.approx(100 * exact)
    assert float(found["f1"]) == pytest.approx(100 * f1)


# ---- translations

WORDS = ["</s>", "ein", "kleines", "haus", "steht", "im", "wald", "."]


class Speller:
    """Ids to words and back."""

    def require(self, role):
        assert role == "eos"
        return [0]

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


class Echo(nn.Module):
    """Translates a sentence into itself, and ends it with id 0."""

    def translate(self, batch, eos, *, num_beams, alpha, max_tokens):
        tokens = batch["tokens"]
        return torch.cat([tokens, torch.full_like(tokens[:, :2], eos)], 1)


def sentences():
    tokens = torch.randint(1, 8, (7, 6), generator=torch.Generator().manual_seed(0))
    return tokens, [Speller().decode(row.tolist()) for row in tokens]


def test_bleu_is_that_of_sacrebleu_on_rows_in_their_order():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    tokens, texts = sentences()
    references = [*texts[:4], "ein haus", "im wald steht ein kleines haus .", "haus"]
    data = Data({"tokens": tokens}, SimpleNamespace(references=references), Speller())
    rows = run_all({"bleu": Bleu(num_beams=1)}, Echo(), data)
    expected = sacrebleu.corpus_bleu(texts, [references])
    assert {row.name: row.value for row in rows}["bleu"] == pytest.approx(expected.score)
    assert 10 < expected.score < 90
    assert "tok:13a" in rows[0].protocol["signature"] and rows[0].protocol["num_beams"] == 1
    same = Data({"tokens": tokens}, SimpleNamespace(references=texts), Speller())
    assert values(Bleu(), Echo(), same)["bleu"] == pytest.approx(100)


def test_bleu_needs_translations_and_its_library(monkeypatch):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    tokens, _ = sentences()
    with pytest.raises(Skip, match="no translations"):
        Bleu().run(Round(Echo(), Data({"tokens": tokens}, SimpleNamespace(), Speller())))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-lab\[text\]'"):
        Bleu().run(Round(Echo(), Data({"tokens": tokens})))
