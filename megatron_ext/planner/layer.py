"""Seconds that a device and its host need for one microbatch: a layer, the head, a whole stage.

A matrix product takes its operations at the rate that large ones reach, or its bytes if those take longer, and half a
wave of tiles more: the last wave of a product leaves on average half of the multiprocessors idle. Elementwise kernels
take their bytes. Messages of tensor parallelism come on top, and the host's time to start the kernels runs beside all
that.
"""

import dataclasses
import functools
from typing import NamedTuple

from megatron_ext.attention import BACKENDS, AttentionBackend, AttentionSizes
from megatron_ext.models import ModelConfig, attention_pattern
from megatron_ext.models.count import parameters_per_layer
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.gpus import Gpu
from megatron_ext.planner.program import Program

_HALF = 2  # bytes of an element that is computed with
_TILE = 256 * 128  # elements of a product that a multiprocessor computes at once
_LOST_WAVE = 0.5
_CONCURRENCY = 4  # device and host in parallel: of a and b, (a^4 + b^4)^(1/4), between the larger and the sum


class Seconds(NamedTuple):
    """Of one pass: matrix products, memory-bound kernels, tensor-parallel messages; and the host's, meanwhile."""

    compute: float = 0.0
    memory: float = 0.0
    messages: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.compute + self.memory + self.messages

    @property
    def total(self) -> float:
        device, host = self.device, self.host
        longer = max(device, host)
        if longer == 0:
            return 0.0
        return longer * ((device / longer) ** _CONCURRENCY + (host / longer) ** _CONCURRENCY) ** (1 / _CONCURRENCY)


def plus(a: Seconds, b: Seconds, times: float = 1.0) -> Seconds:
    """a + times x b."""
    return Seconds(*(mine + times * theirs for mine, theirs in zip(a, b, strict=True)))


class PassTimes(NamedTuple):
    """Forward; backward's two halves (of the inputs, of the weights); what is computed again before backward."""

    forward: Seconds = Seconds()
    inputs: Seconds = Seconds()
    weights: Seconds = Seconds()
    again: Seconds = Seconds()


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """What a tensor-parallel group computes at once: `size` sequences of `length` tokens.

    recompute: None, "selective" or "full". trained: share of the layers' weights that get a gradient. trains_head,
    trains_embedding: whether those do.
    """

    model: ModelConfig
    size: int
    length: int
    tp: int
    sequence_parallel: bool
    recompute: str | None
    attention: AttentionBackend
    trained: float = 1.0
    trains_head: bool = True
    trains_embedding: bool = True

    @property
    def tokens(self) -> int:
        return self.size * self.length


def product(gpu: Gpu, m: float, n: float, k: float, batch: float = 1) -> float:
    """Seconds of `batch` products of [m, k] and [k, n]."""
    rate = gpu.flops * gpu.measured.matmul
    operations = 2 * batch * m * n * k
    moved = _HALF * batch * (m * k + k * n + m * n)
    wave = 2 * _TILE * k * gpu.multiprocessors / rate
    return max(operations / rate, moved / gpu.traffic) + _LOST_WAVE * wave


def _attention(batch: Microbatch, gpu: Gpu, program: Program) -> tuple[Seconds, Seconds]:
    """Scores, softmax and weighted values: forward and backward."""
    model = batch.model
    backend = batch.attention if program.flash_attention else BACKENDS["math"]
    heads, kv_heads = model.num_attention_heads / batch.tp, max(model.kv_heads / batch.tp, 1)
    sizes = AttentionSizes(batch.size, heads, kv_heads, batch.length, model.head_dim)
    work = backend.work(attention_pattern(model, batch.length), sizes)
    products = sum(product(gpu, *shape) for shape in work.products)
    dropped = 5 * sizes.rows * batch.length if program.dropout else 0.0  # read and written, with a mask of one byte
    forward, backward = (
        Seconds(
            compute=operations / (gpu.flops * gpu.measured.attention), memory=(_HALF * moved + dropped) / gpu.traffic
        )
        for operations, moved in zip(work.operations, work.moved, strict=True)
    )
    return plus(forward, Seconds(products)), plus(backward, Seconds(2 * products))


def _products(batch: Microbatch, program: Program) -> list[tuple[float, float]]:
    """(outputs, inputs) of a layer's matrix products on one rank."""
    model, tp = batch.model, batch.tp
    d, h, f = model.head_dim, model.hidden_size, model.ffn_hidden_size / tp
    q, kv = model.num_attention_heads * d / tp, max(model.kv_heads / tp, 1) * d
    gates = [f, f] if model.activation == "swiglu" else [f]
    into = [q, kv, kv]
    if program.fused_projections:
        into, gates = [sum(into)], [sum(gates)]
    return [*((n, h) for n in into), (h, q), *((n, h) for n in gates), (h, f)]


