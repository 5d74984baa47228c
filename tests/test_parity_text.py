"""BERT, GPT-2, LLaMA and Mistral of ours are transformers' in outputs, loss and every gradient, in float64."""

import types

import pytest
import torch
import torch.nn.functional as F
from parity import gap, gradients, randomise, weigh

from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.heads import MaskedLMHead, PoolerHead
from ssl_lab.weights import families
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_bert, hf_gpt2, hf_llama

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 37, 12
COMMON = {"vocab_size": VOCAB, "dim": 32, "depth": 2, "num_heads": 4, "hidden": 48, "max_length": 64}
BERT = {"family": "bert", **COMMON, "num_types": 3, "eps": 1e-12}
GPT2 = {"family": "gpt2", **COMMON, "eps": 1e-5, "tied": True}
LLAMA = {
    "family": "llama", **COMMON, "num_kv_heads": 2, "head_dim": 6, "window": None, "base": 5e4, "scaling": None,
    "eps": 1e-6,     "tied": False,
}  # fmt: skip
ROUNDED = 1e-6  # transformers turns queries and keys by angles of float32


def ids(seed=0):
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding():
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, 7:] = False
    return valid


def base_names(theirs, prefix):
    return {key.removeprefix(prefix): value for key, value in theirs.items()}


