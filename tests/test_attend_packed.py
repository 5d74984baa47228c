"""Kernels that only a GPU can run: compared with `eager` on CPU, with stand-ins that compute their definition.

A stand-in has the arguments of the function that it stands for and knows nothing of our masks.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import attention
from torch.nn.attention import varlen as torch_varlen

from ssl_lab.backbones.decoder import Decoder
from ssl_lab.data.text_views import NextToken
from ssl_lab.errors import UserError
from ssl_lab.nn import attend as door
from ssl_lab.nn.attend import KERNELS, attend, supports
from ssl_lab.nn.attention import Attention
from ssl_lab.nn.kernels.case import Case
from ssl_lab.nn.kernels.flash_attn import MODULE
from ssl_lab.nn.mask import CAUSAL, FULL, AttnMask

B, H, L, DH = 3, 4, 12, 8
SEGMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] + [2] * 5 + [-1] * 3, [4] * 12])  # -1: padding of a row
MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "window": AttnMask(window=3),
    "causal_window": AttnMask(causal=True, window=3),
    "itself": AttnMask(causal=True, window=1),
    "documents": AttnMask(segments=SEGMENTS),
    "causal_documents": AttnMask(causal=True, segments=SEGMENTS),
    "documents_window": AttnMask(segments=SEGMENTS, window=3),
    "causal_documents_window": AttnMask(causal=True, segments=SEGMENTS, window=3),
}


def sequence(q, k, v, left, right, scale):
    """(L, H, Dh), (S, G, Dh) x2 -> (L, H, Dh): query i stands at i + S - L, sees `left` before, `right` after."""
    rows = []
    for i in range(len(q)):
        at = i + len(k) - len(q)
        first = 0 if left < 0 else max(0, at - left)
        last = len(k) if right < 0 else min(len(k), at + right + 1)
        heads = []
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            weights = (k[first:last, g] @ q[i, h] * scale).softmax(0)
            heads.append(weights @ v[first:last, g])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def sequences(q, k, v, of_q, of_k, longest_q, longest_k, left, right, scale):
    assert of_q.dtype == of_k.dtype == torch.int32
    assert int(of_q[-1]) == len(q) and int(of_k[-1]) == len(k)
    assert int(of_q.diff().max()) == longest_q and int(of_k.diff().max()) == longest_k
    return torch.cat(
        [
            sequence(q[a:b], k[c:d], v[c:d], left, right, scale)
            for a, b, c, d in zip(of_q[:-1], of_q[1:], of_k[:-1], of_k[1:], strict=True)
        ]
    )


def newer_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    return sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *window_size, scale)


def older_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    """torch 2.11's has no groups of heads."""
    assert query.shape[1] == key.shape[1]
    return sequences(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *window_size, scale)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
):  # fmt: skip
    assert dropout_p == 0
    left, right = window_size
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return sequences(q, k, v, *bounds, left, 0 if causal else right, softmax_scale)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False,
):  # fmt: skip
    assert dropout_p == 0
    left, right = window_size
    return torch.stack(
        [sequence(*one, left, 0 if causal else right, softmax_scale) for one in zip(q, k, v, strict=True)]
    )


def stand_in(monkeypatch, kernel):
    """Put a stand-in in the place of what `kernel` calls; the name of the kernel in `KERNELS`."""
    if kernel == "flash_attn":
        module = ModuleType(MODULE)
        module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, MODULE.split(".")[0], ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, MODULE, module)
        return kernel
    monkeypatch.setattr(torch_varlen, "varlen_attn", older_varlen if kernel == "varlen of 2.11" else newer_varlen)
    return "varlen"


def tensors(kv_heads=H, queries=L):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, queries, DH), (B, kv_heads, L, DH), (B, kv_heads, L, DH)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def assert_equals_eager(run, mask, *, kv_heads=H, queries=L):
    """Values and the gradients of queries, keys and values."""
    ours, theirs = tensors(kv_heads, queries), tensors(kv_heads, queries)
    weight = torch.randn(B, H, queries, DH, dtype=torch.float64)
    a, b = run(*ours, mask, 0.3), attend(*theirs, mask, kernel="eager", scale=0.3)
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel", ["varlen", "varlen of 2.11", "flash_attn"])
@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_packed_kernels_equal_eager(monkeypatch, kernel, mask, kv_heads):
    kernel = stand_in(monkeypatch, kernel)
    assert_equals_eager(lambda q, k, v, m, s: KERNELS[kernel](q, k, v, m, s, 0.0, None), mask, kv_heads=kv_heads)


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, AttnMask(causal=True, window=4)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("queries", [1, 5])
def test_queries_are_the_last_positions(monkeypatch, kernel, mask, queries):
    """As when text is generated with a cache."""
    kernel = stand_in(monkeypatch, kernel)
    assert_equals_eager(lambda q, k, v, m, s: KERNELS[kernel](q, k, v, m, s, 0.0, None), mask, queries=queries)


