"""AdamW on this rank's shards, with clipping by the norm of the whole model's gradient."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_ext.footprint import ModelStates, held
from megatron_ext.mesh import ProcessGrid
from megatron_ext.optim.config import OptimizerConfig
from megatron_ext.optim.norm import squared_norms
from megatron_ext.optim.states import States

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Fused AdamW over the local parts of sharded parameters.

    named: this rank's parameters by name (DTensors with storage); `uncounted`: parameters that stand for ones on
    another rank and so do not count in the norm; `first_row(name)`: where the trained rows of a parameter begin. The
    optimizer works on plain tensors that share the parameters' storage, and knows nothing of rows that are not
    trained: no decay or momentum can touch them. A rank with nothing to train still takes part in the norm.

    Moments are, and the update runs, where the parameters are: on the device, or on the host if ZeRO offloads them.
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
        self._locals = {name: nn.Parameter(self._trained(name, p)) for name, p in self.params.items()}
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, p in self.params.items():
            if self._locals[name].numel():
                groups[decays(name, p)].append(self._locals[name])
        self._adam: torch.optim.AdamW | None = None
        if any(groups.values()):
            self._adam = torch.optim.AdamW(
                [
                    {"params": params, "weight_decay": config.weight_decay if decayed else 0.0}
                    for decayed, params in groups.items()
                    if params
                ],
                lr=config.lr,
                betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_eps,
                fused=True,
            )
        self._moments = {
            name: {moment: torch.zeros_like(local) for moment in MOMENTS} for name, local in self._locals.items()
        }
        self.step_count = torch.zeros((), dtype=torch.float32, device=self._home)
        self._gradient_bytes = 0
        if self._adam is not None:
            for name, local in self._locals.items():
                if local.numel():
                    self._adam.state[local] = {"step": self.step_count.clone(), **self._moments[name]}

    def _trained(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, or of its gradient or moment, without the rows that are not trained."""
        return _local(tensor)[self._skipped[name] :]

    def update(
        self, sums: torch.Tensor, lr: float, loss_scale: torch.Tensor | float, measure: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take an optimizer step with the gradients there are, and sum `sums` over the world in the same message.

        sums: float64 [n], this rank's shares. loss_scale: what the gradients are too large by. measure: note what the
        gradients take, for `model_states`.
        Returns the totals, the norm of the whole model's gradient before clipping (float64), and float32 1 if the
        step was skipped for a gradient that is not finite; all on the device, equal on every rank.
        """
        if measure:
            self._gradient_bytes = held(p.grad for p in self.params.values() if p.grad is not None)
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
        squares = squared_norms([self._trained(name, _grad(self.params[name])) for name in counted])
        if counted != self._counted:  # copied to the device once, not every step
            shares = [self._share(name) for name in counted]
            self._counted, self._shares = counted, torch.tensor(shares, dtype=torch.float64, device=squares.device)
        return (squares * self._shares).sum()

    def _share(self, name: str) -> float:
        grad = _grad(self.params[name])
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
        skipped = found_inf.to(self._home)
        if self._adam is not None:
            grads = []
            for name, local in self._locals.items():
                grad = self.params[name].grad
                if grad is not None and local.numel():
                    local.grad = self._trained(name, grad)
                    grads.append(local.grad)
            if grads and (self.config.clip_grad > 0 or isinstance(loss_scale, torch.Tensor)):
                torch._foreach_mul_(grads, factor.to(self._home))
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.found_inf = skipped  # type: ignore[attr-defined]  # the fused kernel skips by itself
            self._adam.step()
        self.step_count += 1 - skipped
        self.zero_grad()
        return found_inf

    def zero_grad(self) -> None:
        for name, param in self.params.items():
            param.grad = None
            self._locals[name].grad = None

    def model_states(self) -> ModelStates:
        """Bytes that this rank holds: weights and optimizer states now, gradients as the last update found them that
        measured."""
        states = [] if self._adam is None else [t for state in self._adam.state.values() for t in state.values()]
        return ModelStates(held(self._named.values()), self._gradient_bytes, held([self.step_count, *states]))

    def states(self, empty: bool = False) -> States:
        """All weights and moments, in place; see `moments`. They are at hand, so `empty` saves nothing."""
        weights: dict[str, torch.Tensor] = {name: param.detach() for name, param in self._named.items()}
        return States(weights, {name: dict(self.moments(name)) for name in self.params})

    def take(self, states: States) -> None:
        """Take over what was written to `states()`; weights have been written in place."""
        for name, moments in states.moments.items():
            self.set_moments(name, moments)

    def moments(self, name: str) -> dict[str, DTensor]:
        """exp_avg and exp_avg_sq of a parameter, placed as the parameter is.

        They share the optimizer's storage; where only some rows are trained they are copies, 0 in the others.
        """
        param = self.params[name]
        assert isinstance(param, DTensor)
        skipped = self._skipped[name]
        return {
            moment: placed_as(
                param, torch.cat([value.new_zeros(skipped, *value.shape[1:]), value]) if skipped else value
            )
            for moment, value in self._moments[name].items()
        }

    @torch.no_grad()
    def set_moments(self, name: str, moments: dict[str, torch.Tensor]) -> None:
        """Take over what was loaded into `moments(name)`."""
        for moment, value in moments.items():
            self._moments[name][moment].copy_(self._trained(name, value))

    def set_step_count(self, steps: torch.Tensor) -> None:
        self.step_count.copy_(steps)
        if self._adam is not None:
            for state in self._adam.state.values():
                state["step"].copy_(steps)


def decays(name: str, param: torch.Tensor) -> bool:
    """Weight decay applies to matrices only, as in Megatron-LM: not to norms, not to biases."""
    return param.ndim > 1 and not name.endswith("bias")


def _rows_before(param: torch.Tensor, row: int) -> int:
    """How many rows of this rank's part of a parameter come before the global `row`."""
    if not row:
        return 0
    assert isinstance(param, DTensor)
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return min(max(row - offset[0], 0), shape[0])


def placed_as(param: DTensor, local: torch.Tensor) -> DTensor:
    """`local` as a DTensor. (DTensor.from_local would copy what is offloaded to the device.)"""
    return DTensor(local, param._spec, requires_grad=False)  # type: ignore[call-arg]


def _grad(param: nn.Parameter) -> DTensor:
    assert isinstance(param.grad, DTensor)
    return param.grad


def _local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
