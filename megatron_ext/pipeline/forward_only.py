"""A pass without backward, the same for every schedule: stage after stage, microbatch after microbatch."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_ext.mesh import ProcessGrid
from megatron_ext.pipeline.layout import StageLayout


def forward_only(
    modules: dict[int, nn.Module],
    layout: StageLayout,
    microbatches: list[dict[str, torch.Tensor]],
    grid: ProcessGrid,
    room: Callable[[torch.device], torch.Tensor],
) -> list[torch.Tensor]:
    """Run every microbatch through this rank's stages, in order of their index.

    room(device): an uninitialised tensor for one microbatch's hidden states. Returns the last stage's output for
    each microbatch, nothing where the last stage is elsewhere. Every rank of the pipeline calls it.
    """
    group = grid.mesh["pp"].get_group()
    peer = [dist.get_global_rank(group, rank) for rank in layout.rank_of]
    me = grid.rank("pp")
    handed_over: list[torch.Tensor] = []
    for index, module in modules.items():
        inputs, handed_over = handed_over, []
        sends = []
        for i, batch in enumerate(microbatches):
            extra = {name: tensor for name, tensor in batch.items() if name != "tokens"}
            if index == 0:
                x = batch["tokens"]
            elif layout.rank_of[index - 1] == me:
                x = inputs[i]
            else:
                x = room(grid.device)
                dist.recv(x, peer[index - 1], group=group)
            y = module(x, **extra)
            if index + 1 == len(layout.stages) or layout.rank_of[index + 1] == me:
                handed_over.append(y)
            else:
                send = dist.P2POp(dist.isend, y.contiguous(), peer[index + 1], group)
                sends += dist.batch_isend_irecv([send])
        for work in sends:
            work.wait()
    return handed_over if len(layout.stages) - 1 in modules else []