def _elementwise(batch: Microbatch, program: Program) -> tuple[float, float]:
    """Bytes that a layer's kernels between the products read and write, forward and backward."""
    model, tp = batch.model, batch.tp
    hidden = batch.tokens * model.hidden_size / (tp if batch.sequence_parallel else 1)
    heads = batch.tokens * (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim / tp
    turned = batch.tokens * (model.num_attention_heads + model.kv_heads) * model.head_dim / tp
    inner = batch.tokens * model.ffn_hidden_size / tp
    norms = 1 if model.parallel_residual == "one-norm" else 2
    # residual sums read twice and write
    forward = hidden * (program.norm_passes[0] * norms + 2 * 3)
    backward = hidden * (program.norm_passes[1] * norms + 2 * 2)
    if program.dropout:  # reads, writes, and a mask of one byte, fused with the sums
        forward, backward = forward + hidden * 1, backward + hidden * 1
    forward, backward = forward + 2 * heads, backward + 2 * heads  # heads to the front and back
    if model.position_embedding_type == "rope":
        forward, backward = forward + program.rotation_passes * turned, backward + program.rotation_passes * turned
    passes = program.gated_passes if model.activation == "swiglu" else program.plain_passes
    forward, backward = forward + passes[0] * inner, backward + passes[1] * inner
    if model.add_bias_linear and not program.fused_projections:
        forward, backward = forward + 2 * (heads + inner + 2 * hidden), backward + heads + inner + 2 * hidden
    return _HALF * forward, _HALF * backward


@functools.lru_cache(maxsize=4096)
def layer_times(batch: Microbatch, cluster: Cluster, program: Program) -> PassTimes:
    """One decoder layer."""
    gpu, tp = cluster.gpu, batch.tp
    shapes = _products(batch, program)
    forward = sum(product(gpu, batch.tokens, n, k) for n, k in shapes)
    inputs = sum(product(gpu, batch.tokens, k, n) for n, k in shapes)
    weights = batch.trained * sum(product(gpu, n, k, batch.tokens) for n, k in shapes)
    core_forward, core_backward = _attention(batch, gpu, program)
    moved_forward, moved_backward = (moved / gpu.traffic for moved in _elementwise(batch, program))
    gradients = batch.trained * parameters_per_layer(batch.model) / tp * program.accumulate_bytes / gpu.traffic
    host = program.kernels * gpu.measured.launch_us * 1e-6
    message = _HALF * batch.tokens * batch.model.hidden_size
    sums = 2 * cluster.all_reduce(tp, 1, message)  # as much as two all-gathers and two reduce-scatters
    # sequence parallelism gathers the inputs of the products again; their weights' gradients wait for them
    regathered = 2 * cluster.ring(tp, 1, message) if batch.sequence_parallel and batch.trained else 0.0
    whole = plus(Seconds(forward, moved_forward, sums, host), core_forward)
    again = Seconds()
    if batch.recompute == "full":
        again = whole
    elif batch.recompute == "selective":
        again = core_forward
    return PassTimes(
        forward=whole,
        inputs=plus(Seconds(inputs, moved_backward, sums, host), core_backward),
        weights=Seconds(weights, gradients, regathered, host if batch.trained else 0.0),
        again=again,
    )


@functools.lru_cache(maxsize=4096)
def head_times(batch: Microbatch, cluster: Cluster, program: Program) -> PassTimes:
    """The head and the loss."""
    gpu, model = cluster.gpu, batch.model
    rows, h = model.vocab_size / batch.tp, model.hidden_size
    forward, backward = (batch.tokens * rows * moved / gpu.traffic for moved in program.loss_bytes)
    gradients = rows * h * program.accumulate_bytes / gpu.traffic
    message = cluster.all_reduce(batch.tp, 1, _HALF * batch.tokens * h)
    weights = Seconds(product(gpu, rows, h, batch.tokens), gradients) if batch.trains_head else Seconds()
    return PassTimes(
        forward=Seconds(product(gpu, batch.tokens, rows, h), forward),
        inputs=Seconds(product(gpu, batch.tokens, h, rows), backward, message),
        weights=weights,
    )


@functools.lru_cache(maxsize=4096)
def embedding_times(batch: Microbatch, cluster: Cluster, program: Program) -> PassTimes:
    """The embedding: rows that are read and written, and a gradient of the whole matrix."""
    gpu, model = cluster.gpu, batch.model
    hidden = _HALF * batch.tokens * model.hidden_size
    matrix = model.vocab_size * model.hidden_size / batch.tp * program.accumulate_bytes
    sums = cluster.all_reduce(batch.tp, 1, hidden)
    return PassTimes(
        forward=Seconds(memory=2 * hidden / gpu.traffic, messages=sums),
        weights=Seconds(memory=(2 * hidden + matrix) / gpu.traffic if batch.trains_embedding else 0.0),
    )


@functools.lru_cache(maxsize=65536)
def stage_times(
    batch: Microbatch, layers: int, has_embedding: bool, has_head: bool, cluster: Cluster, program: Program
) -> PassTimes:
    """All that stands on a stage of the pipeline."""
    parts = [(layer_times(batch, cluster, program), layers)]
    if has_embedding:
        parts.append((embedding_times(batch, cluster, program), 1))
    if has_head:
        parts.append((head_times(batch, cluster, program), 1))
    total = PassTimes()
    for times, count in parts:
        total = PassTimes(*(plus(mine, theirs, count) for mine, theirs in zip(total, times, strict=True)))
    return total
