"""The tensors of a run that a checkpoint holds, as any engine hands them out and takes them back."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class States:
    """Weights and optimizer states of this rank's parameters, by global name: DTensors that say where they lie.

    optimizer: by name of a trained parameter, then by the name that the algorithm gives a state. They may share the
    engine's storage or be copies: what is written to them counts once the engine has loaded them.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
