"""What the environment says of a launch, and how ranks meet: refusals in one line, and who is missing."""

import datetime
import socket

import pytest
import torch.distributed as dist

from megatron_ext.errors import RequestError
from megatron_ext.launch import Launch, read_launch, refuse_ranks
from megatron_ext.rendezvous import meet
from tests.distributed import Pool

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},  # exported for a launch to come
        {"SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_alone(environment: dict[str, str]) -> None:
    assert read_launch(environment) is None
    refuse_ranks(environment)


def test_tools_in_a_batch_script_of_several_tasks() -> None:
    refuse_ranks(SLURM)
    for task in ({"SLURM_PROCID": "1"}, {"SLURM_STEP_NUM_TASKS": "2"}):
        with pytest.raises(RequestError, match="Slurm has started 2 processes"):
            refuse_ranks(SLURM | task)


def test_torchrun_under_slurm() -> None:
    whole = WHOLE | SLURM | {"LOCAL_WORLD_SIZE": "2"}
    assert read_launch(whole) == Launch(rank=1, local_rank=1, world_size=2, host="node0", port=29500)
    with pytest.raises(RequestError, match="this is RANK 1 of WORLD_SIZE 2: start it without torchrun"):
        refuse_ranks(whole)
    refuse_ranks(WHOLE | {"RANK": "0", "WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({name: None}, f"but no {name}") for name in WHOLE),
        *((dict.fromkeys(WHOLE) | {name: "1"}, f"^{name} in the environment") for name in list(WHOLE)[:3]),
        ({"RANK": ""}, "but no RANK"),
        ({"RANK": "2"}, "RANK 2: .* below WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK -1: "),
        ({"RANK": "one"}, "RANK one: "),
        ({"RANK": "²"}, "RANK ²: "),
        ({"LOCAL_RANK": "0x1"}, "LOCAL_RANK 0x1: "),
        ({"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1: .* below LOCAL_WORLD_SIZE 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE 3: "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: "),
        ({"WORLD_SIZE": "1.0"}, "WORLD_SIZE 1.0: "),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT 65536: "),
        ({"MASTER_PORT": "http"}, "MASTER_PORT http: "),
        (dict.fromkeys(WHOLE) | SLURM, "Slurm has started 2 processes .*SLURM_PROCID 0"),
        (dict.fromkeys(WHOLE) | {"PMI_SIZE": "4", "PMI_RANK": "3"}, "MPI has started 4 processes"),
    ],
)
def test_half_an_environment(changes: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (WHOLE | changes).items() if value is not None}
    with pytest.raises(RequestError, match=message):
        read_launch(environment)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def try_to_meet(world_size: int, port: int, ranks: list[int], seconds: float) -> str:
    """On a process of the pool, which is rank ranks[n] of a world of its own."""
    rank = ranks[dist.get_rank()]
    try:
        store = meet(Launch(rank, rank, world_size, "127.0.0.1", port), datetime.timedelta(seconds=seconds))
        dist.barrier()  # it ends with rank 0's
        del store
    except RequestError as error:
        if "already" in str(error):
            dist.barrier()
        return str(error)
    return "met"


@pytest.mark.parametrize(
    "world_size, ranks, seconds, expected",
    [
        (2, [0, 1], 60, ["met", "met"]),
        (4, [0, 2], 5, ["of WORLD_SIZE 4 ranks these did not come within 0.0833 minutes: 1, 3"] * 2),
        (3, [1], 1, ["rank 1 reaches nobody there within 0.0167 minutes"]),
    ],
)
def test_who_is_missing(pool: Pool, world_size: int, ranks: list[int], seconds: float, expected: list[str]) -> None:
    said = pool.run(try_to_meet, len(ranks), world_size, free_port(), ranks, seconds)
    assert all(part in line for part, line in zip(expected, said, strict=True)), said


def test_a_port_in_use_and_a_rank_that_is_there_twice(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        (said,) = pool.run(try_to_meet, 1, 2, taken.getsockname()[1], [0], 5)
    assert "the port is in use on this host" in said
    said = sorted(pool.run(try_to_meet, 3, 2, free_port(), [0, 1, 1], 60))
    assert said[1:] == ["met", "met"]
    assert "rank 1 is there already" in said[0]
    monkeypatch.setattr("megatron_ext.rendezvous._RESOLVE_SECONDS", 0.0)
    with pytest.raises(RequestError, match=r"MASTER_ADDR no\.such\.host\.invalid: no host of this name"):
        meet(Launch(0, 0, 2, "no.such.host.invalid", 29500), datetime.timedelta(seconds=5))
