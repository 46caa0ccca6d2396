"""What an optimizer algorithm is: the states that it declares to keep of a parameter, and a step with them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from megatron_ext.optim.config import OptimizerConfig

STEP = "step"  # a state of this name, a float32 scalar, counts a parameter's steps; a checkpoint has one for all


class StateSpec(NamedTuple):
    """Shape and dtype of a state."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


State = dict[str, torch.Tensor]


class Algorithm(Protocol):
    """An update of parameters by their gradients. title: its name for people.

    It sees plain tensors: what this rank updates of each parameter, wherever that lies in the whole. Its instances
    hold hyperparameters alone; what is kept from step to step, it declares.
    """

    title: str

    def __init__(self, config: OptimizerConfig): ...

    @staticmethod
    def declare(shape: torch.Size, dtype: torch.dtype) -> dict[str, StateSpec]:
        """Name what is kept of a parameter (or a part) of this shape and dtype; before the first step it is 0.

        Each is of the parameter's shape, and so is cut, left out where rows are not trained, and resharded as the
        parameter is; or it is STEP.
        """

    def step(
        self,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        states: Sequence[State],
        rate: float,
        weight_decay: float,
        skip: torch.Tensor,
    ) -> None:
        """Update the parameters and their states in place, without waiting for the device.

        Gradients may be overwritten. skip: float32 scalar beside the parameters; where it is 1 nothing changes,
        whatever the gradients are.
        """


def new_state(algorithm: type[Algorithm], parameter: torch.Tensor) -> State:
    """What is kept of a parameter before its first step, with its strides: fused kernels go by the order in memory."""
    declared = algorithm.declare(parameter.shape, parameter.dtype)
    return {
        name: torch.zeros_like(parameter, dtype=spec.dtype)
        if spec.shape == parameter.shape
        else parameter.new_zeros(spec.shape, dtype=spec.dtype)
        for name, spec in declared.items()
    }


def stored_states(algorithm: type[Algorithm], shape: torch.Size, dtype: torch.dtype) -> dict[str, StateSpec]:
    """What a checkpoint has of a parameter beside its value."""
    return {name: spec for name, spec in algorithm.declare(shape, dtype).items() if name != STEP}
