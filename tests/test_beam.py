"""Beam search: equal to transformers', and to trying everything."""

import itertools
import math

import pytest
import torch
from language_models import NEW, PAD, V, of_theirs, pair, prompts, shaken, tiny

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.errors import UserError
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.generation.generate import generate
from ssl_lab.generation.sampling import Sampling


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_beams_are_transformers(family, alpha, early):
    theirs, ours = pair(family, torch.float32)
    rows = prompts(5, 9, 7)
    eos = int(generate(ours, rows, max_new_tokens=NEW)[1, 3])
    for width in (3, 4):
        how = {"num_beams": width, "early_stopping": early, "length_penalty": alpha}
        expected = of_theirs(theirs, rows, eos_token_id=eos, **how)
        beam = Beam(width, alpha, early_stopping=early)
        found = beam_search(ours, rows, max_new_tokens=NEW, eos=eos, pad=PAD, beam=beam)
        best = found.tokens[:, 0]
        length = min(best.shape[1], expected.shape[1])
        assert torch.equal(best[:, :length], expected[:, :length])
        assert (best[:, length:] == PAD).all() and (expected[:, length:] == PAD).all()


def test_beams_of_an_encoder_and_decoder_are_transformers():
    theirs, ours = pair("t5", torch.float32)
    rows = prompts(9, 9)
    for width, alpha in itertools.product((1, 3, 4), (0.0, 1.0)):
        with torch.no_grad():
            expected = theirs.generate(torch.stack(rows), num_beams=width, length_penalty=alpha, max_new_tokens=NEW,
                                       do_sample=False)[:, 1:]  # fmt: skip
        best = beam_search(ours, rows, max_new_tokens=NEW, eos=1, pad=PAD, start=0, beam=Beam(width, alpha)).tokens[
            :, 0
        ]
        assert best.tolist() == expected.tolist()
        if width == 1:
            assert generate(ours, rows, max_new_tokens=NEW, eos=1, pad=PAD).tolist() == expected.tolist()
    assert len(expected.unique()) > 3


def test_sources_of_different_length_do_not_disturb_each_other():
    model = shaken(EncoderDecoder(V, 32, 2, 4, max_length=80), std=0.2).double()
    rows = prompts(4, 9)
    together = beam_search(model, rows, eos=1, max_new_tokens=NEW)
    for row, tokens in zip(rows, together.tokens[:, 0], strict=True):
        alone = beam_search(model, [row], eos=1, max_new_tokens=NEW).tokens[0, 0]
        assert tokens[: len(alone)].tolist() == alone.tolist()
    assert generate(model, rows).shape[1] == 9 + 50


@pytest.mark.parametrize("penalty", ["length", "gnmt"])
def test_enough_beams_find_the_best_of_all(penalty):
    """Every sequence of a toy vocabulary, scored one by one."""
    vocab, new, eos, alpha = 4, 4, 1, 0.6
    decoder = shaken(Decoder(vocab, 16, 2, 2, max_length=16), std=0.8).double()
    prompt = torch.tensor([2, 3])
    beam = Beam(3 * vocab**3, alpha, penalty, early_stopping="never")
    found = beam_search(decoder, [prompt], max_new_tokens=new, eos=eos, pad=0, beam=beam)
    scores = {}
    for text in itertools.product(range(vocab), repeat=new):
        text = text[: text.index(eos) + 1] if eos in text else text
        if text not in scores:
            ids = torch.cat([prompt, torch.tensor(text)])
            with torch.no_grad():
                logs = decoder.logits(decoder(ids[None]).tokens[0]).log_softmax(-1)
            total = sum(logs[1 + i, token].item() for i, token in enumerate(text))
            n = len(text)
            scores[text] = total / (n**alpha if penalty == "length" else ((5 + n) / 6) ** alpha)
    best = sorted(scores, key=scores.get, reverse=True)[:5]
    rows = found.tokens[0, :5].tolist()
    assert [tuple(row[: len(text)]) for row, text in zip(rows, best, strict=True)] == best
    assert all(math.isclose(a, scores[b], rel_tol=1e-5) for a, b in zip(found.scores[0, :5].tolist(), best))


def test_beam_mistakes():
    with pytest.raises(UserError, match="num_beams=0"):
        Beam(0)
    with pytest.raises(UserError, match="draws nothing"):
        beam_search(tiny(), [[1]], max_new_tokens=1, sampling=Sampling(1.0))
