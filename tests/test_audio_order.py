"""Batches of clips of like length: the order, its ranks, and a run that goes on."""

from types import SimpleNamespace

import pytest
import torch

from ssl_lab.data.audio_joined import Joined
from ssl_lab.data.audio_module import AudioModule
from ssl_lab.data.audio_order import Bucketed
from ssl_lab.data.audio_tokenizer import trained
from ssl_lab.data.audio_views import AudioViews, WholeAudio
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.stream import rows_at
from ssl_lab.data.tones import Tones
from ssl_lab.errors import UserError


def module(trainer=None, train=None, **options):
    made = {"batch_size": 4, "eval_views": WholeAudio(8000), "sampling_rate": 8000, "bucket": 4, "seed": 3}
    train = Tones("train", 50) if train is None else train
    data = AudioModule(train, Tones("test", 10), AudioViews(8000), **(made | options))
    if trainer is not None:
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, **({"global_rank": 0, "world_size": 1} | trainer))
    return data


def batches(data, count):
    return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_pool_holds_what_the_plain_order_has_there():
    source = Tones("train", 50)
    ordered = Bucketed(source, source.lengths, 4, 6)
    found, plain = ordered.rows_at(torch.arange(240), 7), rows_at(torch.arange(240), 7, 50)
    for pool in range(10):
        here = slice(24 * pool, 24 * pool + 24)
        assert sorted(found[here].tolist()) == sorted(plain[here].tolist())
    assert torch.equal(found[37:90], ordered.rows_at(torch.arange(37, 90), 7))  # from anywhere
    assert not torch.equal(found, ordered.rows_at(torch.arange(240), 8))
    lengths = source.lengths
    spread = [
        (lengths[rows].view(-1, 4).amax(1) - lengths[rows].view(-1, 4).amin(1)).double().mean()
        for rows in (found, plain)
    ]
    assert spread[0] < 0.3 * spread[1]
    firsts = lengths[found[:24].view(6, 4)[:, 0]]
    assert not torch.equal(firsts, firsts.sort().values)  # batches of a pool come in no order of length


def test_a_small_set_has_no_pool_larger_than_itself():
    source = Tones("train", 10)
    for group in (4, 10, 16):
        ordered = Bucketed(source, source.lengths, group, 32)
        rows = ordered.rows_at(torch.arange(80), 0)
        assert torch.bincount(rows, minlength=10).tolist() == [8] * 10
        assert len(ordered) == 10
    first = Bucketed(source, source.lengths, 4, 32).rows_at(torch.arange(4), 0)
    assert len(set(first.tolist())) == 4


def test_ranks_share_the_batches_of_one_process():
    whole = batches(module({"global_step": 0}, batch_size=4), 6)
    for rank in (0, 1):
        half = batches(module({"global_step": 0, "global_rank": rank, "world_size": 2}, batch_size=2), 6)
        for one, two in zip(whole, half, strict=True):
            assert torch.equal(one["index"][2 * rank : 2 * rank + 2], two["index"])
            assert torch.equal(one["position"][2 * rank : 2 * rank + 2], two["position"])
            size = min(one["audio"].shape[1], two["audio"].shape[1])
            assert torch.equal(one["audio"][2 * rank : 2 * rank + 2, :size], two["audio"][:, :size])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_and_workers_see_the_same_batches(workers):
    words = Joined(Tones("train", 90, snr=None), 40, trained("tones"), words=[1, 3], snr=[10, 30])
    run = batches(module({"global_step": 0}, words), 24)  # more than two passes
    assert run[0].keys() == {"audio", "audio_valid", "labels", "target", "index", "position"}
    for step in (0, 13):
        later = batches(module({"global_step": step}, words, num_workers=workers), 4)
        for a, b in zip(run[step : step + 4], later, strict=True):
            same(a, b)


def test_evaluation_reads_every_clip_once_in_order():
    data = module()
    found = list(data.eval_loader("test"))
    assert torch.cat([x["index"] for x in found]).tolist() == list(range(10))
    assert torch.cat([x["target"] for x in found]).tolist() == Tones("test", 10).read(range(10)).targets.tolist()
    assert [len(x["audio"]) for x in found] == [4, 4, 2]


def test_less_is_padded():
    def share(bucket):
        valid = [
            batch["audio_valid"].double().mean() for batch in batches(module({"global_step": 0}, bucket=bucket), 12)
        ]
        return float(torch.stack(valid).mean())

    assert share(12) > share(1) + 0.05


def test_rows_and_mistakes():
    few = module({"global_step": 0}, rows=9)
    assert few.num_train == 9 and all(int(x["index"].max()) < 9 for x in batches(few, 6))
    assert few.classes == Tones("train", 1).classes and few.tokenizer is None
    cases = [
        (lambda: module(sampling_rate=16000), "data.train.sampling_rate is 8000, and data.sampling_rate 16000"),
        (lambda: module(train=Shapes("train", 5)), "data.train is no source of sound"),
        (lambda: module(bucket=0), "data.bucket is 0"),
        (lambda: module(sampling_rate=16), "sampling_rate is 16"),
    ]
    for make, message in cases:
        with pytest.raises(UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
