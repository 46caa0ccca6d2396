"""Sums of squares over whole gradients, which are long sums: 100 million elements and more."""

from collections.abc import Sequence

import torch

from megatron_ext.torch_private import foreach_norm

_BLOCK = 4096


def squared_norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of squares of each tensor (at least one, on one device), float64 [n], to about 1e-7 for float32.

    torch's norm adds float32 on a CPU one by one into a few accumulators, and so loses 4e-5 at 2.4 million elements and
    1e-2 at 100 million. There norms are taken of short blocks, which is as fast, and summed in float64. On CUDA its
    fused kernel adds in trees, over 65,536 elements and then over these, and one launch takes many tensors.
    """
    if tensors[0].is_cuda:
        return torch.stack(foreach_norm(list(tensors))).double().square()
    return torch.stack([_by_blocks(tensor.reshape(-1)) for tensor in tensors])


def _by_blocks(flat: torch.Tensor) -> torch.Tensor:
    whole = flat.numel() // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:], dim=0, keepdim=True)
    return torch.cat([blocks, rest]).double().square().sum()
