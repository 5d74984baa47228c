"""CTC decoding against the sum over every path: greedy, prefix beam search, language model, alignment, words."""

import itertools
import math

import pytest
import torch

from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.generation.chunks import in_chunks
from ssl_lab.generation.ctc import CTCBeam, align, beam_search, greedy, pieces, words
from ssl_lab.generation.ngram import NGram, WordScore

ALL = CTCBeam(width=10_000, prune=math.inf)


def frames(T, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(T, V, generator=generator, dtype=torch.float64)).log_softmax(-1)


def collapsed(path, blank=0):
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def paths(log_probs):
    """Every path with its log probability."""
    T, V = log_probs.shape
    for path in itertools.product(range(V), repeat=T):
        yield path, sum(float(log_probs[t, token]) for t, token in enumerate(path))


def totals(log_probs, blank=0):
    """Token sequence -> ln of the summed probability of its paths."""
    found = {}
    for path, value in paths(log_probs):
        found.setdefault(collapsed(path, blank), []).append(value)
    return {tokens: math.log(sum(math.exp(v) for v in values)) for tokens, values in found.items()}


@pytest.mark.parametrize(("seed", "blank"), [(0, 0), (1, 0), (2, 2)])
def test_a_search_that_drops_nothing_sums_over_every_path(seed, blank):
    log_probs = frames(5, 3, seed)
    expected, found = totals(log_probs, blank), beam_search(log_probs, ALL, blank=blank)
    assert {tuple(tokens) for tokens, _ in found} == set(expected)
    for tokens, value in found:
        assert value == pytest.approx(expected[tuple(tokens)], abs=1e-12)
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(found))
    assert sum(math.exp(value) for _, value in found) == pytest.approx(1)


def test_the_best_sequence_can_be_another_one_than_that_of_the_best_path():
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert greedy(log_probs) == []  # 0.36 alone, but the three paths that say 1 have 0.64
    assert beam_search(log_probs)[0] == ([1], pytest.approx(math.log(0.64)))


def test_a_language_model_counts_with_its_weight_and_once_for_each_prefix():
    log_probs, V = frames(4, 3, 3), 3
    bigram = frames(V, V, 4)
    asked = []

    def score(prefix):
        asked.append(prefix)
        return bigram[prefix[-1] if prefix else 0]

    beam = CTCBeam(10_000, math.inf, lm_weight=0.7, reward=0.3)
    expected = {}
    for tokens, value in totals(log_probs).items():
        steps = zip((0, *tokens), tokens, strict=False)
        expected[tokens] = value + 0.7 * sum(float(bigram[a, b]) for a, b in steps) + 0.3 * len(tokens)
    found = beam_search(log_probs, beam, score)
    assert found[0][0] == list(max(expected, key=expected.get))
    for tokens, value in found:
        assert value == pytest.approx(expected[tuple(tokens)], abs=1e-12)
    assert len(asked) == len(set(asked))


def test_a_narrow_search_finds_what_a_wide_one_does_where_frames_are_sure():
    log_probs = (5 * frames(60, 8, 5)).log_softmax(-1)
    assert beam_search(log_probs, CTCBeam(8))[0][0] == beam_search(log_probs, CTCBeam(300, math.inf))[0][0]


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2), (1, 1), (2, 2, 1)])
def test_the_alignment_is_the_best_of_the_paths_that_say_it(tokens):
    log_probs = frames(5, 3, 6)
    best, _ = max((x for x in paths(log_probs) if collapsed(x[0]) == tokens), key=lambda x: x[1])
    expected, t = [], 0
    for token, run in itertools.groupby(best):
        length = len(list(run))
        if token:
            expected.append((t, t + length - 1))
        t += length
    assert align(log_probs, tokens) == expected


def test_an_alignment_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="3 tokens need 5 frames"):
        align(frames(4, 3), [1, 1, 1])


def test_greedy_merges_repeats_before_it_drops_blanks():
    path = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0])
    assert greedy(torch.nn.functional.one_hot(path, 3).double().log()) == [1, 1, 2]
    assert greedy(torch.zeros(0, 3)) == []


def test_pieces_are_short_and_say_together_what_the_whole_does():
    log_probs = frames(400, 6, 7)
    log_probs[:, 0] += 1.0
    cut = pieces(log_probs, 30)
    assert cut[0][0] == 0 and cut[-1][1] == 400
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cut)) and max(b - a for a, b in cut) <= 30
    assert [token for a, b in cut for token in greedy(log_probs[a:b])] == greedy(log_probs)
    assert pieces(log_probs[:20], 30) == [(0, 20)]
    loud = torch.zeros(100, 2)
    loud[:, 1] = 1.0  # never a pause
    assert max(b - a for a, b in pieces(loud, 30)) <= 30


class Letters:
    def decode(self, ids):
        return "".join("_ abcdefgh"[i] for i in ids)


def test_words_last_from_their_first_letter_to_their_last():
    said = words([2, 3, 1, 4], [(1, 2), (4, 4), (6, 6), (8, 9)], Letters(), 0.04)
    assert [w.text for w in said] == ["ab", "c"]
    assert [(round(w.start, 3), round(w.end, 3)) for w in said] == [(0.06, 0.22), (0.34, 0.42)]
    assert words([], [], Letters(), 0.04) == []
    assert [w.text for w in words([1, 2, 1], [(0, 0), (1, 1), (2, 2)], Letters(), 1.0)] == ["a"]


def test_tokens_that_are_words_need_no_blank_between_them():
    tokenizer = Tokenizer(train(["one two three"], "word", 0, ["<pad>"]))
    ids = tokenizer.encode("two three two")
    said = words(ids, [(0, 1), (4, 4), (6, 9)], tokenizer, 0.1)
    assert [(word.text, round(word.start, 2), round(word.end, 2)) for word in said] == [
        ("two", 0.05, 0.25),
        ("three", 0.45, 0.55),
        ("two", 0.65, 1.05),
    ]
    entries = {("one",): (-1.0, 0.0), ("two",): (-2.0, 0.0), ("three",): (-3.0, 0.0)}
    score = WordScore(NGram(entries, 1), tokenizer, tokenizer.vocab_size)
    assert score(tuple(ids[:1])).tolist() == [0.0, -2.0, -2.0, -2.0]  # what ends counts when another begins
    assert score.end(tuple(ids[:2])) == -3.0


@pytest.mark.parametrize("samples", [9, 40, 41, 79, 80, 81, 203])
def test_chunks_give_the_frames_of_the_whole(samples):
    step, audio = 4, torch.randn(samples, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    heard = []

    def emit(part):
        heard.append(len(part))
        return part.unfold(0, 8, step).sum(1, keepdim=True)  # frame t from t * step on

    found = in_chunks(emit, audio, step=step, chunk=40, overlap=16)
    assert max(heard) <= 40 and min(heard) >= 9
    torch.testing.assert_close(found, emit(audio), rtol=0, atol=0)
    with pytest.raises(ValueError, match="do not advance"):
        in_chunks(emit, audio.repeat(9), step=step, chunk=40, overlap=40)
