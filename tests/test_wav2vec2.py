"""wav2vec 2.0 equals transformers' in features, tokens, loss parts and gradients, and never looks at padding."""

import functools

import pytest
import torch
from parity import gap, gradients, randomise, weigh
from torch import nn

from ssl_lab.backbones.wav2vec2 import Wav2Vec2 as Encoder
from ssl_lab.backbones.wav2vec2 import wav2vec2_block
from ssl_lab.errors import UserError
from ssl_lab.losses.speech import sample_negatives
from ssl_lab.methods.audio_classification import AudioClassification
from ssl_lab.methods.ctc import CTC
from ssl_lab.methods.wav2vec2 import Wav2Vec2
from ssl_lab.nn.waveform import ConvFeatures, ConvPositions
from ssl_lab.weights.io import save
from ssl_lab.weights.rename import rename
from ssl_lab.weights.tables import hf_wav2vec2

LAYERS = {"kernels": (10, 3, 4), "strides": (5, 2, 2)}
KINDS = ("base", "large")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(kind, cls="Wav2Vec2ForPreTraining", **more):
    import transformers

    large = kind == "large"
    config = transformers.Wav2Vec2Config(
        vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        conv_dim=(8, 8, 8), conv_kernel=LAYERS["kernels"], conv_stride=LAYERS["strides"], conv_bias=large,
        feat_extract_norm="layer" if large else "group", do_stable_layer_norm=large, num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2, num_codevectors_per_group=5, codevector_dim=6, proj_codevector_dim=7,
        feat_proj_dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_quantizer_dropout=0.0, layerdrop=0.0, **more,
    )  # fmt: skip
    return randomise(getattr(transformers, cls)(config), seed=5)


def ours(kind, positions=6, **more):
    torch.manual_seed(0)
    large = kind == "large"
    norms = {"norm": "layer" if large else "group", "bias": large}
    more = {"front": ConvFeatures(16000, 8, **LAYERS, **norms, normalize=False)} | more
    block = functools.partial(wav2vec2_block, place="pre" if large else "post", mlp_ratio=2.0)
    make = functools.partial(ConvPositions, kernel_size=positions, groups=2)
    return Encoder(16, 2, 4, positions=make, block=block, **more)


