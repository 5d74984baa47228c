"""Generated text: equal to transformers' for the same weights, whichever way it is computed."""

import copy

import pytest
import torch
from language_models import NEW, PAD, V, of_theirs, pair, prompts, shaken, tiny

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.bench.harness import make as make_step
from ssl_lab.errors import UserError
from ssl_lab.generation.batch import pad_left
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.generation.compact import Compact
from ssl_lab.generation.generate import generate, stream
from ssl_lab.generation.processors import (
    PADDING,
    Allowed,
    MinNewTokens,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)
from ssl_lab.generation.prompts import chat, few_shot
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.steppers import Cached, stepper
from ssl_lab.generation.words import Words
from ssl_lab.nn.positions import ALiBi, Learned, Relative
from ssl_lab.nn.prompt import Prompts
from ssl_lab.nn.recipes import gpt_block, llama_block, mla_block

transformers = pytest.importorskip("transformers")


# ---- the loop


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (3, 11, 7)], ids=["one", "even", "padded"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_greedy_text_is_transformers(family, lengths):
    theirs, ours = pair(family)
    rows = prompts(*lengths)
    expected = of_theirs(theirs, rows)
    assert len(expected.unique()) > 3, "a text of one token proves little"
    assert isinstance(stepper(ours), Compact)
    assert torch.equal(generate(ours, rows, max_new_tokens=NEW), expected)
    assert torch.equal(generate(ours, rows, max_new_tokens=NEW, compact=False), expected)
    assert torch.equal(generate(ours, rows, max_new_tokens=NEW, cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("lengths", [(4, 10, 9), (5,)], ids=["padded", "one"])
def test_scores_of_the_quick_path_are_as_exact_as_those_of_the_modules(family, dtype, lengths):
    """Against float64 with the same (rounded) weights."""
    _, ours = pair(family, dtype)
    exact = copy.deepcopy(ours).double()
    tokens, valid = pad_left(prompts(*lengths), PAD)
    ways, worst = [stepper(ours), Cached(ours, cache=False), Cached(exact, cache=False)], torch.zeros(2)
    with torch.no_grad():
        scores = [way.begin(tokens, valid, 20) for way in ways]
        for i in range(19):
            worst = torch.stack([worst, torch.stack([(s - scores[2]).abs().max() for s in scores[:2]])]).amax(0)
            scores = [way.step(torch.full((len(tokens),), 5 + i)) for way in ways]
            if i == 8:
                for way in ways:
                    way.reorder(torch.tensor([2, 0, 0])[: len(lengths)] % len(lengths))
    assert worst[0] <= {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.5}[dtype]
    assert worst[0] <= 1.5 * worst[1] or dtype != torch.bfloat16


def test_the_window_rolls_and_forgets():
    """Only `window` keys are held, and what has left the window cannot matter in a model of one layer."""
    decoder = shaken(tiny(depth=1, window=4)).double()
    quick = stepper(decoder)
    with torch.no_grad():
        a, b = prompts(9, seed=1)[0], prompts(9, seed=2)[0]
        tail = torch.tensor([7, 8, 9, 10])
        for first in (a, b):
            quick.begin(first[None], None, 20)
            for token in tail:
                last = quick.step(token[None])
            other = quick.kept.shape[3]
            assert other == 4
            first.last = last
    assert torch.allclose(a.last, b.last, atol=1e-14)


@pytest.mark.parametrize("block", [gpt_block, mla_block], ids=["gpt", "mla"])
@pytest.mark.parametrize("positions", [ALiBi, Relative])
def test_a_bias_of_the_scores_fits_what_the_window_keeps(positions, block):
    decoder = shaken(Decoder(V, 32, 2, 4, max_length=64, window=5, positions=positions, block=block)).double()
    for rows in (prompts(4), prompts(9, 3)):
        cached = generate(decoder, rows, max_new_tokens=12)
        assert torch.equal(cached, generate(decoder, rows, max_new_tokens=12, cache=False))


@pytest.mark.parametrize(
    ("what", "quick"),
    [
        ({}, True),
        ({"positions": ALiBi}, False),
        ({"block": lambda d, h, layer: hooked(llama_block(d, h, layer=layer))}, False),
    ],
    ids=["plain", "alibi", "hooks"],
)
def test_what_the_quick_path_does_not_know_goes_through_the_modules(what, quick):
    decoder = shaken(tiny(**what)).double()
    assert isinstance(stepper(decoder), Compact) == quick
    rows = prompts(3, 8)
    expected = generate(decoder, rows, max_new_tokens=NEW, cache=False)
    assert torch.equal(generate(decoder, rows, max_new_tokens=NEW), expected)


def hooked(block):
    block.register_forward_hook(lambda module, args, out: out * 1.5)
    return block


def test_ends_fill_and_stop():
    theirs, ours = pair("llama")
    rows = prompts(5, 9, 3)
    free = generate(ours, rows, max_new_tokens=NEW)
    row, at = next((r, i) for r in range(3) for i in range(3, NEW) if free[r, i] not in free[r, :i])
    eos = int(free[row, at])
    out = generate(ours, rows, max_new_tokens=NEW, eos=eos, pad=PAD)
    assert torch.equal(out, of_theirs(theirs, rows, eos_token_id=eos)[:, : out.shape[1]])
    assert out[row, : at + 1].tolist() == free[row, : at + 1].tolist() and (out[row, at + 1 :] == PAD).all()
    assert generate(ours, rows[row : row + 1], max_new_tokens=NEW, eos=(eos, PAD)).shape[1] <= at + 1
    longer = Sampling(min_new_tokens=6)
    out = generate(ours, rows, max_new_tokens=NEW, eos=eos, pad=PAD, sampling=longer)
    assert (out[:, :6] != eos).all()
    assert torch.equal(out, of_theirs(theirs, rows, eos_token_id=eos, min_new_tokens=6)[:, : out.shape[1]])


def test_stream_yields_each_step_and_leaves_the_mode():
    _, ours = pair("gpt2")
    rows = prompts(4, 6)
    ours.train()
    steps = stream(ours, rows, max_new_tokens=5)
    parts = [next(steps), next(steps)]
    assert not torch.is_inference_mode_enabled()
    parts += list(steps)
    assert ours.training and not ours.eval().training
    assert torch.equal(torch.stack(parts, 1), generate(ours, rows, max_new_tokens=5))


def test_a_seed_is_a_text():
    _, ours = pair("gpt2", torch.float32)
    drawn = [generate(ours, prompts(4), max_new_tokens=20, sampling=Sampling(1.0, seed=s)).tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_samples_are_transformers():
    theirs, ours = pair("llama", torch.float32)
    rows, how = prompts(6, 3), {"temperature": 0.7, "top_k": 9, "top_p": 0.83, "repetition_penalty": 1.2}
    tokens, _ = pad_left(rows, 0)
    even = [*tokens]  # their penalty counts padding too: none here
    out = generate(ours, even, max_new_tokens=NEW, sampling=Sampling(**how, seed=3))
    torch.manual_seed(3)
    assert torch.equal(out, of_theirs(theirs, even, do_sample=True, **how))


@pytest.mark.parametrize(
    ("rows", "new", "message"),
    [
        ([[1] * 65], 1, "65 tokens, the model's context holds 64"),
        ([[1] * 60], 5, "at most max_new_tokens=4"),
        ([[1, V]], 1, f"knows 0 to {V - 1}"),
        ([[1], []], 1, "no tokens"),
        ([[1]], 0, "1 or more"),
        ([[1]], None, "max_new_tokens is not given"),
    ],
)
def test_mistakes_are_told_before_any_work(rows, new, message):
    decoder = tiny()
    decoder.forward = None  # type: ignore[assignment]
    for call in (stream, beam_search):
        with pytest.raises(UserError, match=message):
            call(decoder, rows, max_new_tokens=new)


def test_the_whole_context_can_be_filled():
    _, ours = pair("gpt2")
    assert generate(ours, [[3] * 60], max_new_tokens=4).shape == (1, 4)


def test_a_learned_prompt_counts_as_context_before_the_first_token():
    decoder = Decoder(50, 32, 2, 4, max_length=24)
    Prompts(length=8).change(decoder, "decoder")
    with pytest.raises(UserError, match="context of 16: at most max_new_tokens=12"):
        stream(decoder, [[1, 2, 3, 4]], max_new_tokens=20)
    assert generate(decoder, [[1, 2, 3, 4]], max_new_tokens=12).shape == (1, 12)
    both = EncoderDecoder(50, 32, 2, 4, max_length=24, positions=Learned)
    Prompts(length=8).change(both, "model")
    with pytest.raises(UserError, match="the source has 17 tokens, the model's context holds 16"):
        stream(both, [[1] * 17], max_new_tokens=2)
    assert generate(both, [[1] * 16], max_new_tokens=2).shape == (1, 2)


# ---- scores of the next token


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Temperature(0.7), lambda p: p.TemperatureLogitsWarper(0.7)),
        (TopK(5), lambda p: p.TopKLogitsWarper(5)),
        (TopK(1000), lambda p: p.TopKLogitsWarper(1000)),
        (TopP(0.6), lambda p: p.TopPLogitsWarper(0.6)),
        (TopP(0.01), lambda p: p.TopPLogitsWarper(0.01)),
        (RepetitionPenalty(1.3), lambda p: p.RepetitionPenaltyLogitsProcessor(1.3)),
        (MinNewTokens(4, (2, 3), 6), lambda p: p.MinNewTokensLengthLogitsProcessor(6, 4, [2, 3])),
    ],
)
def test_processors_are_transformers(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (5, 8), generator=generator)
    logits = 3 * torch.randn(5, V, generator=generator)
    expected = theirs(transformers.generation.logits_process)(tokens, logits.clone())
    assert torch.equal(ours(tokens, logits), expected)
    assert not torch.equal(expected, logits) or ours == TopK(1000)


def test_nucleus_holds_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert TopP(0.6)(None, logits).isfinite().tolist() == [[True, True, False, False]]
    assert TopP(0.4)(None, logits).isfinite().tolist() == [[True, False, False, False]]


def test_padding_is_no_repetition():
    logits = torch.ones(1, 4)
    assert RepetitionPenalty(2.0)(torch.tensor([[PADDING, PADDING, 2]]), logits).tolist() == [[1, 1, 0.5, 1]]


def test_order_of_processors():
    kinds = [type(p) for p in Sampling(0.5, 3, 0.9, 1.1, 2, extra=(len,)).processors(4, (1,))]
    assert kinds == [RepetitionPenalty, MinNewTokens, type(len), Temperature, TopK, TopP]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"top_k": 3},
    ],
)
def test_values_out_of_range(wrong):
    with pytest.raises(UserError, match=[*wrong][-1]):
        Sampling(**wrong)


