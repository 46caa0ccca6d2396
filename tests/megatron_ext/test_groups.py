"""Process groups: the same ones in the same order on every rank, and none that waits longer than it was told to."""

import datetime
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_ext.checkpoint import CheckpointWriter
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ParallelConfig, build_grid
from tests.distributed import Pool
from tests.megatron_ext.training import LR, global_batch, share, tiny

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def groups_of_a_run(config: EngineConfig, folder: Path) -> tuple[list[list[int]], set[datetime.timedelta]]:
    """The ranks of each group that this rank took part in making, and how long those that it is in wait."""
    before = set(distributed_c10d._world.pg_map)
    make = distributed_c10d._new_group_with_tag
    made: list[list[int]] = []

    def note(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        made.append(list(range(dist.get_world_size()) if ranks is None else ranks))
        return make(ranks, *args, **kwargs)

    with mock.patch.object(distributed_c10d, "_new_group_with_tag", note):
        grid = build_grid(config.parallel, torch.device("cpu"))
        engine = Engine(config, grid)
        engine.train_step(share(global_batch(config, 0), grid, config.batch.micro_batch_size), LR)
        CheckpointWriter(folder, engine)
    mine = [group for group in distributed_c10d._world.pg_map if group not in before]
    backends: list[Any] = [group._get_backend(torch.device("cpu")) for group in mine]
    return made, {backend.options._timeout for backend in backends}


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 3},  # every axis
        pytest.param({"zero_stage": 2, "zero_shard_size": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"tensor_model_parallel_size": 2, "zero_stage": 3, "zero_engine": "deepspeed"},
            marks=[needs_deepspeed, pytest.mark.slow],
        ),
    ],
)
def test_ranks_make_the_same_groups_with_the_timeout(pool: Pool, tmp_path: Path, options: dict[str, Any]) -> None:
    config = tiny(distributed_timeout_minutes=7, micro_batch_size=1, **options)
    runs = pool.run(groups_of_a_run, 8, config, tmp_path)
    assert all(made == runs[0][0] for made, _ in runs)
    assert len(runs[0][0]) > 2
    assert all(timeouts == {datetime.timedelta(minutes=7)} for _, timeouts in runs)


@pytest.mark.parametrize("minutes", [0, -5, 10**9])
def test_timeouts_that_are_none_are_refused(minutes: int) -> None:
    with pytest.raises(RequestError, match=f"--distributed-timeout-minutes {minutes}: must be from 1 to 525600"):
        ParallelConfig(distributed_timeout_minutes=minutes).data_parallel_size(1)
