"""Our process grid as the "model parallel unit" that DeepSpeed asks about groups."""

import torch.distributed as dist

from megatron_ext.mesh import ProcessGrid


class ModelParallelUnit:
    """What DeepSpeed may know of the grid.

    Its model-parallel group is what the norm of the gradient, and so clipping, is summed over: pp x tp, or clipping
    would be by stage. Its model-parallel *rank* decides who counts a parameter that is not cut: the first rank of
    every tensor-parallel group, hence the tp rank.
    """

    def __init__(self, grid: ProcessGrid):
        self._grid = grid
        self._model_parallel = _group_over_pp_and_tp(grid)
        self._data_parallel = grid.mesh["dp_shard"].get_group()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model_parallel

    def get_model_parallel_world_size(self) -> int:
        return self._grid.size("pp") * self._grid.size("tp")

    def get_model_parallel_rank(self) -> int:
        return self._grid.rank("tp")

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._grid.mesh["tp"].get_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._grid.size("tp")

    def get_tensor_model_parallel_rank(self) -> int:
        return self._grid.rank("tp")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._grid.size("pp")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_parallel

    def get_data_parallel_world_size(self) -> int:
        return self._grid.dp_size

    def get_data_parallel_rank(self) -> int:
        return self._grid.dp_rank


def _group_over_pp_and_tp(grid: ProcessGrid) -> dist.ProcessGroup:
    """The group of this rank's data-parallel replica of the model. Collective over the world."""
    replicas = grid.mesh.mesh.movedim(0, 2).flatten(2).flatten(0, 1)  # [dp, pp x tp] global ranks
    mine, _ = dist.new_subgroups_by_enumeration(replicas.tolist())
    assert mine is not None
    return mine
