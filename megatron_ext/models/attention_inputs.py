"""What attention reads beside queries, keys and values: the angles of positions, and who may attend to whom."""

import math
from collections.abc import Iterable

import torch

from megatron_ext.attention import Attend, Choice, Pattern, Prepared
from megatron_ext.errors import RequestError
from megatron_ext.kernels import Backend
from megatron_ext.models.config import ModelConfig
from megatron_ext.models.rotary import Rotation, inverse_frequencies, rotation
from megatron_ext.tensor_parallel import TensorParallel


class AttentionInputs:
    """The rotations of all stages of a rank, and what its attention backend makes of the model's pattern.

    What is the same for every microbatch (sequences of positions 0..s-1, a window, ALiBi) is made on the device once,
    when it is first asked for; what positions or documents change is made for a microbatch, from what is there. These
    are no buffers of a module: neither checkpoints nor FSDP know of them, nor what gives modules their storage.
    """

    def __init__(self, config: ModelConfig, tp: TensorParallel, dtype: torch.dtype, kernels: Backend):
        self.config, self.tp, self.dtype, self.kernels = config, tp, dtype, kernels
        self._made_for: tuple[int, torch.device] | None = None
        self._positions = self._frequencies = torch.empty(0)
        self._rotation: Rotation | None = None
        self._prepared: dict[bool, Prepared] = {}

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

    def attend(self, length: int, document_ids: torch.Tensor | None, device: torch.device) -> Attend:
        """Attention of this microbatch. document_ids int64 [b, s]: a token attends within its own document only.

        Raises RequestError where the backend cannot.
        """
        self._make(length, device)
        documents = document_ids is not None
        if documents not in self._prepared:
            pattern = attention_pattern(self.config, length, documents, self.tp.size, self.tp.rank)
            shape = self.config, length, documents, self.tp.size
            backend = chosen_attention(self.kernels, *shape, [device], self.dtype).backend
            self._prepared[documents] = backend.prepare(pattern, length, device, self.dtype)
        return self._prepared[documents](document_ids)

    @torch.no_grad()
    def _make(self, length: int, device: torch.device) -> None:
        """Positions and their rotation, unless they are there for sequences of this length."""
        if self._made_for == (length, device):
            return
        self._made_for, self._rotation, self._prepared = (length, device), None, {}
        self._positions = torch.arange(length, device=device)
        if self.config.position_embedding_type == "rope":
            self._frequencies = inverse_frequencies(self.config, device)
            self._rotation = rotation(self.config, self._positions, self._frequencies, self.dtype)


def attention_pattern(
    config: ModelConfig, length: int, documents: bool = False, tp: int = 1, tp_rank: int = 0
) -> Pattern:
    """Who attends to whom in sequences of `length` tokens, as rank `tp_rank` of `tp` sees it."""
    window, slopes = config.window_size, None
    if config.position_embedding_type == "alibi":
        heads = config.num_attention_heads // tp
        slopes = alibi_slopes(config.num_attention_heads)[tp_rank * heads : (tp_rank + 1) * heads]
    return Pattern(True, window if window is not None and window < length else None, slopes, documents)


def chosen_attention(
    kernels: Backend,
    config: ModelConfig,
    length: int,
    documents: bool,
    tp: int,
    devices: Iterable[torch.device],
    dtype: torch.dtype,
) -> Choice:
    """What computes attention on one of `tp` ranks, on the first of `devices` that can; see `Backend.attention`.

    Raises RequestError, what is against the first of them, where none can.
    """
    pattern, refusals = attention_pattern(config, length, documents, tp), []
    heads, kv_heads = config.num_attention_heads // tp, max(config.kv_heads // tp, 1)
    for device in devices:
        try:
            return kernels.attention(pattern, heads, kv_heads, config.head_dim, device, dtype)
        except RequestError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of every head (Press et al., arXiv 2108.12409, section 3; its code for other than powers of 2).

    A geometric sequence for the largest power of two, then every other term of the sequence for twice as many.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return (*slopes, *(2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)))
