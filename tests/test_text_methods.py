"""The methods of text: their losses are those of transformers and fairseq, packing and padding change nothing."""

import pytest
import torch
import torch.nn.functional as F
from parity import gap, gradients, randomise
from test_parity_encoder_decoder import padding as source_padding
from test_parity_encoder_decoder import t5_ours, t5_theirs
from test_parity_text import BERT, LENGTH, VOCAB, base_names, bert, ids, padding, sentences

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.errors import UserError
from ssl_lab.losses.lm import mean_over_tokens, token_nll
from ssl_lab.methods.causal_lm import CausalLM
from ssl_lab.methods.masked_lm import MaskedLM
from ssl_lab.methods.seq2seq import Seq2Seq, shift_right
from ssl_lab.methods.span_corruption import SpanCorruption
from ssl_lab.methods.span_qa import SpanQA
from ssl_lab.methods.text_classification import TextClassification
from ssl_lab.nn.recipes import deepseek_block, switch_block
from ssl_lab.types import Batch
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_bert, hf_t5

transformers = pytest.importorskip("transformers")


def heads(theirs, table, *prefixes):
    """Their head's tensors by our names."""
    state = {key.removeprefix("bert."): value for key, value in theirs.items()}
    return rename({key: value for key, value in state.items() if key.startswith(prefixes)}, table)


def encoder_gap(ours, theirs):
    """Largest difference of the encoders' gradients; token 0 is their padding, which gets none."""
    found, expected = gradients(ours), rename(base_names(gradients(theirs), "bert."), hf_bert.table(BERT))
    assert found.keys() == expected.keys()
    found["embed.weight"], expected["embed.weight"] = found["embed.weight"][1:], expected["embed.weight"][1:]
    return max(gap(found[key], expected[key]) for key in found)


# ---- BERT


def test_masked_lm_with_next_sentence_is_transformers():
    theirs, encoder = bert(transformers.BertForPreTraining)
    method = MaskedLM(encoder, next_sentence=True).double().eval()
    method.head.load_state_dict(heads(theirs.state_dict(), hf_bert.MASKED_LM, "cls.predictions."))
    method.pooler.load_state_dict(heads(theirs.state_dict(), hf_bert.NEXT_SENTENCE, "pooler.", "cls.seq_r"))
    labels = ids(1).masked_fill(torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7, -100)
    batch = Batch(tokens=ids(), valid=padding(), types=sentences(), labels=labels, target=torch.tensor([0, 1]))
    step = method.step(batch, 0.0)
    b = theirs(
        ids(),
        attention_mask=padding(),
        token_type_ids=sentences(),
        labels=labels,
        next_sentence_label=batch["target"],
    )
    assert gap(step.loss, b.loss) <= 1e-10
    assert gap(step.logs["masked"] + step.logs["next"], b.loss) <= 1e-10
    step.loss.backward()
    b.loss.backward()
    assert encoder_gap(encoder, theirs) <= 1e-10
    theirs_now = gradients(theirs)
    assert gap(method.head.dense.weight.grad, theirs_now["cls.predictions.transform.dense.weight"]) <= 1e-10
    assert gap(method.pooler.out.bias.grad, theirs_now["cls.seq_relationship.bias"]) <= 1e-10
    scored = labels != -100
    nll = method.nll(batch)
    assert gap(nll.sum() / scored.sum(), step.logs["masked"]) <= 1e-10 and not nll[~scored].any()


def test_next_sentence_asks_for_pairs_and_masked_lm_for_both_sides():
    encoder = TextEncoder(VOCAB, 16, 1, 2, max_length=16)
    batch = Batch(tokens=ids(), labels=ids(1), target=torch.tensor([-1, -1]))
    with pytest.raises(UserError, match="needs pairs"):
        MaskedLM(encoder, next_sentence=True).step(batch, 0.0)
    with pytest.raises(UserError, match="both sides"):
        MaskedLM(TextEncoder(VOCAB, 16, 1, 2, causal=True))


def test_classification_is_transformers_and_leaves_out_rows_without_a_class():
    theirs, encoder = bert(transformers.BertForSequenceClassification, num_labels=3)
    method = TextClassification(encoder, 3).double().eval()
    method.head.load_state_dict(heads(theirs.state_dict(), hf_bert.CLASSIFIER, "pooler.", "classifier."))
    batch = Batch(tokens=ids(), valid=padding(), types=sentences(), target=torch.tensor([2, 0]))
    b = theirs(ids(), attention_mask=padding(), token_type_ids=sentences(), labels=batch["target"])
    loss = method.step(batch, 0.0).loss
    assert gap(method.classify(batch), b.logits) <= 1e-10 and gap(loss, b.loss) <= 1e-10
    loss.backward()
    b.loss.backward()
    assert encoder_gap(encoder, theirs) <= 1e-10
    half = method.step({**batch, "target": torch.tensor([2, -1])}, 0.0)
    assert gap(half.loss, F.cross_entropy(b.logits[:1], torch.tensor([2]))) <= 1e-10
    with pytest.raises(UserError, match="no classes"):
        TextClassification(encoder, 0)


