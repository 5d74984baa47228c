"""CTC and the transducer equal sums over all their paths; wav2vec 2.0's losses and codes equal transformers'."""

import itertools

import pytest
import torch
from parity import gap, gradients, randomise, weigh

from ssl_lab.errors import UserError
from ssl_lab.losses import joint
from ssl_lab.losses.ctc import ctc_loss, ctc_nll
from ssl_lab.losses.speech import contrastive, diversity, mean_over_frames, perplexity, sample_negatives
from ssl_lab.losses.transducer import transducer_nll
from ssl_lab.nn.conv import ConvSubsampling
from ssl_lab.nn.quantize import GumbelQuantizer, RandomQuantizer, code_usage

LABELS = torch.tensor([[1, 2, -100], [2, 2, -100], [-100, 3, 1], [-100, -100, -100], [1, 1, 1]])
FRAMES = torch.tensor([5, 4, 2, 3, 4])
VALID = torch.arange(5) < FRAMES[:, None]


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collapsed(path, blank):
    return [token for token, _ in itertools.groupby(path) if token != blank]


@pytest.mark.parametrize("blank", [0, 3])
def test_ctc_is_the_sum_over_all_paths(blank):
    swap = torch.tensor([0, 1, 2, 3] if blank == 0 else [3, 1, 2, 0])
    labels = torch.where(LABELS < 0, LABELS, swap[LABELS.clamp(min=0)])
    logits, same = noise(5, 5, 4).requires_grad_(), noise(5, 5, 4).requires_grad_()
    nll, fits = ctc_nll(logits, labels, VALID, blank=blank)
    assert fits.tolist() == [True, True, True, True, False] and float(nll[4]) == 0
    log_probs, total = same.log_softmax(-1), 0
    for row in range(4):
        wanted = [int(token) for token in labels[row] if token >= 0]
        paths = itertools.product(range(4), repeat=int(FRAMES[row]))
        scores = [log_probs[row, torch.arange(len(p)), list(p)].sum() for p in paths if collapsed(p, blank) == wanted]
        own = -torch.stack(scores).logsumexp(0)
        assert abs(float(own - nll[row])) < 1e-12
        total = total + own
    loss, lost = ctc_loss(logits, labels, VALID, blank=blank)
    assert abs(float(loss - total / 6)) < 1e-12 and float(lost) == pytest.approx(0.2)
    loss.backward()
    (total / 6).backward()
    assert gap(logits.grad, same.grad) < 1e-12


def test_impossible_and_foreign_transcripts():
    logits = noise(2, 2, 4).requires_grad_()
    for valid in (None, torch.zeros(2, 2, dtype=torch.bool)):
        loss, lost = ctc_loss(logits, torch.tensor([[1, 2, 3], [1, 1, -100]]), valid)
        assert float(loss) == 0 and float(lost) == 1
        assert float(torch.autograd.grad(loss, logits)[0].abs().max()) == 0
    for wrong in (0, 4, -5):
        for loss, output in ((ctc_nll, logits), (transducer_nll, noise(2, 2, 2, 4))):
            with pytest.raises(UserError, match="vocab_size and blank"):
                loss(output, torch.tensor([[1], [wrong]]))
    with pytest.raises(UserError, match="do not fit"):
        transducer_nll(noise(2, 2, 2, 4), LABELS[:2])


def lattice_sum(log_probs, tokens, frames, blank):
    """Straight from the definition, node by node."""
    alpha = {(0, 0): log_probs.new_zeros(())}
    for t, u in itertools.product(range(frames), range(len(tokens) + 1)):
        ways = [alpha[t - 1, u] + log_probs[t - 1, u, blank]] if t else []
        ways += [alpha[t, u - 1] + log_probs[t, u - 1, tokens[u - 1]]] if u else []
        alpha[t, u] = torch.stack(ways).logsumexp(0) if ways else alpha[0, 0]
    return -(alpha[frames - 1, len(tokens)] + log_probs[frames - 1, len(tokens), blank])


@pytest.mark.parametrize("blank", [0, 3])
def test_the_transducer_is_the_sum_over_its_lattice(blank):
    swap = torch.tensor([0, 1, 2, 3] if blank == 0 else [3, 1, 2, 0])
    labels = torch.where(LABELS < 0, LABELS, swap[LABELS.clamp(min=0)])
    frames = FRAMES.clone()
    frames[1] = 1
    valid = torch.arange(5) < frames[:, None]
    logits, same = noise(5, 5, 4, 4).requires_grad_(), noise(5, 5, 4, 4).requires_grad_()
    nll, fits = transducer_nll(logits, labels, valid, blank=blank)
    assert bool(fits.all())
    wanted = torch.stack([
        lattice_sum(same[row].log_softmax(-1), [int(t) for t in labels[row] if t >= 0], int(frames[row]), blank)
        for row in range(5)
    ])  # fmt: skip
    assert gap(nll, wanted) < 1e-12
    weigh(nll).backward()
    weigh(wanted).backward()
    assert gap(logits.grad, same.grad) < 1e-12


