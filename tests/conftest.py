"""Fixtures that every room's tests share."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.distributed import Pool


@pytest.fixture(scope="session")
def pool() -> "Pool":
    """Ranks on demand: `pool.run(fn, world_size, *args)`. See tests/distributed.py."""
    from tests.distributed import Pool  # not above: the process that only hands out tests would import torch too

    return Pool.start()
