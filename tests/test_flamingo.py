"""Flamingo: closed gates change nothing, a token sees the last image before it, packing and caches agree; IDEFICS."""

import functools

import pytest
import torch
import torch.nn.functional as F
from parity import gap, randomise, weigh
from ranks import on_ranks, part
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.flamingo import GatedVisionLanguage, gated_block
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.generation.looking import few_shot
from ssl_lab.generation.seeing import stream_seen
from ssl_lab.methods.flamingo import Flamingo
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.block import Block, Context, Residual
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.connectors import ResamplerConnector
from ssl_lab.nn.ffn import GLU
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.norm import RMSNorm
from ssl_lab.nn.prompt import Prompts
from ssl_lab.train import checkpoint
from ssl_lab.types import Batch

MARK, D = 30, 32
WORDS = torch.randint(1, 30, (3, 10), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made(every: int = 1) -> GatedVisionLanguage:
    torch.manual_seed(0)
    connector = functools.partial(ResamplerConnector, num_latents=3, depth=1, num_heads=2, head_dim=8)
    block = functools.partial(gated_block, num_heads=2, head_dim=8, hidden=16)
    decoder = Decoder(30, D, 3, 4, max_length=64)
    randomise(decoder)
    model = GatedVisionLanguage(
        ViT(24, 1, 2, image_size=16, patch_size=8), connector, decoder, image_token=MARK, every=every, block=block
    )
    return model.double().eval()


def opened(every: int = 1) -> GatedVisionLanguage:
    return randomise(made(every), 3)


def marked(*places: tuple[int, int]) -> torch.Tensor:
    tokens = WORDS.clone()
    for row, at in places:
        tokens[row, at] = MARK
    return tokens


ONE_TWO_NONE = marked((0, 2), (1, 0), (1, 5))  # the third row has no image


@pytest.mark.parametrize("every", [1, 2])
def test_closed_gates_are_the_frozen_language_model_to_the_bit(every):
    model = made(every)
    assert len(model.looks) == {1: 3, 2: 2}[every]
    plain = Decoder(30, D, 3, 4, max_length=64).double().eval()
    plain.load_state_dict(
        {k.replace(".block.", "."): v for k, v in model.decoder.state_dict().items() if "look" not in k}
    )
    embedded = plain.embed(ONE_TWO_NONE.where(ONE_TWO_NONE != MARK, 0))
    embedded = torch.where((ONE_TWO_NONE == MARK)[..., None], model.marker, embedded)
    with torch.no_grad():
        assert torch.equal(model(ONE_TWO_NONE, IMAGES)[0].tokens, plain(embedded).tokens)
        assert torch.equal(model(WORDS)[0].tokens, plain(WORDS).tokens)


def test_what_learns_is_what_is_new():
    model = made()
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learns == {n for n, _ in model.named_parameters() if ".look." in n or n.startswith(("connector", "marker"))}
    model.train()
    assert model.looks[0].training and not model.vision.training and not model.decoder.blocks[0].block.training
    for step in range(2):  # a closed gate lets a gradient to itself alone
        model.zero_grad()
        weigh(model(ONE_TWO_NONE, IMAGES)[0].tokens).backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == ({n for n in learns if "gate" in n or n == "marker"} if step == 0 else learns)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "gate" in n:
                    p.fill_(0.5)


def test_a_prompt_and_a_cache_give_what_the_whole_text_does():
    model = opened()
    memory, mask = model.media(ONE_TWO_NONE, model.see(IMAGES))
    Prompts(length=4).change(model.decoder, "decoder")
    whole = model.read(ONE_TWO_NONE, memory, mask).tokens
    cache, parts = KVCache(), []
    for here in (slice(6), slice(6, None)):
        part = AttnMask(segments=mask.segments, asked=mask.asked[:, here])
        parts.append(model.read(ONE_TWO_NONE[:, here], memory, part, cache=cache).tokens)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_a_token_sees_the_last_image_before_it_and_no_other():
    model = opened()
    images = IMAGES.clone().requires_grad_()
    tokens = marked((1, 2), (1, 6), (2, 4))
    model.freeze()  # else the image encoder passes no gradient on
    looks = [n for n in range(10)]
    with torch.no_grad():
        _, mask = model.media(tokens, model.see(images))
    assert mask.asked.tolist() == [[0] * 10, [0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, *[1] * 6]]
    first = model.looks[0]
    memory, mask = model.media(tokens, model.see(images))
    x = torch.randn(3, 10, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    out = first.cross(x, Context(memory=memory, memory_mask=mask))
    seen = [[None] * 10 for _ in range(3)]
    for row in range(3):
        for at in looks:
            (grad,) = torch.autograd.grad(out[row, at].sum(), images, retain_graph=True)
            seen[row][at] = grad.abs().sum((1, 2, 3)).nonzero().flatten().tolist()
    assert seen[0] == [[]] * 10
    assert seen[1] == [[], [], *[[0]] * 4, *[[1]] * 4]
    assert seen[2] == [*[[]] * 4, *[[2]] * 6]
    assert torch.equal(out[0], x[0])  # a row without image passes


@pytest.mark.parametrize("prompted", [False, True])
def test_packed_and_padded_rows_give_what_each_gives_alone(prompted):
    model = opened()
    if prompted:
        plain = model(ONE_TWO_NONE, IMAGES)[0].tokens
        torch.manual_seed(2)
        Prompts(length=4).change(model.decoder, "decoder")
        found = model(ONE_TWO_NONE, IMAGES)[0].tokens
        assert found.shape == plain.shape and (found - plain).abs().max() > 1e-4
    alone = [
        model(ONE_TWO_NONE[i : i + 1], images)[0].tokens[0] for i, images in enumerate((IMAGES[:1], IMAGES[1:], None))
    ]
    together = model(ONE_TWO_NONE, IMAGES)[0].tokens
    for row, each in zip(together, alone, strict=True):
        torch.testing.assert_close(row, each, rtol=0, atol=1e-12)
    packed, segments = ONE_TWO_NONE.reshape(1, -1), torch.arange(3).repeat_interleave(10)[None]
    found = model(packed, IMAGES, segments=segments)[0].tokens[0].unflatten(0, (3, 10))
    for row, each in zip(found, alone, strict=True):
        torch.testing.assert_close(row, each, rtol=0, atol=1e-12)
    short = ONE_TWO_NONE[1:2, :7]
    left = F.pad(short, (3, 0), value=MARK)  # padding that looks like a marker
    valid = torch.arange(10)[None] >= 3
    torch.testing.assert_close(
        model(left, IMAGES[1:], valid=valid)[0].tokens[:, 3:], model(short, IMAGES[1:])[0].tokens, rtol=0, atol=1e-12
    )


def test_decoding_with_a_cache_writes_what_the_whole_text_would():
    model = opened()
    prompts = [ONE_TWO_NONE[0, :6].tolist(), ONE_TWO_NONE[1, :8].tolist(), WORDS[2, :5].tolist()]
    visual = model.see(IMAGES)
    found = torch.stack(list(stream_seen(model, prompts, visual, max_new_tokens=4)), 1)
    for prompt, images, row in zip(prompts, (IMAGES[:1], IMAGES[1:], None), found, strict=True):
        text = list(prompt)
        for _ in range(4):
            hidden = model(torch.tensor([text]), images)[0].tokens[0, -1]
            text.append(int(model.decoder.logits(hidden).argmax()))
        assert text[len(prompt) :] == row.tolist()


def test_examples_in_context_are_images_with_their_texts():
    prompt = few_shot([[5, 6], [7]], [8], image_token=MARK, end=2)
    assert prompt == [MARK, 5, 6, 2, MARK, 7, 2, MARK, 8]
    model = opened()
    one, other = (model(torch.tensor([prompt]), images)[0].tokens[0, -1] for images in (IMAGES, IMAGES.roll(1, 0)))
    assert gap(one, other) > 1e-6
    with pytest.raises(UserError, match="a prompt without its image: 3 image markers"):
        model(torch.tensor([prompt]), IMAGES[:2])


def test_gated_block_equals_idefics():
    transformers = pytest.importorskip("transformers")
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = transformers.IdeficsConfig(
        hidden_size=D, intermediate_size=48, num_attention_heads=4, qk_layer_norms=False, alpha_type="float",
        alpha_initializer="zeros", vision_config={"embed_dim": D}, dropout=0.0, rms_norm_eps=1e-6,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = randomise(IdeficsGatedCrossAttentionLayer(config), 1)
    norm = functools.partial(RMSNorm, eps=1e-6)
    attention = Attention(D, 4, cross=True, qkv_bias=False, proj_bias=False)
    ours = Block(cross=Residual(D, attention, norm=norm, gate=True), mlp=Residual(D, GLU(D, 48), norm=norm, gate=True))
    state = {k: v.detach() for k, v in theirs.state_dict().items()}
    ours.double().eval()
    ours.load_state_dict({
        "cross.norm.weight": state["input_layernorm.weight"],
        "cross.fn.q.weight": state["cross_attn.q_proj.weight"],
        "cross.fn.kv.weight": torch.cat([state["cross_attn.k_proj.weight"], state["cross_attn.v_proj.weight"]]),
        "cross.fn.proj.weight": state["cross_attn.o_proj.weight"],
        "cross.gate": state["alpha_cross_attn"].reshape(()),
        "mlp.norm.weight": state["post_attention_layernorm.weight"],
        "mlp.fn.gate.weight": state["mlp.gate_proj.weight"],
        "mlp.fn.up.weight": state["mlp.up_proj.weight"],
        "mlp.fn.down.weight": state["mlp.down_proj.weight"],
        "mlp.gate": state["alpha_dense"].reshape(()),
    })  # fmt: skip
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, D, generator=g, dtype=torch.float64)
    memory = torch.randn(2, 6, D, generator=g, dtype=torch.float64)  # two images of three tokens
    asked = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2, 2]])
    keys = torch.tensor([1, 1, 1, 2, 2, 2]).expand(2, -1)
    for seen in (asked, asked.clamp(min=1)):  # theirs has no gradients but NaN where a token sees nothing
        a = ours(x, Context(memory=memory, memory_mask=AttnMask(segments=keys, asked=seen)))
        allowed = seen[:, :, None] == keys[:, None]
        hidden = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
        gate = allowed.any(-1).to(x.dtype)
        b = theirs(x, image_hidden_states=memory, image_attention_mask=hidden[:, None], cross_attention_gate=gate)
        b = b[0] if isinstance(b, tuple) else b
        assert gap(a, b) < 1e-7  # theirs takes the mean square in float32
    weigh(a).backward()
    weigh(b).backward()
    assert gap(ours["cross"].fn.q.weight.grad, theirs.cross_attn.q_proj.weight.grad) < 1e-7
    assert gap(ours["cross"].gate.grad, theirs.alpha_cross_attn.grad.reshape(())) < 1e-6
    assert gap(ours["mlp"].fn.down.weight.grad, theirs.mlp.down_proj.weight.grad) < 1e-6


