"""A pass without backward, in the order of the schedule's own forward passes.

torch's schedules have an `eval`, which would do for some: those in a V fail in it (2.13: "can't steal_bwd_input if this
stage doesn't have backward"), all keep every microbatch's hidden states to the end, and going over from training and
back makes them negotiate anew, for which the host waits.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_ext.mesh import ProcessGrid
from megatron_ext.pipeline.actions import forward_lists
from megatron_ext.pipeline.layout import StageLayout


def forward_only(
    modules: dict[int, nn.Module],
    layout: StageLayout,
    microbatches: list[dict[str, torch.Tensor]],
    grid: ProcessGrid,
    room: Callable[[torch.device], torch.Tensor],
) -> list[torch.Tensor]:
    """Run every microbatch through this rank's stages.

    room(device): an uninitialised tensor for one microbatch's hidden states. Returns the last stage's output for
    each microbatch in their order, nothing where the last stage is elsewhere. Every rank of the pipeline calls it.
    """
    group, last = grid.mesh["pp"].get_group(), len(layout.stages) - 1
    inputs = {(0, i): batch["tokens"] for i, batch in enumerate(microbatches)}
    arriving: dict[tuple[int, int], dist.Work | None] = {}
    leaving: tuple[dist.Work | None, torch.Tensor] | None = None
    outputs: dict[int, torch.Tensor] = {}
    for kind, stage, i in forward_lists(layout, len(microbatches))[grid.rank("pp")]:
        if kind == "R":
            inputs[stage, i] = room(grid.device)
            arriving[stage, i] = dist.irecv(inputs[stage, i], group=group, group_src=layout.rank_of[stage - 1])
        elif kind == "F":
            if (stage, i) in arriving:
                _wait(arriving.pop((stage, i)))
            extra = {name: tensor for name, tensor in microbatches[i].items() if name != "tokens"}
            y = modules[stage](inputs.pop((stage, i)), **extra)
            if stage == last:
                outputs[i] = y
            else:
                inputs[stage + 1, i] = y  # of this rank, or to be sent next
        else:
            if leaving is not None:
                _wait(leaving[0])
            y = inputs.pop((stage + 1, i)).contiguous()
            leaving = dist.isend(y, group=group, group_dst=layout.rank_of[stage + 1]), y  # kept until it has left
    if leaving is not None:
        _wait(leaving[0])
    return [outputs[i] for i in sorted(outputs)]


def _wait(work: dist.Work | None) -> None:
    if work is not None:  # it is for ranks of the group
        work.wait()
