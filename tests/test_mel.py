"""Log-mels equal other libraries' by their definition, and what stands after an utterance never changes them."""

import copy

import numpy as np
import pytest
import torch

from ssl_lab.errors import UserError
from ssl_lab.nn.mel import LogMel, mel_filters
from ssl_lab.nn.spec_augment import SpecAugment, span_mask

LENGTHS = (4000, 2500, 450, 399, 0)


def waves(lengths=LENGTHS, rate=16000):
    """Noise and tones (B, S) float64, with noise where the padding is, and the valid samples."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(lengths), max(lengths), generator=generator, dtype=torch.float64)
    at = torch.arange(max(lengths))
    return 0.1 * noise + (at / rate * 6000).sin(), at < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("style", ["htk", "slaney", "kaldi"])
def test_filters_are_those_of_transformers(style):
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(
        257, 40, 20.0, 7600.0, 16000, norm="slaney" if style == "slaney" else None, mel_scale=style,
        triangularize_in_mel_space=style == "kaldi",
    )  # fmt: skip
    ours = mel_filters(16000, 40, 512, style=style, band=(20.0, 7600.0))
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-11)


@pytest.mark.parametrize("style", ["htk", "slaney", "kaldi"])
@pytest.mark.parametrize("window", ["hann", "hamming", "povey"])
def test_energies_are_those_of_transformers(style, window):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    kaldi, audio = style == "kaldi", waves((4000,))[0]
    mel = LogMel(num_mels=40, style=style, window=window, norm="none", gain=3.0)
    theirs = spectrogram(
        3 * audio[0].numpy(), window_function(400, window, periodic=not kaldi), 400, 160, 512, power=2.0, center=False,
        preemphasis=0.97 if kaldi else None, remove_dc_offset=kaldi, mel_floor=mel.floor, log_mel="log",
        mel_filters=mel_filter_bank(
            257, 40, 20.0, 8000.0, 16000, norm="slaney" if style == "slaney" else None, mel_scale=style,
            triangularize_in_mel_space=kaldi,
        ), dtype=np.float64,
    )  # fmt: skip
    ours, valid = mel(audio)
    assert bool(valid.all())
    # their transform is rounded to complex64
    torch.testing.assert_close(ours[0], torch.from_numpy(theirs.T), rtol=0, atol=2e-5)


def test_power_is_that_of_stft():
    audio = waves((4000,))[0]
    mel = LogMel(style="htk", window="hann", window_ms=32, norm="none", floor=1e-30)
    theirs = torch.stft(audio, 512, 160, window=mel.window, center=False, return_complex=True).abs().square()
    torch.testing.assert_close(mel(audio)[0], (theirs.transpose(1, 2) @ mel.filters).log(), rtol=0, atol=1e-10)


def test_whole_front_ends_of_transformers():
    from transformers import ASTFeatureExtractor, SeamlessM4TFeatureExtractor

    audio = waves((4000,))[0][0]
    theirs = ASTFeatureExtractor(max_length=23)(audio.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    ours = LogMel(num_mels=128, window="hann", norm="global", mean=-4.2677393, std=2 * 4.5689974)(audio[None].float())
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=2e-4)
    seamless = SeamlessM4TFeatureExtractor()(audio.float().numpy(), sampling_rate=16000, return_tensors="pt")
    ours = LogMel(gain=2**15, norm="utterance")(audio[None].float())[0]
    torch.testing.assert_close(ours[:, :22].reshape(1, 11, 160), seamless.input_features[:, :11], rtol=0, atol=2e-3)


@pytest.mark.parametrize("norm", ["utterance", "global", "none"])
def test_padding_changes_nothing(norm):
    audio, valid = waves()
    mel = LogMel(num_mels=20, norm=norm, mean=[0.5] * 20, std=2.0)
    features, frames = mel(audio, valid)
    assert frames.sum(1).tolist() == [23, 14, 1, 0, 0] == mel.frames(torch.tensor(LENGTHS)).tolist()
    for row, length in enumerate(LENGTHS[:3]):
        alone, real = mel(audio[row : row + 1, :length])
        assert bool(real.all())
        torch.testing.assert_close(features[row, : real.shape[1]], alone[0], rtol=0, atol=1e-12)
    assert float(features[~frames].abs().max()) == 0


def test_silence_and_half_precision_stay_finite():
    mel = LogMel(num_mels=40)
    for audio in (torch.zeros(1, 800), torch.full((1, 800), 0.3), torch.zeros(1, 3), torch.zeros(1, 0)):
        features, valid = mel(audio)
        assert bool(features.isfinite().all()) and features.shape[1] == valid.shape[1] >= 1
        assert float(features.abs().max()) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        audio = waves((4000,))[0].float()
        rounded = mel(audio)[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, mel(audio)[0])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="mix channels down"):
        LogMel()(torch.zeros(1, 2, 800))
    with pytest.raises(UserError, match="smaller num_mels"):
        LogMel(8000, 256)
    with pytest.raises(UserError, match="mean and std"):
        LogMel(norm="global")


def test_spec_augment_hides_bounded_bands_and_stretches():
    features = torch.ones(200, 60, 20)
    valid = torch.arange(60) < torch.tensor([60, 30])[torch.arange(200) % 2][:, None]
    augment = SpecAugment(freq_masks=1, freq_width=5, time_masks=2, time_width=8, max_share=0.2)
    torch.manual_seed(0)
    out = augment(features, valid)
    hidden = out == 0
    assert out.unique().tolist() == [0, 1]
    bands, stretches = hidden.all(1).sum(1), (hidden.all(2) & valid).sum(1)
    assert bands.unique().tolist() == [0, 1, 2, 3, 4, 5] and abs(bands.float().mean() - 2.5) < 0.3
    assert stretches[::2].max() <= 16 and stretches[1::2].max() <= 12
    assert stretches[::2].float().mean() > stretches[1::2].float().mean() > 3
    assert not bool((hidden.all(2) & ~valid).any())
    assert bool((hidden == (hidden.all(1)[:, None] | hidden.all(2)[:, :, None])).all())
    torch.manual_seed(0)
    shorter = augment(features[1::2, :30].repeat_interleave(2, 0), valid[1::2, :30].repeat_interleave(2, 0))
    torch.testing.assert_close(shorter[1::2], out[1::2, :30])
    assert augment.eval()(features, valid) is features


def test_spans_cover_the_share_that_their_starts_promise():
    torch.manual_seed(0)
    valid = torch.arange(400) < torch.tensor([400, 200, 3, 0])[torch.arange(80) % 4][:, None]
    mask = span_mask(valid, 0.065, 10)
    assert not bool((mask & ~valid).any()) and bool(mask[valid.any(1)].any(1).all())
    assert abs(mask[::4, 10:].float().mean() - (1 - (1 - 0.065) ** 10)) < 0.03
    ends = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    starts = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    lengths = ends[::4].nonzero()[:, 1] - starts[::4].nonzero()[:, 1] + 1
    assert int(lengths[:-1].min()) < 11 and int((lengths == 10).sum()) > 20
    assert span_mask(valid, 0.0, 10, least=0).sum() == 0
    assert set(span_mask(valid, 0.0, 2)[:3].sum(1).tolist()) <= {1, 2}


def test_tables_stay_exact_whatever_a_model_is_cast_to():
    mel, (audio, valid) = LogMel(num_mels=40, norm="global", mean=-4.2, std=[3.3] * 40), waves()
    wanted, real = mel(audio, valid)
    for cast in (copy.deepcopy(mel).to(torch.bfloat16), torch.nn.Sequential(mel).half()[0], copy.deepcopy(mel).float()):
        assert {table.dtype for table in cast.buffers()} == {torch.float64} and float(cast.mean) == -4.2
        assert torch.equal(cast(audio, valid)[0], wanted)
    moved = mel.to("meta", torch.bfloat16)
    assert all(table.is_meta and table.dtype == torch.float64 for table in moved.buffers())
    assert real.any() and moved.to_empty(device="cpu").window.shape == (400,)