def test_what_needs_a_draw_says_that_beams_draw_nothing():
    with pytest.raises(UserError, match=r"top_k=50 .* leave top_k out, or set num_beams=1"):
        Sampling(top_k=50)


def test_generation_leaves_every_part_in_its_mode():
    decoder = shaken(tiny()).train()
    decoder.blocks[0].eval()
    modes = [module.training for module in decoder.modules()]
    generate(decoder, prompts(4), max_new_tokens=2)
    assert [module.training for module in decoder.modules()] == modes and len({*modes}) == 2


def test_only_what_is_allowed_is_generated():
    _, ours = pair("gpt2")
    rows = prompts(4, 7, 5)
    choices = [[5, 6], [5, 6, 7], "hi"]
    allowed = Allowed(choices, eos=1, start=7, encode=lambda text: [ord(c) - 60 for c in text])
    for sampling in (Sampling(extra=(allowed,)), Sampling(2.0, extra=(allowed,)), Sampling(1.0, 2, extra=(allowed,))):
        for row in generate(ours, rows, max_new_tokens=8, eos=1, pad=0, sampling=sampling).tolist():
            text = row[: row.index(1)]
            assert text in ([5, 6], [5, 6, 7], [ord("h") - 60, ord("i") - 60])
    with pytest.raises(UserError, match="encode"):
        Allowed(["hi"], eos=1, start=0)


