"""The tensors of an engine under their checkpoint keys; loading writes into them in place.

model.NAME                      the weight
optimizer.exp_avg.NAME          Adam's moments, placed as the weight is
optimizer.exp_avg_sq.NAME
optimizer.steps                 optimizer steps taken
loss_scaler                     scale, good steps, tolerance
random.RANK                     generator states of one rank; meaningful at the layout that wrote them
"""

import torch
import torch.distributed as dist

from megatron_ext.engine import Engine

State = dict[str, torch.Tensor]

MODEL, OPTIMIZER = "model.", "optimizer."
STEPS, LOSS_SCALER = "optimizer.steps", "loss_scaler"


def checkpoint_name_of(engine: Engine, name: str) -> str:
    """A tied head on its own stage is read from, and stands for, the embedding."""
    return "embed_tokens.weight" if name in engine.copies() else name


def model_state(engine: Engine, for_saving: bool) -> State:
    """Weights. Copies of tied weights are loaded but not saved: their source saves them."""
    return {
        MODEL + checkpoint_name_of(engine, name): param.detach()
        for name, param in engine.parameters.items()
        if not (for_saving and name in engine.copies())
    }


def optimizer_state(engine: Engine, for_saving: bool) -> State:
    state: State = {STEPS: engine.optimizer.step_count.clone(), LOSS_SCALER: engine.loss_scaler.state.clone()}
    for name in engine.optimizer.params:
        if for_saving and name in engine.copies():
            continue
        for moment, value in engine.optimizer.moments(name).items():
            state[f"{OPTIMIZER}{moment}.{checkpoint_name_of(engine, name)}"] = value
    return state


def apply_optimizer_state(engine: Engine, state: State) -> None:
    """Give back the parts of `optimizer_state` that are not loaded in place."""
    engine.optimizer.set_step_count(state[STEPS])
    engine.loss_scaler.state = state[LOSS_SCALER]


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
