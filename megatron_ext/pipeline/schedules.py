"""The pipeline schedules: a row says all that is particular to one."""

import dataclasses
from collections.abc import Callable

from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from megatron_ext.torch_private import PipelineSchedule


def _any_number(pp: int, stages: int, microbatches: int) -> str:
    return ""


def _as_many_as_ranks(pp: int, stages: int, microbatches: int) -> str:
    enough = microbatches >= pp
    return "" if enough else f"needs at least as many microbatches as stages: {microbatches} for {pp}"


def _equal_rounds(pp: int, stages: int, microbatches: int) -> str:
    if microbatches >= pp and microbatches % (microbatches // pp) == 0:
        return ""
    rounds = f"in equal rounds (a multiple of {pp} always does)"
    return f"needs at least PP {pp} microbatches, {rounds}, not {microbatches}"


def _as_many_as_stages(pp: int, stages: int, microbatches: int) -> str:
    return "" if microbatches >= stages else f"needs at least {stages} microbatches, not {microbatches}"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How torch's `runs` goes, and what it asks of the layout.

    stages_per_rank: None: the user chooses, at least `least_stages`; it then goes in equal rounds of microbatches.
    lacks(pp, stages, microbatches): what is wrong with their number, or nothing. ahead(pp, rank, microbatches): with
    one stage on a rank, by how many microbatches forward passes are ahead of backward passes. v_shaped: rank 0 has the
    first stage and the last. splits_backward: into an input and a weight half. in_pairs: torch takes a forward and a
    whole backward pass as one. searched: the planner looks at it.
    """

    runs: Callable[..., PipelineSchedule]
    stages_per_rank: int | None
    least_stages: int = 1
    lacks: Callable[[int, int, int], str] = _any_number
    ahead: Callable[[int, int, int], int] | None = None
    v_shaped: bool = False
    splits_backward: bool = False
    in_pairs: bool = False
    searched: bool = True

    @property
    def one_stage(self) -> bool:
        """Whether a rank always has one stage, and so receives when it is about to compute, not ahead."""
        return self.stages_per_rank == 1


SCHEDULES = {
    # not searched: it has 1F1B's bubble and needs more memory
    "gpipe": Schedule(ScheduleGPipe, 1, ahead=lambda pp, rank, microbatches: microbatches, searched=False),
    "1f1b": Schedule(Schedule1F1B, 1, lacks=_as_many_as_ranks, ahead=lambda pp, rank, microbatches: pp - 1 - rank),
    "interleaved": Schedule(ScheduleInterleaved1F1B, None, least_stages=2, lacks=_equal_rounds),
    "zero-bubble": Schedule(ScheduleInterleavedZeroBubble, None, lacks=_equal_rounds, splits_backward=True),
    "zbv": Schedule(ScheduleZBVZeroBubble, 2, v_shaped=True, splits_backward=True),
    "dualpipev": Schedule(
        ScheduleDualPipeV,
        2,
        lacks=_as_many_as_stages,
        v_shaped=True,
        splits_backward=True,
        in_pairs=True,
        searched=False,
    ),
}
DEFAULT = "1f1b"
