"""The tensors of an engine under their checkpoint keys; loading writes into them in place.

model.NAME                      the weight
optimizer.STATE.NAME            what the algorithm declares to keep of the weight, placed as the weight is
optimizer.steps                 optimizer steps taken
loss_scaler                     scale, good steps, tolerance
random.RANK                     generator states of one rank; meaningful at the layout that wrote them
"""

import torch
import torch.distributed as dist

from megatron_ext.engine import Engine
from megatron_ext.models.names import EMBEDDING
from megatron_ext.optim import PrecisionConfig, States

State = dict[str, torch.Tensor]

MODEL, OPTIMIZER = "model.", "optimizer."
STEPS, LOSS_SCALER = "optimizer.steps", "loss_scaler"


def optimizer_key(kind: str, name: str) -> str:
    """The key of a state of the parameter `name`."""
    return f"{OPTIMIZER}{kind}.{name}"


def checkpoint_name_of(engine: Engine, name: str) -> str:
    """A tied head on its own stage is read from, and stands for, the embedding."""
    return EMBEDDING if name in engine.copies() else name


def _left_out(engine: Engine, for_saving: bool) -> frozenset[str]:
    """Copies of tied weights without an entry: their source saves them, and is loaded where both are on this rank."""
    return engine.copies() if for_saving or EMBEDDING in engine.parameters else frozenset()


def model_state(engine: Engine, states: States, for_saving: bool) -> State:
    """Weights under their checkpoint keys."""
    return {
        MODEL + checkpoint_name_of(engine, name): weight
        for name, weight in states.weights.items()
        if name not in _left_out(engine, for_saving)
    }


def optimizer_state(engine: Engine, states: States, for_saving: bool) -> State:
    state: State = {STEPS: engine.optimizer.step_count.clone(), LOSS_SCALER: engine.loss_scaler.state.clone()}
    for name, kept in states.optimizer.items():
        if name in _left_out(engine, for_saving):
            continue
        for kind, value in kept.items():
            state[optimizer_key(kind, checkpoint_name_of(engine, name))] = value
    return state


@torch.no_grad()
def fill_copies(engine: Engine, states: States) -> None:
    """Give tied weights whose source is on this rank too (V-shaped schedules) its values, and its optimizer states."""
    for name in _left_out(engine, for_saving=False):
        states.weights[name].copy_(states.weights[EMBEDDING])
        for kind, value in states.optimizer.get(name, {}).items():
            value.copy_(states.optimizer[EMBEDDING][kind])


def take_counters(engine: Engine, state: State, written: PrecisionConfig) -> None:
    """Give the engine the optimizer's step count and the loss scale that were loaded. written: with which flags."""
    engine.optimizer.set_step_count(state[STEPS])
    engine.loss_scaler.resume(state[LOSS_SCALER], written)


def random_key(rank: int | None = None) -> str:
    return f"random.{dist.get_rank() if rank is None else rank}"


def random_state(engine: Engine) -> torch.Tensor:
    """uint8: the CPU generator's state, followed by the CUDA generator's where there is one."""
    states = [torch.get_rng_state()]
    if engine.grid.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(engine.grid.device))
    return torch.cat(states)


def set_random_state(engine: Engine, state: torch.Tensor) -> None:
    cpu_bytes = torch.get_rng_state().numel()
    torch.set_rng_state(state[:cpu_bytes].cpu())
    if engine.grid.device.type == "cuda":
        torch.cuda.set_rng_state(state[cpu_bytes:].cpu(), engine.grid.device)
