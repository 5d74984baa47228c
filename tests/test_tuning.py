"""Tuning with few parameters: what learns, what stays, and that nothing changes before the first step."""

import copy
import functools

import pytest
import torch
from parity import randomise, weigh
from torch import nn

from ssl_lab.backbones.conformer import Conformer
from ssl_lab.backbones.decoder import Decoder
from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.speech_transformer import GatedSubsampling, SpeechTransformer
from ssl_lab.backbones.text import TextEncoder
from ssl_lab.backbones.timm import Timm
from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.generation.generate import generate
from ssl_lab.nn.adapters import Adapters
from ssl_lab.nn.cache import KVCache
from ssl_lab.nn.lora import LoRA, LoRALinear, fuse_, merge_, unmerge_
from ssl_lab.nn.mask import AttnMask
from ssl_lab.nn.mel import LogMel
from ssl_lab.nn.positions import ALiBi, Positions, Relative, Rotary, Sinusoidal
from ssl_lab.nn.prefix import Prefixes
from ssl_lab.nn.prompt import Prompts
from ssl_lab.nn.recipes import llama_block, t5_block
from ssl_lab.nn.tuning import Partial, added, networks, share
from ssl_lab.train.base import Base
from ssl_lab.train.optim import Optim

WORDS = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
VALID = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
SOUND = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HEARD = torch.arange(8000) < torch.tensor([8000, 5000])[:, None]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Small(nn.Module):
    """A method's shape: a network and a head beside it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(32, 3)


NETWORKS = {
    "vit": lambda: ViT(32, 2, 4, image_size=32, patch_size=8),
    "bert": lambda: TextEncoder(50, 32, 2, 4, max_length=24),
    "decoder": lambda: Decoder(50, 32, 2, 4, max_length=24),
    "encoder_decoder": lambda: EncoderDecoder(50, 32, 2, 4, block=t5_block, scaled="none", dropout=0.0),
    "conformer": lambda: Conformer(32, 2, 4, front=LogMel(num_mels=16, sampling_rate=8000)),
    "speech": lambda: SpeechTransformer(
        50,
        32,
        2,
        4,
        front=LogMel(num_mels=16, sampling_rate=8000),
        frames=120,
        max_length=24,
        stem=functools.partial(GatedSubsampling, channels=16),
    ),
}
KINDS = {
    "lora": lambda: LoRA(rank=2, targets=["q", "v", "proj", "fc*"]),
    "lora_packed": lambda: LoRA(rank=2, targets=["*kv"]),
    "adapter": lambda: Adapters(hidden=4),
    "prefix": lambda: Prefixes(length=3),
    "prompt": lambda: Prompts(length=3),
    "bias": lambda: Partial(learn=["*bias"]),
    "last": lambda: Partial(last_blocks=1),
}
UNCHANGED = ("lora", "lora_packed", "adapter", "bias", "last")  # to the bit, but kernels differ where less learns


def output(name: str, network: nn.Module) -> torch.Tensor:
    if name == "vit":
        return network(IMAGES, tokens=False).pooled("cls")
    if name == "conformer":
        encoded = network(SOUND, valid=HEARD)
        return encoded.tokens * encoded.valid[..., None]
    if name == "speech":
        return network(SOUND, WORDS[:2], valid=HEARD).tokens
    if name == "encoder_decoder":
        return network(WORDS, WORDS.flip(1), valid=VALID).tokens
    encoded = network(WORDS, valid=VALID)
    return encoded.tokens * VALID[..., None]


def made(name: str) -> Small:
    torch.manual_seed(0)
    return randomise(Small(NETWORKS[name]())).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_stays_and_what_is_tuned_learns(name, kind):
    if name == "encoder_decoder" and kind == "bias":
        pytest.skip("T5 has no biases")
    method = made(name)
    before, state = output(name, method.encoder).detach(), copy.deepcopy(method.state_dict())
    torch.manual_seed(1)
    assert KINDS[kind]()(method) == {"encoder": "encoder"}
    assert method.head.weight.requires_grad
    after = output(name, method.encoder)
    assert after.shape == before.shape
    if kind in UNCHANGED:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-13 if kind == "last" else 0)
    else:
        assert (after - before).abs().max() > 1e-4
    optimizer = Optim(lr=1e-2, warmup=0).build(method.named_parameters(), 8)
    aim = torch.randn(before.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * (before != 0)
    losses = []
    for _ in range(6):
        loss = (output(name, method.encoder) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learns = {n for n, p in method.encoder.named_parameters() if p.requires_grad}
    idle = [n for n in learns if method.encoder.get_parameter(n).grad is None]
    assert learns and (not idle or kind in ("bias", "last"))  # the padding's and unused positions learn nothing
    changed = {n for n, p in method.encoder.named_parameters() if f"encoder.{n}" not in state}
    for n, p in method.encoder.named_parameters():
        if n not in learns and n not in changed:
            assert p.grad is None and torch.equal(p, state[f"encoder.{n}"]), n


@pytest.mark.parametrize("name", NETWORKS)
def test_merged_weights_give_the_same_and_come_back_to_the_bit(name):
    method = made(name)
    LoRA(rank=2, alpha=3, targets=["q", "v", "proj", "fc*"])(method)
    randomise(method, 4)
    method.encoder.requires_grad_(True)
    exact, weights = output(name, method.encoder).detach(), copy.deepcopy(method.state_dict())
    merge_(method)
    assert not torch.equal(method.state_dict()[next(n for n in weights if n.endswith("proj.weight"))], exact)
    torch.testing.assert_close(output(name, method.encoder), exact, rtol=0, atol=1e-12)
    unmerge_(method)
    assert all(torch.equal(value, weights[n]) for n, value in method.state_dict().items())
    fuse_(method)
    assert not added(method) and not any("lora" in n for n in method.state_dict())
    torch.testing.assert_close(output(name, method.encoder), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_update_is_the_scaled_product_of_its_matrices(rslora):
    base = nn.Linear(6, 9).double()
    net = nn.Sequential(nn.Sequential(base)).double()
    LoRA(rank=4, alpha=6, rslora=rslora, targets=["0"], parts=["0"])(net)
    layer = randomise(net)[0][0]
    scale = 6 / (2 if rslora else 4)
    x = torch.randn(5, 6, dtype=torch.float64)
    wanted = x @ base.weight.T + base.bias + scale * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.rows(x, 2, 5), wanted[:, 2:5], rtol=0, atol=1e-13)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), wanted, rtol=0, atol=1e-13)


def test_parts_of_a_packed_layer_have_matrices_of_their_own():
    net = Small(Decoder(50, 32, 1, 4, block=lambda *a, **k: llama_block(*a, num_kv_heads=2, **k)))
    LoRA(rank=2, targets=["q", "v"])(net)
    layer = randomise(net).encoder.blocks[0].attn.fn.qkv
    update = layer.update()
    (a, c), (b, d) = layer.lora_a.split(2), layer.lora_b.split([32, 16])
    assert update.shape == (64, 32) and not update[32:48].any()
    torch.testing.assert_close(update[:32], 2 * 8 * b @ a, rtol=0, atol=1e-13)
    torch.testing.assert_close(update[48:], 2 * 8 * d @ c, rtol=0, atol=1e-13)


def test_dropout_acts_in_training_alone():
    method = made("vit")
    LoRA(rank=2, dropout=0.5, targets=["qkv"])(method)
    randomise(method)
    quiet = output("vit", method.encoder)
    torch.testing.assert_close(output("vit", method.encoder), quiet)
    method.train()
    assert (output("vit", method.encoder) - quiet).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["prefix", "prompt", "adapter", "lora"])
def test_decoding_with_a_cache_packing_and_padding_change_nothing(kind):
    method = made("decoder")
    KINDS[kind]()(method)
    decoder = randomise(method, 2).encoder
    whole = decoder(WORDS).tokens
    cache = KVCache()
    steps = [decoder(part, cache=cache).tokens for part in WORDS.split([4, 1, 2, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    left = torch.cat([WORDS.new_zeros(3, 2), WORDS], 1)
    valid = torch.arange(11) >= torch.tensor([2, 2, 2])[:, None]
    torch.testing.assert_close(decoder(left, valid=valid).tokens[:, 2:], whole, rtol=0, atol=1e-12)
    packed = WORDS[:2].reshape(1, -1)
    segments = torch.arange(2).repeat_interleave(9)[None]
    found = decoder(packed, segments=segments).tokens.unflatten(1, (2, 9))[0]
    torch.testing.assert_close(found, whole[:2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "positions",
    [Rotary, Sinusoidal, ALiBi, Positions, functools.partial(Relative, bidirectional=False)],
)
def test_full_rows_have_room_beside_a_prompt_where_positions_are_computed(positions):
    torch.manual_seed(0)
    decoder = Decoder(50, 32, 2, 4, max_length=9, positions=positions).double().eval()
    wider = Decoder(50, 32, 2, 4, max_length=12, positions=positions).double().eval()
    wider.load_state_dict(decoder.state_dict())
    Prompts(length=3).change(decoder, "decoder")
    wider.prompt = decoder.prompt
    assert torch.equal(decoder(WORDS).tokens, wider(WORDS).tokens)
    assert generate(decoder, WORDS[:, :5], max_new_tokens=4).shape == (3, 4)
    with pytest.raises(UserError, match="context of 9: at most max_new_tokens=4"):
        generate(decoder, WORDS[:, :5], max_new_tokens=5)


def test_a_learned_table_says_what_makes_room_for_a_prompt():
    for network in (Decoder(50, 32, 2, 4, max_length=9), TextEncoder(50, 32, 2, 4, max_length=9)):
        Prompts(length=3).change(network, "network")
        assert network(WORDS[:, :6]).tokens.shape == (3, 6, 32)
        with pytest.raises(UserError, match=r"9 tokens and 3 of tuning=prompt .*.*max_length to 12, .* at most 6"):
            network(WORDS)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("name", ["bert", "conformer", "encoder_decoder", "speech"])
def test_padding_changes_nothing(name, kind):
    method = made(name)
    KINDS[kind]()(method)
    network = randomise(method, 2).encoder
    if name == "conformer":
        network.blocks[0].conv.fn.norm = network.blocks[1].conv.fn.norm = nn.LayerNorm(32).double()
        whole, short = network(SOUND, valid=HEARD), network(SOUND[1:, :5000], valid=HEARD[1:, :5000])
        count = int(short.valid.sum())
        torch.testing.assert_close(whole.tokens[1:, :count], short.tokens[:, :count], rtol=0, atol=1e-12)
        return
    whole = output(name, network)
    if name == "bert":
        torch.testing.assert_close(whole[2, :4], network(WORDS[2:, :4]).tokens[0], rtol=0, atol=1e-12)
    elif name == "speech":
        alone = network(SOUND[1:, :5000], WORDS[1:2], valid=HEARD[1:, :5000]).tokens
        torch.testing.assert_close(whole[1:], alone, rtol=0, atol=1e-12)
    else:
        alone = network(WORDS[2:, :4], WORDS.flip(1)[2:]).tokens
        torch.testing.assert_close(whole[2:], alone, rtol=0, atol=1e-12)


def test_every_network_of_a_method_and_what_follows_it():
    from ssl_lab.nn.teacher import follower

    method = Small(NETWORKS["vit"]())
    method.student = method.encoder
    method.encoder = follower(method.student)
    assert networks(method) == ["student"]
    parts = LoRA(rank=2)(method)
    assert parts == {"student": "student", "encoder": "student"}
    here, there = dict(method.student.named_parameters()), dict(method.encoder.named_parameters())
    assert here.keys() == there.keys() and not any(p.requires_grad for p in there.values())
    assert all(torch.equal(here[n], there[n]) for n in here)
    base = Base(method, parts)
    lean = base.left_out({"state_dict": method.state_dict()})
    assert {n for n in lean["state_dict"] if "encoder" in n} == {f"encoder.{n}" for n in there if "lora" in n}
    back = base.put_back(lean, "here")["state_dict"]
    assert back.keys() == method.state_dict().keys()


def test_timm_networks_take_low_rank_updates():
    method = Small(Timm("vit_tiny_patch16_224", image_size=32, embed_dim=32, depth=1, num_heads=2)).double().eval()
    x = IMAGES
    before = method.encoder(x).tokens
    LoRA(rank=2)(method)
    assert isinstance(method.encoder.model.blocks[0].attn.qkv, LoRALinear)
    assert torch.equal(method.encoder(x).tokens, before)
    for kind in (Adapters(), Prefixes(), Prompts()):
        with pytest.raises(UserError, match="tuning=lora"):
            kind(method)


def test_groups_know_the_layer_of_what_is_added():
    method = made("vit")
    LoRA(rank=2, also=["*norm*"])(method)
    optimizer = Optim(lr=1.0, layer_decay=0.5, warmup=0).build(method.named_parameters(), 8)
    rate = {id(p): (g["peak_lr"], g["decays"]) for g in optimizer.param_groups for p in g["params"]}
    named = dict(method.named_parameters())
    assert rate[id(named["encoder.blocks.1.attn.fn.qkv.lora_a"])] == (0.5, True)
    assert rate[id(named["encoder.blocks.0.attn.fn.qkv.lora_b"])] == (0.25, True)
    assert rate[id(named["encoder.blocks.0.attn.norm.weight"])] == (0.25, False)
    assert rate[id(named["head.weight"])] == (1.0, True) and len(rate) == sum(p.requires_grad for p in named.values())
    prompted = made("decoder")
    Prompts(length=2)(prompted)
    optimizer = Optim(lr=1.0, layer_decay=0.5, warmup=0).build(prompted.named_parameters(), 8)
    assert {g["peak_lr"] for g in optimizer.param_groups} == {0.125, 1.0}


def test_mistakes_are_told_with_the_names_there_are():
    with pytest.raises(UserError, match=r"nothing fits 'query'; there are attn\.fn\.qkv, attn\.fn\.q, "):
        LoRA(targets=["query"])(made("vit"))
    with pytest.raises(UserError, match="nothing fits 'cross'; there are attn, mlp"):
        Adapters(after=["cross"])(made("vit"))
    with pytest.raises(UserError, match="has no backbone; its parts: encoder, head"):
        LoRA(parts=["backbone"])(made("vit"))
    with pytest.raises(UserError, match=r"tuning\.also: nothing fits 'gamma'"):
        Prefixes(also=["gamma"])(made("vit"))
    with pytest.raises(UserError, match="has 2 blocks"):
        Partial(last_blocks=3)(made("vit"))
    with pytest.raises(UserError, match="at least 1"):
        LoRA(rank=0)


def test_one_pattern_needs_no_brackets():
    one, same = made("vit"), made("vit")
    LoRA(targets="qkv", parts="encoder")(one)
    LoRA(targets=["qkv"], parts=["encoder"])(same)
    assert [n for n, p in one.named_parameters() if p.requires_grad] == [
        n for n, p in same.named_parameters() if p.requires_grad
    ]
    assert one.encoder.blocks[0].attn.fn.qkv.lora_a.shape == same.encoder.blocks[0].attn.fn.qkv.lora_a.shape


def test_a_layer_that_shares_its_weight_is_not_tuned():
    net = nn.Sequential(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)))
    net[0][1].weight = net[0][0].weight
    with pytest.raises(UserError, match="1 shares its weight"):
        LoRA(targets=["1"], parts=["0"])(net)


def test_the_share_is_told():
    method = made("vit")
    LoRA(rank=2)(method)
    count = sum(p.numel() for p in method.parameters())
    learns = 2 * 2 * 2 * 2 * 32 + 33 * 3
    told = f"trains {learns / 1e6:.3g} M of {count / 1e6:.3g} M parameters, {100 * learns / count:.2g} %"
    assert share(method) == told


def test_no_gradient_of_a_frozen_weight_is_made():
    method = made("bert")
    Partial(last_blocks=1)(method)
    weigh(method.encoder(WORDS).tokens).backward()
    assert all((p.grad is None) != p.requires_grad for n, p in method.encoder.named_parameters() if "blocks.1" in n)
    assert all(p.grad is None for n, p in method.encoder.named_parameters() if "blocks.0" in n)


@pytest.mark.parametrize(
    "mask",
    [
        AttnMask(causal=True, valid=VALID).after(2),
        AttnMask(causal=True, segments=torch.arange(9).expand(3, -1) // 4, window=3).after(2),
        AttnMask(valid=VALID, window=3).after(2),
        AttnMask(causal=True, chunk=4, valid=VALID).after(2),
        AttnMask(causal=True, prefix=torch.tensor([0, 3, 5]), valid=VALID).after(2),
        AttnMask(segments=torch.arange(11).expand(3, -1) // 4, asked=torch.tensor([[0, 1, 2, 7]] * 3)),
    ],
)
def test_the_rule_is_the_same_dense_and_as_a_predicate(mask):
    length = 9 if mask.asked is None else 4
    dense = mask.dense(length, 11, "cpu").expand(3, 1, length, 11)
    b, q, k = torch.meshgrid(torch.arange(3), torch.arange(length), torch.arange(11), indexing="ij")
    said = mask.mask_mod(length, 11)(b, torch.zeros_like(b), q, k)
    assert torch.equal(said, dense[:, 0])
    if mask.free:
        assert dense[..., :2].all() and not dense.all()
    else:
        assert not dense[:, :, 3].any()  # nobody has this id: such a query sees nothing