def test_the_transducer_counts_paths_and_ignores_padding():
    """Where every token is as likely as the other, all C(T + U - 1, U) paths have T + U of them."""
    nll, _ = transducer_nll(torch.zeros(1, 6, 4, 2, dtype=torch.float64), torch.tensor([[1, 1, 1]]))
    assert float(nll) == pytest.approx(9 * 0.6931471805599453 - torch.tensor(56.0).log().item())
    logits = noise(5, 7, 6, 4)
    labels = torch.nn.functional.pad(LABELS, (0, 2), value=-100)
    valid = torch.nn.functional.pad(VALID, (0, 2))
    longer, _ = transducer_nll(logits, labels, valid)
    shorter, _ = transducer_nll(logits[:, :5, :4], LABELS, VALID)
    assert torch.equal(longer, shorter)
    half = logits.bfloat16().requires_grad_()
    nll, fits = transducer_nll(half, labels, valid & (torch.arange(5) != 1)[:, None])
    assert nll.dtype == torch.float32 and fits.tolist() == [True, False, True, True, True] and float(nll[1]) == 0
    nll.sum().backward()
    assert bool(half.grad.isfinite().all()) and float(half.grad[1].abs().max()) == 0


@pytest.mark.parametrize(("numbers", "blank"), [(1 << 22, 0), (150, 3), (1, 0)])
def test_scores_made_in_pieces_give_the_same_loss_and_gradients(monkeypatch, numbers, blank):
    monkeypatch.setattr(joint, "_NUMBERS", numbers)  # all in one, pairs of rows, single frames
    swap = torch.tensor([0, 1, 2, 3] if blank == 0 else [3, 1, 2, 0])
    labels = torch.where(LABELS < 0, LABELS, swap[LABELS.clamp(min=0)])
    valid = VALID & (torch.arange(5) != 1)[:, None]  # a row without frames
    parts = [noise(5, 5, 6, seed=2), noise(5, 4, 6, seed=3), noise(4, 6, seed=4), noise(4, seed=5)]
    here, there = ([x.clone().requires_grad_() for x in parts] for _ in range(2))
    nll, fits = joint.joint_nll(*here, labels, valid, blank=blank)
    heard, said, weight, bias = there
    logits = (heard[:, :, None] + said[:, None]).tanh() @ weight.t() + bias
    wanted, _ = transducer_nll(logits, labels, valid, blank=blank)
    assert gap(nll, wanted) < 1e-12 and fits.tolist() == [True, False, True, True, True]
    weigh(nll).backward()
    weigh(wanted).backward()
    assert max(gap(a.grad, b.grad) for a, b in zip(here, there, strict=True)) < 1e-12
    loss, lost = joint.joint_loss(*parts, labels, valid, blank=blank)
    assert abs(float(loss - nll.detach().sum() / 7)) < 1e-12 and float(lost) == pytest.approx(0.2)
    half, _ = joint.joint_nll(*(x.bfloat16() for x in parts), labels, valid, blank=blank)
    assert half.dtype == torch.float32 and gap(half.double(), nll.detach()) < 0.2


def w2v(**more):
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    cfg = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 4), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        num_codevectors_per_group=5, num_codevector_groups=2, codevector_dim=6, proj_codevector_dim=7, **more,
    )  # fmt: skip
    return randomise(Wav2Vec2ForPreTraining(cfg), seed=5)


def quantizer_of(reference):
    ours = GumbelQuantizer(8, groups=2, entries=5, width=6).double()
    state = {"proj.weight": reference.weight_proj.weight, "proj.bias": reference.weight_proj.bias}
    ours.load_state_dict(state | {"codebook": reference.codevectors.view(2, 5, 3)})
    return ours


