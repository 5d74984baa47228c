"""CTC and BEST-RQ: their losses by hand, rows without an alignment, padding, and what is told in a line."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vectors import FakeData, clusters, run

from ssl_lab.backbones.ast import AST
from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.wav2vec2 import Wav2Vec2 as Waves
from ssl_lab.errors import UserError
from ssl_lab.evals.crop_scale import CropScale
from ssl_lab.evals.finetune import Finetune
from ssl_lab.generation.ctc import greedy
from ssl_lab.losses.ctc import frames_needed, packed
from ssl_lab.methods.audio_classification import AudioClassification
from ssl_lab.methods.best_rq import BestRQ
from ssl_lab.methods.ctc import CTC
from ssl_lab.methods.rnnt import RNNT
from ssl_lab.methods.supervised import Supervised
from ssl_lab.methods.wav2vec2 import Wav2Vec2
from ssl_lab.nn.conv import ConvSubsampling
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.waveform import ConvFeatures, ConvPositions
from ssl_lab.train.optim import Optim
from ssl_lab.types import Encoded


class Frames(nn.Module):
    """An encoder whose tokens are the means of 400 samples, so that a batch says what its frames are."""

    dim = 400

    def __call__(self, x, *, valid=None):
        tokens = x.unfold(1, 400, 400)
        real = None if valid is None else valid.unfold(1, 400, 400).all(-1)
        return Encoded(tokens, tokens[:, :0], valid=real, has_cls=False)


def toy(V=7):
    torch.manual_seed(0)
    return CTC(Frames(), V).double()


def speech(frames=(12, 9, 5), labels=((1, 2, 3), (4, 4), (5,))):
    longest = max(frames) * 400
    audio = torch.randn(len(frames), longest, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.arange(longest) < torch.tensor(frames)[:, None] * 400
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=-100)
    return {"audio": audio * valid, "audio_valid": valid, "labels": padded}


def test_the_loss_is_the_sum_over_alignments_per_token():
    method, batch = toy(), speech()
    total = 0.0
    for row, (frames, labels) in enumerate(zip((12, 9, 5), ([1, 2, 3], [4, 4], [5]), strict=True)):
        tokens = batch["audio"][row, : frames * 400].view(frames, 400)
        log_probs = F.linear(tokens, method.head.weight, method.head.bias).log_softmax(-1)
        total += F.ctc_loss(log_probs[:, None], torch.tensor([labels]), (frames,), (len(labels),), reduction="sum")
    step = method.step(batch, 0.5)
    torch.testing.assert_close(step.loss, total / 6)
    assert step.logs["too_long"] == 0


def test_a_target_longer_than_its_frames_counts_for_nothing_and_is_logged():
    method, batch = toy(), speech(labels=((1, 2, 3), (4, 4), (5, 5, 5)))  # three alike need five frames
    assert method.step(batch, 0.5).logs["too_long"] == 0
    batch = speech(labels=((1, 2, 3), (4, 4), (5, 5, 5, 5)))
    step = method.step(batch, 0.5)
    step.loss.backward()
    assert step.logs["too_long"] == pytest.approx(1 / 3)
    left = method.head.weight.grad.clone()
    method.zero_grad()
    other = method.step({key: value[:2] for key, value in batch.items()}, 0.5)
    other.loss.backward()
    torch.testing.assert_close(other.loss, step.loss)
    torch.testing.assert_close(method.head.weight.grad, left)


def test_nothing_but_impossible_targets_is_no_nan():
    method = toy()
    step = method.step(speech(frames=(2, 1), labels=((1, 2, 3), (4, 4))), 0.5)
    step.loss.backward()
    assert step.loss == 0 and step.logs["too_long"] == 1
    assert method.head.weight.grad.isfinite().all() and not method.head.weight.grad.any()


def test_labels_are_packed_and_frames_counted():
    labels = torch.tensor([[3, -100, 3, 5], [-100, -100, 2, 2], [-100, -100, -100, -100]])
    assert packed(labels).tolist() == [[3, 3, 5, -100], [2, 2, -100, -100], [-100] * 4]
    assert frames_needed(packed(labels)).tolist() == [4, 3, 0]


def test_what_follows_a_row_does_not_change_its_transcript():
    method, batch = toy(), speech()
    batch["audio"] = batch["audio"] + 5.0 * ~batch["audio_valid"]
    log_probs, frames = method.emissions(batch)
    assert frames.tolist() == [12, 9, 5]
    said = method.transcribe(batch)
    for row, length in enumerate(frames.tolist()):
        alone = {"audio": batch["audio"][row : row + 1, : length * 400]}
        assert method.transcribe(alone) == [said[row]] == [greedy(log_probs[row, :length])]
    assert len(method.transcribe(batch, num_beams=4)) == 3


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="leaves nothing to write"):
        CTC(Frames(), 1)
    with pytest.raises(UserError, match="no sound"):
        toy().step({"image": torch.zeros(1, 3, 8, 8), "labels": torch.zeros(1, 2)}, 0.5)
    with pytest.raises(UserError, match="transcripts"):
        toy().step({"audio": torch.zeros(1, 800)}, 0.5)


@pytest.mark.parametrize("codebooks", [1, 2])
def test_best_rq_tells_the_codes_of_tokens_that_are_hidden_whole(codebooks):
    torch.manual_seed(0)
    encoder = Conformer(16, 1, 2, front=LogMel(8000, 12), stem=lambda bins, dim: ConvSubsampling(bins, dim, channels=4))
    method = BestRQ(encoder, num_codes=9, code_dim=4, codebooks=codebooks).double().eval()
    features = torch.randn(3, 60, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.arange(60) < torch.tensor([60, 41, 30])[:, None]
    hidden = torch.zeros_like(valid)
    hidden[0, 9:30], hidden[1, 20:28], hidden[2, 25:40] = True, True, True
    noise = torch.zeros_like(features)
    step = method.predict(features, valid, hidden & valid, noise)
    tokens = encoder(features.masked_fill((hidden & valid)[..., None], 0), valid=valid).tokens
    codes = method.quantizer(features, valid)
    # token t has the code of frames 4 t + 1 ... 4 t + 4
    at = [(b, t) for b in range(3) for t in range(14) if bool((hidden & valid)[b, 4 * t + 1 : 4 * t + 5].all())]
    at = [(b, t) for b, t in at if 4 * t + 7 <= int(valid[b].sum())]
    assert at == [(0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 5)]
    losses = [
        F.cross_entropy(method.head(tokens[b, t]).view(codebooks, 9)[c], codes[b, t, c])
        for b, t in at for c in range(codebooks)
    ]  # fmt: skip
    torch.testing.assert_close(step.loss, torch.stack(losses).mean())
    assert step.logs["masked"] == pytest.approx(len(at) / (3 * 14))
    nothing = method.predict(features, valid, torch.zeros_like(hidden), noise)
    assert nothing.loss == 0


def conformer():
    stem = functools.partial(ConvSubsampling, channels=4)
    return Conformer(16, 1, 2, front=LogMel(8000, 16), stem=stem)


def ast():
    return AST(16, 1, 2, front=LogMel(8000, 32, norm="global", mean=-5.0, std=4.0), frames=64)


def waves():
    front = ConvFeatures(8000, 8, kernels=(10, 3), strides=(5, 4))
    return Waves(16, 1, 2, front=front, positions=lambda dim: ConvPositions(dim, 6, 2))


@pytest.mark.parametrize("encoder", [conformer, ast, waves], ids=lambda x: x.__name__)
def test_weights_may_be_bf16(encoder):
    torch.manual_seed(0)
    batch = speech() | {"target": torch.tensor([0, 2, 1])}
    batch["audio"] = batch["audio"].float()
    method = AudioClassification(encoder(), 3, augment=None).to(torch.bfloat16)
    loss = method.step(batch, 0.5).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    if encoder is not ast:
        method = CTC(encoder(), 7).to(torch.bfloat16)
        assert method.step(batch, 0.5).loss.isfinite() and len(method.transcribe(batch)) == 3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BestRQ(waves()), "best_rq needs a Conformer, not a Wav2Vec2: choose backbone=conformer_small"),
        (lambda: BestRQ(ast()), "best_rq needs a Conformer, not a AST: choose backbone=conformer_small"),
        (lambda: Wav2Vec2(conformer()), "needs a wav2vec 2.0, not a Conformer: choose backbone=wav2vec2_small"),
        (lambda: CTC(ast(), 7), "ctc needs .* AST .* choose backbone=conformer_small"),
        (lambda: RNNT(ast(), 7), "rnnt needs .* AST .* choose backbone=conformer_small"),
    ],
)  # fmt: skip
def test_another_encoder_is_refused_in_a_line(make, told):
    with pytest.raises(UserError, match=told):
        make()


class Normed(nn.Module):
    """Sound or images -> one token, with statistics that run and units that drop."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.blocks = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x, *, valid=None, tokens=True):
        tokens = self.dropout(self.norm(self.blocks[0](x.flatten(1)[:, :8])))[:, None]
        return Encoded(tokens, tokens[:, :0], has_cls=False)


