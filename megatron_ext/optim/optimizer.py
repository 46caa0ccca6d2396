"""An optimizer step on this rank's shards, with clipping by the norm of the whole model's gradient."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_ext.footprint import ModelStates, nbytes
from megatron_ext.mesh import ProcessGrid
from megatron_ext.optim.algorithm import STEP, new_state
from megatron_ext.optim.algorithms import algorithm_named
from megatron_ext.optim.config import OptimizerConfig
from megatron_ext.optim.groups import by_weight_decay
from megatron_ext.optim.norm import squared_norms
from megatron_ext.optim.states import States
from megatron_ext.tensor_parallel import gradient_of
from megatron_ext.torch_private import compute_local_shape_and_global_offset, foreach_mul_, placed_as


class ShardedOptimizer:
    """An algorithm over the local parts of sharded parameters; it is a `zero.Optimizer`.

    named: this rank's parameters by name (DTensors with storage); `uncounted`: parameters that stand for ones on
    another rank and so do not count in the norm; `first_row(name)`: where the trained rows of a parameter begin. The
    algorithm works on plain tensors that share the parameters' storage, and knows nothing of rows that are not
    trained: no decay or momentum can touch them. A rank with nothing to train still takes part in the norm.

    States are, and the update runs, where the parameters are: on the device, or on the host if ZeRO offloads them.
    local_states: by name of a trained parameter, what the algorithm keeps of the part that is updated here.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        named: dict[str, nn.Parameter],
        grid: ProcessGrid,
        uncounted: frozenset[str] = frozenset(),
        first_row: Callable[[str], int] = lambda name: 0,
    ):
        self.config, self.grid = config, grid
        self._named = named
        self._home = next((_local(p).device for p in named.values()), grid.device)
        self._dtype = next((p.dtype for p in named.values()), torch.float32)
        self.params = {name: p for name, p in named.items() if p.requires_grad}
        self._uncounted = uncounted
        self._counted: list[str] = []
        self._shares = torch.empty(0)
        self._skipped = {name: _rows_before(p, first_row(name)) for name, p in self.params.items()}
        self._locals = {name: self._trained(name, p) for name, p in self.params.items()}
        updated = {name: p for name, p in self.params.items() if self._locals[name].numel()}
        self._groups = by_weight_decay(updated, config.weight_decay)
        algorithm = algorithm_named(config.optimizer)
        self._algorithm = algorithm(config)
        self.local_states = {name: new_state(algorithm, local) for name, local in self._locals.items()}
        self.step_count = torch.zeros((), dtype=torch.float32, device=self._home)
        self._gradient_bytes = 0

    def _trained(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, or of its gradient or state, without the rows that are not trained."""
        return _local(tensor)[self._skipped[name] :]

    def update(
        self, sums: torch.Tensor, lr: float, loss_scale: torch.Tensor | float, measure: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `zero.Optimizer.update`; norm and `sums` travel in one message."""
        if measure:
            self._gradient_bytes = nbytes(p.grad for p in self.params.values() if p.grad is not None)
        totals = torch.cat([sums, self._norm_contribution().to(sums.device)[None]])
        dist.all_reduce(totals)
        norm = totals[-1].sqrt()
        return totals[:-1], norm / loss_scale, self._step(lr, norm, loss_scale)

    @torch.no_grad()
    def _norm_contribution(self) -> torch.Tensor:
        """This rank's share of the squared global gradient norm, float64: the sum over the world is the square.

        Each local part counts by one over the number of ranks of its pipeline stage that hold the same elements.
        """
        counted = [name for name, p in self.params.items() if p.grad is not None and name not in self._uncounted]
        if not counted:
            return torch.zeros((), dtype=torch.float64, device=self._home)
        squares = squared_norms([self._trained(name, gradient_of(self.params[name])) for name in counted])
        if counted != self._counted:  # copied to the device once, not every step
            shares = [self._share(name) for name in counted]
            self._counted, self._shares = counted, torch.tensor(shares, dtype=torch.float64, device=squares.device)
        return (squares * self._shares).sum()

    def _share(self, name: str) -> float:
        grad = gradient_of(self.params[name])
        parts = math.prod(
            grad.device_mesh.size(i) for i, placement in enumerate(grad.placements) if not placement.is_replicate()
        )
        return parts * self.grid.size("pp") / self.grid.world_size

    @torch.no_grad()
    def _step(self, lr: float, norm: torch.Tensor, loss_scale: torch.Tensor | float) -> torch.Tensor:
        """Clip by the global `norm` of the (scaled) gradients and update; then forget the gradients.

        A step whose norm is not finite, or whose factor for the gradients is not, changes nothing. Returns float32 1
        for such a step, else 0. Nothing here waits for the device, unless the update runs on the host: it cannot begin
        before the norm of all is there.
        """
        factor = norm.new_ones(()) / loss_scale
        if self.config.clip_grad > 0:
            factor = factor * (self.config.clip_grad / (norm / loss_scale + 1e-6)).clamp(max=1.0)
        factor = factor.to(self._dtype)
        found_inf = (~(norm.isfinite() & factor.isfinite())).to(torch.float32)
        skipped, factor = found_inf.to(self._home), factor.to(self._home)
        for weight_decay, names in self._groups:
            names = [name for name in names if self.params[name].grad is not None]
            if not names:
                continue
            grads = [self._trained(name, gradient_of(self.params[name])) for name in names]
            if self.config.clip_grad > 0 or isinstance(loss_scale, torch.Tensor):
                foreach_mul_(grads, factor)
            locals_, states = [self._locals[name] for name in names], [self.local_states[name] for name in names]
            self._algorithm.step(locals_, grads, states, lr, weight_decay, skipped)
        self.step_count += 1 - skipped
        self.zero_grad()
        return found_inf

    def zero_grad(self) -> None:
        for param in self.params.values():
            param.grad = None

    def model_states(self) -> ModelStates:
        states = [value for _, names in self._groups for name in names for value in self.local_states[name].values()]
        return ModelStates(nbytes(self._named.values()), self._gradient_bytes, nbytes([self.step_count, *states]))

    def state_dict(self, empty: bool = False) -> States:
        """All weights and states, in place; see `state`. They are at hand, so `empty` saves nothing."""
        weights: dict[str, torch.Tensor] = {name: param.detach() for name, param in self._named.items()}
        return States(weights, {name: dict(self.state(name)) for name in self.params})

    @torch.no_grad()
    def load_state_dict(self, states: States) -> None:
        """Take over what was written to `state_dict()`; weights have been written in place."""
        for name, state in states.optimizer.items():
            for kind, value in state.items():
                self.local_states[name][kind].copy_(self._trained(name, value))

    def state(self, name: str) -> dict[str, DTensor]:
        """The states of a parameter that a checkpoint holds, placed as the parameter is.

        They share the optimizer's storage; where only some rows are trained they are copies, 0 in the others.
        """
        param, skipped = self.params[name], self._skipped[name]
        assert isinstance(param, DTensor)
        stored = {kind: value for kind, value in self.local_states[name].items() if kind != STEP}
        if skipped:
            stored = {k: torch.cat([v.new_zeros(skipped, *v.shape[1:]), v]) for k, v in stored.items()}
        return {kind: placed_as(param, value) for kind, value in stored.items()}

    def set_step_count(self, steps: torch.Tensor) -> None:
        self.step_count.copy_(steps)
        for state in self.local_states.values():
            if STEP in state:
                state[STEP].copy_(steps)


def _rows_before(param: torch.Tensor, row: int) -> int:
    """How many rows of this rank's part of a parameter come before the global `row`."""
    if not row:
        return 0
    assert isinstance(param, DTensor)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return min(max(row - offset[0], 0), shape[0])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