def filled(kind):
    """Theirs for pre-training, and ours with the same weights."""
    reference = theirs(kind)
    encoder = ours(kind)
    method = Wav2Vec2(encoder, codes=(2, 5), code_dim=6, dim=7, negatives=12, feature_grad=1.0).double()
    encoder.load_state_dict(rename(reference.wav2vec2.state_dict(), hf_wav2vec2.table(post=kind == "base")))
    parts = {"proj.weight": reference.quantizer.weight_proj.weight, "proj.bias": reference.quantizer.weight_proj.bias}
    method.quantizer.load_state_dict(parts | {"codebook": reference.quantizer.codevectors.view(2, 5, 3)})
    method.predict_code.load_state_dict(reference.project_hid.state_dict())
    method.project_code.load_state_dict(reference.project_q.state_dict())
    method.mask_token.data.copy_(reference.wav2vec2.masked_spec_embed)
    return reference, method


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", [False, True])
def test_loss_parts_and_gradients_are_those_of_transformers(kind, drawn):
    reference, method = filled(kind)
    reference.train(drawn)
    method.train(drawn)
    audio = noise(2, 900)
    features, valid = method.encoder.front(audio)
    count = features.shape[1]
    mask = torch.zeros(2, count, dtype=torch.bool)
    mask[0, 2:11], mask[1, 5:30] = True, True
    where = mask.nonzero()
    torch.manual_seed(1)
    negatives = sample_negatives(where[:, 0], 12)
    spread = torch.zeros(2, count, 12, dtype=torch.int64)
    spread[mask] = (where[:, 0] * count + where[:, 1])[negatives]
    torch.manual_seed(2)
    given = -torch.empty(2, count, 2, 5, dtype=torch.float32).exponential_().log() if drawn else None
    torch.manual_seed(2)  # they draw for every frame, the hidden ones or not, in this order
    out = reference(audio, mask_time_indices=mask, sampled_negative_indices=spread)
    step = method.predict(features, valid, mask, negatives, 0.0, None if given is None else given[mask].double())
    hidden = len(where)
    assert abs(float(step.logs["contrastive"]) - float(out.contrastive_loss) / hidden) < 1e-6
    assert abs(float(step.logs["diversity"]) - float(out.diversity_loss) / hidden) < 1e-6
    assert abs(float(step.logs["code_perplexity"]) * 2 - float(out.codevector_perplexity)) < 1e-5
    squares = reference.wav2vec2.feature_extractor(audio).square().mean()
    assert abs(float(step.logs["penalty"]) - float(squares)) < 1e-12
    step.loss.backward()
    (out.loss / hidden + 10 * squares).backward()
    wanted = gradients(reference.wav2vec2)
    token = wanted.pop("masked_spec_embed")
    wanted = rename(wanted, hf_wav2vec2.table(post=kind == "base"))
    own = gradients(method.encoder)
    assert own.keys() == wanted.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    assert max(gap(grad, wanted[name]) for name, grad in own.items()) < 1e-4 * scale  # their cosines are float32
    assert gap(method.mask_token.grad, token) < 1e-4 * scale
    pairs = [(method.quantizer.proj, reference.quantizer.weight_proj)]
    pairs += [(method.predict_code, reference.project_hid), (method.project_code, reference.project_q)]
    for here, there in pairs:
        for name, grad in gradients(here).items():
            assert gap(grad, gradients(there)[name]) < 1e-4 * scale
    assert gap(gradients(method.quantizer)["codebook"].flatten(0, 1), reference.quantizer.codevectors.grad[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_batch_of_mixed_lengths_are_those_of_each_alone(kind):
    reference, method = filled(kind)
    encoder, lengths = method.encoder, (1200, 777, 300)
    valid = torch.arange(1200) < torch.tensor(lengths)[:, None]
    audio = noise(3, 1200)
    for normalize in (False, True):
        encoder.front.normalize = normalize
        out = encoder(audio, valid=valid, layers=(0,))
        assert out.valid.sum(1).tolist() == encoder.front.frames(torch.tensor(lengths)).tolist()
        for row, length in enumerate(lengths):
            one = audio[row : row + 1, :length]
            alone = encoder(one, layers=(0,))
            assert gap(out.tokens[row][out.valid[row]], alone.tokens[0]) < 1e-12
            assert gap(out.hidden[0][row][out.valid[row]], alone.hidden[0][0]) < 1e-12
            if normalize:
                one = (one - one.mean()) / (one.var(correction=0) + 1e-7).sqrt()
            assert gap(alone.tokens, reference.wav2vec2(one).last_hidden_state) < 1e-12
    weigh(out.tokens[out.valid]).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in encoder.parameters())
    nobody = encoder(audio[:, :40], valid=torch.zeros(3, 40, dtype=torch.bool))
    assert nobody.tokens.isfinite().all() and not nobody.valid.any()


def test_features_are_frames_of_twenty_milliseconds():
    front = ConvFeatures(channels=4)
    features, valid = front(torch.randn(2, 16000))
    assert features.shape == (2, 49, 4) and valid.all() and front.hop == 320 and front.receptive == 400
    assert front.frames(torch.tensor([399, 400, 719, 720, 16000])).tolist() == [0, 1, 1, 2, 49]
    assert Encoder(16, 1, 2, front=front, positions=functools.partial(ConvPositions, groups=4)).seconds == 0.02
    features, valid = front(torch.randn(1, 100))
    assert features.shape == (1, 1, 4) and not valid.any() and not features.any()


def test_the_step_hides_valid_frames_and_slows_the_convolutions():
    torch.manual_seed(0)
    method = Wav2Vec2(ours("base"), codes=(2, 5), code_dim=6, dim=7, mask_p=0.2, mask_length=3, negatives=4).double()
    valid = torch.arange(1500) < torch.tensor([1500, 700, 60])[:, None]
    batch = {"audio": noise(3, 1500), "audio_valid": valid}
    found = []
    for factor in (1.0, 0.1):
        method.zero_grad()
        method.feature_grad = factor
        torch.manual_seed(4)
        step = method.step(batch, 0.5)
        step.loss.backward()
        found.append({name: p.grad.clone() for name, p in method.named_parameters()})
    for name, grad in found[0].items():
        slowed = 0.1 * grad if ".front." in name else grad
        torch.testing.assert_close(found[1][name], slowed, msg=name)
    assert step.loss.isfinite() and 0 < step.logs["masked"] < 1 and step.logs["gumbel"] == pytest.approx(1.0)
    nothing = method.step({"audio": noise(2, 1500), "audio_valid": torch.zeros(2, 1500, dtype=torch.bool)}, 0.5)
    nothing.loss.backward()
    assert nothing.loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_transformers(tmp_path, kind):
    for cls in ("Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"):
        reference = theirs(kind, cls, layer_norm_eps=1e-4).float()
        reference.save_pretrained(tmp_path / cls)
        model = ours(kind, weights=f"hf:{tmp_path / cls}").eval()
        audio = noise(2, 700).float()
        torch.testing.assert_close(model(audio).tokens, reference.wav2vec2(audio).last_hidden_state, rtol=0, atol=2e-5)
    other = KINDS[kind == "base"]
    with pytest.raises(UserError, match="norms elsewhere"):
        ours(other, weights=f"hf:{tmp_path / cls}")
    with pytest.raises(UserError, match=r"positions\.gain"):
        ours(kind, positions=4, weights=f"hf:{tmp_path / cls}")
    front = ConvFeatures(16000, 8, kernels=(10, 3, 4), strides=(5, 3, 2))
    with pytest.raises(UserError, match="strides"):
        ours(kind, front=front, weights=f"hf:{tmp_path / cls}")


def test_what_was_pre_trained_begins_other_methods(tmp_path):
    first = Wav2Vec2(ours("base"), codes=(2, 5))
    torch.save({"state_dict": first.state_dict()}, tmp_path / "run.ckpt")
    save(first.encoder, tmp_path / "last.safetensors")
    batch = {
        "audio": noise(2, 1500).float(),
        "target": torch.tensor([0, 1]),
        "labels": torch.tensor([[1, 2], [3, -100]]),
    }
    for file in ("run.ckpt", "last.safetensors"):
        for make in (lambda encoder: CTC(encoder, 5), lambda encoder: AudioClassification(encoder, 3)):
            method = make(ours("base", weights=str(tmp_path / file)))
            assert all(map(torch.equal, method.encoder.parameters(), first.encoder.parameters()))
            method.step(batch, 0.5).loss.backward()
            assert all(p.grad is not None for p in method.parameters())
    assert CTC(first.encoder, 5).transcribe(batch) is not None


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="2 kernels with 1 strides"):
        ConvFeatures(kernels=(10, 3), strides=(5,))
    with pytest.raises(UserError, match="groups=16"):
        ConvPositions(24)
    with pytest.raises(UserError, match="mono waveforms"):
        ours("base")(torch.zeros(1, 2, 3))
    with pytest.raises(UserError, match="mono waveforms"):
        ours("base").front(torch.zeros(1, 2, 300))
    with pytest.raises(UserError, match="nothing to tell apart"):
        Wav2Vec2(ours("base"), codes=(2, 1))
    with pytest.raises(UserError, match="multiple"):
        Wav2Vec2(ours("base"), codes=(2, 5), code_dim=7)
    with pytest.raises(UserError, match="no sound"):
        Wav2Vec2(ours("base")).step({"image": torch.zeros(1)}, 0.5)
    assert isinstance(ours("base").norm, nn.Identity) and isinstance(ours("large").embed_norm, nn.Identity)
