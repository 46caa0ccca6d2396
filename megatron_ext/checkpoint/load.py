"""Reading checkpoints into an engine of any layout."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ext.checkpoint.directory import Manifest, read_manifest
from megatron_ext.checkpoint.state import (
    apply_optimizer_state,
    fill_copies,
    model_state,
    optimizer_state,
    random_key,
    random_state,
    set_random_state,
)
from megatron_ext.engine import Engine
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import ModelConfig

# fields that change no stored tensor: a checkpoint may be continued with other values of these
_FREE_FIELDS = frozenset({"init_method_std", "max_position_embeddings", "norm_epsilon"})


def layout_of(grid: ProcessGrid) -> dict[str, int]:
    return {"world_size": grid.world_size} | {
        axis: grid.size(axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp")
    }


def check_compatible(manifest: Manifest, model: ModelConfig, checkpoint: Path) -> None:
    """Raise RequestError naming the first field in which the checkpoint's model is another one."""
    stored_model = dataclasses.asdict(ModelConfig(**manifest.model).resolved())
    for name, wanted in dataclasses.asdict(model.resolved()).items():
        stored = stored_model[name]
        if name not in _FREE_FIELDS and stored != wanted and not name.startswith(("rope", "rotary")):
            raise RequestError(
                f"--load {checkpoint}: its model has {name} {stored}, the run asks for {wanted} "
                f"(--{name.replace('_', '-')})"
            )


def load_checkpoint(engine: Engine, checkpoint: Path, weights_only: bool = False) -> Manifest:
    """Fill the engine's weights and, unless `weights_only` or absent, optimizer, loss scale and random state.

    Bitwise: every element is the one that was written, whatever layout wrote it. Collective.
    """
    manifest = read_manifest(checkpoint)
    check_compatible(manifest, engine.config.model, checkpoint)
    engine.optimizer.zero_grad()
    with_optimizer = manifest.has_optimizer and not weights_only
    state = model_state(engine, for_saving=False)
    if with_optimizer:
        state |= optimizer_state(engine, for_saving=False)
    same_layout = manifest.layout == layout_of(engine.grid)
    if with_optimizer and same_layout:
        state[random_key()] = random_state(engine)
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), process_group=dist.new_group(backend="gloo"))
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RequestError(f"--load {checkpoint}: cannot be read ({reason})") from error
    fill_copies(engine)
    if with_optimizer:
        apply_optimizer_state(engine, state)
    if with_optimizer and same_layout:
        set_random_state(engine, state[random_key()])
    else:  # another layout has other ranks: draw anew, from the seed and the place in the run
        torch.manual_seed(engine.config.seed + manifest.iteration * engine.grid.world_size + dist.get_rank())
    return manifest
