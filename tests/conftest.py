"""Fixtures that every room's tests share."""

import pytest

from tests.distributed import Pool


@pytest.fixture(scope="session")
def pool() -> Pool:
    """Ranks on demand: `pool.run(fn, world_size, *args)`. See tests/distributed.py."""
    return Pool.start()
