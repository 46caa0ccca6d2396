"""How full a rank of each pipeline rank gets: states, what exists only inside a step, and activations.

    inside a step, of the weights of a rank's stages (bytes c as computed, r as stored and reduced):
    ZeRO stage   weights                                     gradients
    0            c of all but the embedding, if c is not r   (as held)
    1            c of all, gathered once                     r of all, whole until the last microbatch
    2            c of all, gathered once                     of one group on its way, whole
    3            c of one group in use and of the next       of one group on its way, whole

A group is what FSDP gathers and reduces together: a layer, the embedding, the head. Zero-bubble schedules make the
pipeline stage one group, see `zero.data_parallel`. DeepSpeed's groups and buckets are taken for the same. At stage 0
layers that are computed again cast one at a time.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron_ext.engine import EngineConfig
from megatron_ext.footprint import ModelStates
from megatron_ext.models import StageSpec
from megatron_ext.pipeline import StageLayout
from megatron_ext.pipeline.actions import Action, action_lists
from megatron_ext.planner.activations import ActivationBytes, attention_input_bytes, saved_bytes
from megatron_ext.planner.states import (
    canonical_stage,
    fullest_states,
    is_sharded,
    local_elements,
    shards,
    stage_layout,
    stage_parameters,
)

_ROUNDS = 3  # two are enough (the tests compare)


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank of a pipeline rank, when most is in use.

    states: as `Engine.model_states` has them, of which `offloaded` bytes are not on the device. working: weights and
    gradients that exist only inside a step (below 0 where the sharded gradients, which are among the states, are not
    there yet). activations: what microbatches keep, what attention reads in all of them, and the temporaries of a
    backward pass. head: tensors as large as the logits. buffers: messages between stages.
    """

    states: ModelStates
    working: float
    activations: float
    head: float
    buffers: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        states = self.states.total - self.offloaded
        return states + self.working + self.activations + self.head + self.buffers


def pipeline_memory(config: EngineConfig, world_size: int, device_type: str = "cuda") -> list[RankMemory]:
    """By pipeline rank, what its fullest rank holds at the highest point of a step.

    config: validated. device_type: whose kernels run, "cuda" or "cpu". Too much where no microbatch is left to be
    forwarded once the first one has been backwarded (gpipe, or as many microbatches as stages): gradients are counted
    beside the most activations. The allocator's fragments, the context and what NCCL and cuBLAS take are not counted.
    """
    layout = stage_layout(config, world_size)
    microbatches = config.batch.microbatches(config.parallel.data_parallel_size(world_size))
    ranks = shards(config, world_size) if is_sharded(config, world_size) else 0
    casts, fixed = casts_weights(config, world_size), attention_input_bytes(config, device_type)
    kinds = [canonical_stage(config, stage) for stage in layout.stages]
    saved = {kind: saved_bytes(config, kind, device_type, casts) for kind in set(kinds)}
    points = {kind: _points(config, layout, kind, of, ranks, device_type) for kind, of in saved.items()}
    of_stages, points_of_stages = [saved[kind] for kind in kinds], [points[kind] for kind in kinds]
    standing: dict[tuple[StageSpec, ...], tuple[ModelStates, float]] = {}
    found = []
    for rank, passed in enumerate(rank_occupancies(layout.schedule, layout.rank_of, microbatches)):
        mine = tuple(kinds[index] for index in layout.on_rank(rank))
        if mine not in standing:
            states = fullest_states(config, world_size, rank)
            standing[mine] = states, _whole(config, mine, states) if ranks else casts * cast_bytes(config, mine)
        states, whole = standing[mine]
        highest = peak(passed, of_stages, points_of_stages)
        buffers = 2 * saved[kinds[0]].message if len(kinds) > 1 else 0.0  # one that arrives and one that leaves
        working, offloaded = whole + highest.working, _offloaded(config, states)
        activations = fixed + highest.activations
        found.append(RankMemory(states, working, activations, highest.logits, buffers, offloaded))
    return found


def casts_weights(config: EngineConfig, world_size: int) -> bool:
    """Whether weights are cast where they are used, for FSDP does not hold them: see `DataParallel.begin`."""
    ours = config.zero.zero_engine == "torch" and not is_sharded(config, world_size)
    return ours and config.precision.compute != config.precision.stored


def cast_bytes(config: EngineConfig, stages: Iterable[StageSpec]) -> float:
    """Bytes of a rank's casts, where there are any, that are kept for a step: not of embeddings, which are read as they
    are stored, nor of layers that are computed again."""
    again = config.recompute.recompute_granularity == "full"
    kept = [StageSpec(s.last if again else s.first, s.last, has_embedding=False, has_head=s.has_head) for s in stages]
    elements = sum(local_elements(config, stage_parameters(config, stage))[0] for stage in kept)
    return float(config.precision.compute.itemsize * elements)


