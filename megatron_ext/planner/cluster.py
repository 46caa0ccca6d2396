"""GPUs in nodes, and how long messages between them take."""

import dataclasses

from megatron_ext.planner.gpus import Gpu

_START, _HOP = 35e-6, 4e-6
"""Seconds of a ring collective whatever its size, and of each of its hops: fitted to the nccl-tests tables of 2, 4 and
8 A100 that vTrain (arXiv 2312.12391) published with its code: 43, 59 and 91 us against 44, 51 and 92 for 1 MiB."""
_NETWORK_HOP = 10e-6


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`gpus` of one kind in nodes of `gpus_per_node`, numbered node by node."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8

    def ring(self, size: int, stride: int, payload: float) -> float:
        """Seconds of an all-gather or reduce-scatter of `payload` bytes, the whole tensor, among `size` ranks.

        The ranks are `stride` apart, and the `stride` groups that lie between talk at the same time. Within a node
        every rank passes (size - 1) / size of the payload on to the next over its own link. Between nodes a group has
        the network adapters of as many GPUs as it has in a node.
        """
        if size == 1 or payload == 0:
            return 0.0
        measured = self.gpu.measured
        link = self.gpu.link_gb_s * 1e9 * measured.link
        hops = size - 1
        if not self.crosses_nodes(size, stride):
            return _START / 2 + hops * _HOP + hops / size * payload / link
        in_node = max(1, min(size, self.gpus_per_node // stride))
        network = min(link, in_node * self.gpu.network_gb_s * 1e9 * measured.network)
        nodes = -(-size // in_node)
        # over many nodes libraries go by trees, so that latency grows with their logarithm
        latency = (in_node - 1) * _HOP + nodes.bit_length() * 2 * _NETWORK_HOP
        return _START / 2 + latency + hops / size * payload / network

    def all_reduce(self, size: int, stride: int, payload: float) -> float:
        """Seconds of the sum of `payload` bytes over `size` ranks: a reduce-scatter and an all-gather."""
        return 2 * self.ring(size, stride, payload)

    def send(self, payload: float) -> float:
        """Seconds that `payload` bytes take to another rank: over the link, or the network if there are more nodes."""
        gpu = self.gpu
        within = self.gpus <= self.gpus_per_node
        rate = gpu.link_gb_s * gpu.measured.link if within else gpu.network_gb_s * gpu.measured.network
        return payload / (rate * 1e9)

    def crosses_nodes(self, size: int, stride: int) -> bool:
        """Whether any of the groups has ranks on two nodes."""
        return self.gpus > self.gpus_per_node and self.gpus_per_node % (size * stride) != 0
