"""DeepSpeed's optimizer as the engine sees it: steps, and whole states in and out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megatron_ext.footprint import ModelStates, nbytes
from megatron_ext.models import ModelConfig, initialize_parameter
from megatron_ext.optim import States
from megatron_ext.optim.algorithm import STEP
from megatron_ext.torch_private import compute_local_shape_and_global_offset, placed_as
from megatron_ext.zero.deepspeed.fragments import STATES, WEIGHT, fragments, gradients, recover, weights
from megatron_ext.zero.deepspeed.stage import DeepSpeedStage


class DeepSpeedOptimizer:
    """The states of one stage's parameters under DeepSpeed; it is a `zero.Optimizer`.

    To a checkpoint they are what FSDP2 holds: float32 DTensors over (dp, tp), cut over dp along the dimension that
    tp leaves, so that either engine reads what the other wrote.
    """

    def __init__(self, stage: DeepSpeedStage, model: ModelConfig, seed: int):
        self._stage, self._engine = stage, stage.engine
        self._dp = stage.grid.mesh["dp_shard"]
        self._gradient_bytes = 0
        self._names = {param: name for name, param in stage.decoder.named_parameters()}

        def initial(name: str, state: str) -> torch.Tensor | None:
            if state != WEIGHT:
                return None
            placed = stage.stored[name]
            local = torch.empty(placed.to_local().shape, device=stage.grid.device)
            initialize_parameter(name, placed, local, model, seed, stage.grid.device)
            return local

        self._write(initial)

    def update(
        self, sums: torch.Tensor, lr: float, loss_scale: torch.Tensor | float, measure: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `zero.Optimizer.update`; the norm, over pp, dp and tp, and the clipping by it are DeepSpeed's."""
        dist.all_reduce(sums)
        if measure:
            self._gradient_bytes = nbytes(gradients(self._engine))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        skipped = bool(self._engine.optimizer.overflow)
        if skipped:
            recover(self._engine)
        norm = float("inf") if skipped else float(self._engine.get_global_grad_norm())
        return sums, sums.new_tensor(norm), sums.new_tensor(skipped, dtype=torch.float32)

    @property
    def step_count(self) -> torch.Tensor:
        """Optimizer steps taken, float32 scalar."""
        return next(iter(self._adam.state.values()))[STEP]

    def set_step_count(self, steps: torch.Tensor) -> None:
        for state in self._adam.state.values():
            state[STEP].copy_(steps)

    def model_states(self) -> ModelStates:
        """Bytes that this rank holds in memory, on the device and on the host: see `zero.Optimizer.model_states`.

        Weights are those in the computing dtype; the float32 masters count as the optimizer's, as in the ZeRO paper.
        """
        states = [tensor for state in self._adam.state.values() for tensor in state.values()]
        return ModelStates(nbytes(weights(self._engine)), self._gradient_bytes, nbytes([*self._adam.state, *states]))

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    @torch.no_grad()
    def state_dict(self, empty: bool = False) -> States:
        """Copies of all weights and states on the host, cut over (dp, tp). `empty`: only room for them.

        On the host because of what is offloaded: it would not fit on the device. Collective.
        """
        if empty:
            found = {
                (name, state): self._part(name, None) for name in self._stage.stored for state in (WEIGHT, *STATES)
            }
        else:
            found = dict(self._read())
        return States(
            weights={name: found[name, WEIGHT] for name in self._stage.stored},
            optimizer={name: {state: found[name, state] for state in STATES} for name in self._stage.stored},
        )

    def load_state_dict(self, states: States) -> None:
        """Go on from these weights and, where there are any, states. Collective."""

        def whole(name: str, state: str) -> torch.Tensor | None:
            part = states.weights[name] if state == WEIGHT else states.optimizer.get(name, {}).get(state)
            if part is None:
                return None
            assert isinstance(part, DTensor)
            shape = self._stage.stored[name].to_local().shape
            stride = self._stage.stored[name].to_local().stride()
            local = part.to_local().to(self._stage.grid.device)
            over_dp = DTensor.from_local(
                local, self._dp, part.placements[:1], run_check=False, shape=shape, stride=stride
            )
            return over_dp.full_tensor()

        self._write(whole)

    def _read(self) -> Any:
        """(name, state) and this rank's part, for every parameter and state."""
        for fragment in fragments(self._engine):
            name = self._names[fragment.param]
            for state, view in fragment.views.items():
                whole = torch.zeros(self._stage.stored[name].to_local().shape, device=self._stage.grid.device)
                whole.view(-1).narrow(0, fragment.start, view.numel()).copy_(view)
                # exactly one rank has each element, the others 0: as integers the sum keeps every bit
                dist.all_reduce(whole.view(torch.int32), group=self._dp.get_group())
                yield (name, state), self._part(name, whole)

    @torch.no_grad()
    def _write(self, source: Callable[[str, str], torch.Tensor | None]) -> None:
        """Write source(name, state), float32 of the tp shape, of every parameter; None leaves what there is."""
        for fragment in fragments(self._engine, changed=True):
            name = self._names[fragment.param]
            for state, view in fragment.views.items():
                value = source(name, state)
                if value is None:
                    continue
                view.copy_(value.flatten().narrow(0, fragment.start, view.numel()))
                if state == WEIGHT and fragment.whole is not None:
                    fragment.whole.copy_(value)

    def _part(self, name: str, whole: torch.Tensor | None) -> DTensor:
        """This rank's part over dp of a tp-local tensor, or room for it."""
        placed = self._stage.stored[name]
        over_tp = placed.placements[0]
        over_dp = _over_dp(over_tp, placed.ndim)
        shape, offset = compute_local_shape_and_global_offset(placed.to_local().shape, self._dp, [over_dp])
        if whole is None:
            local = torch.empty(shape)
        else:
            part = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
            local = torch.empty(shape).copy_(whole[part])
        described = DTensor.from_local(
            torch.empty(shape, device="meta"),
            self._stage.grid.mesh["dp_shard", "tp"],
            [over_dp, over_tp],
            run_check=False,
            shape=placed.shape,
            stride=placed.stride(),
        )
        return placed_as(described, local)


def _over_dp(over_tp: Placement, ndim: int) -> Placement:
    """How data parallelism cuts: the dimension that tp leaves; a vector that tp cuts stays whole."""
    if ndim == 1:
        return Replicate() if over_tp.is_shard() else Shard(0)
    return Shard(1) if over_tp.is_shard(0) else Shard(0)
