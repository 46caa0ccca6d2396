"""How many bytes a model's states take: by the formulas of the ZeRO paper, and as they are held.

Of Psi parameters, mixed-precision Adam keeps 2 Psi bytes of weights, 2 Psi of gradients and K Psi, K = 12, of
optimizer states; over N ranks stage 1 divides the last by N, stage 2 the gradients too, and stage 3 all three
(Rajbhandari et al., arXiv 1910.02054, sections 3.1 and 5).
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from megatron_ext.torch_private import storage_id


@dataclasses.dataclass(frozen=True)
class ModelStates:
    """A figure for each of the three: weights as stored, gradients, and what the optimizer keeps."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What an implementation of ZeRO stores: bytes of one parameter, and the stage from which each is sharded."""

    bytes: ModelStates
    sharded_from: ModelStates

    def of_rank(self, elements: ModelStates, stage: int, ranks: int) -> ModelStates:
        """Bytes on one of the `ranks` that ZeRO shards over.

        elements: of the part of the model that these ranks share: stored, with a gradient, and with optimizer states.
        """

        def share(size: float, count: float, first: float) -> float:
            return size * count / (ranks if stage >= first else 1)

        parts = map(dataclasses.astuple, (self.bytes, elements, self.sharded_from))
        return ModelStates(*map(share, *parts))


# half-precision weights and gradients; float32 weights and Adam's two moments
PAPER = Footprint(ModelStates(weights=2, gradients=2, optimizer=4 + 4 + 4), ModelStates(3, 2, 1))


def one_copy(stored: torch.dtype, states: int = 2) -> Footprint:
    """Ours: weights, gradients and the optimizer's states in one dtype. states: to a parameter; AdamW keeps two.

    The stored weights are the master weights, so they are sharded wherever optimizer states are; gradients count as
    the update finds them, reduced to shards. Stages 1 and 2 have whole weights too, but only inside a step.
    """
    size = stored.itemsize
    return Footprint(ModelStates(size, size, states * size), sharded_from=ModelStates(1, 1, 1))


def deepspeed(compute: torch.dtype, stage: int, offload: bool) -> Footprint:
    """DeepSpeed's (0.19): the paper's, with weights in the dtype that is computed in, and gradients in float32.

    The update finds shards of the gradients at every stage, with `offload` (of the optimizer to the host) two sets:
    the one that was accumulated and the optimizer's. In bf16 stage 1 without it accumulates whole ones, and has the
    last microbatch's beside them; in float32 stage 1 with it has one set.
    """
    size, gradient, sharded_from = compute.itemsize, torch.float32.itemsize, 1
    if stage == 1 and not offload and compute == torch.bfloat16:
        gradient, sharded_from = gradient + size, 2
    elif offload and not (stage == 1 and compute == torch.float32):
        gradient = 2 * gradient
    return Footprint(
        dataclasses.replace(PAPER.bytes, weights=size, gradients=gradient),
        dataclasses.replace(PAPER.sharded_from, gradients=sharded_from),
    )


@torch.no_grad()
def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the local parts of `tensors`; one that several are views of counts once."""
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage_id(storage): storage.nbytes() for storage in storages}.values())
