"""AST equals transformers' in tokens and pooling, starts from its weights or a ViT's, and never looks at padding."""

import functools

import pytest
import torch
from parity import gap, gradients, randomise, weigh

from ssl_lab.backbones.ast import AST
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.nn.block import encoder_block
from ssl_lab.nn.mel import LogMel
from ssl_lab.weights.io import architecture, save
from ssl_lab.weights.rename import rename
from ssl_lab.weights.spectrogram import resampled
from ssl_lab.weights.tables import hf_ast

SIZE = {"dim": 16, "depth": 2, "num_heads": 4}


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(max_length=64):
    from transformers import ASTConfig, ASTModel

    cfg = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, num_mel_bins=32,
        max_length=max_length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return randomise(ASTModel(cfg), seed=2)


def ours(frames=64, eps=1e-12, **more):
    torch.manual_seed(0)
    block = functools.partial(encoder_block, mlp_ratio=2.0, norm=functools.partial(torch.nn.LayerNorm, eps=eps))
    front = LogMel(8000, 32, window="hann", norm="global", mean=-5.0, std=4.0)
    return AST(**SIZE, front=front, frames=frames, block=block, **more)


def test_tokens_pooling_and_gradients_are_those_of_transformers():
    reference, model = theirs(), ours().double()
    model.load_state_dict(hf_ast.fold(rename(reference.state_dict(), hf_ast.TABLE)))
    x, y = noise(2, 64, 32).requires_grad_(), noise(2, 64, 32).requires_grad_()
    out, wanted = model(x, layers=(-1,)), reference(y)
    assert model.grid == (2, 5) and out.tokens.shape == (2, 10, 16)
    assert gap(out.tokens, wanted.last_hidden_state[:, 2:]) < 1e-12
    assert gap(model.norm(out.hidden[-1]), wanted.last_hidden_state) < 1e-12
    assert (
        gap(out.pooled(), wanted.pooler_output) < 1e-12 and gap(model(x, tokens=False).pooled(), out.pooled()) < 1e-12
    )
    (weigh(out.tokens) + weigh(out.pooled())).backward()
    (weigh(wanted.last_hidden_state[:, 2:]) + weigh(wanted.pooler_output)).backward()
    assert gap(x.grad, y.grad) < 1e-12
    there = rename(gradients(reference), hf_ast.TABLE)
    own = gradients(model)
    assert gap(own.pop("pos_embed"), there["pos_embed"][:, [0, *range(2, 12)]]) < 1e-12
    assert max(gap(grad, there[name]) for name, grad in own.items()) < 1e-12


@pytest.mark.parametrize("frames", [64, 44])
def test_weights_of_transformers(tmp_path, frames):
    reference = theirs().float()
    reference.save_pretrained(tmp_path)
    model = ours(frames, eps=1e-5, weights=f"hf:{tmp_path}").eval()
    x = noise(2, 64, 32).float()
    if frames == 64:
        torch.testing.assert_close(model(x).pooled(), reference(x).pooler_output, rtol=0, atol=1e-5)
    else:
        assert model.grid == (2, 3)
        table = reference.embeddings.position_embeddings[:, 2:].unflatten(1, (2, 5))
        torch.testing.assert_close(model.pos_embed[:, 1:].unflatten(1, (2, 3)), table[:, :, :3])
    with pytest.raises(UserError, match="every 10 bins"):
        ours(stride=8, weights=f"hf:{tmp_path}")


def test_a_vit_for_images_gives_its_colours_summed_and_its_positions(tmp_path):
    vit = ViT(**SIZE, image_size=48, block=functools.partial(encoder_block, mlp_ratio=2.0))
    save(vit, tmp_path / "vit.safetensors")
    model = ours(weights=str(tmp_path / "vit.safetensors"))
    torch.testing.assert_close(model.patch_embed.proj.weight[:, 0], vit.patch_embed.proj.weight.sum(1))
    torch.testing.assert_close(model.blocks[1]["mlp"].fn.fc2.weight, vit.blocks[1]["mlp"].fn.fc2.weight)
    old, new = vit.pos_embed[0, 1:].view(3, 3, 16), model.pos_embed[0, 1:].view(2, 5, 16)
    torch.testing.assert_close(new[:, ::2], old[:2])  # five columns of three: every second one stands where one stood
    torch.testing.assert_close(new[:, 0].lerp(new[:, 4], 0.5), (old[:2, 0] + old[:2, 2]) / 2)
    torch.testing.assert_close(model.pos_embed[:, 0], vit.pos_embed[:, 0])
    assert architecture(model) == {} != architecture(vit)  # its header must not call it a ViT
    save(model, tmp_path / "ast.safetensors")
    again = ours(weights=str(tmp_path / "ast.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(UserError, match="does not fit this AST"):
        AST(24, 2, 4, weights=str(tmp_path / "vit.safetensors"))


def test_positions_are_cut_in_the_middle_or_stretched():
    table = torch.arange(1.0 + 4 * 6)[None, :, None]
    cut = resampled(table, (4, 6), (2, 3))[0, :, 0]
    assert cut.tolist() == [0, *[1 + 6 * row + column for row in (1, 2) for column in (1, 2, 3)]]
    assert resampled(table, (4, 6), (4, 6)).equal(table)
    assert resampled(table, (4, 6), (8, 6))[0, 1:, 0].view(8, 6).diff(dim=1).allclose(torch.ones(8, 5))


def test_padding_changes_nothing_and_short_clips_have_one_column():
    model = randomise(ours())
    samples = (5300, 3000, 1500, 700, 0)
    valid = torch.arange(5400) < torch.tensor(samples)[:, None]
    audio = noise(5, 5400)
    out = model(audio, valid=valid)
    assert out.valid.sum(1).tolist() == [10, 6, 2, 2, 0] and bool(out.tokens.isfinite().all())
    for row, length in enumerate(samples[:4]):
        alone = model(audio[row : row + 1, :length])
        assert gap(out.pooled()[row], alone.pooled()[0]) < 1e-12
        assert gap(out.tokens[row][out.valid[row]], alone.tokens[0]) < 1e-12
    features, frames = model.front(audio, valid)
    features = torch.where(frames[..., None], features, noise(*features.shape, seed=4))
    again = model(features, valid=frames)
    assert gap(again.pooled(), out.pooled()) < 1e-12 and gap(again.pooled("mean"), out.pooled("mean")) < 1e-12


def test_mistakes_are_named():
    model = ours()
    with pytest.raises(UserError, match=r"1\.0 s is longer than the 0\.6 s"):
        model(torch.zeros(1, 8200))
    assert model(torch.zeros(1, 8200), valid=torch.arange(8200)[None] < 4000).tokens.shape == (1, 10, 16)
    with pytest.raises(UserError, match="mono waveforms"):
        model(torch.zeros(1, 64, 3))
    with pytest.raises(UserError, match="smaller patch_size"):
        ours(frames=8)
