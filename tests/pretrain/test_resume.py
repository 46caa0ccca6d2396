"""A run that is interrupted and continued, here or on another layout, is the run that never stopped."""

import dataclasses
import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from megatron_ext.checkpoint import CheckpointWriter, Manifest, find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.load import mesh_sizes
from megatron_ext.checkpoint.save import publish
from megatron_ext.checkpoint.state import checkpoint_name_of
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.mesh import build_grid
from tests.distributed import Pool, RankError
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.pretrain.support import assert_equal, curve, metrics, start, stored, train
from tests.pretrain.support import command as command_of
from tests.pretrain.test_data import write_corpus
from tests.slow import sweep

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
NEW_ROWS = {"train_only": "new-rows", "train_output_embeddings": True, "base_vocab_size": 61}
LORA = {"train_only": "lora", "lora_target_modules": ["k_proj", "o_proj"]}
ITERS = 4
Tensors = dict[str, torch.Tensor]
Named = list[tuple[str, torch.Tensor]]


def command(**flags: Any) -> list[str]:
    return command_of(**{"train_iters": ITERS} | flags)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c")


def final(save: Path) -> Tensors:
    return stored(find_checkpoint(save))


def trained(tensors: Tensors) -> Tensors:
    """Without the random states: those of another layout, or of another way to start a process."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


# The same layout: bitwise


def interrupted(pool: Pool, ranks: int, folder: Path, **flags: Any) -> None:
    """All iterations in two parts, `folder`/parts, beside all at once, `folder`/whole."""
    for name, more in (("whole", {}), ("parts", {"exit_interval": ITERS // 2}), ("parts", {"load": folder / "parts"})):
        pool.run(train, ranks, command(save=folder / name, metrics=folder / f"{name}.jsonl", **flags, **more))


@pytest.mark.parametrize(
    "ranks, flags",
    [
        pytest.param(2, {"zero_stage": 2}, id="DP2 ZeRO-2", marks=pytest.mark.slow),
        pytest.param(4, {TP: 2, PP: 2, "sequence_parallel": True}, id="TP2 SP PP2", marks=pytest.mark.slow),
        pytest.param(4, {PP: 2, "pipeline_schedule": "zbv", "zero_stage": 3}, id="PP2 zbv DP2 ZeRO-3"),
        pytest.param(4, {TP: 2, "zero_stage": 3} | NEW_ROWS, id="TP2 DP2 ZeRO-3, new rows", marks=pytest.mark.slow),
        pytest.param(2, {TP: 2, "lora_dropout": 0.2} | LORA, id="TP2, LoRA with dropout", marks=pytest.mark.slow),
        pytest.param(
            1, {"fp16": True, "initial_loss_scale": 2**20, "loss_scale_window": 4}, id="fp16", marks=pytest.mark.slow
        ),
    ],
)
def test_same_layout_is_bitwise(pool: Pool, corpus: str, tmp_path: Path, ranks: int, flags: dict[str, Any]) -> None:
    interrupted(pool, ranks, tmp_path, **flags | {"data_path": corpus})
    assert curve(tmp_path / "parts.jsonl") == curve(tmp_path / "whole.jsonl")
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
    assert sorted(os.listdir(tmp_path / "parts")) == ["iter_0000002", "iter_0000004", "latest", "run.yaml"]


@pytest.mark.slow
def test_a_real_process_is_bitwise_too(pool: Pool, corpus: str, tmp_path: Path) -> None:
    pool.run(train, 1, command(data_path=corpus, save=tmp_path / "whole", metrics=tmp_path / "whole.jsonl"))
    flags = {"data_path": corpus, "save": tmp_path / "parts", "metrics": tmp_path / "parts.jsonl"}
    pool.run(train, 1, command(**flags, exit_interval=ITERS // 2))
    process = start(command(**flags, load=tmp_path / "parts"))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing from iteration 2" in output
    assert [record["consumed_samples"] for record in metrics(tmp_path / "parts.jsonl")] == [8, 16, 24, 32]
    assert curve(tmp_path / "parts.jsonl") == curve(tmp_path / "whole.jsonl")
    assert_equal(trained(final(tmp_path / "parts")), trained(final(tmp_path / "whole")))


# Another layout


MOVES: dict[str, tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]], dict[str, Any]]] = {
    "TP2 PP2 to DP2 ZeRO-3": ((4, {TP: 2, PP: 2}), (2, {"zero_stage": 3}), {}),
    "one process to TP2 PP2 DP2 ZeRO-2": (
        (1, {}),
        (8, {TP: 2, PP: 2, "zero_stage": 2, "sequence_parallel": True}),
        {},
    ),
    "TP2 DP2 ZeRO-2 to PP2 zbv, new rows": (
        (4, {TP: 2, "zero_stage": 2}),
        (2, {PP: 2, "pipeline_schedule": "zbv"}),
        NEW_ROWS,
    ),
    "PP2 DP2 ZeRO-3 to TP2, LoRA": ((4, {PP: 2, "zero_stage": 3}), (2, {TP: 2}), {"lora_dropout": 0} | LORA),
}


@pytest.mark.parametrize("name", sweep(MOVES, {"TP2 PP2 to DP2 ZeRO-3"}))
def test_another_layout_continues_the_curve(pool: Pool, corpus: str, tmp_path: Path, name: str) -> None:
    first, second, only = MOVES[name]
    flags: dict[str, Any] = {"data_path": corpus, "params_dtype": "float64"} | only
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(train, 1, command(**flags, save=whole, metrics=tmp_path / "whole.jsonl"))
    flags |= {"save": parts, "metrics": tmp_path / "parts.jsonl"}
    pool.run(train, first[0], command(**flags, **first[1], exit_interval=ITERS // 2))
    pool.run(train, second[0], command(**flags, **second[1], load=parts))
    for found, expected in zip(curve(tmp_path / "parts.jsonl"), curve(tmp_path / "whole.jsonl"), strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(trained(final(parts)), trained(final(whole)), rtol=0, atol=1e-9)


def whole(engine: Engine) -> Named:
    """This rank's weights and moments, whole, under their checkpoint names. Collective."""
    tensors = [("optimizer.steps", engine.optimizer.step_count), ("loss_scaler", engine.loss_scaler.state)]
    for name, param in engine.parameters.items():
        moments = {f"optimizer.{moment}": value for moment, value in engine.optimizer.state(name).items()}
        for kind, value in {"model": param.detach(), **moments}.items():
            assert isinstance(value, DTensor)
            tensors.append((f"{kind}.{checkpoint_name_of(engine, name)}", value.full_tensor()))
    return tensors


