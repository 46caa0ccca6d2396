"""Reading checkpoints into an engine of any layout."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from megatron_ext.checkpoint.compatible import check_compatible, check_trained
from megatron_ext.checkpoint.directory import Manifest, read_manifest
from megatron_ext.checkpoint.metadata import TensorReader
from megatron_ext.checkpoint.read import VOCABULARY_MATRICES, ResizedWeights, WeightReader
from megatron_ext.checkpoint.state import (
    LOSS_SCALER,
    MODEL,
    State,
    fill_copies,
    model_state,
    optimizer_state,
    random_key,
    random_state,
    set_random_state,
    take_counters,
)
from megatron_ext.engine import Engine
from megatron_ext.errors import RequestError
from megatron_ext.mesh import ProcessGrid
from megatron_ext.models.expand import Expansion
from megatron_ext.models.names import is_adapter
from megatron_ext.optim import PrecisionConfig, States
from megatron_ext.torch_private import compute_local_shape_and_global_offset

_VOCABULARY_KEYS = {MODEL + name for name in VOCABULARY_MATRICES}


def mesh_sizes(grid: ProcessGrid) -> dict[str, int]:
    """Give what a manifest says of the layout: the world size, and that of every axis."""
    return {"world_size": grid.world_size} | {
        axis: grid.size(axis) for axis in ("pp", "dp_replicate", "dp_shard", "tp")
    }


def load_checkpoint(
    engine: Engine,
    checkpoint: Path,
    weights_only: bool = False,
    expansion: Expansion | None = None,
    overridden: Collection[str] = (),
    flag: str = "--load",
) -> Manifest:
    """Fill the engine's weights and, unless `weights_only` or absent, optimizer, loss scale and random state.

    Bitwise: every element is the one that was written, whatever layout wrote it. Collective. The random state goes on
    at the layout, and on the kind of device, that wrote it; elsewhere it begins anew, as another layout's does.

    expansion: the checkpoint has a smaller vocabulary, which grows like this (with `weights_only`).
    overridden: see `check_compatible`. flag: that names the checkpoint.
    """
    assert expansion is None or weights_only
    manifest = read_manifest(checkpoint, flag)
    check_compatible(manifest, engine.config.model, checkpoint, expansion, overridden, flag)
    check_trained(manifest, engine.config, checkpoint, weights_only, flag)
    with_optimizer = manifest.has_optimizer and not weights_only
    states = engine.state_dict(empty=True)
    if not with_optimizer:
        states = States(states.weights, {})
    state = model_state(engine, states, for_saving=False)
    if manifest.lora is None:  # new adapters keep their initial values, with which they change nothing
        state = {key: value for key, value in state.items() if not is_adapter(key)}
    if with_optimizer:
        state |= optimizer_state(engine, states, for_saving=False)
    random = random_state(engine)
    resized = {key: state.pop(key) for key in _VOCABULARY_KEYS & state.keys()} if expansion is not None else {}
    reader = TensorReader(checkpoint, flag)
    same_layout = manifest.layout == mesh_sizes(engine.grid)
    same_generators = same_layout and reader.size_of(random_key()) in (None, random.shape)
    if with_optimizer and same_generators:
        state[random_key()] = random
    try:
        dcp.load(state, storage_reader=reader, process_group=dist.new_group(backend="gloo"))
        if expansion is not None:
            progress = engine.grid.mesh.get_rank() == 0
            _fill_resized(resized, ResizedWeights(WeightReader(checkpoint), expansion, progress))
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RequestError(f"{flag} {checkpoint}: cannot be read ({reason})") from error
    fill_copies(engine, states)
    engine.load_state_dict(states)
    if with_optimizer:
        take_counters(engine, state, _precision(manifest, engine.config.precision, float(state[LOSS_SCALER][0])))
    if with_optimizer and same_generators:
        set_random_state(engine, random)
    else:  # other ranks, or other generators: draw anew, from the seed and the place in the run
        torch.manual_seed(engine.config.seed + manifest.iteration * engine.grid.world_size + engine.grid.random_stream)
    return manifest


def _precision(manifest: Manifest, now: PrecisionConfig, scale: float) -> PrecisionConfig:
    """With which flags a checkpoint was written. Older ones do not say: as those of now, unless nothing was scaled."""
    if manifest.precision is None:
        return now if scale != 1 else PrecisionConfig()
    names = {field.name for field in dataclasses.fields(PrecisionConfig)}
    return PrecisionConfig(**{name: value for name, value in manifest.precision.items() if name in names})


@torch.no_grad()
def _fill_resized(state: State, weights: ResizedWeights) -> None:
    """Fill this rank's parts of the matrices whose rows follow the vocabulary, keyed as in a checkpoint."""
    for key, stored in state.items():
        assert isinstance(stored, DTensor)
        local = stored.to_local()
        _, offset = compute_local_shape_and_global_offset(stored.shape, stored.device_mesh, stored.placements)
        if local.numel() > 0:
            rows = weights.read_rows(key.removeprefix(MODEL), offset[0], offset[0] + local.shape[0])
            local.copy_(rows[:, offset[1] : offset[1] + local.shape[1]])
