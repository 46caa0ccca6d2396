"""LoRA adapters leave with the weights: what transformers computes from an export is what was trained."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint, load_checkpoint, read_manifest
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import build_grid
from tests.distributed import Pool
from tests.megatron_ext.training import global_batch, share, tiny
from tests.tools.test_convert_checkpoint import convert

LORA: dict[str, Any] = {"train_only": "lora", "num_query_groups": 2}


def build(config: EngineConfig) -> Engine:
    return Engine(config, build_grid(config.parallel, torch.device("cpu")))


def train_and_save(config: EngineConfig, root: Path) -> float:
    """A few steps with adapters; the loss of a batch afterwards."""
    engine = build(config)
    batch = share(global_batch(config, 0), engine.grid, config.batch.micro_batch_size)
    for _ in range(5):
        engine.train_step(batch, 3e-2)
    assert config.adapters is not None
    manifest = Manifest(
        5,
        40,
        640,
        dataclasses.asdict(config.model),
        mesh_sizes(engine.grid),
        has_optimizer=True,
        trainable=dataclasses.asdict(config.trainable),
        lora=dataclasses.asdict(config.adapters),
    )
    CheckpointWriter(root, engine).save(manifest, {})
    return engine.evaluate([batch]).item()


def load_and_evaluate(config: EngineConfig, checkpoint: Path) -> float:
    engine = build(config)
    load_checkpoint(engine, checkpoint, weights_only=True)
    return engine.evaluate([share(global_batch(config, 0), engine.grid, config.batch.micro_batch_size)]).item()


def refusal(config: EngineConfig, checkpoint: Path) -> str:
    with pytest.raises(RequestError) as error:
        load_checkpoint(build(config), checkpoint)
    return str(error.value)


@pytest.fixture(scope="module")
def trained(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint of TP2 x PP2, and the loss of its model."""
    root = tmp_path_factory.mktemp("lora") / "checkpoints"
    config = tiny(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, micro_batch_size=4, **LORA)
    losses = pool.run(train_and_save, 4, config, root)
    return root, losses[0]


def test_transformers_computes_the_trained_model_from_the_export(trained: tuple[Path, float], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    root, loss = trained
    assert convert("--from", "native", "--to", "hf", "--input", root, "--output", tmp_path / "hf") == 0
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    batch = global_batch(tiny(**LORA), 0)
    logits = model(batch["tokens"]).logits
    assert F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item() == pytest.approx(loss, rel=1e-5)


def test_native_without_adapters_trains_on(pool: Pool, trained: tuple[Path, float], tmp_path: Path) -> None:
    root, loss = trained
    merged = tmp_path / "merged"
    assert convert("--from", "native", "--to", "native", "--input", root, "--output", merged) == 0
    checkpoint = find_checkpoint(merged)
    assert read_manifest(checkpoint).lora is None
    plain = tiny(num_query_groups=2)
    assert pool.run(load_and_evaluate, 1, plain, checkpoint)[0] == pytest.approx(loss, rel=1e-5)
    new_adapters = tiny(**LORA)  # they begin by changing nothing
    assert pool.run(load_and_evaluate, 1, new_adapters, checkpoint)[0] == pytest.approx(loss, rel=1e-5)
    assert convert("--from", "native", "--to", "native", "--input", merged, "--output", tmp_path / "again") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_query_groups": 2}, "it was trained with train_only lora, the run asks for None (--train-only)"),
        (LORA | {"lora_rank": 4}, "its adapters have lora_rank 8, the run asks for 4 (--lora-rank)"),
    ],
)
def test_a_run_of_another_kind_is_refused(
    pool: Pool, trained: tuple[Path, float], options: dict[str, Any], message: str
) -> None:
    (found,) = pool.run(refusal, 1, tiny(**options), find_checkpoint(trained[0]))
    assert message in found
