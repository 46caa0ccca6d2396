"""Activation formulas: the paper's against its table and figures, ours against the paper's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ext.engine import BatchConfig, EngineConfig, RecomputeConfig
from megatron_ext.mesh import ParallelConfig
from megatron_ext.models import ModelConfig
from megatron_ext.optim import PrecisionConfig
from megatron_ext.planner.activations import layer_terms, paper_layer_bytes

# arXiv 2205.05198, table 2: bytes of a layer by s, b, h, a, t
TABLE_2: list[tuple[dict[str, Any], Callable[..., float]]] = [
    ({"t": 1}, lambda s, b, h, a, t: s * b * h * (34 + 5 * a * s / h)),
    ({}, lambda s, b, h, a, t: s * b * h * (10 + 24 / t + 5 * a * s / (h * t))),
    ({"sequence_parallel": True}, lambda s, b, h, a, t: s * b * h / t * (34 + 5 * a * s / h)),
    ({"recompute": "selective"}, lambda s, b, h, a, t: s * b * h * (10 + 24 / t)),
    ({"sequence_parallel": True, "recompute": "selective"}, lambda s, b, h, a, t: 34 * s * b * h / t),
    ({"recompute": "full"}, lambda s, b, h, a, t: 2 * s * b * h),
]


@pytest.mark.parametrize("options, formula", TABLE_2)
def test_table_2(options: dict[str, Any], formula: Callable[..., float]) -> None:
    sizes: dict[str, Any] = {"s": 2048, "b": 3, "h": 6144, "a": 64, "t": 8} | {
        k: v for k, v in options.items() if k == "t"
    }
    rest = {k: v for k, v in options.items() if k != "t"}
    assert paper_layer_bytes(**sizes, **rest) == pytest.approx(formula(**sizes))


@dataclasses.dataclass(frozen=True)
class Published:
    """A model of the paper's table 3 (t = 8, s = 2048), and what figures 1 and 7 say of it.

    gib: activations on a rank of the first stage, with tensor parallelism alone, and with sequence parallelism and
    selective recomputation. percent: of tensor parallelism alone: + sequence parallelism, selective, both, full.
    """

    a: int
    h: int
    layers: int
    p: int
    interleaved: int
    b: int
    gib: tuple[float, float]
    percent: tuple[float, float, float, float]


PUBLISHED = [
    Published(64, 6144, 48, 1, 1, 4, (59.25, 9.5625), (66.84, 49.42, 16.18, 7.64)),
    Published(96, 12288, 96, 8, 3, 1, (66.84375, 12.3515625), (62.04, 56.53, 18.49, 8.71)),
    Published(128, 20480, 105, 35, 3, 1, (114.0234375, 23.076171875), (58.31, 62.04, 20.27, 9.42)),
    Published(160, 25600, 128, 64, 1, 1, (131.25, 26.5625), (58.31, 62.04, 20.27, 9.42)),
]


@pytest.mark.parametrize("model", PUBLISHED, ids=["22B", "175B", "530B", "1T"])
def test_figures_1_and_7(model: Published) -> None:
    sizes: dict[str, Any] = {"s": 2048, "b": model.b, "h": model.h, "a": model.a, "t": 8}
    baseline = paper_layer_bytes(**sizes)
    both = paper_layer_bytes(**sizes, sequence_parallel=True, recompute="selective")
    # section 4.2.3: the first stage keeps L layers' worth of microbatches, interleaved 1 + (p - 1) / (p m) times
    first_stage = model.layers * (1 + (model.p - 1) / (model.p * model.interleaved) * (model.interleaved > 1))
    for layer, published in zip((baseline, both), model.gib, strict=True):
        assert layer * first_stage / 2**30 == pytest.approx(published, rel=1e-6)
    cases: list[Any] = [{"sequence_parallel": True}, {"recompute": "selective"}, None, {"recompute": "full"}]
    layers = [both if case is None else paper_layer_bytes(**sizes, **case) for case in cases]
    for layer, published in zip(layers, model.percent, strict=True):
        assert 100 * layer / baseline == pytest.approx(published, abs=0.2)  # as read off the figure


S, B, H, A, G, F = 2048, 3, 1024, 16, 4, 2816


def ours(tp: int = 1, sequence_parallel: bool = False, recompute: str | None = None, **model: Any) -> float:
    """Bytes of a layer in bf16, without what its norms keep of every token (the paper leaves that out)."""
    shape: dict[str, Any] = {"num_layers": 1, "hidden_size": H, "num_attention_heads": A, "vocab_size": 100} | model
    config = EngineConfig(
        model=ModelConfig(**shape),
        batch=BatchConfig(B, B, S),
        parallel=ParallelConfig(tp, sequence_parallel=sequence_parallel),
        precision=PrecisionConfig(bf16=True),
        recompute=RecomputeConfig(recompute),
    )
    return sum(size for name, size in layer_terms(config).items() if not name.endswith("statistics"))


GPT: dict[str, Any] = {
    "ffn_hidden_size": 4 * H,
    "normalization": "LayerNorm",
    "activation": "gelu",
    "add_bias_linear": True,
}


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (4, False), (4, True)])
def test_a_gpt_without_dropout_and_with_fused_attention(tp: int, sequence_parallel: bool) -> None:
    """Two masks of s b h bytes and 5 a s^2 b bytes less, and the log of every score's sum, 4 bytes, more."""
    theirs = paper_layer_bytes(s=S, b=B, h=H, a=A, t=tp, sequence_parallel=sequence_parallel)
    masks = 2 * S * B * H / (tp if sequence_parallel else 1)
    expected = theirs - masks - 5 * A * S * S * B / tp + 4 * A * S * B / tp
    assert ours(tp, sequence_parallel, **GPT) == pytest.approx(expected)


def test_selective_recomputation_saves_only_the_sums_of_scores() -> None:
    assert ours(**GPT) - ours(recompute="selective", **GPT) == 4 * A * S * B


def test_a_llama() -> None:
    """Gate, up and product are three times the inner width, where a GPT's two are 4 h wide."""
    expected = S * B * (12 * H + 4 * H * G // A + 4 * A + 6 * F)
    assert ours(ffn_hidden_size=F, num_query_groups=G) == expected
    assert ours(4, True, ffn_hidden_size=F, num_query_groups=G) == expected / 4