def test_what_is_allowed_begins_where_the_new_tokens_do():
    choices = [[5, 6], [5, 6, 7], [8]]
    sampling = Sampling(extra=(Allowed(choices, eos=1),))
    for model in (tiny(), EncoderDecoder(V, 32, 2, 4, max_length=64)):
        model, how = shaken(model).double(), {"max_new_tokens": 6, "eos": 1, "pad": 0, "sampling": sampling}
        greedy = generate(model, prompts(4, 7, 5), **how)
        best = beam_search(model, prompts(4, 7, 5), beam=Beam(2), **how).tokens[:, 0]
        for row in [*greedy.tolist(), *best.tolist()]:
            assert row[: row.index(1)] in choices


# ---- prompts and text


def test_few_shots():
    text = few_shot(
        [("2+2", "4"), ("{output}", "5")], "3+3", instruction="Add.", separator="\n--\n", shot="{input} = {output}"
    )
    assert text == "Add.\n--\n2+2 = 4\n--\n{output} = 5\n--\n3+3 ="
    with pytest.raises(UserError, match="must contain"):
        few_shot([], "x", shot="{output}{input}")


TEMPLATE = """{% if messages[0]['role'] != 'system' %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
{{ '<|' + message['role'] + '|>' + message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_chat_is_transformers():
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "you"}]
    for answer in (True, False):
        expected = theirs.apply_chat_template(
            messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=answer
        )
        assert chat(messages, config, answer=answer) == expected
    assert chat(messages, config | {"chat_template": [{"name": "default", "template": "{{ bos_token }}"}]}) == "<s>"
    for wrong, message in ((config, "no tools here"), ({}, "no chat_template")):
        with pytest.raises(UserError, match=message):
            chat([{"role": "tool", "content": "x"}], wrong)
    with pytest.raises(UserError, match="fails: TemplateError"):
        chat(messages, {"chat_template": "{{ raise_exception('') }}"})
    with pytest.raises(UserError, match="fails"):  # nothing outside the sandbox
        chat(messages, {"chat_template": "{{ messages.__class__.__mro__ }}{{ ''.__class__.mro() }}"})


class Bytes:
    """Ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_only_whole_characters_are_given():
    text = "a\u00e9\u20ac\U0001f600 b"
    words, parts = Words(Bytes(), before=b"x\xc3"), []
    words = Words(Bytes(), before=b"before")
    for byte in text.encode():
        parts.append(words.push(byte))
    assert "".join(parts) == text and not words.rest()
    assert parts[0] == "a" and parts[1] == "" and parts[2] == "\u00e9"
    assert [words.push(0xE2), words.push(0x82)] == ["", ""] and words.rest() == "\ufffd"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_harness_gets_a_text(precision):
    sizes = {"vocab": V, "dim": 16, "depth": 1, "heads": 2, "ffn": 24, "prompt": 4, "new": 3}
    step = make_step("llama_gen", sizes | {"device": "cpu", "precision": precision}, {"ids": prompts(4)[0][None]})
    assert step() == 0 and step.params > 0
    assert next(step.decoder.parameters()).dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