def test_cu_seqlens_are_the_runs_of_ids():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 2, (4, 9), generator=generator).cumsum(1) - 1
        begins, longest, last = [], 0, None
        for row in range(len(ids)):
            for column in range(ids.shape[1]):
                if (here := (row, int(ids[row, column]))) != last:
                    begins.append(row * ids.shape[1] + column)
                last = here
        ends = begins[1:] + [ids.numel()]
        longest = max(b - a for a, b in zip(begins, ends, strict=True))
        mask = AttnMask(segments=ids)
        bounds, length = mask.cu_seqlens()
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [*begins, ids.numel()]
        assert length == longest
        assert mask.cu_seqlens()[0] is bounds  # once for all layers


def test_a_document_in_two_pieces_is_refused():
    """Their tokens see each other by the definition, which sequences cannot express."""
    with pytest.raises(UserError, match="two pieces"):
        AttnMask(segments=torch.tensor([[0, 0, 1, 0]])).cu_seqlens()


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_packed_text_goes_through_a_model(monkeypatch, kernel):
    """Rows as the data gives them, through every layer, with and without more than one document in the batch."""
    stand_in(monkeypatch, kernel)
    monkeypatch.setitem(door.REFUSALS, kernel, lambda case: None)  # they refuse a CPU
    model = Decoder(16, 8, 2, 2, max_length=12).double().eval()
    tokens = torch.arange(26).view(2, 13) % 16
    packed = (torch.tensor([[0] * 4 + [1] * 9, [0] * 13]), torch.zeros(2, 13, dtype=torch.int64))
    bounds = []
    monkeypatch.setattr(
        AttnMask, "cu_seqlens", lambda self, real=AttnMask.cu_seqlens: bounds.append(real(self)) or bounds[-1]
    )
    for documents in packed:
        batch = NextToken()((tokens, documents), torch.arange(2), 0)
        outs = []
        for name in (kernel, "eager"):
            for module in model.modules():
                if isinstance(module, Attention):
                    module.kernel = name
            outs.append(model(batch["tokens"], segments=batch.get("segments")).tokens)
        torch.testing.assert_close(*outs, atol=1e-12, rtol=0)
    assert len(bounds) == 2 and bounds[0] is bounds[1]


def test_varlen_in_a_compiled_function(monkeypatch):
    stand_in(monkeypatch, "varlen")

    @torch.compile(backend="eager")
    def compiled(q, k, v, mask, scale):
        return attend(q * 1.0, k, v, mask, kernel="varlen", scale=scale)

    assert_equals_eager(compiled, MASKS["causal_documents"])


def test_dropout_and_determinism_reach_flash_attn(monkeypatch):
    stand_in(monkeypatch, "flash_attn")
    given = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(sys.modules[MODULE], name, lambda q, *rest, **options: given.append(options) or q)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for mask in (FULL, MASKS["documents"]):
        KERNELS["flash_attn"](*tensors(), mask, 0.3, 0.25, None)
    assert [(one["dropout_p"], one["deterministic"]) for one in given] == [(0.25, True)] * 2


REFUSED = {
    "a prefix that all see": {"mask": AttnMask(causal=True, prefix=torch.tensor([2]))},
    "padding": {"mask": AttnMask(causal=True, segments=SEGMENTS, valid=SEGMENTS >= 0)},
    "positions outside of the window": {"mask": AttnMask(window=2, everyone=SEGMENTS == 0)},
    "chunks": {"mask": AttnMask(causal=True, chunk=2)},
    "cross-attention by ids": {"mask": AttnMask(segments=SEGMENTS, asked=SEGMENTS)},
    "learned positions": {"mask": AttnMask(causal=True, segments=SEGMENTS).after(2)},
    "as many queries as keys here, not 1 and 12": {"mask": AttnMask(segments=SEGMENTS), "lengths": (1, 12)},
    "needs bf16 or fp16, not float32": {"dtype": torch.float32},
    "at most 256 wide, not 512": {"head_dim": 512},
    "as wide as its keys, not 32 beside 64": {"v_dim": 32},
    "CUDA only, not for cpu": {"device": "cpu"},
    "score bias": {"bias": True},
}
ON_GPU = {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 64}


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
@pytest.mark.parametrize("phrase", REFUSED)
def test_refusals_name_the_reason(monkeypatch, kernel, phrase):
    stand_in(monkeypatch, kernel)
    assert supports(kernel, **ON_GPU) is None
    reason = supports(kernel, **{**ON_GPU, **REFUSED[phrase]})
    assert reason is not None and phrase in reason


