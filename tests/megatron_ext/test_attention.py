"""Backends of attention against the dense one, what they refuse, and what is chosen."""

import dataclasses

import pytest
import torch

from megatron_ext.attention import BACKENDS, AttentionSizes, Pattern, choose_attention
from megatron_ext.attention.sdpa import SdpaBackend
from megatron_ext.engine import EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.kernels import KernelConfig
from megatron_ext.planner.activations import layer_terms
from tests.megatron_ext.training import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, HEADS, KV_HEADS, S, D = 2, 4, 2, 12, 8
SLOPES = (0.5, 0.25, 0.125, 0.0625)
PATTERNS = [
    Pattern(),
    Pattern(causal=False),
    Pattern(window=5),
    Pattern(slopes=SLOPES),
    Pattern(documents=True),
    Pattern(window=3, slopes=SLOPES, documents=True),
]
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 9, [0] * 7 + [1] * 4 + [2]])


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(B, n, S, D, generator=generator, dtype=torch.float64).requires_grad_() for n in heads]


class Repeating(SdpaBackend):
    repeats_heads = property(lambda self: True)  # type: ignore[assignment]


def by_hand(pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Query by query, head by head."""
    out = torch.zeros_like(q)
    for b in range(B):
        for head in range(HEADS):
            for i in range(S):
                seen = [
                    j
                    for j in range(S)
                    if (j <= i or not pattern.causal)
                    and (pattern.window is None or abs(i - j) < pattern.window)
                    and (not pattern.documents or DOCUMENTS[b, i] == DOCUMENTS[b, j])
                ]
                of = head * KV_HEADS // HEADS
                scores = k[b, of, seen] @ q[b, head, i] / D**0.5
                if pattern.slopes is not None:
                    scores = scores - pattern.slopes[head] * torch.tensor([abs(i - j) for j in seen])
                out[b, head, i] = scores.softmax(0) @ v[b, of, seen]
    return out


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_backends_do_what_the_pattern_says(pattern: Pattern) -> None:
    """On a CPU: values and gradients. The efficient kernel's repeated heads, by the math kernel."""
    expected = by_hand(pattern, *inputs())
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(by_hand(pattern, *(q := inputs())), q, grad)
    backends = [*BACKENDS.values(), SdpaBackend(), Repeating(("math",))]
    able = [b for b in backends if b.supports(pattern, HEADS, KV_HEADS, D, CPU, torch.float64) is None]
    assert len(able) == (5 if not pattern.masks else 4)
    for backend in able:
        attend = backend.prepare(pattern, S, CPU, torch.float64)(DOCUMENTS if pattern.documents else None)
        out = attend(*(q := inputs()))
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(out, q, grad), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name, pattern, device, dtype, head_dim, reason",
    [
        ("flash", Pattern(window=5), CUDA, torch.bfloat16, 64, r"cannot mask a window of 5 tokens \("),
        ("flash", Pattern(slopes=SLOPES), CPU, torch.float32, 64, "cannot mask ALiBi"),
        ("flash", Pattern(documents=True), CPU, torch.float32, 64, "cannot mask documents"),
        ("flash", Pattern(), CUDA, torch.float32, 64, "needs --bf16 or --fp16: use auto, efficient, math"),
        ("flash", Pattern(), CUDA, torch.bfloat16, 320, "takes heads of at most 256 elements, not of 320"),
        ("cudnn", Pattern(), CPU, torch.bfloat16, 64, "needs a CUDA device: use auto, flash, math"),
        ("cudnn", Pattern(), CUDA, torch.bfloat16, 20, "takes heads of a multiple of 8 elements, not of 20"),
        ("efficient", Pattern(), CUDA, torch.float64, 64, "takes no --params-dtype float64"),
    ],
)
def test_what_cannot_be_done_is_refused(
    name: str, pattern: Pattern, device: torch.device, dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    with pytest.raises(RequestError, match=f"^--attention-backend {name} {reason}"):
        choose_attention(name, pattern, HEADS, KV_HEADS, head_dim, device, dtype)


@pytest.mark.parametrize(
    "pattern, kv_heads, dtype, head_dim, chosen",
    [
        (Pattern(), 2, torch.bfloat16, 64, "flash, or cudnn where torch prefers it"),
        (Pattern(window=5), 4, torch.bfloat16, 64, "efficient, or cudnn where torch prefers it (flash cannot"),
        (
            Pattern(window=5),
            2,
            torch.bfloat16,
            64,
            "efficient, or cudnn where torch prefers it, with key and value heads repeated 2 times (flash cannot mask",
        ),
        (Pattern(), 2, torch.float32, 64, "efficient, with key and value heads repeated 2 times (flash needs"),
        (Pattern(), 2, torch.float64, 64, "math, with all scores in memory (flash needs --bf16"),
        (Pattern(window=5), 2, torch.bfloat16, 20, "math, with all scores in memory (flash cannot mask"),
    ],
)
def test_what_is_chosen_on_a_gpu_is_said(
    pattern: Pattern, kv_heads: int, dtype: torch.dtype, head_dim: int, chosen: str
) -> None:
    assert choose_attention("auto", pattern, HEADS, kv_heads, head_dim, CUDA, dtype).why.startswith(chosen)


def test_documents_that_a_backend_cannot_mask_are_refused_in_any_batch() -> None:
    """Also where no configuration knew of them."""
    config = with_backend("flash")
    assert config.attention(CPU).why == "flash, as asked"
    with pytest.raises(RequestError, match="--attention-backend flash cannot mask documents"):
        config.attention(CPU, documents=True)
    with pytest.raises(RequestError, match="--attention-backend flash cannot mask a window"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, window_size=3)).validate(1)


def with_backend(name: str, **options: object) -> EngineConfig:
    return dataclasses.replace(tiny(**options), kernels=KernelConfig(attention_backend=name)).validate(1)


def test_repeated_heads_are_in_the_account() -> None:
    """Keys and values as large as the queries, where the efficient kernel runs on grouped heads."""
    grouped = {"num_attention_heads": 4, "num_query_groups": 2, "bf16": True}
    terms = layer_terms(with_backend("efficient", **grouped), "cuda")
    assert terms["attention: keys and values"] == 2 * terms["attention: queries"]
    assert (
        layer_terms(with_backend("auto", **grouped), "cuda")["attention: keys and values"]
        == terms["attention: queries"]
    )


@pytest.mark.parametrize("name", ["dense", "math"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_documents_are_not_ignored(name: str, pattern: Pattern) -> None:
    """Neither where the pattern has none, nor where a batch does not say which they are."""
    prepared = BACKENDS[name].prepare(pattern, S, CPU, torch.float64)
    with pytest.raises(AssertionError):
        prepared(None if pattern.documents else DOCUMENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_dense_attention_keeps(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs())
    attend = BACKENDS["dense"].prepare(Pattern(), S, CPU, dtype)(None)
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attend(q, k, v)
    account = BACKENDS["dense"].kept(Pattern(), AttentionSizes(B, HEADS, KV_HEADS, S, D), dtype.itemsize, 4)
    assert sum(kept.values()) + out.nbytes == sum(account.values())