def test_a_frozen_text_encoder_drops_nothing():
    encoder = TextEncoder(VOCAB, 16, 2, 2, dropout=0.5)
    method = TextClassification(encoder, 3, dropout=0.0, freeze_encoder=True).train()
    given = {"tokens": torch.randint(1, VOCAB, (4, 6)), "target": torch.tensor([0, 1, 2, 0])}
    losses = [method.step(given, 0.5).loss for _ in range(2)]
    assert torch.equal(*losses) and method.head.training and not encoder.training


def test_span_qa_is_transformers():
    theirs, encoder = bert(transformers.BertForQuestionAnswering)
    method = SpanQA(encoder).double().eval()
    state = theirs.state_dict()
    method.head.load_state_dict({name: state[f"qa_outputs.{name}"] for name in ("weight", "bias")})
    span = torch.tensor([[3, 5], [0, 0]])
    b = theirs(ids(), token_type_ids=sentences(), start_positions=span[:, 0], end_positions=span[:, 1])
    batch = Batch(tokens=ids(), types=sentences(), span=span)
    loss = method.step(batch, 0.0).loss
    assert gap(loss, b.loss) <= 1e-10
    loss.backward()
    b.loss.backward()
    assert encoder_gap(encoder, theirs) <= 1e-10
    hidden = method.locate({**batch, "valid": padding()})
    assert hidden[1, 7:].isinf().all() and hidden[0].isfinite().all()


def test_a_decoder_classifies_by_its_last_valid_token():
    torch.manual_seed(0)
    decoder = Decoder(VOCAB, 16, 2, 2, max_length=16)
    method = randomise(TextClassification(decoder, 3))
    batch = Batch(tokens=ids(), valid=padding(), target=torch.tensor([2, 0]))
    alone = method.classify(Batch(tokens=ids()[1:, :7]))
    assert gap(method.classify(batch)[1:], alone) <= 1e-12


# ---- T5 and the Transformer of 2017


def test_span_corruption_is_transformers():
    theirs, model = t5_theirs(False, True), t5_ours(False, True)
    table = hf_t5.table({"gated": False, "tied": True})
    model.load_state_dict(rename(theirs.state_dict(), table))
    g = torch.Generator().manual_seed(4)
    tokens, labels = torch.randint(2, 31, (2, 40), generator=g), torch.randint(2, 31, (2, 9), generator=g)
    labels[0, -3:] = -100
    valid = source_padding(length=40)
    loss = SpanCorruption(model).step(Batch(tokens=tokens, valid=valid, labels=labels), 0.0).loss
    b = theirs(tokens, attention_mask=valid, labels=labels)
    assert gap(loss, b.loss) <= 1e-10
    loss.backward()
    b.loss.backward()
    found, expected = gradients(model), rename(gradients(theirs), table)
    assert max(gap(found[key], expected[key]) for key in found) <= 1e-10


def fairseq(logits, labels, epsilon, others):
    """Label smoothing row by row: epsilon spread over the V - 1 `others`, or over all V; the mean over scored rows."""
    losses = []
    for scores, label in zip(logits.flatten(0, 1), labels.flatten()):
        if label == -100:
            continue
        log = scores.log_softmax(0)
        share = epsilon / (len(log) - 1) if others else epsilon / len(log)
        weight = torch.full_like(log, share)
        weight[label] = 1 - epsilon if others else 1 - epsilon + share
        losses.append(-(weight * log).sum())
    return torch.stack(losses).mean()


def translator(**more):
    torch.manual_seed(0)
    return Seq2Seq(EncoderDecoder(31, 16, 2, 2, max_length=32), 1, **more)


def pairs(rows=3):
    g = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(2, 31, (rows, 9), generator=g), torch.randint(2, 31, (rows, 7), generator=g)
    valid = torch.arange(9) < torch.tensor([9, 6, 3])[:rows, None]
    return Batch(
        tokens=tokens, valid=valid, labels=labels.where(torch.arange(7) < torch.tensor([4, 7, 5])[:, None], -100)
    )


def test_label_smoothing_is_that_of_the_reference_and_skips_padding():
    method, batch, epsilon = randomise(translator(label_smoothing=0.1)), pairs(), 0.1
    read = shift_right(batch["labels"], 1)
    logits = method.model.logits(method.model(batch["tokens"], read, valid=batch["valid"]).tokens)
    loss = method.step(batch, 0.0).loss
    assert gap(loss, fairseq(logits, batch["labels"], epsilon, others=False)) <= 1e-12
    method.label_smoothing = epsilon * 31 / 30  # what others spread over the V - 1 wrong tokens
    assert gap(method.step(batch, 0.0).loss, fairseq(logits, batch["labels"], epsilon, others=True)) <= 1e-12
    plain = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert gap(method.nll(batch).sum() / (batch["labels"] != -100).sum(), plain) <= 1e-12