def agreed(ranks: list[Named]) -> Tensors:
    """What all ranks hold together; of tensors that several hold, tied copies among them, all must be equal."""
    tensors: Tensors = {}
    for name, tensor in itertools.chain(*ranks):
        assert torch.equal(tensors.setdefault(name, tensor), tensor), name
    return tensors


def save_after_three_steps(config: EngineConfig, root: Path) -> Named:
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    for step in range(3):
        engine.train_step(share(global_batch(config, step), grid, config.batch.micro_batch_size), LR)
    CheckpointWriter(root, engine).save(
        Manifest(3, 48, 768, dataclasses.asdict(config.model), mesh_sizes(grid), True), {}
    )
    return whole(engine)


def load(config: EngineConfig, root: Path) -> Named:
    engine = Engine(config, build_grid(config.parallel, torch.device("cpu")))
    load_checkpoint(engine, find_checkpoint(root))
    return whole(engine)


MODEL = {"vocab_size": 97, "num_query_groups": 2, "micro_batch_size": 1}
TIED = {"untie_embeddings_and_output_weights": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP4": (4, {TP: 4}),
    "PP2 DP2 ZeRO-3": (4, {PP: 2, "zero_stage": 3}),
    "DP8 ZeRO-2": (8, {"zero_stage": 2}),
    "TP2 PP4": (8, {TP: 2, PP: 4}),
    "PP2 zbv DP2 ZeRO-3": (4, {PP: 2, "pipeline_schedule": "zbv", "zero_stage": 3}),
    "PP2 zbv DP4 in shards of 2 ZeRO-3": (
        8,
        {PP: 2, "pipeline_schedule": "zbv", "zero_shard_size": 2, "zero_stage": 3},
    ),
}
SAVED = {False: (8, {TP: 2, PP: 2, "zero_stage": 1}), True: (4, {PP: 2, "zero_stage": 1})}  # by whether it is tied