def batch(rows: slice = slice(0, 4)) -> Batch:
    """Four rows, the last two, a second rank's, without any image."""
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 30, (4, 8), generator=g)
    tokens[0, 1] = tokens[1, 0] = tokens[1, 3] = MARK
    labels = torch.randint(0, 30, (4, 8), generator=g)
    labels[:, :2] = -100
    count = 3 if rows.start == 0 else 0
    return Batch(tokens=tokens[rows], labels=labels[rows], images=IMAGES[:count])


def method() -> Flamingo:
    return Flamingo(opened()).double().train()


class Loss(nn.Module):
    def __init__(self, inner: Flamingo) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: slice) -> torch.Tensor:
        return self.inner.step(batch(rows), 0.5).loss


def learned(rows: slice, wrap=lambda module: module) -> dict[str, torch.Tensor]:
    inner = method()
    network = wrap(Loss(inner))  # it must live until the gradients have been exchanged
    network(rows).backward()
    return {n: p.grad for n, p in inner.named_parameters() if p.requires_grad}


def of_rank(rank: int) -> dict[str, torch.Tensor]:
    return learned(part(rank, 4), DistributedDataParallel)


def test_a_rank_without_images_learns_along(tmp_path):
    alone = learned(slice(0, 4))
    for found in on_ranks(of_rank, tmp_path):
        wrong = {name: (found[name] - grad).abs().max().item() for name, grad in alone.items()}
        assert max(wrong.values()) < 1e-10, {n: w for n, w in wrong.items() if w > 1e-10}