@pytest.mark.parametrize(("cls", "key"), [(AudioClassification, "audio"), (Supervised, "image")])
def test_a_frozen_encoder_runs_as_for_evaluation(cls, key):
    torch.manual_seed(0)
    method = cls(Normed(), 3, freeze_encoder=True, pooling="mean").train()
    shape = (6, 8) if key == "audio" else (6, 2, 2, 2)
    batch = {key: torch.randn(shape), "target": torch.tensor([0, 1, 2] * 2)}
    with torch.no_grad():
        method.head.weight.normal_()
    losses = [method.step(batch, 0.5).loss for _ in range(2)]
    assert torch.equal(*losses) and method.head.training
    assert method.encoder.norm.num_batches_tracked == 0 and not method.encoder.norm.running_mean.any()


class Sounds(FakeData):
    """The same vectors as sound."""

    def eval_loader(self, split, limit=None):
        return map(self.heard, super().eval_loader(split, limit))

    def train_dataloader(self, first=None):
        return map(self.heard, super().train_dataloader())

    @staticmethod
    def heard(batch):
        batch["audio"] = batch.pop("image")
        return batch


class Hears(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Normed()

    def embed(self, batch):
        return self.encoder(batch["audio"]).pooled("mean")


def test_sound_is_fine_tuned_on_and_not_cropped(capsys):
    torch.manual_seed(0)
    data = Sounds(*clusters(noise=0.02))
    found = run(Finetune(Optim(lr=1e-2), steps=60), data, Hears())
    assert found["top1"] > 60
    assert run(CropScale(scales=(0.5,)), data, Hears()) == {}
    assert "a crop needs images" in capsys.readouterr().out
