"""What one microbatch keeps on a stage from its forward to its backward pass, term by term.

Every term is a tensor that autograd saves in the layers of `models`, `tensor_parallel` and `kernels`. In the
sizes: b sequences, s tokens, h hidden, f feed-forward, a heads of d, g key/value heads, t tensor-parallel ranks,
e bytes of an element as computed. What attention keeps, its backend says. What is the same for all microbatches is
there once, see `attention_input_bytes`; documents in a sequence (which a configuration does not know of) would add
their mask, b s s e, to every microbatch. Weights that --train-only freezes keep no input, except that those frozen by a
pattern are counted as if they were trained.
"""

import dataclasses

import torch

from megatron_ext.attention import AttentionBackend, AttentionSizes, Pattern
from megatron_ext.engine import EngineConfig
from megatron_ext.kernels import Backend, load_kernels
from megatron_ext.kernels.backend import LossBytes
from megatron_ext.models import StageSpec, attention_pattern
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.optim.trainable import MODES
from megatron_ext.planner.states import local_elements, stage_parameters
from megatron_ext.tensor_parallel.lora import dropout_bytes

_INDEX, _BOOL = torch.int64.itemsize, torch.bool.itemsize


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes of one microbatch on a stage.

    kept: from the forward to the backward pass (or its input half), of which `layer` is a layer's and `head` the final
    norm's, head's and loss's; logits: beside it, what the loss keeps of the logits' size. deferred, deferred_logits:
    the same between the two halves of a split backward pass. temporary: on top of what is kept, most that the backward
    pass of a layer needs at once; temporary_logits: and that the head and loss need in either pass. message: what one
    stage hands to the next.
    """

    kept: float
    layer: float
    head: float
    logits: float
    deferred: float
    deferred_logits: float
    temporary: float
    temporary_logits: float
    message: float


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Elements of one microbatch's tensors on a rank. slice: [b, s or s/t, h], what is between parallel regions."""

    tokens: int
    tokens_of_slice: int
    whole: int
    slice: int
    queries: int
    keys: int
    ffn: int
    element: int
    wide: int  # bytes of an element where statistics and sums are kept

    @classmethod
    def of(cls, config: EngineConfig) -> "_Sizes":
        model, batch, tp = config.model, config.batch, config.parallel.tensor_model_parallel_size
        tokens = batch.micro_batch_size * batch.seq_length
        tokens_of_slice = tokens // (tp if config.parallel.sequence_parallel else 1)
        compute = config.precision.compute
        return cls(
            tokens=tokens,
            tokens_of_slice=tokens_of_slice,
            whole=tokens * model.hidden_size,
            slice=tokens_of_slice * model.hidden_size,
            queries=tokens * model.num_attention_heads // tp * model.head_dim,
            keys=tokens * max(model.kv_heads // tp, 1) * model.head_dim,
            ffn=tokens * model.ffn_hidden_size // tp,
            element=compute.itemsize,
            wide=torch.promote_types(compute, torch.float32).itemsize,
        )


def saved_bytes(
    config: EngineConfig, stage: StageSpec, device_type: str = "cuda", casts: bool = False
) -> ActivationBytes:
    """What a microbatch keeps on `stage`.

    config: validated. device_type: whose kernels run, "cuda" or "cpu". casts: weights are cast by the layers, and their
    gradients back (ZeRO-0 in bf16 or fp16).
    """
    sizes = _Sizes.of(config)
    e, layers, message = sizes.element, stage.last - stage.first, sizes.slice * sizes.element
    recomputes, widens = config.recompute.recompute_granularity == "full", _widens(config, device_type)
    whole_layer = sum(layer_terms(config, device_type).values())
    layer = message if recomputes else whole_layer
    kept = float(layers * layer)
    if stage.has_embedding:
        kept += sum(_embedding(config, device_type).values())
    elif widens and not recomputes:
        kept += message  # the received input, of which norms keep only a wider copy
    head, of_loss = 0.0, LossBytes(0.0, 0.0, 0.0, 0.0)
    if stage.has_head:
        rows = -(-config.model.vocab_size // config.parallel.tensor_model_parallel_size)
        of_loss = _kernels(config).linear_cross_entropy.kept(sizes.tokens, sizes.tokens * rows, e, sizes.wide)
        norm = sum(_norm(config, device_type, sizes.slice, sizes.tokens_of_slice).values())
        trained = config.trainable.trains(EMBEDDING if config.model.tied else HEAD)
        head = norm + (message if trained else 0.0) + of_loss.tokens
        kept += head
    else:
        kept += message  # the output, until its gradient has come
    temporary = _temporary(config, casts)
    if recomputes:
        one = StageSpec(stage.first, stage.first + 1, has_embedding=False, has_head=False)
        cast = e * local_elements(config, stage_parameters(config, one))[0] if casts else 0
        temporary += whole_layer - (0 if widens else message) + cast
    if stage.has_embedding:  # there is no gradient to hand on, and torch leaves the whole backward pass for later
        deferred, deferred_logits = kept + message, of_loss.logits
    else:
        deferred = kept + layers * _deferred_gradients(config) + (message - of_loss.tokens if stage.has_head else 0.0)
        deferred_logits = of_loss.deferred
    return ActivationBytes(
        kept, layer, head, of_loss.logits, deferred, deferred_logits, temporary, of_loss.temporary, message
    )


def layer_terms(config: EngineConfig, device_type: str = "cuda") -> dict[str, float]:
    """Bytes by name that a layer keeps which is not recomputed as a whole. The residual stream is the norms' input."""
    sizes, model = _Sizes.of(config), config.model
    terms: dict[str, float] = {}
    norms = 1 if model.parallel_residual == "one-norm" else 2
    for i in range(norms):
        norm = _norm(config, device_type, sizes.slice, sizes.tokens_of_slice)
        if i and model.parallel_residual == "two-norms" and not _widens(config, device_type):
            del norm["input"]  # the same for both
        terms |= {f"norm {i}: {name}": size for name, size in norm.items()}
        if _keeps_inputs(config):
            terms[f"norm {i}: output"] = sizes.slice * sizes.element
    terms |= {f"attention: {name}": size for name, size in _attention(config, device_type).items()}
    terms |= {f"feed-forward: {name}": size for name, size in _feed_forward(config).items()}
    terms |= {f"adapter: {name}": size for name, size in _adapters(config, device_type).items()}
    return terms


def _norm(config: EngineConfig, device_type: str, elements: int, rows: int) -> dict[str, float]:
    """What a norm keeps besides its output, which is its reader's."""
    sizes, norm = _Sizes.of(config), _kernels(config).norm(config.model.normalization)
    return norm.kept(elements, rows, sizes.element, sizes.wide, device_type, trained=not _frozen(config))


def _kernels(config: EngineConfig) -> Backend:
    return load_kernels(config.kernels)


def _frozen(config: EngineConfig) -> bool:
    """Whether no weight of a layer is trained, but for adapters."""
    return config.trainable.train_only in MODES


def _keeps_inputs(config: EngineConfig) -> bool:
    """Whether linear layers, or adapters that drop nothing of it, keep their input."""
    return not _frozen(config) or (config.adapters is not None and not config.adapters.lora_dropout)


def _widens(config: EngineConfig, device_type: str) -> bool:
    """Whether norms keep a wider copy of their input, not the input."""
    return _norm(config, device_type, 1, 1)["input"] > _Sizes.of(config).element


def _attention(config: EngineConfig, device_type: str) -> dict[str, float]:
    sizes, model = _Sizes.of(config), config.model
    e, q, k = sizes.element, sizes.queries, sizes.keys
    if config.recompute.recompute_granularity == "selective":
        return {"queries": q * e, "keys and values": 2 * k * e, "output": q * e}
    terms: dict[str, float] = {}
    if model.qk_layernorm:
        for name, size in (("queries", q), ("keys", k)):
            norm = _norm(config, device_type, size, size // model.head_dim)
            terms |= {f"norm of {name}: {part}": n for part, n in norm.items()}
        if device_type == "cuda" or model.normalization == "LayerNorm" or _widens(config, device_type):
            terms["output in the order of heads"] = q * e  # o_proj then reads a copy
    backend, pattern = attention_backend(config, device_type), _pattern(config)
    return terms | backend.kept(pattern, _attention_sizes(config), e, sizes.wide)


def _feed_forward(config: EngineConfig) -> dict[str, float]:
    sizes = _Sizes.of(config)
    read_by_down_proj = ("activated",) if _keeps_inputs(config) else ()
    kept = (*_kernels(config).activation(config.model.activation).keeps, *read_by_down_proj)
    return dict.fromkeys(kept, float(sizes.ffn * sizes.element))


def _adapters(config: EngineConfig, device_type: str) -> dict[str, float]:
    adapters, sizes = config.adapters, _Sizes.of(config)
    if adapters is None or not adapters.lora_dropout:
        return {}
    inputs = {"o_proj": sizes.queries, "down_proj": sizes.ffn}
    return {
        name: dropout_bytes(inputs.get(name, sizes.slice), sizes.element, device_type)
        for name in adapters.lora_target_modules
    }


def attention_input_bytes(config: EngineConfig, device_type: str = "cuda") -> float:
    """What all layers of a rank read in every microbatch: positions, the rotation's cosines and sines, the mask."""
    model, s, e = config.model, config.batch.seq_length, config.precision.compute.itemsize
    rotation = 2 * s * model.rotary_dim * e if model.position_embedding_type == "rope" else 0
    return s * _INDEX + rotation + attention_backend(config, device_type).prepared_bytes(_pattern(config), s, e)


def _pattern(config: EngineConfig) -> Pattern:
    tp = config.parallel.tensor_model_parallel_size
    return attention_pattern(config.model, config.batch.seq_length, tp=tp)


def attention_backend(config: EngineConfig, device_type: str) -> AttentionBackend:
    return config.attention(torch.device(device_type), torch.device("cpu")).backend


def _attention_sizes(config: EngineConfig) -> AttentionSizes:
    model, batch, tp = config.model, config.batch, config.parallel.tensor_model_parallel_size
    heads, kv_heads = model.num_attention_heads // tp, max(model.kv_heads // tp, 1)
    return AttentionSizes(batch.micro_batch_size, heads, kv_heads, batch.seq_length, model.head_dim)


def _embedding(config: EngineConfig, device_type: str) -> dict[str, float]:
    """Its output is the first layer's input; the ids are the batch's."""
    sizes, model = _Sizes.of(config), config.model
    terms: dict[str, float] = {}
    if config.parallel.tensor_model_parallel_size > 1:
        terms["ids of this rank"] = sizes.tokens * (_INDEX + _BOOL)
    if model.position_embedding_type == "learned_absolute":
        terms["positions"] = config.batch.seq_length * _INDEX
    if model.embed_layernorm:
        terms |= _norm(config, device_type, sizes.slice, sizes.tokens_of_slice)
    return terms


def _temporary(config: EngineConfig, casts: bool) -> float:
    """What the backward pass of a layer needs on top of all that is kept: at its start, in the feed-forward part.

    Either the last product's, or the activation's, when what the product kept is free again.
    """
    sizes, model, kernels = _Sizes.of(config), config.model, _kernels(config)
    weight = model.hidden_size * model.ffn_hidden_size // config.parallel.tensor_model_parallel_size
    of_product = kernels.row_parallel_temporary(
        sizes.ffn, sizes.whole, weight, sizes.element, sizes.wide if casts else 0, config.parallel.sequence_parallel
    )
    return max(of_product, kernels.activation(model.activation).temporary * sizes.ffn * sizes.element)


def _deferred_gradients(config: EngineConfig) -> float:
    """Of a layer: the gradients of what its weights produce, kept from the input half to the weight half."""
    sizes = _Sizes.of(config)
    inner = _kernels(config).activation(config.model.activation).inputs
    outputs = inner * sizes.ffn + sizes.queries + 2 * sizes.keys + 2 * sizes.whole + 2 * sizes.slice
    return outputs * sizes.element


def paper_layer_bytes(
    *, s: int, b: int, h: int, a: int, t: int = 1, sequence_parallel: bool = False, recompute: str | None = None
) -> float:
    """What a layer of a GPT (four times as wide inside) keeps in Megatron-LM: Korthikanti et al., arXiv 2205.05198,
    table 2, in half precision.

    It differs from ours by the masks of its dropouts, of s b h bytes each behind the attention and feed-forward
    parts, and by an attention that is not fused and keeps 5 a s^2 b bytes of scores and their dropout.
    """
    if recompute == "full":
        return 2 * s * b * h
    scores = 0.0 if recompute == "selective" else 5 * a * s / h / t
    return s * b * h * ((34 / t if sequence_parallel else 10 + 24 / t) + scores)
