"""The tensors of a run that a checkpoint holds, as any engine hands them out and takes them back."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class States:
    """Weights and Adam's moments of this rank's parameters, by global name: DTensors that say where they lie.

    moments: by name of a trained parameter, then "exp_avg" and "exp_avg_sq". They may share the engine's storage or
    be copies: what is written to them counts once the engine has taken them back.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
