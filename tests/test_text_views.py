"""Views of text: shifted, masked, corrupted and padded, each sample by its position alone."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ssl_lab.data import text_captions
from ssl_lab.data.text_pad import IGNORE, PadQuestions, PadSentences, PadTranslations
from ssl_lab.data.text_questions import Questions
from ssl_lab.data.text_views import CorruptSpans, MaskPairs, MaskTokens, NextToken, _parts, noise_of
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError
from ssl_lab.rng import uniform

TEXTS = text_captions.table("test")["text"]


@pytest.fixture(scope="module")
def bert():
    return Tokenizer(train(TEXTS, "wordpiece", 90))  # so few that words fall into several


@pytest.fixture(scope="module")
def t5():
    return Tokenizer(train(TEXTS, "bpe", 420, ["<pad>"], sentinels=40))


def rows(tokenizer, count, length, documents=1):
    """(B, L + 1) ordinary tokens, and documents of equal length."""
    free = torch.tensor(sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special)))
    chosen = torch.randint(len(free), (count, length + 1), generator=torch.Generator().manual_seed(0))
    return free[chosen], (torch.arange(length + 1) * documents // (length + 1)).expand(count, -1)


def alone(view, data, row, seed=3):
    """What the view makes of one row by itself, at the position that it has in a batch."""
    one = tuple(part[row : row + 1] for part in data)
    return view(one, torch.tensor([100 + row]), seed)


def check_each_by_itself(view, data, keys, count=6):
    batch = view(data, 100 + torch.arange(count), 3)
    for row in range(count):
        single = alone(view, data, row)
        for key in keys:
            assert torch.equal(batch[key][row], single[key][0]), key
    other = view(data, 200 + torch.arange(count), 3)
    assert any(not torch.equal(batch[key], other[key]) for key in keys if batch[key].shape == other[key].shape)
    return batch


# Language modelling


def test_next_token():
    tokens, segments = torch.arange(12).view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    batch = NextToken()((tokens, segments), torch.arange(2), 0)
    assert batch["tokens"].tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[1, IGNORE, 3, 4, IGNORE], [7, 8, 9, 10, 11]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 1], [0] * 5]
    plain = NextToken(across=True)((tokens, segments), torch.arange(2), 0)
    assert plain["labels"].tolist() == tokens[:, 1:].tolist() and set(plain) == {"tokens", "labels"}
    assert set(NextToken()((tokens[1:], segments[1:]), torch.arange(1), 0)) == {"tokens", "labels"}


# Masking


def test_masking_follows_bert(bert):
    data = rows(bert, 400, 128)
    batch = MaskTokens(bert)(data, torch.arange(400), 0)
    tokens, labels = batch["tokens"], batch["labels"]
    assert set(batch) == {"tokens", "labels"} and tokens.shape == labels.shape == (400, 128)
    assert (tokens[:, 0] == bert.cls).all() and (tokens[:, -1] == bert.sep).all()
    original = torch.where(labels == IGNORE, tokens, labels)
    assert torch.equal(original[:, 1:-1], data[0][:, :126])
    chosen = labels != IGNORE
    assert (chosen.sum(1) == round(128 * 0.15)).all() and not chosen[:, [0, -1]].any()
    places = chosen.float().mean(0)[1:-1]
    assert (places - 19 / 126).abs().max() < 5 * (19 / 126 / 400) ** 0.5  # everywhere alike
    masked, kept = tokens[chosen] == bert.mask, tokens[chosen] == labels[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.02)
    drawn = tokens[chosen][~masked & ~kept]
    assert not set(drawn.tolist()) & set(bert.special)
    assert len(set(drawn.tolist())) > 0.9 * (bert.vocab_size - len(bert.special))
    assert torch.equal(tokens[~chosen], original[~chosen])


def test_masking_is_a_matter_of_the_position(bert):
    check_each_by_itself(MaskTokens(bert), rows(bert, 6, 40), ["tokens", "labels"])
    check_each_by_itself(MaskTokens(bert, whole_words=True), rows(bert, 6, 40), ["tokens", "labels"])


def test_separators_and_shares(bert):
    tokens, segments = rows(bert, 50, 40, documents=2)
    tokens = tokens.clone()
    tokens[:, 20] = bert.sep
    batch = MaskTokens(bert, rate=0.5, masked=0.0, random=0.0, across=False)((tokens, segments), torch.arange(50), 0)
    assert not (batch["labels"] == bert.sep).any() and ((batch["labels"] != IGNORE).sum(1) == 20).all()
    assert torch.equal(batch["tokens"][:, 1:-1], tokens[:, :38])
    assert torch.equal(batch["segments"][:, 1:-1], segments[:, :38]) and batch["segments"].shape == (50, 40)
    low = MaskTokens(bert, rate=0.001)((tokens, segments), torch.arange(50), 0)
    assert ((low["labels"] != IGNORE).sum(1) == 1).all() and "segments" not in low


def test_whole_words_are_masked_together(bert):
    ids = torch.tensor([bert.encode(" ".join(TEXTS[i : i + 4]))[:120] for i in range(0, 200, 4)])
    data = ids, torch.zeros_like(ids)
    batch = MaskTokens(bert, whole_words=True)(data, torch.arange(len(ids)), 0)
    chosen, starts = batch["labels"] != IGNORE, bert.starts
    assert chosen.sum(1).max() <= round(119 * 0.15) and chosen.sum(1).float().mean() > 16
    inside = 0
    for row in range(len(ids)):
        words, original = [], torch.where(chosen[row], batch["labels"][row], batch["tokens"][row])
        for place, i in enumerate(original.tolist()):
            words = [*words[:-1], [*words[-1], place]] if words and not starts[i] else [*words, [place]]
        for word in words:
            assert len({bool(chosen[row, place]) for place in word}) == 1
            inside += len(word) > 1
    assert inside > 100


def test_masking_needs_a_mask_and_sensible_shares(bert, t5):
    with pytest.raises(UserError, match="mask token"):
        MaskTokens(t5)
    for options in ({"rate": 0.0}, {"masked": 0.9, "random": 0.2}):
        with pytest.raises(UserError, match="take 0 < rate < 1"):
            MaskTokens(bert, **options)


def test_pairs_for_the_next_sentence(bert):
    passages = [np.array(bert.encode(text)[:60]) for text in TEXTS[:300]]
    others = [np.array(bert.encode(text)[:60]) for text in TEXTS[300:500] + TEXTS[:100]]
    view = MaskPairs(bert, rate=0.15)
    batch = view((passages, others), torch.arange(300), 0)
    assert batch["target"].float().mean() == pytest.approx(0.5, abs=0.1)
    for row in range(300):
        real = batch["valid"][row]
        whole = torch.where(batch["labels"][row] == IGNORE, batch["tokens"][row], batch["labels"][row])[real].tolist()
        assert not real[len(whole) :].any() and (batch["tokens"][row, len(whole) :] == bert.pad).all()
        assert (batch["labels"][row] != IGNORE).sum() == max(1, round(len(whole) * 0.15))
        middle = whole.index(bert.sep)
        assert whole[0] == bert.cls and whole[-1] == bert.sep
        assert batch["types"][row].tolist()[: len(whole)] == [0] * (middle + 1) + [1] * (len(whole) - middle - 1)
        first, second = whole[1:middle], whole[middle + 1 : -1]
        assert len(first) > 0 and len(second) > 0 and len(whole) <= 63
        assert first == passages[row].tolist()[: len(first)]
        assert bert.decode(first).endswith(".")  # cut after a sentence
        source = others[row] if batch["target"][row] else passages[row]
        assert bytes(np.array(second)) in bytes(source)
        assert batch["target"][row] or second == source.tolist()[len(first) :]
    assert (MaskPairs(bert, shuffled=0.0)((passages, others), torch.arange(300), 0)["target"] == 0).all()
    for row in range(3):
        one = view(([passages[row]], [others[row]]), torch.tensor([row]), 0)
        assert torch.equal(one["tokens"][0], batch["tokens"][row, : one["tokens"].shape[1]])


# Span corruption


def restored(batch, row, tokenizer):
    """The raw tokens that inputs and labels stand for; sentinels must come in order and end both."""
    inputs, labels = batch["tokens"][row].tolist(), batch["labels"][row].tolist()
    assert inputs.pop() == labels.pop() == tokenizer.eos
    spans: list[list[int]] = []
    for i in labels:
        if i in tokenizer.sentinels:
            assert i == tokenizer.sentinels[len(spans)]
            spans.append([])
        else:
            spans[-1].append(i)
    found: list[int] = []
    for i in inputs:
        found += spans[tokenizer.sentinels.index(i)] if i in tokenizer.sentinels else [i]
    assert [i for i in inputs if i in tokenizer.sentinels] == tokenizer.sentinels[: len(spans)]
    return found, spans


def test_spans_are_corrupted_as_in_t5(t5):
    assert noise_of(568, 0.15, 3.0) == (85, 28)
    data = rows(t5, 64, 568)
    batch = CorruptSpans(t5)(data, torch.arange(64), 0)
    assert batch["tokens"].shape == (64, 512) and batch["labels"].shape == (64, 114) and batch["valid"].all()
    sizes = Counter()
    for row in range(64):
        raw, spans = restored(batch, row, t5)
        assert raw == data[0][row, :568].tolist()
        assert len(spans) == 28 and min(map(len, spans)) >= 1 and sum(map(len, spans)) == 85
        assert batch["tokens"][row, 0] not in t5.sentinels and batch["tokens"][row, -2] == t5.sentinels[27]
        sizes.update(map(len, spans))
    assert sizes.total() == 64 * 28 and {1, 2, 3, 4, 5} < set(sizes)
    check_each_by_itself(CorruptSpans(t5), (data[0][:6], data[1][:6]), ["tokens", "labels"])
    closed = CorruptSpans(t5, closing=True)(data, torch.arange(64), 0)
    assert closed["labels"].shape == (64, 115) and (closed["labels"][:, -2] == t5.sentinels[28]).all()
    assert torch.equal(closed["labels"][:, :113], batch["labels"][:, :113])


@pytest.mark.parametrize(
    ("length", "rate", "mean_span"), [(8, 0.15, 3.0), (9, 0.5, 1.0), (30, 0.9, 3.0), (3, 0.15, 3.0)]
)
def test_short_rows_and_high_rates(t5, length, rate, mean_span):
    data = rows(t5, 20, length)
    batch = CorruptSpans(t5, rate=rate, mean_span=mean_span)(data, torch.arange(20), 0)
    noise, spans = noise_of(length, rate, mean_span)
    assert batch["tokens"].shape[1] == length - noise + spans + 1 and batch["labels"].shape[1] == noise + spans + 1
    for row in range(20):
        assert restored(batch, row, t5)[0] == data[0][row, :length].tolist()


def test_every_division_is_equally_likely():
    found = Counter(map(tuple, _parts(6, 3, uniform(0, torch.arange(20000), 5)).tolist()))
    wanted = {tuple(np.diff([0, *cuts, 6]).tolist()) for cuts in combinations(range(1, 6), 2)}
    assert set(found) == wanted and len(wanted) == 10
    assert max(abs(count - 2000) for count in found.values()) < 5 * 2000**0.5


def test_corruption_needs_sentinels(t5, bert):
    with pytest.raises(UserError, match=r"data.tokenizer.sentinels=50"):
        CorruptSpans(t5)(rows(t5, 2, 1000), torch.arange(2), 0)
    with pytest.raises(UserError, match="eos token"):
        CorruptSpans(bert)
    with pytest.raises(UserError, match="spans of at least 1"):
        CorruptSpans(t5, mean_span=0.5)


# Padding


@pytest.mark.parametrize("max_length", [12, 13, 40, 200])
def test_sentences_and_pairs_as_transformers_makes_them(bert, tmp_path, max_length):
    bert.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    a, b = TEXTS[:40], [text[: 7 * i] or "a" for i, text in enumerate(TEXTS[40:80])]
    for texts in ((a,), (b,), (a, b), (b, a), (a, a)):
        data = tuple([np.array(bert.encode(x), np.int32) for x in side] for side in texts)
        batch = PadSentences(bert, max_length=max_length, fixed=True)(data, torch.arange(40), 0)
        wanted = theirs(
            *texts, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt",
            return_token_type_ids=True,
        )  # fmt: skip
        assert torch.equal(batch["tokens"], wanted["input_ids"])
        assert torch.equal(batch["valid"], wanted["attention_mask"].bool())
        pair_types = wanted["token_type_ids"]
        assert torch.equal(batch["types"], pair_types if len(texts) == 2 else torch.zeros_like(pair_types))
        short = PadSentences(bert, max_length=max_length)(data, torch.arange(40), 0)
        length = short["tokens"].shape[1]
        assert length % 8 == 0 and length - 8 < short["valid"].sum(1).max() <= length
        kept = min(length, max_length)
        assert torch.equal(short["tokens"][:, :kept], batch["tokens"][:, :kept])


def test_sentences_for_a_tokenizer_without_cls(t5):
    data = ([np.array([50, 51])], [np.array([52])])
    batch = PadSentences(t5)(data, torch.arange(1), 0)
    assert batch["tokens"].tolist() == [[50, 51, t5.eos, 52, t5.eos, t5.pad, t5.pad, t5.pad]]
    assert batch["types"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]] and batch["valid"].sum() == 5


def test_translations(t5):
    data = ([np.arange(50, 53), np.arange(60, 75)], [np.arange(70, 71), np.arange(80, 89)])
    batch = PadTranslations(t5, max_length=12)(data, torch.arange(2), 0)
    assert batch["tokens"].shape == batch["valid"].shape == (2, 16) and batch["labels"].shape == (2, 16)
    assert batch["tokens"][0].tolist() == [50, 51, 52, t5.eos] + [t5.pad] * 12
    assert batch["tokens"][1, :12].tolist() == [*range(60, 71), t5.eos] and batch["valid"].sum(1).tolist() == [4, 12]
    assert batch["labels"][0].tolist() == [70, t5.eos] + [IGNORE] * 14
    assert batch["labels"][1].tolist() == [*range(80, 89), t5.eos] + [IGNORE] * 6
    fixed = PadTranslations(t5, max_length=12, fixed=True)(data, torch.arange(2), 0)
    assert fixed["tokens"].shape == fixed["labels"].shape == (2, 12)
    with pytest.raises(UserError, match="max_length is 4"):
        PadTranslations(t5, max_length=4)


@pytest.mark.parametrize("which", ["bert", "t5"])
def test_answers_are_found_in_the_joined_sequence(which, request):
    tokenizer = request.getfixturevalue(which)
    questions = Questions("captions", tokenizer, split="test", max_length=64, stride=16, max_question=20)
    assert len(questions) > len(questions.questions)
    batch = PadQuestions(tokenizer)(questions.read(range(len(questions))).data, torch.arange(len(questions)), 0)
    assert batch["tokens"].shape[1] <= 64
    answered = set()
    for row, (first, last) in enumerate(batch["span"].tolist()):
        if last:
            question = questions.questions[questions.question_of(row)]
            assert tokenizer.decode(batch["tokens"][row, first : last + 1]).strip() == question.answers[0]
            assert batch["valid"][row, last] and batch["types"][row, [first, last]].tolist() == [1, 1]
            answered.add(questions.question_of(row))
    assert answered == set(range(len(questions.questions)))
    assert PadQuestions(tokenizer, max_length=64)(questions.read([0]).data, torch.arange(1), 0)["tokens"].shape == (
        1,
        64,
    )
