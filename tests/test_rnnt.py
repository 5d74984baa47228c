"""The transducer: its loss by hand, greedy and beam decoding against plain loops, padding, and messages."""

import functools
import itertools

import pytest
import torch
from test_speech_methods import Frames, speech

from ssl_lab.backbones.hear import hear
from ssl_lab.errors import UserError
from ssl_lab.generation.ctc import CTCBeam
from ssl_lab.generation.listen import Recogniser
from ssl_lab.generation.rnnt import RNNTBeam, beam_search, greedy
from ssl_lab.losses.ctc import ctc_loss
from ssl_lab.losses.transducer import transducer_nll
from ssl_lab.methods.rnnt import RNNT
from ssl_lab.nn.transducer import LSTMPredictor, StatelessPredictor, Transducer

PREDICTORS = {
    "lstm": functools.partial(LSTMPredictor, dim=6, depth=2),
    "stateless": functools.partial(StatelessPredictor, dim=6, context=2),
    "last": functools.partial(StatelessPredictor, dim=6, context=1),
}


def toy(predictor="lstm", V=7, **more):
    torch.manual_seed(0)
    method = RNNT(Frames(), V, predictor=PREDICTORS[predictor], joint_dim=8, **more).double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.mul_(3)  # so that what was written matters
    return method


@pytest.fixture(params=PREDICTORS)
def method(request):
    return toy(request.param)


def test_the_loss_is_that_of_each_row_alone_per_token(method):
    batch, net, total = speech(), method.transducer, 0.0
    for row, (frames, labels) in enumerate(zip((12, 9, 5), ([1, 2, 3], [4, 4], [5]), strict=True)):
        tokens = batch["audio"][row, : frames * 400].view(frames, 400)
        written, state, said = [0, *labels], None, []
        for token in written:  # step by step, as decoding does
            out, state = net.advance(torch.tensor([token]), state)
            said.append(out)
        scores = net.out((net.hear(tokens)[:, None] + torch.cat(said)).tanh())
        total += transducer_nll(scores[None], torch.tensor([labels]))[0][0]
    step = method.step(batch, 0.5)
    torch.testing.assert_close(step.loss, total / 6)
    assert step.logs["too_short"] == 0


def test_ctc_on_the_frames_stands_beside_it_and_changes_nothing_that_is_written():
    batch, plain, both = speech(), toy(), toy(ctc_weight=0.3)
    both.load_state_dict(plain.state_dict(), strict=False)
    alone, step = plain.step(batch, 0.5), both.step(batch, 0.5)
    logits = both.ctc_head(hear(both.encoder, batch).tokens)
    valid = torch.arange(12) < torch.tensor([12, 9, 5])[:, None]
    ctc = ctc_loss(logits, batch["labels"], valid)[0]
    torch.testing.assert_close(step.loss, alone.loss + 0.3 * ctc, rtol=1e-12, atol=0)
    torch.testing.assert_close([step.logs["transducer"], step.logs["ctc"]], [alone.loss, ctc], rtol=1e-12, atol=0)
    assert step.logs["spoken"] == ((logits.argmax(-1) != 0) & valid).sum() / 26
    assert both.transcribe(batch) == plain.transcribe(batch)


def plain_greedy(net, heard, max_symbols):
    tokens, at = [], []
    said, state = net.advance(torch.tensor([net.blank]))
    for t in range(len(heard)):
        for _ in range(max_symbols):
            best = int(net.log_probs(heard[t], said[0]).argmax())
            if best == net.blank:
                break
            tokens.append(best)
            at.append(t)
            said, state = net.advance(torch.tensor([best]), state)
    return tokens, at


@pytest.mark.parametrize("max_symbols", [1, 3])
def test_greedy_is_the_plain_loop_over_each_row(method, max_symbols):
    with torch.no_grad():
        method.transducer.out.bias[0] += 1.0
    heard, counts = method.emissions(speech())
    assert counts.tolist() == [12, 9, 5]
    found = greedy(method.transducer, heard, counts, max_symbols=max_symbols)
    lengths = []
    for row, count in enumerate(counts.tolist()):
        tokens, at = plain_greedy(method.transducer, heard[row, :count], max_symbols)
        assert (found[row].tokens, found[row].frames) == (tokens, at)
        lengths.append(len(tokens))
    assert max(lengths) > 1 and 0 < sum(lengths) < max_symbols * sum(counts.tolist())
    method.max_symbols = max_symbols
    assert method.transcribe(speech()) == [row.tokens for row in found]
    assert method.decode(heard[0])[1] == [(at, at) for at in found[0].frames]


