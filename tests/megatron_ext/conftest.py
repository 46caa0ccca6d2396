"""The runs that others are held against."""

import dataclasses
from typing import Any

import pytest

from megatron_ext.engine import EngineConfig
from tests.distributed import Pool
from tests.megatron_ext.layouts import Reference
from tests.megatron_ext.training import Run, one_process, train


@pytest.fixture(scope="module")
def reference(pool: Pool) -> Reference:
    """The run of one process, computed once for each model, precision and kind of batch.

    In float64 it sees the whole global batch as one microbatch; in float32, where the order of sums shows, the same
    microbatches.
    """
    runs: dict[Any, Run] = {}

    def run(config: EngineConfig, documents: bool = False) -> Run:
        alone = one_process(config)
        if config.precision.params_dtype == "float64":
            batch = dataclasses.replace(config.batch, micro_batch_size=config.batch.global_batch_size)
            alone = dataclasses.replace(alone, batch=batch)
        key = (alone, documents)
        if key not in runs:
            (runs[key],) = pool.run(train, 1, *key)
        return runs[key]

    return run