def test_contrastive_and_diversity_are_those_of_transformers():
    model = w2v()
    audio, mask = noise(2, 400), torch.zeros(2, 19, dtype=torch.bool)
    mask[0, 2:9], mask[1, 4:15] = True, True
    where = mask.nonzero()
    negatives = sample_negatives(where[:, 0], 12)
    flat = where[:, 0] * 19 + where[:, 1]
    theirs = torch.zeros(2, 19, 12, dtype=torch.int64)
    theirs[mask] = flat[negatives]
    out = model(audio, mask_time_indices=mask, sampled_negative_indices=theirs)
    features = model.wav2vec2(audio, mask_time_indices=mask).extract_features
    joined, codes, chosen = quantizer_of(model.quantizer).eval()(features[mask])
    targets = model.project_q(joined)
    assert gap(targets, out.projected_quantized_states[mask]) < 1e-12
    assert bool((codes[negatives] == codes[:, None]).all(-1).any())  # some are left out
    nll, found = contrastive(out.projected_states[mask], targets, codes, negatives)
    cosines = torch.cosine_similarity(out.projected_states[mask][:, None], targets[negatives], dim=-1)
    cosines[(codes[negatives] == codes[:, None]).all(-1)] = -1
    own = torch.cosine_similarity(out.projected_states[mask], targets, dim=-1)
    assert torch.equal(found, own > cosines.amax(1))
    assert abs(float(nll.sum() - out.contrastive_loss)) < 1e-3 * float(out.contrastive_loss)
    assert abs(float(perplexity(chosen).sum() - out.codevector_perplexity)) < 1e-9
    assert abs(float(diversity(chosen) * len(nll) - out.diversity_loss)) < 1e-9
    assert float(mean_over_frames(nll)) == pytest.approx(float(nll.mean()))
    assert float(mean_over_frames(nll[:0])) == 0


def test_the_drawn_choice_is_that_of_transformers():
    reference = w2v().quantizer.train()
    ours = quantizer_of(reference).train()
    x, y = noise(6, 8).requires_grad_(), noise(6, 8).requires_grad_()
    torch.manual_seed(3)
    wanted, wanted_perplexity = reference(x[None])
    torch.manual_seed(3)
    joined, codes, likely = ours(y)
    assert gap(joined, wanted[0]) < 1e-6 and abs(float(perplexity(likely).sum() - wanted_perplexity)) < 1e-5
    assert gap(joined.detach(), ours.codebook[torch.arange(2), codes].flatten(1)) < 1e-6
    weigh(joined).backward()
    weigh(wanted[0]).backward()
    assert gap(x.grad, y.grad) < 1e-5
    assert gap(gradients(ours)["codebook"].flatten(0, 1), gradients(reference)["codevectors"][0]) < 1e-5


def test_negatives_are_others_of_the_same_utterance_each_as_likely():
    torch.manual_seed(0)
    rows = torch.tensor([0] * 4 + [2] * 1 + [5] * 3)
    drawn = sample_negatives(rows, 3000)
    own = torch.arange(8)[:, None]
    assert bool((rows[drawn] == rows[:, None]).all())
    assert (drawn == own).any(1).tolist() == [False] * 4 + [True] + [False] * 3
    counts = torch.stack([row.bincount(minlength=8) for row in drawn]).float() / 3000
    assert float((counts[:4, :4] - (1 - torch.eye(4)) / 3).abs().max()) < 0.05
    assert sample_negatives(rows[:0], 5).shape == (0, 5)
    lonely, found = contrastive(noise(1, 4), noise(1, 4), torch.zeros(1, 2).long(), torch.zeros(1, 5).long())
    assert float(lonely) == 0 and bool(found)
    parts = noise(6, 4).float(), noise(6, 4, seed=2).float(), torch.arange(6)[:, None], sample_negatives(rows[:4], 3)
    parts = *(x[:4] for x in parts[:3]), parts[3]
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = contrastive(*parts)
    assert half.dtype == torch.float32 and torch.equal(half, contrastive(*parts)[0])


def test_random_codes_are_the_nearest_entries_of_the_frames_a_token_sees():
    quantizer = RandomQuantizer(6, codebooks=2, entries=30, dim=4)
    features, lengths = 3 + noise(3, 43, 6), torch.tensor([43, 20, 5])
    valid = torch.arange(43) < lengths[:, None]
    codes = quantizer(features, valid)
    stem = ConvSubsampling(6 + 10, 4)
    count = stem.tokens(lengths)
    assert codes.shape == (3, int(count[0]), 2) and count.tolist() == [10, 4, 0]
    for row in range(2):
        seen = torch.stack([features[row, 4 * t + 1 : 4 * t + 5].flatten() for t in range(count[row])])
        seen = (seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-7).sqrt()
        for book in range(2):
            projected = torch.nn.functional.normalize(seen @ quantizer.projection[book].double(), dim=1)
            nearest = torch.cdist(projected, quantizer.codebook[book].double()).argmin(1)
            assert torch.equal(codes[row, : count[row], book], nearest)
    alone = quantizer(features[1:2, :20])
    assert torch.equal(alone[0], codes[1, :4])
    assert not list(quantizer.parameters()) and len(quantizer.state_dict()) == 2
    assert torch.equal(RandomQuantizer(6, codebooks=2, entries=30, dim=4).codebook, quantizer.codebook)
    share, effective = code_usage(torch.tensor([[0], [0], [1], [1]]), 8)
    assert float(share) == 0.25 and float(effective) == pytest.approx(2.0)
    used, _ = code_usage(RandomQuantizer(6, entries=30)(5 + 2 * noise(8, 400, 6)).flatten(0, 1), 30)
    assert float(used) > 0.9
