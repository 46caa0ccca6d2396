"""The harness tells which rank failed and why, and never hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Pool, RankError


def total(x: float) -> tuple[float, str]:
    t = torch.tensor(x + dist.get_rank())
    dist.all_reduce(t)
    return t.item(), os.environ["RANK"]


def fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 1 and how == "raise":
        raise ValueError("no bread")
    if dist.get_rank() == 1 and how == "die":
        os._exit(7)
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_results_come_in_the_order_of_ranks(pool: Pool) -> None:
    assert pool.run(total, 3, 1.0) == [(6.0, "0"), (6.0, "1"), (6.0, "2")]


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", r"rank 1 of 2: (?s:.*)no bread"),
        ("die", "rank 1 of 2: died with exit code 7"),
        ("hang", r"rank 0 of 2: (?s:.*)dist.barrier(?s:.*)rank 1 of 2: did not finish in time"),
    ],
)
def test_failures_are_told(pool: Pool, how: str, message: str) -> None:
    with pytest.raises(RankError, match=message):
        pool.run(fail_on_rank_1, 2, how, timeout=3 if how == "hang" else 60)
    assert len(pool.run(total, 2, 0.0)) == 2
