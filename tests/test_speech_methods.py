"""CTC: its loss against torch, rows without an alignment, padding, and what is told in a line."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_lab.errors import UserError
from ssl_lab.generation.ctc import greedy
from ssl_lab.methods.ctc import CTC, frames_needed, packed
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