def test_a_batch_of_unequal_pairs_is_each_pair_alone():
    method, batch = randomise(translator(label_smoothing=0.0)), pairs()
    whole = method.nll(batch).sum(1)
    for i, row in enumerate(batch["tokens"]):
        wanted = batch["labels"][i]
        alone = Batch(tokens=row[None, batch["valid"][i]], labels=wanted[None, wanted != -100])
        assert gap(method.nll(alone).sum(), whole[i]) <= 1e-11


def test_the_decoder_reads_labels_shifted_right():
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    assert shift_right(labels, 1).tolist() == [[1, 5, 6], [1, 8, 1]]
    with pytest.raises(UserError, match="start_token"):
        Seq2Seq(EncoderDecoder(31, 16, 1, 2), -1)


def test_translate_ends_where_the_model_ends():
    method = translator(label_smoothing=0.0)
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    batch = pairs()
    labels = batch["labels"].clone()
    for row, end in zip(labels, (3, 6, 4)):
        row[end] = 0  # ends a sequence
    batch["labels"] = labels
    for _ in range(150):
        optimizer.zero_grad()
        method.step(batch, 0.0).loss.backward()
        optimizer.step()
    found = method.eval().translate(batch, 0, num_beams=2, alpha=0.6, max_tokens=9)
    assert found[:, :7].tolist() == labels.where(labels != -100, 0).tolist() and not found[:, 7:].any()


def test_a_batch_without_a_class_teaches_nothing():
    method = randomise(TextClassification(TextEncoder(VOCAB, 16, 1, 2), 3)).train()
    step = method.step(Batch(tokens=ids(), target=torch.full((len(ids()),), -1)), 0.0)
    step.loss.backward()
    assert step.loss == 0 and step.logs["top1"] == 0
    assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


# ---- decoders


def test_packed_documents_have_the_loss_of_each_alone():
    torch.manual_seed(0)
    method = randomise(CausalLM(Decoder(VOCAB, 16, 2, 2, max_length=16)))
    row = ids()[:1]
    segments = (torch.arange(LENGTH) >= 5).long()[None]
    labels = row.roll(-1, 1)
    labels[0, [4, -1]] = -100  # the first token of a document cannot be told from another one
    packed = method.step(Batch(tokens=row, segments=segments, labels=labels), 0.0).loss
    parts = [method.nll(Batch(tokens=row[:, s], labels=labels[:, s])).sum() for s in (slice(0, 5), slice(5, None))]
    assert gap(packed, sum(parts) / (LENGTH - 2)) <= 1e-12
    across = method.step(Batch(tokens=row, labels=labels), 0.0).loss
    assert gap(packed, across) > 1e-6


def test_features_of_a_middle_layer_are_the_mean_over_valid_tokens():
    method = randomise(CausalLM(Decoder(VOCAB, 16, 3, 2, max_length=16), layer=1))
    batch = Batch(tokens=ids(), valid=padding())
    hidden = method.decoder(ids(), valid=padding(), layers=[1]).hidden[1]
    assert gap(method.embed(batch)[1], hidden[1, :7].mean(0)) <= 1e-12
    with pytest.raises(UserError, match=r"method\.layer=3: there are 3 blocks"):
        CausalLM(method.decoder, layer=3)
    method.layer = None
    assert gap(method.embed(batch)[1], method.decoder(ids(), valid=padding()).tokens[1, :7].mean(0)) <= 1e-12


def test_experts_add_their_loss_and_are_balanced_after_a_step():
    torch.manual_seed(0)
    switch = CausalLM(Decoder(VOCAB, 16, 2, 2, max_length=16, block=switch_block))
    batch = Batch(tokens=ids(), labels=ids(1))
    step = switch.step(batch, 0.0)
    assert float(step.logs["experts"]) > 0
    assert gap(step.loss, step.logs["token"] + step.logs["experts"]) <= 1e-6
    step.loss.backward()
    assert all(p.grad is not None for n, p in switch.named_parameters() if "router" in n)
    deepseek = CausalLM(Decoder(VOCAB, 16, 2, 2, max_length=16, block=deepseek_block))
    deepseek.step(batch, 0.0).loss.backward()
    biases = [b for n, b in deepseek.named_buffers() if n.endswith(".bias")]
    before = [b.clone() for b in biases]
    deepseek.after_step(0.0)
    assert biases and any(not torch.equal(a, b) for a, b in zip(before, biases))
    assert "experts" not in CausalLM(Decoder(VOCAB, 16, 1, 2, max_length=16)).step(batch, 0.0).logs


# ---- the mean over tokens


def test_nothing_to_score_is_named():
    labels = torch.full((2, 3), -100)
    with pytest.raises(UserError, match="all labels are -100"):
        mean_over_tokens(token_nll(torch.randn(2, 3, 4), torch.randn(5, 4), labels), labels)


def test_half_precision_is_summed_in_float32():
    hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    labels = torch.tensor([[1, -100, 3], [0, 2, -100]])
    assert token_nll(hidden.bfloat16(), weight.bfloat16(), labels).dtype == torch.float32
    assert token_nll(hidden.double(), weight.double(), labels).dtype == torch.float64