def test_the_method_learns_and_freezes(tmp_path):
    inner = Flamingo(made()).double().train()
    frozen = {n: p.clone() for n, p in inner.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad], lr=1e-2)
    losses, gates = [], []
    for _ in range(25):
        step = inner.step(batch(), 0.5)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
        gates.append(float(step.logs["gate"]))
    assert losses[-1] < 0.7 * losses[0] and gates[0] == 0 < gates[-1]
    assert all(torch.equal(p, frozen[n]) for n, p in inner.named_parameters() if n in frozen)
    checkpoint.write({"state_dict": inner.state_dict()}, tmp_path / "step=25.ckpt")
    again = Flamingo(made(), weights=str(tmp_path / "step=25.ckpt")).double().train()
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in inner.named_parameters())
    with pytest.raises(UserError, match="name some of vision"):
        Flamingo(made(), train=["eyes"])


def test_features_kept_in_memory_give_the_same_loss():
    plain, keeping = (Flamingo(opened(), cache_features=kept).double().train() for kept in (False, True))
    given = batch() | {"image_ids": torch.tensor([7, 8, 9])}
    first, second, third = (m.step(given, 0.5).loss for m in (plain, keeping, keeping))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-12)
    assert torch.equal(second, third) and len(keeping._kept) == 3
