"""The encoder-decoder of speech is transformers' Speech2Text in float64; padding and caches change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import gap, gradients, randomise, weigh

from ssl_lab.backbones.speech_transformer import GatedSubsampling, SpeechTransformer, Waves
from ssl_lab.errors import UserError
from ssl_lab.generation.beam import Beam, beam_search
from ssl_lab.generation.generate import generate
from ssl_lab.methods.seq2seq import Seq2Seq, shift_right
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.recipes import transformer_block
from ssl_lab.weights.rename import Drop, Fuse, rename

VOCAB, MELS, END = 31, 20, 2


def table():
    def stack(name, attentions):
        rows = []
        for ours, theirs in attentions.items():
            parts = {"attn": "qkv", "cross": "kv"}[ours]
            at, there = f"{name}.blocks.#.{ours}", f"model.{name}.layers.#.{theirs}"
            rows += [Fuse(f"{at}.fn.{parts}.*", tuple(f"{there}.{part}_proj.*" for part in parts))]
            rows += [(f"{at}.fn.q.*", f"{there}.q_proj.*")] if ours == "cross" else []
            rows += [(f"{at}.fn.proj.*", f"{there}.out_proj.*"), (f"{at}.norm.*", f"{there}_layer_norm.*")]
        mlp = [(f"{name}.blocks.#.mlp.fn.{fc}.*", f"model.{name}.layers.#.{fc}.*") for fc in ("fc1", "fc2")]
        norm = (f"{name}.blocks.#.mlp.norm.*", f"model.{name}.layers.#.final_layer_norm.*")
        return [*rows, *mlp, norm, (f"{name}.norm.*", f"model.{name}.layer_norm.*")]

    return [
        ("embed.weight", "model.decoder.embed_tokens.weight"),
        ("stem.conv1.*", "model.encoder.conv.conv_layers.0.*"),
        ("stem.conv2.*", "model.encoder.conv.conv_layers.1.*"),
        *stack("encoder", {"attn": "self_attn"}),
        *stack("decoder", {"attn": "self_attn", "cross": "encoder_attn"}),
        Drop("lm_head.weight"),
    ]


def theirs():
    transformers = pytest.importorskip("transformers")
    config = transformers.Speech2TextConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, input_feat_per_channel=MELS,
        conv_channels=24, max_source_positions=200, max_target_positions=64, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, scale_embedding=True,
    )  # fmt: skip
    model = randomise(transformers.Speech2TextForConditionalGeneration(config))
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


def ours(**more):
    block = {"place": "pre", "hidden": 48}
    return SpeechTransformer(
        VOCAB, 32, (2, 3), 4, frames=240, max_length=64, **more,
        front=LogMel(8000, MELS), stem=lambda bins, dim: GatedSubsampling(bins, dim, channels=24),
        block=lambda dim, heads, **given: transformer_block(dim, heads, **block, **given),
    ).double().eval()  # fmt: skip


def features(rows=2, frames=53, seed=0):
    return torch.randn(rows, frames, MELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows=2, length=7, seed=1):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_it_is_transformers_speech2text():
    other, own = theirs(), ours()
    own.load_state_dict(rename(other.state_dict(), table()))
    for stack, positions in ((other.model.encoder, own.source_positions), (other.model.decoder, own.target_positions)):
        exact, known = positions.table, stack.embed_positions.weights
        assert gap(exact[:50], known[2:52].double()) <= 1e-4  # theirs are made in float32
        known.data = torch.cat([torch.zeros(2, 32, dtype=torch.float64), exact])
    x, target = features(), tokens()
    memory = own.encode(x)
    a = own.logits(own.decode(target, memory).tokens)
    b = other(input_features=x, decoder_input_ids=target, use_cache=False)
    assert memory.tokens.shape == (2, 14, 32) and bool(memory.valid.all())
    assert gap(memory.tokens, b.encoder_last_hidden_state) <= 1e-10
    assert gap(a, b.logits) <= 1e-10
    weigh(a).backward()
    weigh(b.logits).backward()
    found, expected = gradients(own), rename(gradients(other), table())
    assert found.keys() == expected.keys()
    assert max(gap(found[key], expected[key]) for key in found) <= 1e-10


def test_padding_changes_nothing():
    own, lengths = randomise(ours()), (4000, 1700, 2911)
    clips = [torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in lengths]
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    audio += torch.arange(4000) >= torch.tensor(lengths)[:, None]  # anything at all
    valid, target = torch.arange(4000) < torch.tensor(lengths)[:, None], tokens(3)
    whole = own(audio, target, valid=valid).tokens
    for i, clip in enumerate(clips):
        assert gap(whole[i : i + 1], own(clip[None], target[i : i + 1]).tokens) <= 1e-12
    memory = own.encode(audio, valid=valid)
    frames = [int(own.front.frames(torch.tensor(n))) for n in lengths]
    assert memory.valid.sum(1).tolist() == [math.ceil(math.ceil(n / 2) / 2) for n in frames]


def test_a_cache_changes_nothing():
    own = randomise(ours())
    target = tokens()
    memory, cache = own.encode(features()), KVCache()
    whole = own.decode(target, memory).tokens
    steps = [own.decode(target[:, a:b], memory, cache=cache).tokens for a, b in ((0, 3), (3, 4), (4, 7))]
    assert gap(torch.cat(steps, 1), whole) <= 1e-12


def test_a_search_of_one_is_greedy_and_a_wide_one_is_no_worse():
    own = randomise(ours())
    clips = [torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (2400, 1600)]
    greedy = generate(own, clips, max_new_tokens=6, eos=END, pad=END, start=0)
    one = beam_search(own, clips, max_new_tokens=6, beam=Beam(1), eos=END, pad=END)
    assert torch.equal(one.tokens[:, 0, : greedy.shape[1]], greedy)
    wide = beam_search(own, clips, max_new_tokens=6, beam=Beam(8, 0.0), eos=END, pad=END)
    narrow = beam_search(own, clips, max_new_tokens=6, beam=Beam(1, 0.0), eos=END, pad=END)
    assert bool((wide.scores[:, 0] >= narrow.scores[:, 0] - 1e-6).all())
    alone = beam_search(own, clips[1:], max_new_tokens=6, beam=Beam(8, 0.0), eos=END, pad=END)
    assert gap(wide.scores[1:, 0], alone.scores[:, 0]) <= 1e-6  # sums in float32


def test_the_method_learns_two_clips_by_heart_and_writes_them_down():
    torch.manual_seed(0)
    method = Seq2Seq(ours().float(), 0, end_token=END, label_smoothing=0.0)
    audio = torch.stack([torch.sin(torch.arange(2400) * f) for f in (0.2, 1.1)])
    labels = torch.tensor([[5, 6, 7, END], [8, 9, END, -100]])
    batch = {"audio": audio, "audio_valid": torch.ones_like(audio, dtype=torch.bool), "labels": labels}
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss = method.step(batch, 0.5).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    for beams in (1, 3):
        assert method.transcribe(batch, num_beams=beams) == [[5, 6, 7], [8, 9]]
    hidden = method.model(audio, shift_right(labels, 0), valid=batch["audio_valid"]).tokens
    right = F.cross_entropy(method.model.logits(hidden).flatten(0, 1), labels.flatten())
    assert gap(method.nll(batch).sum() / 7, right) <= 1e-6


def test_a_transcript_is_no_longer_than_its_own_clip():
    torch.manual_seed(0)
    method = Seq2Seq(ours(), 0, end_token=END).eval()
    audio = torch.randn(2, 2400, dtype=torch.float64)
    with torch.no_grad():
        method.model.decoder.norm.weight.zero_()  # every token is as likely, and the first is not the end
    valid = torch.arange(2400) < torch.tensor([2400, 900])[:, None]
    both = method.transcribe({"audio": audio, "audio_valid": valid})
    assert len(both[0]) > len(both[1]) and both[1:] == method.transcribe({"audio": audio[1:, :900]})


def test_mistakes_say_what_to_do():
    own = ours()
    with pytest.raises(UserError, match=r"2\.5 s is longer than the 2\.4 s"):
        own.encode(features(frames=250))
    with pytest.raises(UserError, match=r"features .B, T, 20."):
        own.encode(features()[..., :7])
    batch = {"audio": torch.zeros(1, 2400), "labels": tokens(1)}
    with pytest.raises(UserError, match=r"data.train.end=true"):
        Seq2Seq(own).transcribe(batch)
    with pytest.raises(UserError, match="reads audio"):
        Seq2Seq(own).step({"tokens": tokens(), "labels": tokens()}, 0.5)
    with pytest.raises(UserError, match="transcripts"):
        Seq2Seq(own).step({"audio": torch.zeros(1, 2400)}, 0.5)
    assert Waves(32, 4, 10).added(torch.arange(10)).shape == (10, 32)


def test_weights_may_be_bf16():
    model = ours().to(torch.bfloat16)
    assert model.encode(features().float()).tokens.dtype == torch.bfloat16
    assert model.encode(torch.randn(2, 4000)).tokens.isfinite().all()
