"""Steps of every layout on a device that is not the host: nothing waits for it, nothing is copied to or from it."""

from typing import Any

import pytest
import torch

from megatron_ext.engine import Engine
from megatron_ext.fake_world import destroy_fake_world, init_fake_world
from megatron_ext.mesh import build_grid
from tests.distributed import Pool
from tests.megatron_ext.fake_device import Crossings, prepare_steps
from tests.megatron_ext.layouts import Layout, layout
from tests.megatron_ext.test_parity import LAYOUTS
from tests.megatron_ext.training import LR, global_batch, share, tiny
from tests.slow import sweep

ALIBI: dict[str, Any] = {"position_embedding_type": "alibi"}
MORE = {
    "one rank": layout(documents=True),
    "TP2, ALiBi": layout(tp=2, **ALIBI),
    "PP2, ALiBi, documents": layout(pp=2, documents=True, **ALIBI),
    "DP2 ZeRO-2, a window": layout(dp=2, zero=2, window_size=5),
    "TP2 SP, learned positions": layout(tp=2, sp=True, position_embedding_type="learned_absolute"),
    **{f"TP2 PP2 DP2 SP ZeRO-{zero}, bf16": layout(2, 2, 2, zero=zero, sp=True, bf16=True) for zero in (0, 3)},
    "DP2 ZeRO-1, fp16": layout(dp=2, zero=1, fp16=True),
    "TP2 DP2 ZeRO-1, LoRA": layout(tp=2, dp=2, zero=1, train_only="lora"),
}
PARTS = 12  # processes that go through them one after the other


def step(case: Layout, rank: int) -> list[str]:
    """Train, evaluate and train as this rank of a fake world. Returns what was copied after the first step."""
    device = init_fake_world(rank, case.ranks)
    try:
        config = tiny(**case.options)
        with prepare_steps(case.ranks):
            grid = build_grid(config.parallel, device)
            engine = Engine(config, grid)
            batch = share(global_batch(config, 0, case.documents), grid, config.batch.micro_batch_size)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            engine.train_step(batch, LR)
            with Crossings() as crossings:
                assert engine.evaluate([batch]).device == device
                assert engine.train_step(batch, LR).device == device
        return crossings.found
    finally:
        destroy_fake_world()


def steps(part: int, of_last: bool) -> dict[str, Any]:
    """By layout what went wrong on its last rank or its first."""
    torch.distributed.destroy_process_group()
    wrong: dict[str, Any] = {}
    for name, case in list((LAYOUTS | MORE).items())[part::PARTS]:
        try:
            found: Any = step(case, case.ranks - 1 if of_last else 0)
        except RuntimeError as error:
            found = repr(error)
        if found:
            wrong[name] = found
    return wrong


@pytest.mark.parametrize("of_last", sweep((True, False), {True}))
@pytest.mark.parametrize("part", sweep(range(PARTS), {0}))
def test_steps_neither_wait_for_the_device_nor_mix_it_with_the_host(pool: Pool, part: int, of_last: bool) -> None:
    assert pool.run(steps, 1, part, of_last) == [{}]
