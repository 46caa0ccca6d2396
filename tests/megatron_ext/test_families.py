"""LLaMA's relatives against transformers: logits, and the gradients of a step at several layouts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.checkpoint import find_checkpoint
from megatron_ext.checkpoint.load import load_checkpoint
from megatron_ext.checkpoint.read import Weights
from megatron_ext.engine import BatchConfig, Engine, EngineConfig
from megatron_ext.mesh import ParallelConfig, build_grid
from megatron_ext.models import ModelConfig
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.zero import ZeroConfig
from tests.distributed import Pool
from tests.families import MODELS, save_model
from tests.megatron_ext.training import share
from tests.slow import sweep
from tests.weights import InMemory
from tools.check_export import load_decoder
from tools.conversion.families import family_of
from tools.conversion.formats.hf_folder import open_hf
from tools.conversion.formats.native import open_native, write_native
from tools.conversion.rows import bind, to_ours

LENGTH, ROWS = 24, 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2 x PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "TP2 SP x DP2, ZeRO-3": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def batch() -> dict[str, torch.Tensor]:
    """Without ids of padding, whose rows transformers does not train."""
    text = torch.randint(4, 97, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


Step = tuple[float, dict[str, torch.Tensor]]


def steps(jobs: list[tuple[ModelConfig, Path]], layout: dict[str, Any]) -> list[Step]:
    """Loss and gradients of one step of every model, without the update: what this rank knows, whole. Collective."""
    parallel = ParallelConfig(**layout)
    grid = build_grid(parallel, torch.device("cpu"))
    results = []
    for model, checkpoint in jobs:
        config = EngineConfig(
            model,
            batch=BatchConfig(micro_batch_size=2, global_batch_size=ROWS, seq_length=LENGTH),
            parallel=parallel,
            zero=ZeroConfig(zero_stage=3 if parallel.sequence_parallel else 0),
        )
        engine = Engine(config, grid)
        load_checkpoint(engine, checkpoint, weights_only=True)
        loss = engine.pipeline.forward_backward(share(batch(), grid, 2))
        dist.all_reduce(loss)
        engine.tied.sum_gradients()
        gradients = {name: p.grad.full_tensor() for name, p in engine.parameters.items()}  # type: ignore[union-attr]
        results.append((loss.item(), gradients))
    return results


@dataclasses.dataclass
class Expected:
    """What transformers says of a model, under our names."""

    model: ModelConfig
    checkpoint: Path
    loss: float
    norm: torch.Tensor
    gradients: Weights
    logits: torch.Tensor


def expect(name: str, folder: Path) -> Expected:
    theirs = save_model(name, folder / "hf")
    source = open_hf(folder / "hf")
    (folder / "native").mkdir()
    write_native(source, folder / "native")
    text = batch()
    logits = theirs(text["tokens"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), text["labels"].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), torch.inf)
    gradients = InMemory({key: p.grad for key, p in theirs.named_parameters()})
    bindings = bind(family_of(theirs.config.to_dict()).rules, source.model)
    checkpoint = find_checkpoint(folder / "native")
    mapped = to_ours(gradients, bindings, source.model)
    return Expected(source.model, checkpoint, loss.item(), norm, mapped, logits.detach())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Expected]:
    return {name: expect(name, tmp_path_factory.mktemp(name.replace(" ", "_"))) for name in MODELS}


@pytest.fixture(scope="module", params=sweep(LAYOUTS, {"TP2 x PP2"}))
def found(request: pytest.FixtureRequest, pool: Pool, expected: dict[str, Expected]) -> dict[str, list[Step]]:
    """Of every model, what each rank of a layout has found."""
    layout = LAYOUTS[request.param]
    jobs = [(model.model, model.checkpoint) for model in expected.values()]
    ranks = pool.run(steps, 4 if layout else 1, jobs, layout)
    return dict(zip(expected, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_transformers(
    name: str, expected: dict[str, Expected], found: dict[str, list[Step]]
) -> None:
    want = expected[name]
    gradients = {}
    for loss, gradients_of_rank in found[name]:
        assert loss == pytest.approx(want.loss, abs=1e-5)
        for key, gradient in gradients_of_rank.items():
            source = EMBEDDING if want.model.tied and key == HEAD else key
            whole = want.gradients.read_rows(source, 0, want.gradients.shapes[source][0])
            assert (gradient - whole).abs().max() <= 1e-5, key
            gradients[source] = gradient
    assert gradients.keys() == want.gradients.shapes.keys()
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(norm, want.norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, expected: dict[str, Expected]) -> None:
    with torch.no_grad():
        logits = load_decoder(open_native(expected[name].checkpoint))(batch()["tokens"])
    torch.testing.assert_close(logits, expected[name].logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_do_not_see_each_other(name: str, expected: dict[str, Expected]) -> None:
    """Two documents in one sequence get the logits that each gets alone, whatever tells them their positions."""
    decoder = load_decoder(open_native(expected[name].checkpoint))
    first, second = batch()["tokens"][:1, :9], batch()["tokens"][1:2, :15]
    ids = torch.cat([first, second], dim=1)
    documents = torch.cat([torch.zeros(1, 9), torch.ones(1, 15)], dim=1).long()
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    with torch.no_grad():
        packed = decoder(ids, document_ids=documents, position_ids=positions)
        alone = torch.cat([decoder(first), decoder(second)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)
