"""One GPU, bf16: the program that runs on gloo runs there too. Skipped without one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext.attention import BACKENDS, Pattern, choose_attention
from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.engine import BatchConfig, Engine, EngineConfig, RecomputeConfig
from megatron_ext.mesh import ParallelConfig, ProcessGrid, build_grid, init_distributed
from megatron_ext.models import ModelConfig
from megatron_ext.optim import OptimizerConfig, PrecisionConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL = ModelConfig(
    num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=8, vocab_size=997, num_query_groups=2
)


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGrid]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield build_grid(ParallelConfig(), init_distributed())
    dist.destroy_process_group()


def make(grid: ProcessGrid, **options: object) -> Engine:
    config = EngineConfig(
        model=MODEL, batch=BatchConfig(2, 8, 256), optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0), **options
    )
    return Engine(config, grid)


def batch(step: int, grid: ProcessGrid) -> dict[str, torch.Tensor]:
    """Sequences with something to learn: every token is the one before plus a step of its row."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(997, (8, 1), generator=generator)
    stride = torch.randint(1, 4, (8, 1), generator=generator)
    ids = ((start + stride * torch.arange(257)) % 997).to(grid.device)
    return {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    engine.pipeline.forward_backward(batch(0, engine.grid))
    return {name: p.grad.full_tensor().double() for name, p in engine.parameters.items()}  # type: ignore[union-attr]


def test_logits_equal_transformers(grid: ProcessGrid) -> None:
    pytest.importorskip("transformers")
    from tests.megatron_ext.hugging_face import llama_like

    decoder = make(grid).stages[0].decoder
    weights = {name: p.full_tensor() for name, p in decoder.named_parameters()}  # type: ignore[attr-defined]
    theirs = llama_like(MODEL, weights).to(grid.device)
    tokens = batch(0, grid)["tokens"]
    with torch.no_grad():
        difference = (decoder(tokens) - theirs(input_ids=tokens).logits).abs().max().item()
    assert difference <= 1e-4


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_bf16_gradients_are_close_to_float64(grid: ProcessGrid, recompute: str | None) -> None:
    exact = gradients(make(grid, precision=PrecisionConfig(params_dtype="float64")))
    half = gradients(
        make(grid, precision=PrecisionConfig(bf16=True), recompute=RecomputeConfig(recompute_granularity=recompute))
    )
    for name, reference in exact.items():
        assert (half[name] - reference).norm() <= 0.05 * reference.norm(), name


def test_fifty_steps_save_and_resume_bitwise(grid: ProcessGrid, tmp_path: Path) -> None:
    straight = make(grid, precision=PrecisionConfig(bf16=True))
    losses = []
    for step in range(50):
        if step == 25:
            writer = CheckpointWriter(tmp_path, straight)
            manifest = Manifest(25, 200, 200 * 256, dataclasses.asdict(MODEL), mesh_sizes(grid), has_optimizer=True)
            writer.save(manifest, {})
        losses.append(straight.train_step(batch(step, grid), 1e-3)[0].item())
    assert losses[-1] < losses[0] - 2

    resumed = make(grid, precision=PrecisionConfig(bf16=True), seed=99)
    load_checkpoint(resumed, find_checkpoint(tmp_path))
    assert [resumed.train_step(batch(step, grid), 1e-3)[0].item() for step in range(25, 50)] == losses[25:]


@pytest.mark.parametrize("name", ["auto", *BACKENDS])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=20)], ids=["causal", "window"])
def test_attention_equals_the_dense_one(grid: ProcessGrid, pattern: Pattern, name: str) -> None:
    """On grouped heads. What a backend says that it takes, torch takes."""
    device, shape = torch.device("cuda", torch.cuda.current_device()), (8, 2, 64)
    if name != "auto" and BACKENDS[name].supports(pattern, *shape, device, torch.bfloat16) is not None:
        assert (name == "flash" and pattern.masks) or name == "cudnn"
        return
    choice = choose_attention(name, pattern, *shape, device, torch.bfloat16)
    assert not choice.why.startswith("math") or name == "math"
    q, k, v = (
        torch.randn(2, heads, 96, 64, device=device, dtype=torch.bfloat16).requires_grad_() for heads in (8, 2, 2)
    )
    found, expected = (
        backend.prepare(pattern, 96, device, dtype)(None)(*(x.to(dtype) for x in (q, k, v)))
        for backend, dtype in ((choice.backend, torch.bfloat16), (BACKENDS["dense"], torch.float64))
    )
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    gradients = [torch.autograd.grad(out.double().square().sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.1)