def test_a_kernel_is_asked_about_the_very_call(monkeypatch):
    cases = []
    monkeypatch.setitem(door.REFUSALS, "math", lambda case: cases.append(case) or "it is only asked")
    q, k, v = (torch.zeros(1, 2, length, width, dtype=torch.bfloat16) for length, width in ((3, 8), (5, 8), (5, 16)))
    with pytest.raises(UserError, match="attention=math cannot run here: it is only asked"):
        attend(q, k, v, CAUSAL, kernel="math", dropout_p=0.5)
    assert cases == [Case(torch.bfloat16, torch.device("cpu"), 8, CAUSAL, 0.5, v_dim=16, lengths=(3, 5))]


@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_what_changes_nothing_is_not_refused(monkeypatch, kernel):
    stand_in(monkeypatch, kernel)
    everyone, prefix = torch.zeros(1, L, dtype=torch.bool), torch.tensor([2])
    for mask in (*MASKS.values(), AttnMask(everyone=everyone), AttnMask(prefix=prefix, chunk=2), CAUSAL.after(2)):
        assert supports(kernel, mask=mask, lengths=(L, L), **ON_GPU) is None


def test_torchs_flash_kernel_has_as_many_causal_queries_as_keys():
    assert "as many queries as keys" in supports("flash", mask=CAUSAL, lengths=(4, 8), **ON_GPU)
    for mask, lengths in ((CAUSAL, (8, 8)), (CAUSAL, (1, 8)), (FULL, (4, 8)), (CAUSAL, None)):
        assert supports("flash", mask=mask, lengths=lengths, **ON_GPU) is None


def test_dropout_and_widths():
    assert "no dropout" in supports("varlen", dropout_p=0.1, **ON_GPU)
    assert "multiple of 8, not 60" in supports("varlen", **{**ON_GPU, "head_dim": 60})
    assert "multiple of 8, not 60" in supports("flash3", **{**ON_GPU, "head_dim": 60})
    assert "plain or causal" in supports("flash3", mask=MASKS["documents"], **ON_GPU)
    assert "no dropout" in supports("flash4", dropout_p=0.1, **ON_GPU)


@pytest.mark.parametrize(
    ("kernel", "module", "remedy"),
    [
        ("flash_attn", MODULE, "pip install flash-attn "),
        ("flash3", "flash_attn_interface", "install the folder hopper"),
        ("flash4", "flash_attn.cute.interface", "pip install flash-attn-4"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, kernel, module, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, module, None)
    reason = supports(kernel, **ON_GPU)
    assert f"{module} is not installed" in reason and remedy in reason
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert supports(kernel, **ON_GPU) is None


def test_a_package_for_another_torch_says_so(monkeypatch, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: xyz')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    assert "undefined symbol: xyz" in supports("flash3", **ON_GPU)


def test_an_old_torch_or_gpu_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert supports("flash3", **ON_GPU) == "FA3 needs a GPU of compute capability 9.0"
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    assert "cannot exchange its flash kernel and put it back" in supports("flash3", **ON_GPU)


def test_auto_leaves_packed_rows_to_flex():
    """No kernel that has not been measured is chosen unasked."""
    assert {door.choose(t, t, m) for t in [torch.zeros(B, H, L, DH)] for m in MASKS.values()} <= {"eager", "sdpa"}
    meta = torch.zeros(B, H, 2048, DH, device="meta")
    documents = AttnMask(causal=True, segments=torch.zeros(B, 2048, dtype=torch.int64, device="meta"))
    assert door.choose(meta, meta, documents) == "flex"
    padded = AttnMask(causal=True, valid=torch.ones(B, 2048, dtype=torch.bool, device="meta"))
    assert door.choose(meta, meta, padded) == "flex"
    assert door.choose(meta[:, :, :1], meta, padded) == "sdpa"  # decoding


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn", "flash3", "flash4"])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gpu_gradients_equal_eager(kernel, mask, kv_heads):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := supports(kernel, mask=mask, **ON_GPU):
        pytest.skip(reason)
    moved = AttnMask(mask.causal, window=mask.window, segments=None if mask.segments is None else mask.segments.cuda())
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(B, H, L, 64), (B, kv_heads, L, 64), (B, kv_heads, L, 64), (B, H, L, 64)]
    *inputs, weight = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes)
    found = []
    for name in (kernel, "eager"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, moved, kernel=name)
        found.append([out, *torch.autograd.grad(out, leaves, weight)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)
