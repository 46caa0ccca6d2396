"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's fused one."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim.adamw import adamw

from megatron_ext.optim.algorithm import STEP, State, StateSpec
from megatron_ext.optim.config import OptimizerConfig

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"


class AdamW:
    title = "AdamW"

    def __init__(self, config: OptimizerConfig):
        self._config = config

    @staticmethod
    def declare(shape: torch.Size, dtype: torch.dtype) -> dict[str, StateSpec]:
        moment = StateSpec(shape, dtype)
        return {STEP: StateSpec(torch.Size(), torch.float32), _FIRST: moment, _SECOND: moment}

    def step(
        self,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        states: Sequence[State],
        rate: float,
        weight_decay: float,
        skip: torch.Tensor,
    ) -> None:
        adamw(
            list(parameters),
            list(gradients),
            [state[_FIRST] for state in states],
            [state[_SECOND] for state in states],
            [],
            [state[STEP] for state in states],
            fused=True,
            found_inf=skip,
            amsgrad=False,
            beta1=self._config.adam_beta1,
            beta2=self._config.adam_beta2,
            lr=rate,
            weight_decay=weight_decay,
            eps=self._config.adam_eps,
            maximize=False,
        )


def torch_adamw(config: OptimizerConfig, groups: Iterable[tuple[float, list[nn.Parameter]]]) -> torch.optim.AdamW:
    """The same as an object of torch's, for an engine that asks for one. groups: parameters by their weight decay."""
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
