"""What one optimizer step of a pipeline looks like in time: the actions of every rank, stepped through."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from megatron_ext.pipeline.actions import Action, action_lists
from megatron_ext.pipeline.layout import StageLayout


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Seconds that one microbatch takes on one stage: forward, and the two halves of backward."""

    forward: float
    backward_input: float
    backward_weight: float

    def of(self, kind: str, stage: int) -> float:
        """Seconds of an action. Stage 0 hands no gradient on, so torch leaves all of a split backward to its "W"."""
        if kind == "F":
            return self.forward
        if kind == "B" or (kind == "W" and stage == 0):
            return self.backward_input + self.backward_weight
        if kind == "W":
            return self.backward_weight
        return self.backward_input if stage else 0


class Span(NamedTuple):
    """An action and when it runs, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """spans: by pp rank, in order."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first action's start to the last one's end."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """By pp rank, the seconds in which it computes."""
        return tuple(sum(end - start for _, start, end in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time in which they wait: 0 where none ever does."""
        return 1 - sum(self.busy) / (len(self.spans) * self.seconds)


def simulate(layout: StageLayout, n_microbatches: int, times: Sequence[StageTimes], send: float) -> Timeline:
    """The step that `Pipeline` would run.

    times: by stage. send: seconds that a tensor takes from one rank to another; stages of one rank hand over in none.
    A forward pass waits for that of the stage before, a backward pass (or its input half) for that of the stage
    behind. GPipe and 1F1B receive when they are about to compute: the message starts when both ends are free, and
    is waited for. The schedules with several stages on a rank receive ahead, so that a message travels while the rank
    computes something else. Time spent in Python and launching kernels is not in it.
    """
    lists = action_lists(layout, n_microbatches)
    received_ahead = not layout.order.one_stage
    in_pairs = layout.order.in_pairs  # torch sends what both passes gave after both
    passes = _passes(layout, n_microbatches, times)
    spans: list[list[Span]] = [[] for _ in lists]
    clocks: list[float] = [0] * len(lists)
    while any(len(run) < len(actions) for run, actions in zip(spans, lists, strict=True)):
        for rank, actions in enumerate(lists):  # each as far as it gets without the others
            run, clock = spans[rank], clocks[rank]
            for i in range(len(run), len(actions)):
                action = actions[i]
                kind, stage, microbatch = action
                seconds, needed, sent, ends = passes[kind, stage]
                start = clock
                if needed is not None:
                    there = needed[microbatch]
                    if there is None:
                        break
                    if not sent:
                        start = max(clock, there)
                    elif received_ahead:
                        start = max(clock, there + send)
                    else:
                        start = max(clock, there) + send
                clock = start + seconds
                if not (in_pairs and kind == "F" and actions[i + 1].kind == "B"):
                    ends[microbatch] = clock
                if in_pairs and kind == "B" and actions[i - 1].kind == "F":
                    forward = actions[i - 1]
                    passes["F", forward.stage].ends[forward.microbatch] = clock
                run.append(Span(action, start, clock))
            clocks[rank] = clock
    return Timeline(tuple(map(tuple, spans)))


class _Pass(NamedTuple):
    """One kind of action on one stage. needed, ends: by microbatch, when its input is computed, and its output; None
    as long as it is not. sent: the input comes from another rank."""

    seconds: float
    needed: list[float | None] | None
    sent: bool
    ends: list[float | None]


def _passes(layout: StageLayout, n_microbatches: int, times: Sequence[StageTimes]) -> dict[tuple[str, int], _Pass]:
    passes = {}
    num_stages = len(layout.stages)
    for kinds, source in (("F", -1), ("BI", 1)):
        ends: list[list[float | None]] = [[None] * n_microbatches for _ in range(num_stages)]
        for stage in range(num_stages):
            giver = stage + source
            given = 0 <= giver < num_stages
            needed = ends[giver] if given else None
            sent = given and layout.rank_of[giver] != layout.rank_of[stage]
            for kind in kinds:
                passes[kind, stage] = _Pass(times[stage].of(kind, stage), needed, sent, ends[stage])
    for stage in range(num_stages):
        passes["W", stage] = _Pass(times[stage].of("W", stage), None, False, [None] * n_microbatches)
    return passes
