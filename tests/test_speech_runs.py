"""From the command line: a transducer, and pre-training that goes on as CTC, each down to transcripts of a file."""

import pytest
import torch

from ssl_lab.cli.main import main
from ssl_lab.data.tones import Tones
from ssl_lab.weights.sources import read

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
pytest.importorskip("soxr", reason="needs soxr")

WIDTH = [f"method.encoder.{word}" for word in ("dim=16", "depth=1", "num_heads=2")]
FAST = [
    "duration=2steps", "data.batch_size=4", "data.train.length=32", "data.test.length=4", "baselines=false",
    "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
]  # fmt: skip
JOINED = ["data.train.source.length=50", "data.test.source.length=20", "eval=[wer]"]


def trained(out, *words):
    assert main([*words, *WIDTH, *FAST, f"out={out}"]) == 0
    return out


@pytest.fixture
def file(tmp_path):
    clips = Tones("train", length=4, sampling_rate=8000).read(range(4)).data
    soundfile.write(tmp_path / "four.wav", torch.cat(clips).numpy(), 8000)
    soundfile.write(tmp_path / "silence.wav", torch.zeros(8000).numpy(), 8000)
    return tmp_path / "four.wav"


def test_a_transducer_writes_down_a_file(tmp_path, file, capsys):
    small = ["method.encoder.stem.channels=8", "method.predictor.dim=8", "method.joint_dim=8", "optim.lr=1e-4"]
    out = trained(tmp_path / "run", "method=rnnt", *small, *JOINED)
    for more in ([], ["num_beams=3", "words=true"]):
        capsys.readouterr()
        assert main(["transcribe", f"ckpt={out}", f"audio={file}", *more]) == 0
        assert "real-time factor" in capsys.readouterr().err
    assert main(["transcribe", f"ckpt={out}", f"audio={file.parent / 'silence.wav'}"]) == 0
    assert not capsys.readouterr().out.strip()


def test_what_wav2vec2_learned_goes_on_as_ctc(tmp_path, file):
    front = ["method.encoder.front.channels=8", "method.encoder.positions.groups=2"]
    first = trained(tmp_path / "first", "method=wav2vec2", *front, "eval=[collapse]")
    chosen = ["method=ctc", "backbone=wav2vec2_small", f"method.encoder.weights={first}", "optim.lr=1e-9"]
    second = trained(tmp_path / "second", *chosen, *front, *JOINED)
    old, new = read(str(first)).state, read(str(second)).state
    assert old.keys() == new.keys() and all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    assert main(["transcribe", f"ckpt={second}", f"audio={file}"]) == 0
