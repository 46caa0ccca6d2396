"""The predicted order of forward and backward passes against the order in which a running pipeline makes them."""

import dataclasses

import pytest
import torch

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.mesh import build_grid
from megatron_ext.pipeline import SCHEDULES, PipelineConfig, StageLayout, plan_stages
from megatron_ext.pipeline.actions import Action, action_lists, forward_lists
from tests.distributed import Pool
from tests.megatron_ext.recording import recorded_actions
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.slow import sweep


def recorded(config: EngineConfig) -> tuple[StageLayout, list[Action]]:
    """The layout, and what this rank runs in one step. Collective."""
    grid = build_grid(config.parallel, torch.device("cpu"))
    engine = Engine(config, grid)
    with recorded_actions() as spans:
        engine.train_step(share(global_batch(config, 0), grid, config.batch.micro_batch_size), LR)
    return engine.layout, [span.action for span in spans]


CASES = [
    *((schedule, pp, None, m) for schedule in SCHEDULES for pp, m in ((2, 4), (4, 8))),
    ("gpipe", 4, None, 2),
    ("1f1b", 4, None, 9),
    ("interleaved", 2, 4, 4),
    ("interleaved", 2, 3, 3),
    ("zero-bubble", 2, 3, 6),
    ("zbv", 4, None, 3),
    ("dualpipev", 2, None, 7),
]
# Of every schedule the oddest.
BY_DEFAULT = {
    *(("gpipe", 4, None, 2), ("1f1b", 4, None, 9), ("interleaved", 2, 3, 3), ("zero-bubble", 2, 3, 6)),
    *(("zbv", 4, None, 3), ("dualpipev", 2, None, 7)),
}


@pytest.mark.parametrize("schedule, pp, per_rank, microbatches", sweep(CASES, BY_DEFAULT))
def test_as_it_runs(pool: Pool, schedule: str, pp: int, per_rank: int | None, microbatches: int) -> None:
    config = tiny(
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        num_virtual_stages_per_pipeline_rank=per_rank,
        num_layers=8,
        micro_batch_size=1,
        global_batch_size=microbatches,
    )
    ranks = range(0, pp, pp - 1)
    for rank, (layout, actions) in zip(ranks, pool.run_fake(recorded, pp, config, ranks=ranks), strict=True):
        assert action_lists(layout, microbatches)[rank] == tuple(actions)


@pytest.mark.parametrize(
    "schedule, pp, per_rank, microbatches", [*CASES, ("interleaved", 8, 3, 16), ("zbv", 8, None, 40)]
)
def test_forward_passes_do_not_wait_in_a_circle(
    schedule: str, pp: int, per_rank: int | None, microbatches: int
) -> None:
    """Even where a rank stands still at every send until its receive is reached, and at every receive for its send."""
    config = PipelineConfig(schedule, per_rank)
    layout = plan_stages(config, dataclasses.replace(tiny().model, num_layers=24), pp, microbatches)
    ahead = [list(actions) for actions in forward_lists(layout, microbatches)]
    forward = [[action for action in actions if action.kind == "F"] for actions in action_lists(layout, microbatches)]
    assert [[action for action in actions if action.kind == "F"] for actions in ahead] == forward
    there = {(0, i) for i in range(microbatches)}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(ahead):
            kind, stage, i = actions[0] if actions else ("", 0, 0)
            if kind == "F" and (stage, i) in there:
                if stage + 1 < len(layout.stages) and layout.rank_of[stage + 1] == rank:
                    there.add((stage + 1, i))
            elif kind == "S" and ahead[layout.rank_of[stage + 1]][0] == Action("R", stage + 1, i):
                there.add(tuple(ahead[layout.rank_of[stage + 1]].pop(0)[1:]))
            else:
                continue
            actions.pop(0)
            moved = True
    assert not any(ahead)


def test_one_stage() -> None:
    """Without a pipeline a microbatch's backward pass follows its forward pass: nothing else is kept meanwhile."""
    layout = StageLayout("none", (), (0,))
    assert action_lists(layout, 3) == (tuple(Action(kind, 0, i) for i in range(3) for kind in "FB"),)
