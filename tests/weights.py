"""Weights in memory, for tests of what takes any `Weights`."""

import torch


class InMemory:
    """`Weights` of a dictionary, which count what is asked of them.

    Attributes:
        total, largest: bytes of all requests, and of the largest.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.total = self.largest = 0

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self.tensors[name][start:stop]
        self.largest, self.total = max(self.largest, rows.nbytes), self.total + rows.nbytes
        return rows
