"""Parameter groups: what weight decay applies to."""

from collections.abc import Mapping

import torch


def decays(name: str, param: torch.Tensor) -> bool:
    """Weight decay applies to matrices only, as in Megatron-LM: not to norms, not to biases."""
    return param.ndim > 1 and not name.endswith("bias")


def by_weight_decay(named: Mapping[str, torch.Tensor], weight_decay: float) -> list[tuple[float, list[str]]]:
    """The names in groups that are not empty, each with the decay of its parameters."""
    groups = (
        (weight_decay, [name for name, param in named.items() if decays(name, param)]),
        (0.0, [name for name, param in named.items() if not decays(name, param)]),
    )
    return [(decay, names) for decay, names in groups if names]