def without_rounding(model):
    """transformers takes the mean square in float32 whatever the model's type; not here."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def pair(cls, config, facts, table):
    """Their model with random weights, and ours with the same."""
    theirs = without_rounding(randomise(cls(config)))
    ours = families.make(facts).double().eval()
    ours.load_state_dict(rename(base_names(theirs.state_dict(), table.PREFIX), table.table(facts)))
    return theirs, ours


# ---- BERT


def bert(cls, facts=BERT, **more):
    config = transformers.BertConfig(**hf_bert.arguments(facts), **more, attn_implementation="eager")
    theirs = randomise(cls(config))
    ours = families.make(facts).double().eval()
    ours.load_state_dict(rename(base_names(theirs.state_dict(), "bert."), hf_bert.table(facts)))
    return theirs, ours


def sentences():
    return (torch.arange(LENGTH) >= 5).long().expand(2, -1)


def test_bert_is_transformers():
    theirs, ours = bert(transformers.BertModel)
    valid, kinds = padding(), sentences()
    a = ours(ids(), valid=valid, types=kinds).tokens[valid]
    b = theirs(ids(), attention_mask=valid, token_type_ids=kinds).last_hidden_state[valid]
    assert gap(a, b) <= 1e-10
    weigh(a).backward()
    weigh(b).backward()
    found, expected = gradients(ours), rename(gradients(theirs), hf_bert.table(BERT))
    skipped = {"embed.weight"}  # token 0 is their padding, which gets no gradient
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) for key in found.keys() - skipped) <= 1e-10
    assert gap(found["embed.weight"][1:], expected["embed.weight"][1:]) <= 1e-10
    assert gap(ours(ids()).tokens, theirs(ids()).last_hidden_state) <= 1e-10  # no types: all of the first


def test_berts_hidden_states_and_class_token():
    theirs, ours = bert(transformers.BertModel)
    encoded = ours(ids(), layers=(0, -1))
    hidden = theirs(ids(), output_hidden_states=True).hidden_states
    assert gap(encoded.hidden[0], hidden[1]) <= 1e-10 and gap(encoded.hidden[-1], hidden[2]) <= 1e-10
    assert gap(encoded.pooled("cls"), hidden[2][:, 0]) <= 1e-10
    assert gap(ours(ids(), valid=padding(), tokens=False).pooled(), ours(ids(), valid=padding()).pooled()) <= 1e-12


def test_masked_tokens_and_next_sentence_are_transformers():
    theirs, ours = bert(transformers.BertForPreTraining)
    state = base_names(theirs.state_dict(), "bert.")
    masked, following = MaskedLMHead(32, VOCAB).double(), PoolerHead(32).double()
    parts = {
        "cls.predictions.": (masked, hf_bert.MASKED_LM),
        ("pooler.", "cls.seq_r"): (following, hf_bert.NEXT_SENTENCE),
    }
    for prefix, (head, table) in parts.items():
        head.load_state_dict(rename({k: v for k, v in state.items() if k.startswith(prefix)}, table))
    labels = ids(1).masked_fill(torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7, -100)
    encoded = ours(ids(), valid=padding())
    logits = masked(encoded.tokens, ours.embed.weight)
    answer = torch.tensor([0, 1])
    b = theirs(ids(), attention_mask=padding(), labels=labels, next_sentence_label=answer)
    assert gap(logits, b.prediction_logits) <= 1e-10
    assert gap(following(encoded.pooled("cls")), b.seq_relationship_logits) <= 1e-10
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = loss + F.cross_entropy(following(encoded.pooled("cls")), answer)
    assert gap(loss, b.loss) <= 1e-10
    loss.backward()
    b.loss.backward()
    theirs_now = base_names(gradients(theirs), "bert.")
    assert gap(ours.embed.weight.grad[1:], theirs_now["embeddings.word_embeddings.weight"][1:]) <= 1e-10
    assert gap(masked.bias.grad, theirs_now["cls.predictions.bias"]) <= 1e-10
    assert gap(following.dense.weight.grad, theirs_now["pooler.dense.weight"]) <= 1e-10


def test_a_classifier_is_transformers():
    theirs, ours = bert(transformers.BertForSequenceClassification, num_labels=3)
    head = PoolerHead(32, 3).double()
    state = base_names(theirs.state_dict(), "bert.")
    own = {k: v for k, v in state.items() if k.startswith(("pooler.", "classifier."))}
    head.load_state_dict(rename(own, hf_bert.CLASSIFIER))
    assert gap(head(ours(ids()).pooled("cls")), theirs(ids()).logits) <= 1e-10


def test_packed_sentences_do_not_see_each_other():
    _, ours = bert(transformers.BertModel)
    row = ids()[:1]
    segments = (torch.arange(LENGTH) >= 5).long()[None]
    packed = ours(row, segments=segments).tokens
    assert gap(packed[:, :5], ours(row[:, :5]).tokens) <= 1e-12
    assert gap(packed[:, 5:], ours(row[:, 5:]).tokens) <= 1e-12


# ---- decoders


def gpt2():
    config = transformers.GPT2Config(**hf_gpt2.arguments(GPT2), attn_implementation="sdpa")
    return *pair(transformers.GPT2LMHeadModel, config, GPT2, hf_gpt2), GPT2, hf_gpt2, 1e-10


def llama():
    config = transformers.LlamaConfig(**hf_llama.arguments(LLAMA), attn_implementation="sdpa")
    return *pair(transformers.LlamaForCausalLM, config, LLAMA, hf_llama), LLAMA, hf_llama, ROUNDED


def mistral():
    facts = LLAMA | {"window": 4, "tied": True}
    config = transformers.MistralConfig(**hf_llama.arguments(facts), attn_implementation="sdpa")
    return *pair(transformers.MistralForCausalLM, config, facts, hf_llama), facts, hf_llama, ROUNDED


YARN = {
    "kind": "yarn", "factor": 4.0, "original_length": 8, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None,
    "truncate": True,
}  # fmt: skip
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "original_length": 8}


@pytest.mark.parametrize("scaling", [{"kind": "linear", "factor": 4.0}, YARN, LLAMA3], ids=lambda s: s["kind"])
def test_stretched_positions_are_transformers(scaling):
    facts = LLAMA | {"scaling": scaling}
    config = transformers.LlamaConfig(**hf_llama.arguments(facts), attn_implementation="sdpa")
    assert hf_llama.facts(config) == facts
    theirs, ours = pair(transformers.LlamaForCausalLM, config, facts, hf_llama)
    a, b = ours.logits(ours(ids()).tokens), theirs(ids(), use_cache=False).logits
    assert gap(a, b) <= ROUNDED
    plain = pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(**hf_llama.arguments(LLAMA)), LLAMA, hf_llama)
    assert gap(a, plain[1].logits(plain[1](ids()).tokens)) > 1e-3


@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_a_decoder_is_transformers(make):
    theirs, ours, facts, table, near = make()
    labels = ids().clone()
    labels[0, :3] = -100
    a, b = ours.logits(ours(ids()).tokens), theirs(ids(), labels=labels, use_cache=False)
    assert gap(a, b.logits) <= near
    loss = F.cross_entropy(a[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert gap(loss, b.loss) <= 1e-6  # theirs is taken in float32
    weigh(a).backward()
    weigh(b.logits).backward()
    rows = table.table(facts)
    found, expected = gradients(ours), rename(base_names(gradients(theirs), table.PREFIX), rows)
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) / (1 + expected[key].abs().max()) for key in found) <= near


@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_a_padded_prompt_is_transformers(make):
    """Padding stands on the left, and positions count from the first token."""
    theirs, ours, *_, near = make()
    valid = padding().flip(1)
    places = (valid.long().cumsum(1) - 1).clamp(min=0)
    a = ours.logits(ours(ids(), valid=valid).tokens)
    b = theirs(ids(), attention_mask=valid.long(), position_ids=places, use_cache=False).logits
    assert gap(a[valid], b[valid]) <= near


@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_a_cache_changes_nothing(make):
    _, ours, *_ = make()
    cache = KVCache()
    steps = [ours(ids()[:, a:b], cache=cache).tokens for a, b in ((0, 5), (5, 6), (6, LENGTH))]
    assert gap(torch.cat(steps, 1), ours(ids()).tokens) <= 1e-12


@pytest.mark.parametrize("make", [gpt2, llama, mistral])
def test_weights_of_a_decoder_go_back(make):
    theirs, ours, facts, table, _ = make()
    back = rename(ours.state_dict(), table.table(facts), back=True)
    state = base_names(theirs.state_dict(), table.PREFIX)
    assert back.keys() == state.keys() - ({"lm_head.weight"} if facts["tied"] else set())
    assert all(torch.equal(back[key], state[key]) for key in back)