def test_greedy_scores_one_alignment():
    method = toy()
    heard, counts = method.emissions(speech())
    one = greedy(method.transducer, heard, counts, max_symbols=2)[0]
    with torch.no_grad():
        said = method.transducer.said(torch.tensor([one.tokens]))[0]
        log_probs = method.transducer.log_probs(heard[0, :, None], said)
    u, total = 0, 0.0
    for t in range(12):
        for token in [x for x, at in zip(one.tokens, one.frames, strict=True) if at == t]:
            total, u = total + float(log_probs[t, u, token]), u + 1
        total += float(log_probs[t, u, 0])
    assert one.score == pytest.approx(total)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_beam_that_prunes_nothing_gives_the_likelihoods_of_all_short_texts(predictor):
    method = toy(predictor, V=3)
    heard = method.emissions(speech())[0][0, :3]
    found = beam_search(method.transducer, heard, RNNTBeam(10**6, max_symbols=3, prune=float("inf")))
    scores = {tuple(h.tokens): h.score for h in found}
    assert [h.score for h in found] == sorted(scores.values(), reverse=True)
    for length in range(4):  # longer ones would need more than 3 tokens in a frame on some alignments
        for text in itertools.product((1, 2), repeat=length):
            labels = torch.tensor([text], dtype=torch.int64).view(1, length)
            with torch.no_grad():
                scores_of = method.transducer.out((heard[:, None] + method.transducer.said(labels)[0]).tanh())
            assert scores[text] == pytest.approx(-float(transducer_nll(scores_of[None], labels)[0]), abs=1e-9)
    assert all(len(h.tokens) == len(h.frames) and h.frames == sorted(h.frames) for h in found)


def test_a_beam_finds_at_least_what_greedy_does_and_more_width_no_less():
    method = toy(V=5)
    heard, counts = method.emissions(speech())
    one = greedy(method.transducer, heard, counts, max_symbols=2)
    for row in range(3):
        frames = heard[row, : counts[row]]
        best = [beam_search(method.transducer, frames, RNNTBeam(w, 2, float("inf")))[0].score for w in (1, 4, 30)]
        assert best[2] >= best[1] - 1e-9 and best[2] >= one[row].score - 1e-9
    rows = method.transcribe(speech(), num_beams=4)
    assert rows[1] == method.decode(heard[1, :9], num_beams=4)[0]


def test_padding_and_what_stands_in_it_change_nothing(method):
    batch = speech()
    whole = method.step(batch, 0.5).loss
    batch["audio"] = batch["audio"] + 5.0 * ~batch["audio_valid"]
    batch["labels"] = torch.cat([batch["labels"], batch["labels"].new_full((3, 2), -100)], 1)
    torch.testing.assert_close(method.step(batch, 0.5).loss, whole, rtol=1e-12, atol=0)
    said = method.transcribe(batch)
    for row, length in enumerate((12, 9, 5)):
        assert method.transcribe({"audio": batch["audio"][row : row + 1, : length * 400]}) == [said[row]]


def test_long_recordings_are_heard_in_chunks_and_silence_says_nothing(monkeypatch):
    monkeypatch.setattr(Frames, "seconds", 0.05, raising=False)
    method = toy()
    audio = torch.randn(40 * 400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for beam in (CTCBeam(1), CTCBeam(3)):
        whole = Recogniser(method, None, 8000, beam=beam)
        parts = Recogniser(method, None, 8000, chunk=0.8, overlap=0.4, beam=beam)
        tokens, spans = whole.tokens(audio)
        assert len(tokens) == len(spans) > 3 and spans == sorted(spans) and spans[-1][1] < 40
        assert parts.tokens(audio) == (tokens, spans)
        assert whole.tokens(torch.zeros(8000).double()) == ([], [])
    with torch.no_grad():
        method.transducer.hear.bias[0] = float("nan")
    with pytest.raises(UserError, match="no numbers"):
        whole.tokens(audio)


def test_rows_without_frames_or_text():
    method = toy()
    step = method.step(speech(frames=(2, 0), labels=((1, 2, 3), (4, 4))), 0.5)  # more tokens than frames is no trouble
    assert step.logs["too_short"] == 0.5 and step.loss.isfinite() and step.loss > 0
    batch = speech(frames=(2, 1), labels=((1,), (4,)))
    nothing = method.step(batch | {"audio_valid": torch.zeros(2, 800, dtype=torch.bool)}, 0.5)
    nothing.loss.backward()
    assert nothing.loss == 0 and not any(p.grad.any() for p in method.parameters() if p.grad is not None)
    silent = method.step(speech(frames=(3,), labels=((-100,),)), 0.5)
    assert silent.loss.isfinite()


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="leaves nothing to write"):
        RNNT(Frames(), 1)
    with pytest.raises(UserError, match="at least 1"):
        RNNT(Frames(), 5, max_symbols=0)
    with pytest.raises(UserError, match="0 or more"):
        RNNT(Frames(), 5, ctc_weight=-0.1)
    with pytest.raises(UserError, match="transcripts"):
        toy().step({"audio": torch.zeros(1, 800)}, 0.5)
    with pytest.raises(UserError, match="vocab_size and blank"):
        toy(V=4).step(speech(), 0.5)


def test_a_state_goes_on_where_it_stopped():
    for make in PREDICTORS.values():
        torch.manual_seed(1)
        net = make(9).double()
        tokens = torch.randint(0, 9, (3, 7))
        whole, _ = net(tokens)
        first, state = net(tokens[:, :4])
        rest, _ = net(tokens[:, 4:], tuple(part[:, [2, 0, 1]] for part in state))
        torch.testing.assert_close(torch.cat([first, rest[[1, 2, 0]]], 1)[:, :4], whole[:, :4])
        assert rest.shape == (3, 3, 6)
        again, _ = net(tokens[[2, 0, 1], 4:], tuple(part[:, [2, 0, 1]] for part in state))
        torch.testing.assert_close(again, whole[[2, 0, 1], 4:])
    assert Transducer(4, 5).out.out_features == 5