def _offloaded(config: EngineConfig, states: ModelStates) -> float:
    """Bytes of the states that are on the host or on NVMe. FSDP's shards go together, DeepSpeed's by kind."""
    zero = config.zero
    optimizer = states.gradients + states.optimizer if zero.offload_optimizer is not None else 0.0
    weights = zero.offload_param is not None or (optimizer > 0 and zero.zero_engine == "torch")
    return optimizer + (states.weights if weights else 0.0)


class Occupancy(NamedTuple):
    """A pass on a rank: its kind and stage, and how many microbatches each stage of the rank then keeps, in the order
    of `stages`: up to their input half and between both halves. What a pass makes or frees is there while it runs."""

    kind: str
    stage: int
    stages: tuple[int, ...]
    kept: tuple[int, ...]
    deferred: tuple[int, ...]


def occupancies(actions: Sequence[Action]) -> list[Occupancy]:
    """What a rank goes through while it runs these actions, but for what is no more in any respect than another."""
    stages = tuple(sorted({action.stage for action in actions}))
    kept, deferred = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)
    found: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for kind, stage, _ in actions:
        if kind == "F":
            kept[stage] += 1
        found.setdefault((kind, stage), set()).add((*kept.values(), *deferred.values()))
        if kind == "W":
            deferred[stage] -= 1
        elif kind in "BI":
            kept[stage] -= 1
            deferred[stage] += kind == "I"
    return [
        Occupancy(kind, stage, stages, counts[: len(stages)], counts[len(stages) :])
        for (kind, stage), alike in found.items()
        for counts in _largest(alike)
    ]


