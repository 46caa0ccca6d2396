"""How this process was started: by torchrun or whatever sets its variables, or alone.

What would not work is refused: half of the variables, a scheduler's tasks that know nothing of each other. Imports no
torch: programs ask that need none.
"""

import dataclasses
import os
from collections.abc import Mapping

from megatron_ext.errors import RequestError

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOW = "start the ranks with torchrun, which sets them"
# launcher -> what counts its processes, first the most exact; what numbers them
_TASKS = {
    "Slurm": (("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_PROCID"),
    "Open MPI": (("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_RANK"),
    "MPI": (("PMI_SIZE", "MV2_COMM_WORLD_SIZE"), "PMI_RANK"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A rank's place among those that were started, and where they meet."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    port: int


def world_size_from_environment() -> int:
    """How many ranks were started: torchrun's WORLD_SIZE, or one. Raises RequestError where that is no number."""
    return _number(os.environ, "WORLD_SIZE", 1) if "WORLD_SIZE" in os.environ else 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What the environment says, None for a process that is alone.

    Raises:
        RequestError: it says half of it or contradicts itself, or a scheduler has started several processes without it.
    """
    given = [name for name in _VARIABLES if environment.get(name)]
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(given):  # an address alone is often there for a later launch
        refuse_tasks(environment)
        return None
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise RequestError(
            f"{', '.join(given)} in the environment, but no {', '.join(missing)}: {_HOW}, or unset them all for a "
            "single process"
        )
    world = _number(environment, "WORLD_SIZE", 1)
    launch = Launch(
        _number(environment, "RANK", 0, world, f"WORLD_SIZE {world}"),
        _number(environment, "LOCAL_RANK", 0, world, f"WORLD_SIZE {world}"),
        world,
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", 0, 65536, "65536"),
    )
    if environment.get("LOCAL_WORLD_SIZE"):
        local = _number(environment, "LOCAL_WORLD_SIZE", 1, world + 1, f"{world + 1} (WORLD_SIZE {world})")
        _number(environment, "LOCAL_RANK", 0, local, f"LOCAL_WORLD_SIZE {local}")
    if launch.port == 0:  # the ranks would wait for each other for ever
        raise RequestError("MASTER_PORT is 0: give torchrun a free --master-port, or start it with --standalone")
    return launch


def refuse_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RequestError where a scheduler has started several processes, each of which believes to be alone."""
    for launcher, (counts, number) in _TASKS.items():
        count = next((environment[name] for name in counts if environment.get(name)), "1")
        if environment.get(number) and count.isdecimal() and int(count) > 1:
            raise RequestError(
                f"{launcher} has started {count} processes (this is {number} {environment[number]}), and they know "
                "nothing of each other: start one torchrun on each node instead, as examples/slurm/pretrain.sbatch "
                f"does (srun --ntasks-per-node=1 torchrun ...); for a single process unset {number}"
            )


def refuse_ranks(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RequestError where a program that works alone was started several times at once."""
    if environment.get("RANK") and environment.get("WORLD_SIZE", "1") not in ("", "1"):
        raise RequestError(
            f"this program runs in a single process, and this is RANK {environment['RANK']} of WORLD_SIZE "
            f"{environment['WORLD_SIZE']}: start it without torchrun"
        )
    # what Slurm's batch script says of itself looks like the first task's, but for the step
    in_script = environment.get("SLURM_PROCID") == "0" and not environment.get("SLURM_STEP_NUM_TASKS")
    if not environment.get("RANK") and not in_script:
        refuse_tasks(environment)


def _number(environment: Mapping[str, str], name: str, least: int, end: int | None = None, limit: str = "") -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise RequestError(f"{name} {text}: the environment variable must be a whole number of at least {least}")
    if end is not None and int(text) >= end:
        raise RequestError(f"{name} {text}: the environment variable must be below {limit}; {_HOW}")
    return int(text)