# Copies of a tied matrix lie on two ranks, or on two stages of one.
BY_DEFAULT = {(False, "PP2 DP2 ZeRO-3"), (True, "TP4"), (True, "PP2 zbv DP2 ZeRO-3")}
Saved = Callable[[bool], tuple[Path, dict[str, Any], Tensors]]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """By whether its embeddings are tied: a checkpoint, the model's options, and what its ranks held."""

    @functools.cache
    def write(tied: bool) -> tuple[Path, dict[str, Any], Tensors]:
        root = tmp_path_factory.mktemp("saved")
        options = MODEL | (TIED if tied else {})
        ranks, layout = SAVED[tied]
        return root, options, agreed(pool.run(save_after_three_steps, ranks, tiny(**options, **layout), root))

    return write


@pytest.mark.parametrize("tied, name", sweep(itertools.product((False, True), LAYOUTS), BY_DEFAULT))
def test_resharding_is_bitwise(pool: Pool, saved: Saved, tied: bool, name: str) -> None:
    root, options, held = saved(tied)
    ranks, layout = LAYOUTS[name]
    assert_equal(agreed(pool.run(load, ranks, tiny(**options, **layout), root)), held)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_stored_is_what_was_held(saved: Saved, tied: bool) -> None:
    root, options, held = saved(tied)
    assert_equal(trained(final(root)), held)
    parameters = {key.removeprefix("model.") for key in held if key.startswith("model.")}
    assert {"embed_tokens.weight", "layers.3.mlp.down_proj.weight", "norm.weight"} <= parameters
    assert ("lm_head.weight" in parameters) == (TIED.items() - options.items() != set())
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {key.removeprefix(f"optimizer.{moment}.") for key in held if f".{moment}." in key} == parameters
        assert all(held[f"optimizer.{moment}.{name}"].any() for name in parameters)
    assert held["optimizer.steps"] == 3
    assert held["model.embed_tokens.weight"].shape == (97, 32)  # nothing padded


# In the background, and killed


def train_with_a_slow_disk(arguments: list[str]) -> None:
    """Every checkpoint is written only long after its step."""
    original = dcp.FileSystemWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    dcp.FileSystemWriter.write_data = slow  # type: ignore[assignment, method-assign]
    train(arguments)


def test_background_saves_equal_those_that_training_waited_for(pool: Pool, corpus: str, tmp_path: Path) -> None:
    flags = {"data_path": corpus, "save_interval": 2, "train_iters": 5}
    pool.run(train, 2, command(**flags, save=tmp_path / "sync", metrics=tmp_path / "sync.jsonl"))
    background = command(**flags, save=tmp_path / "async", metrics=tmp_path / "async.jsonl", async_save=True)
    pool.run(train_with_a_slow_disk, 2, background)
    assert curve(tmp_path / "async.jsonl") == curve(tmp_path / "sync.jsonl")
    names = ["iter_0000002", "iter_0000004", "iter_0000005"]
    for folder in ("sync", "async"):
        assert sorted(os.listdir(tmp_path / folder)) == [*names, "latest", "run.yaml"]
    for name in names:
        assert_equal(stored(tmp_path / "async" / name), stored(tmp_path / "sync" / name))


def train_until_killed(arguments: list[str]) -> None:
    """The first rank dies when its second checkpoint is written and not yet published."""

    def deadly(root: Path, manifest: Manifest) -> Path:
        if manifest.iteration == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(root, manifest)

    import megatron_ext.checkpoint.save

    megatron_ext.checkpoint.save.publish = deadly
    train(arguments)


def test_killed_while_saving(pool: Pool, corpus: str, tmp_path: Path) -> None:
    flags = {"data_path": corpus, "metrics": tmp_path / "parts.jsonl", "save": tmp_path / "parts", "train_iters": 6}
    pool.run(train, 2, command(**flags | {"metrics": tmp_path / "whole.jsonl", "save": tmp_path / "whole"}))
    with pytest.raises(RankError, match="died with exit code -9"):
        pool.run(train_until_killed, 2, command(**flags, save_interval=2))
    left = [".iter_0000004.tmp", ".lock", "iter_0000002", "latest", "run.yaml"]
    assert sorted(os.listdir(tmp_path / "parts")) == left
    assert len(metrics(tmp_path / "parts.jsonl")) == 4
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lm_lo')  # torn
    pool.run(train, 2, command(**flags, load=tmp_path / "parts"))
    assert sorted(os.listdir(tmp_path / "parts")) == ["iter_0000002", "iter_0000006", "latest", "run.yaml"]
    assert curve(tmp_path / "parts.jsonl") == curve(tmp_path / "whole.jsonl")
    assert_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))
