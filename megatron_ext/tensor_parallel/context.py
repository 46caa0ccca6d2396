"""What a layer needs to know of the tensor-parallel group it belongs to."""

import dataclasses

import torch.distributed as dist

from megatron_ext.mesh import ProcessGrid


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group as one rank sees it. The default is a group of one, without collectives."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @classmethod
    def from_grid(cls, grid: ProcessGrid, sequence_parallel: bool) -> "TensorParallel":
        size = grid.size("tp")
        return cls(size, grid.rank("tp"), grid.mesh["tp"].get_group(), sequence_parallel and size > 1)
