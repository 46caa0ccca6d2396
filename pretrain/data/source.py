"""The way from corpora to batches: a source gives samples, a packer makes rows of them, `collate` a batch of rows.

GPTSource is a source (megatron-core's GPTDataset behind it), Part a packer. Another kind of data is another source, and
another packer where its samples are not as long as a row.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

SampleIndex = tuple[int, int]
"""(source, number of a sample in it)"""


@dataclass(frozen=True)
class Sample:
    """Some tokens to learn from, n of them.

    Attributes:
        tokens: int64 [n].
        labels: int64 [n], what is to follow each.
        loss_mask: float32 [n], 0 or a weight of each label; None, of all samples of a run, where each counts as one.
        lengths: int64 [documents], tokens of each of the documents that the sample is made of; their sum is n.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray | None
    lengths: np.ndarray


class Source(Protocol):
    """The samples of one pass over a corpus. The same index is the same sample in every process and after a restart."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class Order(Protocol):
    """What stands at each position >= 0 of an endless order, whatever the ranks, the batches and the restarts."""

    def __getitem__(self, position: int) -> SampleIndex: ...


class Packer(Protocol):
    """The rows of a run, `seq_length` tokens each. `order` is asked for the place of a row in the training process; the
    row itself is read where batches are, there or in the processes of --num-workers."""

    order: Order

    def __getitem__(self, place: SampleIndex) -> Sample: ...
