"""The process grid: who holds which part of the model and of the batch.

Ranks are numbered with tensor parallelism fastest, then data parallelism, then pipeline parallelism, so that
the ranks that talk most share a node (Narayanan et al., arXiv 2104.04473, section 3):

    rank = ((pp * dp_replicate + dp_replicate_rank) * dp_shard + dp_shard_rank) * tp + tp_rank
"""

import dataclasses
import datetime
import functools
import os

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_ext.errors import RequestError
from megatron_ext.launch import read_launch
from megatron_ext.option import flag_of, option
from megatron_ext.rendezvous import meet

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
_LONGEST_TIMEOUT = 365 * 24 * 60  # minutes; torch counts in smaller units, which overflow


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the world is divided. The data-parallel degree is what the other two leave."""

    tensor_model_parallel_size: int = option(1, "ranks that share every layer (TP)")
    pipeline_model_parallel_size: int = option(1, "ranks that share the stack of layers (PP)")
    sequence_parallel: bool = option(False, "shard the activations between TP regions along the sequence")
    zero_shard_size: int | None = option(
        None, "ranks over which ZeRO shards; the rest of the data-parallel ranks replicate (default: all of them)"
    )
    distributed_timeout_minutes: int = option(
        30, "a message or collective of any process group that waits longer ends the run"
    )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel degree at `world_size` ranks. Raises RequestError where the degrees do not fit."""
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{flag_of(name)} {getattr(self, name)}: must be at least 1")
        if not 1 <= self.distributed_timeout_minutes <= _LONGEST_TIMEOUT:
            raise RequestError(
                f"--distributed-timeout-minutes {self.distributed_timeout_minutes}: must be from 1 to "
                f"{_LONGEST_TIMEOUT} (a year)"
            )
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if world_size % self.model_parallel_size:
            raise RequestError(
                f"world size {world_size} is not a multiple of TP x PP = {tp} x {pp} = {tp * pp} "
                f"(--tensor-model-parallel-size, --pipeline-model-parallel-size): start "
                f"{-(-world_size // (tp * pp)) * tp * pp} ranks (torchrun --nproc-per-node) or change the degrees"
            )
        dp = world_size // self.model_parallel_size
        if self.zero_shard_size is not None and (self.zero_shard_size < 1 or dp % self.zero_shard_size):
            raise RequestError(
                f"--zero-shard-size {self.zero_shard_size} does not divide the data-parallel size {dp} "
                f"(world {world_size} / TP {tp} / PP {pp}): use one of "
                f"{', '.join(str(n) for n in range(1, dp + 1) if dp % n == 0)}"
            )
        if self.sequence_parallel and tp == 1:
            raise RequestError("--sequence-parallel needs --tensor-model-parallel-size of at least 2")
        return dp


@dataclasses.dataclass(frozen=True)
class ProcessGrid:
    """One rank's place in the grid, and the device mesh with the process groups of every axis."""

    mesh: DeviceMesh
    device: torch.device

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Size of every axis and this rank's place on it. (A sub-mesh is made anew whenever it is asked for.)"""
        return {axis: (self.mesh[axis].size(), self.mesh[axis].get_local_rank()) for axis in AXES}

    def size(self, axis: str) -> int:
        return self._places[axis][0]

    def rank(self, axis: str) -> int:
        return self._places[axis][1]

    @property
    def world_size(self) -> int:
        return self.mesh.size()

    @property
    def dp_size(self) -> int:
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def random_stream(self) -> int:
        """Which random numbers a rank draws: those of a tensor-parallel group draw the same, for they drop alike."""
        return self.mesh.get_rank() // self.size("tp")

    @property
    def describe(self) -> str:
        """'PP 2 x DP 2 x TP 2', with the two data-parallel axes named where both are in use."""
        dp = str(self.dp_size)
        if self.size("dp_replicate") > 1 and self.size("dp_shard") > 1:
            dp += f" ({self.size('dp_replicate')} replicas of {self.size('dp_shard')} shards)"
        return f"PP {self.size('pp')} x DP {dp} x TP {self.size('tp')}"


def local_device() -> torch.device:
    """This rank's device: its own GPU where there are any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_distributed(timeout_minutes: int = 30) -> torch.device:
    """Join the world that torchrun started, or make one of a single process.

    NCCL carries CUDA tensors and gloo CPU tensors. Returns this rank's device. Raises RequestError where the
    environment is not that of a launcher, or the ranks do not find each other.

    No device is bound to the world (`device_id=`): with one, NCCL carries every message of a group on one communicator
    and one stream in the order of issue (github.com/pytorch/pytorch/pull/154132), and a stage that waits for one
    neighbour holds up what is ready for the other. Without, a lone send or receive has the communicator of its two
    ranks, which is what torch's pipeline schedules count on when they issue messages one by one wherever they can
    (`_batch_p2p`, pull/175712); sends and receives issued together have the group's. The price is that communicators
    are made at their first use, for which all of their ranks must come: `build_grid` and `Pipeline` see to that.
    """
    launch = read_launch()
    device = local_device()
    if device.type == "cuda":
        local_ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device.index + 1)
        if local_ranks > torch.cuda.device_count():
            raise RequestError(
                f"{local_ranks} ranks were started on a node of which {torch.cuda.device_count()} GPUs are visible: "
                f"use torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world = (0, 1) if launch is None else (launch.rank, launch.world_size)
    store = dist.HashStore() if launch is None else meet(launch, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return device


def build_grid(config: ParallelConfig, device: torch.device) -> ProcessGrid:
    """The grid over all ranks of the default process group. Collective: every rank calls it."""
    _limit_waiting(datetime.timedelta(minutes=config.distributed_timeout_minutes))
    dp = config.data_parallel_size(dist.get_world_size())
    shard = config.zero_shard_size or dp
    shape = (config.pipeline_model_parallel_size, dp // shard, shard, config.tensor_model_parallel_size)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    _meet(mesh, device)
    return ProcessGrid(mesh, device)


def _limit_waiting(timeout: datetime.timedelta) -> None:
    """Let every process group that is made from now on give up after `timeout`, as the world does.

    Most are not made by us (by DeviceMesh, FSDP, DeepSpeed), take no timeout, and would have 10 minutes (NCCL) or 30
    (gloo): these defaults of torch 2.11 to 2.13 are what reaches them all.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _meet(mesh: DeviceMesh, device: torch.device) -> None:
    """Make the communicators of the world and of every axis, in the same order on all ranks.

    NCCL makes one at the first collective of a group, which all its ranks must join; but the first use may be one that
    only some do, as when the ends of the pipeline exchange the gradient of a tied embedding.
    """
    groups = [None, *(mesh[axis].get_group() for axis in AXES if mesh[axis].size() > 1)]
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
