"""One matrix on two stages: the embedding on the first, the same weights as the head on the last.

Both copies start equal, take the same gradient and the same optimizer step, and so stay equal bit for bit. The
first stage's copy is the one that counts in the gradient norm and is written to checkpoints.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_ext.mesh import ProcessGrid
from megatron_ext.models import Decoder
from megatron_ext.models.names import HEAD
from megatron_ext.tensor_parallel import gradient_of


def copies_of_tied(decoders: Iterable[Decoder]) -> frozenset[str]:
    """Names of these decoders' parameters that are copies of one on another stage: the tied head."""
    copied = (d.config.tied and d.stage.has_head and not d.stage.has_embedding for d in decoders)
    return frozenset({HEAD} if any(copied) else ())


class TiedEmbedding:
    """The copies of the tied matrix that this rank holds: none, one or (V-shaped schedules) both."""

    def __init__(self, decoders: list[Decoder], grid: ProcessGrid):
        self.source: torch.nn.Parameter | None = None
        self.copy: torch.nn.Parameter | None = None
        self._group, self._device = grid.mesh["pp"].get_group(), grid.device
        self._first, self._last = 0, grid.size("pp") - 1
        for decoder in decoders:
            if not decoder.config.tied or decoder.stage.has_embedding == decoder.stage.has_head:
                continue
            if decoder.stage.has_embedding:
                self.source = decoder.embed_tokens.weight
            else:
                self.copy = decoder.lm_head.weight

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give both copies, unless frozen, the sum of their gradients. The ranks of the two stages call it together."""
        if self.source is not None and self.copy is not None and self.source.requires_grad:
            first, last = gradient_of(self.source).to_local(), gradient_of(self.copy).to_local()
            first += last
            last.copy_(first)
            return
        mine = self.source if self.source is not None else self.copy
        if mine is None or not mine.requires_grad:
            return
        grad = gradient_of(mine).to_local()
        if grad.numel() == 0:
            return
        ours = grad.contiguous().to(self._device)  # offloaded gradients are on the host; messages leave from the device
        theirs = torch.empty_like(ours)
        peer = dist.get_global_rank(self._group, self._last if mine is self.source else self._first)
        send = dist.P2POp(dist.isend, ours, peer, self._group)
        receive = dist.P2POp(dist.irecv, theirs, peer, self._group)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()
        grad.add_(theirs.to(grad.device))
