"""LoRA, prefixes and prompts against peft: the same values and gradients in float64, random everywhere."""

import pytest
import torch
from language_models import V, pair
from parity import gap, randomise
from torch import nn

from ssl_lab.backbones.vit import ViT
from ssl_lab.nn.lora import LoRA
from ssl_lab.nn.prefix import Prefixes
from ssl_lab.nn.prompt import Prompts

peft = pytest.importorskip("peft")

IDS = torch.randint(0, V, (2, 10), generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder


def copied(family):
    import copy

    theirs, ours = (copy.deepcopy(model) for model in pair(family))
    return theirs, ours


def scored(logits):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7), dtype=logits.dtype)
    return (logits * weights).sum()


def logits_of(decoder):
    return decoder.logits(decoder(IDS).tokens)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_queries_and_values_of_llama(rslora):
    theirs, ours = copied("llama")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "v_proj", "down_proj"])
    theirs = randomise(peft.get_peft_model(theirs, config), 3)
    LoRA(rank=4, alpha=6, rslora=rslora, targets=["q", "v", "down"])(Holder(ours))
    state = {n: p for n, p in theirs.named_parameters() if "lora" not in n}
    _, plain = copied("llama")
    pre = "base_model.model.model.layers"
    for i, block in enumerate(ours.blocks):
        attn, down = block.attn.fn, block.mlp.fn.down
        at = f"{pre}.{i}.self_attn"
        heads = [(f"{at}.q_proj", 0), (f"{at}.v_proj", 1)]
        params = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, j in heads:
                attn.qkv.lora_a.view(2, 4, -1)[j] = params[f"{name}.lora_A.default.weight"]
                attn.qkv.lora_b.split([32, 16])[j].copy_(params[f"{name}.lora_B.default.weight"])
            down.lora_a.copy_(params[f"{pre}.{i}.mlp.down_proj.lora_A.default.weight"])
            down.lora_b.copy_(params[f"{pre}.{i}.mlp.down_proj.lora_B.default.weight"])
    copy_base(ours, {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in state.items()})
    a, b = logits_of(ours), theirs(input_ids=IDS).logits
    assert gap(a, b) < 2e-6  # transformers rotates with float32 tables
    scored(a).backward()
    scored(b).backward()
    params = dict(theirs.named_parameters())
    for i, block in enumerate(ours.blocks):
        grad = block.attn.fn.qkv.lora_a.grad.view(2, 4, -1)
        for j, name in enumerate(("q_proj", "v_proj")):
            other = params[f"{pre}.{i}.self_attn.{name}.lora_A.default.weight"].grad
            assert gap(grad[j], other) < 1e-5 * other.abs().max()
        other = params[f"{pre}.{i}.mlp.down_proj.lora_B.default.weight"].grad
        assert gap(block.mlp.fn.down.lora_b.grad, other) < 1e-5 * other.abs().max()
    assert plain is not ours


def copy_base(ours, state):
    """Llama's tensors by their names into ours, whose layers may be tuned."""
    from ssl_lab.weights.rename import rename
    from ssl_lab.weights.tables import hf_llama

    config = pair("llama")[0].config
    known = {n.removeprefix(hf_llama.PREFIX): p.detach() for n, p in state.items()}
    new = rename(known, hf_llama.table(hf_llama.facts(config)))
    mine = ours.state_dict()
    ours.load_state_dict({n: new.get(n, p) for n, p in mine.items()})


def test_lora_on_a_packed_layer_of_a_vit():
    """peft adapts timm's qkv whole; so does `qkv`, with equal gradients to rounding."""
    import timm

    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
    )
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc1"])
    model = randomise(peft.get_peft_model(theirs, config), 1)
    ours = ViT(32, 2, 4, image_size=32, patch_size=8)
    LoRA(rank=3, alpha=5, targets=["qkv", "fc1"], parts=["decoder"])(Holder(ours))
    from ssl_lab.weights.rename import rename
    from ssl_lab.weights.tables import timm_vit

    state = {n.removeprefix("base_model.model."): p.detach() for n, p in model.named_parameters()}
    base = {n.replace(".base_layer", ""): p for n, p in state.items() if "lora_" not in n}
    new = rename(timm_vit.fold(base, 16), timm_vit.TABLE)
    ours.double().load_state_dict({n: new.get(n, p) for n, p in ours.state_dict().items()})
    layers = [(f"blocks.{i}.attn.qkv", b.attn.fn.qkv) for i, b in enumerate(ours.blocks)]
    layers += [(f"blocks.{i}.mlp.fc1", b.mlp.fn.fc1) for i, b in enumerate(ours.blocks)]
    with torch.no_grad():
        for name, layer in layers:
            layer.lora_a.copy_(state[f"{name}.lora_A.default.weight"])
            layer.lora_b.copy_(state[f"{name}.lora_B.default.weight"])
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    encoded = ours.eval()(x)
    a, b = torch.cat([encoded.prefix, encoded.tokens], 1), model.base_model.model.forward_features(x)
    assert gap(a, b) < 1e-12
    scored(a).backward()
    scored(b).backward()
    for name, layer in layers:
        for ours_p, kind in ((layer.lora_a, "A"), (layer.lora_b, "B")):
            other = model.get_parameter(f"base_model.model.{name}.lora_{kind}.default.weight").grad
            assert gap(ours_p.grad, other) < 1e-11 * other.abs().max().clamp(min=1)
    merged = model.merge_and_unload().forward_features(x)
    assert gap(a, merged) < 1e-12


def test_prompt_of_gpt2():
    theirs, ours = copied("gpt2")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(theirs, config).double().eval()
    Prompts(length=5)(Holder(ours))
    table = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        ours.prompt.tokens.copy_(table)
    a, b = logits_of(ours), model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, 5:]
    assert gap(a, b) < 1e-12 * b.abs().max()
    scored(a).backward()
    scored(b).backward()
    assert gap(ours.prompt.tokens.grad, table.grad) < 1e-12 * table.grad.abs().max()


def test_prefix_of_gpt2():
    """peft lets the text's positions move by the prefix; here they stay, and transformers is told so."""
    theirs, ours = copied("gpt2")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(theirs, config).double().eval()
    Prefixes(length=5)(Holder(ours))
    table = model.prompt_encoder["default"].embedding.weight  # (P, layers * 2 * D)
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        for i, block in enumerate(ours.blocks):
            block.attn.fn.prefix.tokens.copy_(table.view(5, 2, 64)[:, i])
    past = model.get_prompt(batch_size=2)
    b = theirs(
        input_ids=IDS,
        past_key_values=past,
        attention_mask=torch.ones(2, 15, dtype=torch.long),
        position_ids=torch.arange(10).expand(2, -1),
    ).logits
    a = logits_of(ours)
    assert gap(a, b) < 1e-12 * b.abs().max()
    scored(a).backward()
    scored(b).backward()
    grad = torch.stack([block.attn.fn.prefix.tokens.grad for block in ours.blocks], 1).flatten(1)
    assert gap(grad, table.grad) < 1e-11 * table.grad.abs().max()
