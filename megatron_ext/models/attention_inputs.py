"""What attention reads beside queries, keys and values: the angles of positions, and who may attend to whom."""

import math

import torch

from megatron_ext.models.config import ModelConfig
from megatron_ext.models.rotary import Rotation, inverse_frequencies, rotation
from megatron_ext.tensor_parallel import TensorParallel


class AttentionInputs:
    """The rotations and masks of all stages of a rank.

    What is the same for every microbatch (sequences of positions 0..s-1, a window, ALiBi) is made on the device once,
    when it is first asked for; what positions or documents change is made for a microbatch, from what is there. These
    are no buffers of a module: neither checkpoints nor FSDP know of them, nor what gives modules their storage.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype):
        self.config, self.tp, self.dtype = config, tp, dtype
        self._made_for: tuple[int, torch.device] | None = None
        self._positions = self._frequencies = torch.empty(0)
        self._rotation: Rotation | None = None
        self._bias: torch.Tensor | None = None

    def positions(self, length: int, device: torch.device) -> torch.Tensor:
        """0..s-1, int64 [s]."""
        self._make(length, device)
        return self._positions

    def rotation(self, length: int, position_ids: torch.Tensor | None, device: torch.device) -> Rotation | None:
        """The angles at 0..s-1, or at `position_ids` [b, s]; None where the model has no rotary embedding."""
        self._make(length, device)
        if self._rotation is None or position_ids is None:
            return self._rotation
        return rotation(self.config, position_ids, self._frequencies, self.dtype)

    def mask(self, length: int, document_ids: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """What is to be added to the scores, -inf where a token may not attend; None: the causal order is all.

        document_ids [b, s]: a token attends to earlier tokens of its own document and to itself.
        Returns [b or 1, 1, s, s], with ALiBi [b or 1, this rank's heads, s, s]. (Of a bool mask torch's kernels would
        make this in every layer, and keep it for the backward pass.)
        """
        if document_ids is None and not self._windowed(length) and self.config.position_embedding_type != "alibi":
            return None
        self._make(length, device)
        if self._bias is None:
            self._bias = self._make_bias(length, device)
        if document_ids is None:
            return self._bias
        return self._bias.masked_fill(document_ids[:, None, :, None] != document_ids[:, None, None, :], -torch.inf)

    def _windowed(self, length: int) -> bool:
        return self.config.window_size is not None and self.config.window_size < length

    @torch.no_grad()
    def _make(self, length: int, device: torch.device) -> None:
        """Positions and their rotation, unless they are there for sequences of this length."""
        if self._made_for == (length, device):
            return
        self._made_for, self._rotation, self._bias = (length, device), None, None
        self._positions = torch.arange(length, device=device)
        if self.config.position_embedding_type == "rope":
            self._frequencies = inverse_frequencies(self.config, device)
            self._rotation = rotation(self.config, self._positions, self._frequencies, self.dtype)

    @torch.no_grad()
    def _make_bias(self, length: int, device: torch.device) -> torch.Tensor:
        behind = self._positions[:, None] - self._positions[None, :]  # how far the key lies behind the query
        forbidden = behind < 0
        if self._windowed(length):
            assert self.config.window_size is not None
            forbidden = forbidden | (behind >= self.config.window_size)
        if self.config.position_embedding_type != "alibi":
            return torch.zeros_like(behind, dtype=self.dtype).masked_fill_(forbidden, -torch.inf)[None, None]
        heads = self.config.num_attention_heads // self.tp.size
        slopes = alibi_slopes(self.config.num_attention_heads)[self.tp.rank * heads : (self.tp.rank + 1) * heads]
        bias = (-slopes.to(device)[:, None, None] * behind).to(self.dtype)
        return bias.masked_fill_(forbidden, -torch.inf)[None]


def alibi_slopes(heads: int) -> torch.Tensor:
    """Of every head, float32 [heads] (Press et al., arXiv 2108.12409, section 3; its code for other than powers of 2).

    A geometric sequence for the largest power of two, then every other term of the sequence for twice as many.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
