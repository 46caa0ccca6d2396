"""A checkpoint of another kind of device loads: all but its random states, which are of other generators."""

from pathlib import Path

import pytest
import torch

import megatron_ext.checkpoint.load
import megatron_ext.checkpoint.save
from megatron_ext.checkpoint import CheckpointWriter, find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.directory import parse_manifest
from megatron_ext.checkpoint.state import random_state
from megatron_ext.checkpoint.verify import find_problems
from megatron_ext.engine import Engine
from tests.distributed import Pool
from tests.megatron_ext.test_checkpoint import build, manifest_of, whole_states


def of_cuda(engine: Engine) -> torch.Tensor:
    """What a rank on a GPU keeps: the CPU generator's state, then the GPU's of 16 bytes."""
    return torch.cat([random_state(engine), torch.arange(16, dtype=torch.uint8)])


def pass_on(root: Path, saved_on: str, loaded_on: str) -> tuple[list[str], bool, list[torch.Tensor]]:
    """Save and load. What is wrong with the checkpoint; are the states the same; the random states before and after."""
    engine = build()
    kinds = {"cpu": random_state, "cuda": of_cuda}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_ext.checkpoint.save, "random_state", kinds[saved_on])
        CheckpointWriter(root, engine).save(manifest_of(engine, 3), {})
        before = torch.get_rng_state()
        other = build()
        patch.setattr(megatron_ext.checkpoint.load, "random_state", kinds[loaded_on])
        patch.setattr(
            megatron_ext.checkpoint.load, "set_random_state", lambda _, state: torch.set_rng_state(state[:5056])
        )
        load_checkpoint(other, find_checkpoint(root))
    after = torch.get_rng_state()
    ours, theirs = whole_states(engine), whole_states(other)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint = find_checkpoint(root)
    problems = [" ".join(problem) for problem in find_problems(checkpoint, parse_manifest(checkpoint), True, int)]
    torch.manual_seed(engine.config.seed + 3 * engine.grid.world_size + engine.grid.random_stream)
    return problems, same, [before, after, torch.get_rng_state()]


@pytest.mark.parametrize(
    "saved_on, loaded_on", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")], ids=["to a CPU", "to a GPU", "stay"]
)
def test_a_checkpoint_passes_between_kinds_of_devices(
    pool: Pool, tmp_path: Path, saved_on: str, loaded_on: str
) -> None:
    for problems, same, (before, after, anew) in pool.run(pass_on, 2, tmp_path, saved_on, loaded_on):
        assert problems == []
        assert same
        assert torch.equal(after, before if saved_on == loaded_on else anew)
