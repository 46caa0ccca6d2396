"""The runs that others are held against."""

from typing import Any

import pytest

from megatron_ext.engine import EngineConfig
from tests.distributed import Pool
from tests.megatron_ext.layouts import Reference
from tests.megatron_ext.training import Run, one_process, train


@pytest.fixture(scope="module")
def reference(pool: Pool) -> Reference:
    """The run of one process, computed once for each model, precision and kind of batch."""
    runs: dict[Any, Run] = {}

    def run(config: EngineConfig, documents: bool = False) -> Run:
        key = (one_process(config), documents)
        if key not in runs:
            (runs[key],) = pool.run(train, 1, *key)
        return runs[key]

    return run