def _largest(alike: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that no other exceeds in every count."""
    largest: list[tuple[int, ...]] = []
    for counts in sorted(alike, key=sum, reverse=True):
        if not any(all(map(operator.ge, other, counts)) for other in largest):
            largest.append(counts)
    return largest


def _enough(layout: StageLayout, microbatches: int) -> int:
    """As many as it takes to see the most that is kept: schedules go in rounds, and after some all are alike."""
    pp, ahead = max(layout.rank_of) + 1, layout.order.ahead
    rounds = max(1, microbatches // pp)
    if rounds <= _ROUNDS or (ahead is not None and ahead(pp, 0, microbatches) == microbatches):
        return microbatches
    if layout.order.stages_per_rank is None:
        return _ROUNDS * (microbatches // rounds)
    return _ROUNDS * pp + microbatches % pp


@functools.lru_cache(maxsize=4096)
def rank_occupancies(schedule: str, rank_of: tuple[int, ...], microbatches: int) -> tuple[list[Occupancy], ...]:
    """By pipeline rank; which layers stand where does not matter."""
    layout = StageLayout(schedule, (StageSpec(0, 0, False, False),) * len(rank_of), rank_of)
    microbatches = _enough(layout, microbatches)
    return tuple(map(occupancies, action_lists(layout, microbatches)))


class Point(NamedTuple):
    """Bytes at a point of a pass; see `RankMemory`."""

    activations: float
    logits: float
    working: float


def peak(passed: Iterable[Occupancy], saved: Sequence[ActivationBytes], points: Sequence[dict[str, Point]]) -> Point:
    """The point of a rank's step with most bytes.

    saved: of one microbatch, by stage of the pipeline. points: by stage and kind of pass, what there is more (or less)
    at the fullest point of the pass than all microbatches keep that the rank works on, the one that passes included.
    """

    def reached(occupancy: Occupancy) -> Point:
        activations, logits, working = points[occupancy.stage][occupancy.kind]
        for stage, kept, deferred in zip(occupancy.stages, occupancy.kept, occupancy.deferred, strict=True):
            of = saved[stage]
            activations += kept * of.kept + deferred * of.deferred
            logits += kept * of.logits + deferred * of.deferred_logits
        return Point(activations, logits, working)

    return max(map(reached, passed), key=sum)


def _points(
    config: EngineConfig, layout: StageLayout, stage: StageSpec, saved: ActivationBytes, ranks: int, device_type: str
) -> dict[str, Point]:
    """Where a pass through a stage needs most, by kind of pass. ranks: that ZeRO shards over; 0: it does not.

    Forward: its end. Backward: the loss; the head; the first layer of the pass (the stage's last); the reduction of
    that one's gradients; the layer after it; the embedding.
    """
    compute, stored = config.precision.compute.itemsize, config.precision.stored.itemsize
    zero, splits = config.zero, layout.order.splits_backward
    groups = _groups(config, stage)
    first, layer, last = groups[0], _one_layer(config, stage), groups[-1]
    at_loss, at_layer = 0.0, 0.0  # gathered
    if ranks and zero.zero_stage == 3:
        at_loss, at_layer = compute * (last[0] + layer[0]), compute * 2 * layer[0]
        if splits:
            at_loss = at_layer = compute * sum(whole for whole, _ in groups)
    # A group's gradients as they are sent, if they are with every microbatch, beside those computed. FSDP keeps what it
    # sent until it sends the next, and gloo copies it. What is sent once a step is sent when little else is kept.
    sent = stored if ranks and zero.zero_stage >= 2 and not zero.accumulate_then_reduce else 0.0
    reduced = compute + sent if ranks else 0.0
    if sent and device_type == "cpu":
        reduced = max(reduced, (2 + 1 / ranks) * sent)
    before = 0.0 if stage.has_embedding else sent * layer[1]
    loss = Point(0.0, saved.temporary_logits, at_loss + before)
    of_head = first if config.model.tied and stage.has_embedding else last
    # beside the gradient of the logits, which took their place, the weight's: as computed and, of a cast one, as stored
    weight_of_head = (compute if ranks or compute == stored else compute + stored) * of_head[1] * stage.has_head
    of_logits = (saved.temporary_logits or saved.logits) - saved.logits
    head = Point(saved.message, of_logits, at_loss + before + weight_of_head)
    backward = [
        loss,
        head,
        Point(saved.temporary - saved.head, -saved.logits, at_layer + (sent * last[1] if stage.has_head else before)),
        Point(-saved.head - saved.layer, -saved.logits, at_layer + reduced * layer[1]),
        Point(saved.temporary - saved.head - saved.layer, -saved.logits, at_layer + sent * layer[1]),
        Point(-saved.kept, -saved.logits, at_layer + (reduced or stored) * first[1] * stage.has_embedding),
    ]
    if not splits:
        return {"F": loss, "B": max(backward, key=sum)}
    gradients = compute * sum(trained for _, trained in groups) + reduced * layer[1]
    weight = [Point(0.0, 0.0, at_layer), Point(-saved.deferred, -saved.deferred_logits, at_layer + gradients)]
    if stage.has_embedding:  # the whole pass is there
        passing = Point(0.0, 0.0, at_layer)
        return {"F": loss, "B": max(backward, key=sum), "I": passing, "W": max(*backward, *weight, key=sum)}
    whole = Point(saved.deferred - saved.kept + saved.temporary, saved.deferred_logits, at_layer + before)
    return {"F": loss, "B": max(backward, key=sum), "I": max(loss, whole, key=sum), "W": max(weight, key=sum)}


def _whole(config: EngineConfig, stages: Iterable[StageSpec], states: ModelStates) -> float:
    """Weights and gradients that are whole on a rank for the length of a step. DeepSpeed's are among its states."""
    if config.zero.zero_engine == "deepspeed":
        return 0.0
    groups = [group for stage in stages for group in _groups(config, stage)]
    weights = config.precision.compute.itemsize * sum(whole for whole, _ in groups)
    gradients = float(config.precision.stored.itemsize * sum(trained for _, trained in groups))
    if config.zero.offload_optimizer is None:
        gradients -= states.gradients  # the shards, which are made of them
    zero = config.zero
    accumulated = zero.zero_stage == 1 or zero.accumulate_then_reduce
    return (weights if zero.zero_stage < 3 else 0.0) + (gradients if accumulated else 0.0)


def _groups(config: EngineConfig, stage: StageSpec) -> list[tuple[int, int]]:
    """Elements on a tensor-parallel rank of what FSDP gathers together, in forward order: all, and the trained."""

    def part(first: int, last: int, has_embedding: bool = False, has_head: bool = False) -> tuple[int, int]:
        return local_elements(config, stage_parameters(config, StageSpec(first, last, has_embedding, has_head)))

    if config.trainable.tells_layers_apart:
        layers = [part(i, i + 1) for i in range(stage.first, stage.last)]
    else:
        layers = [part(0, 1)] * (stage.last - stage.first)
    if config.model.tied and stage.has_embedding and stage.has_head:
        return [part(0, 0, True, True), *layers]
    before = [part(0, 0, has_embedding=True)] if stage.has_embedding else []
    return [*before, *layers, *([part(0, 0, has_head=True)] if stage.has_head else [])]


def _one_layer(config: EngineConfig, stage: StageSpec) -> tuple[int, int]:
    """The same of the stage's last layer, the first one of a backward pass."""
    last = StageSpec(stage.last - 1, stage.last, has_embedding=False, has_head=False)
    return local_elements(config, stage_parameters(config, last))
