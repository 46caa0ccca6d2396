"""The predicted order of forward and backward passes against the order in which a running pipeline makes them."""

import pytest
import torch

from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.mesh import build_grid
from megatron_ext.pipeline import SCHEDULES, StageLayout
from megatron_ext.pipeline.actions import Action, action_lists
from tests.distributed import Pool
from tests.megatron_ext.recording import recorded_actions
from tests.megatron_ext.training import LR, global_batch, share, tiny


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


@pytest.mark.parametrize("schedule, pp, per_rank, microbatches", CASES)
def test_as_it_runs(pool: Pool, schedule: str, pp: int, per_rank: int | None, microbatches: int) -> None:
    config = tiny(
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        num_virtual_stages_per_pipeline_rank=per_rank,
        num_layers=8,
        micro_batch_size=1,
        global_batch_size=microbatches,
    )
    ranks = pool.run(recorded, pp, config)
    (layout,) = {layout for layout, _ in ranks}
    assert action_lists(layout, microbatches) == tuple(tuple(actions) for _, actions in ranks)


def test_one_stage() -> None:
    """Without a pipeline a microbatch's backward pass follows its forward pass: nothing else is kept meanwhile."""
    layout = StageLayout("none", (), (0,))
    assert action_lists(layout, 3) == (tuple(Action(kind, 0, i) for i in range(3) for kind in "FB"),)
