"""The order in which every rank runs forward and backward passes, without running any.

Schedules with several stages on a rank list their order in torch, and run that list: it is taken from them. GPipe and
1F1B are loops there (what 1F1B's `_get_pipeline_order` lists beside its loop is off by one on the last rank), so
their order is written out here.
"""

import collections
import functools
from typing import NamedTuple

from megatron_ext.pipeline.layout import StageLayout
from megatron_ext.pipeline.schedules import Schedule
from megatron_ext.torch_private import pipeline_order


class Action(NamedTuple):
    """One pass of one microbatch through one stage. kind: "F" forward, "B" a whole backward pass, "I" its input half,
    "W" its weight half; in `forward_lists` also "R", its input is received, and "S", its output is sent. stage: global
    index."""

    kind: str
    stage: int
    microbatch: int


ActionLists = tuple[tuple[Action, ...], ...]


def action_lists(layout: StageLayout, n_microbatches: int) -> ActionLists:
    """By pp rank, the actions of one optimizer step in the order in which `Pipeline` runs them.

    `n_microbatches` is one that `plan_stages` accepts for the layout.
    """
    return _action_lists(layout.order, max(layout.rank_of) + 1, len(layout.stages), n_microbatches)


def forward_lists(layout: StageLayout, n_microbatches: int) -> ActionLists:
    """By pp rank, the forward passes of `action_lists` in their order, with the messages between ranks.

    All lists are cut from one sequence of passes, in which a message stands at once with its sender and its receiver:
    ranks that work through them never wait for each other in a circle, however little a message can hold.
    """
    ahead = [
        collections.deque(action for action in actions if action.kind == "F")
        for actions in action_lists(layout, n_microbatches)
    ]
    lists: list[list[Action]] = [[] for _ in ahead]
    computable = {(0, microbatch) for microbatch in range(n_microbatches)}
    while any(ahead):
        for rank, queue in enumerate(ahead):
            if not queue or queue[0][1:] not in computable:
                continue
            lists[rank].append(queue.popleft())
            _, stage, microbatch = lists[rank][-1]
            if stage + 1 == len(layout.stages):
                continue
            computable.add((stage + 1, microbatch))
            receiver = layout.rank_of[stage + 1]
            if receiver != rank:
                lists[rank].append(Action("S", stage, microbatch))
                lists[receiver].append(Action("R", stage + 1, microbatch))
    return tuple(map(tuple, lists))


@functools.lru_cache(maxsize=16)  # the longest take some ten megabytes
def _action_lists(schedule: Schedule, pp: int, num_stages: int, n_microbatches: int) -> ActionLists:
    if schedule.ahead is not None:
        return tuple(_one_stage(rank, n_microbatches, schedule.ahead(pp, rank, n_microbatches)) for rank in range(pp))
    order = pipeline_order(schedule.runs, pp, num_stages, n_microbatches)
    return tuple(
        tuple(
            Action(part.computation_type.value, part.stage_index, part.microbatch_index)
            for entry in order[rank]
            if entry is not None  # torch pads where it expects a wait
            for part in entry.sub_actions or (entry,)  # of DualPipeV; run one after the other
        )
        for rank in range(pp)
    )


def _one_stage(stage: int, n_microbatches: int, ahead: int) -> tuple[Action, ...]:
    """Forward and backward by turns, once forward is `ahead` microbatches ahead."""
    actions = []
    for i in range(n_microbatches + ahead):
        if i < n_microbatches:
            actions.append(Action("F", stage, i))
        if i >= ahead:
            actions.append(Action("B", stage, i - ahead))
    return tuple(actions)
