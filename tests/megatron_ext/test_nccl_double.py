"""The double of NCCL's point-to-point rules lets pass what NCCL does, and stops at what would stand still there."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Pool, RankError
from tests.megatron_ext.nccl_double import nccl_rules


def both_send_first() -> None:
    other = 1 - dist.get_rank()
    dist.send(torch.zeros(4), other)
    dist.recv(torch.zeros(4), other)


def both_send_first_in_the_background() -> None:
    other = 1 - dist.get_rank()
    dist.isend(torch.zeros(4), other)
    dist.irecv(torch.zeros(4), other).wait()


def batch_meets_a_lone_receive() -> None:
    dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == 0:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.zeros(4), 1)])[0].wait()
    else:
        dist.recv(torch.zeros(4), 0)


def batch_comes_first() -> None:
    dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.zeros(4), 1 - dist.get_rank())])


def nobody_receives() -> None:
    if dist.get_rank() == 0:
        dist.isend(torch.zeros(4), 1)


def sizes_differ() -> None:
    if dist.get_rank() == 0:
        dist.send(torch.zeros(4), 1)
    else:
        dist.recv(torch.zeros(5), 0)


def one_waits_for_a_third() -> None:
    """Legal where every pair of ranks has a communicator of its own: 1 hears from 0, though 0 began to wait for 2."""
    rank, ready = dist.get_rank(), torch.zeros(1)
    for pair in ((0, 1), (1, 2), (0, 2)):  # communicators are made in the same order everywhere
        if rank in pair:
            (dist.send if rank == pair[0] else dist.recv)(ready, pair[pair[0] == rank])
    if rank == 0:
        awaited = dist.irecv(ready, 2)
        dist.send(ready, 1)
        awaited.wait()
    elif rank == 1:
        dist.recv(ready, 0)
        dist.send(ready, 2)
    else:
        dist.recv(ready, 1)
        dist.send(ready, 0)


def pairs_are_made_in_a_circle() -> None:
    rank = dist.get_rank()
    receive = dist.irecv(torch.zeros(1), (rank - 1) % 3)
    dist.isend(torch.zeros(1), (rank + 1) % 3).wait()
    receive.wait()


def chunk_after_chunk() -> None:
    """Evaluation of an interleaved pipeline that runs every microbatch through a rank's first stage, then its next."""
    rank, sends = dist.get_rank(), []
    dist.all_reduce(torch.zeros(1))
    for stage in (rank, rank + 2):
        for _ in range(4):
            if stage > 0:
                dist.recv(torch.zeros(8), 1 - rank)
            if stage < 3:
                sends += dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.zeros(8), 1 - rank)])
        for work in sends:
            work.wait()


def exchange() -> list[float]:
    """Legal in any case, with every kind of operation."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    mine, theirs = torch.arange(3.0) + 10 * rank, torch.zeros(3)
    dist.all_reduce(torch.zeros(1))
    order = (dist.isend, dist.irecv) if rank == 0 else (dist.irecv, dist.isend)
    for work in [op(mine if op is dist.isend else theirs, other) for op in order]:
        work.wait()
    both, two = torch.zeros(3), torch.zeros(2, dtype=torch.int64)
    ops = [dist.P2POp(dist.isend, theirs + 1, other), dist.P2POp(dist.irecv, both, other)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    (dist.send if rank == 0 else dist.recv)(torch.tensor([7, 8]) if rank == 0 else two, other)
    return [*theirs.tolist(), *both.tolist(), *two.tolist()]


def under_the_rules(program: Callable[[], object], eager: bool) -> object:
    with nccl_rules(eager):
        return program()


@pytest.mark.parametrize(
    "program, eager, message",
    [
        (both_send_first, True, "rank 0 waits for send to rank 1 of 16 bytes on .*; rank 1 waits for send to rank 0"),
        (both_send_first, False, "rank 0 waits for send to rank 1 of 16 bytes on .* ranks 0 and 1; rank 1 waits for"),
        (both_send_first_in_the_background, False, "recv from rank 1 of 16 bytes behind send to rank 1 of 16 bytes"),
        (batch_meets_a_lone_receive, False, "rank 0 waits for send to rank 1 .*; rank 1 waits for connect with rank 0"),
        (batch_comes_first, False, "its first use is a batch"),
        (nobody_receives, True, "rank 0 waits for send to rank 1 of 16 bytes on .*; rank 1 has left"),
        (sizes_differ, True, "of 16 bytes meets rank 1: recv from rank 0 of 20 bytes|of 20 bytes meets rank 0"),
        (one_waits_for_a_third, True, "rank 0 waits for send to rank 1 of 4 bytes behind recv from rank 2"),
        (pairs_are_made_in_a_circle, False, "rank 0 waits for connect with rank 2"),
        (chunk_after_chunk, True, "rank 0 waits for send to rank 1 of 32 bytes"),
        (chunk_after_chunk, False, "rank 0 waits for send to rank 1 of 32 bytes"),
    ],
)
def test_what_would_stand_still_is_told(pool: Pool, program: Callable[[], None], eager: bool, message: str) -> None:
    ranks = 3 if program in (one_waits_for_a_third, pairs_are_made_in_a_circle) else 2
    with pytest.raises(RankError, match=message):
        pool.run(under_the_rules, ranks, program, eager, timeout=60)


def test_what_is_legal_passes(pool: Pool) -> None:
    expected = [[10.0, 11.0, 12.0, 1.0, 2.0, 3.0, 0, 0], [0.0, 1.0, 2.0, 11.0, 12.0, 13.0, 7, 8]]
    for eager in (False, True):
        assert pool.run(under_the_rules, 2, exchange, eager) == expected
    pool.run(under_the_rules, 3, one_waits_for_a_third, False)
    pool.run(under_the_rules, 2, batch_meets_a_lone_receive, True)
