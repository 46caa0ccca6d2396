"""How full a rank of each pipeline rank gets: states, what exists only inside a step, and activations.

    inside a step, of the weights of a rank's stages (bytes c as computed, r as stored and reduced):
    ZeRO stage   weights                                     gradients
    0            casts, where c is not r, by microbatch      (as held)
    1            c of all, gathered once                     r of all, whole until the last microbatch
    2            c of all, gathered once                     of one group on its way, whole
    3            c of one group in use and of the next       of one group on its way, whole

A group is what FSDP gathers and reduces together: a layer, the embedding, the head. Zero-bubble schedules make the
pipeline stage one group, see `zero.data_parallel`. DeepSpeed's groups and buckets are taken for the same.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megatron_ext.engine import EngineConfig
from megatron_ext.footprint import ModelStates
from megatron_ext.models import StageSpec
from megatron_ext.pipeline import SCHEDULES, StageLayout
from megatron_ext.pipeline.actions import Action, action_lists
from megatron_ext.planner.activations import Saved, saved_bytes
from megatron_ext.planner.states import fullest_states, is_sharded, layout_of, local_elements, shards, stage_parameters


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank of a pipeline rank, when most is in use.

    states: as `Engine.model_states` has them, of which `offloaded` bytes are not on the device. working: weights and
    gradients that exist only inside a step (below 0 where the sharded gradients, which are among the states, are not
    there yet). activations: what microbatches keep, and the temporaries of a backward pass. head: tensors as large as
    the logits. buffers: messages between stages.
    """

    states: ModelStates
    working: float
    activations: float
    head: float
    buffers: float
    offloaded: float = 0.0

    @property
    def states_on_host(self) -> bool:
        return self.offloaded > 0

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
    layout = layout_of(config, world_size)
    microbatches = config.batch.microbatches(config.parallel.data_parallel_size(world_size))
    ranks = shards(config, world_size) if is_sharded(config, world_size) else 0
    casts = not ranks and config.precision.compute != config.precision.stored
    saved = [saved_bytes(config, stage, device_type, casts) for stage in layout.stages]
    points = [
        _points(config, layout, stage, of, ranks, device_type) for stage, of in zip(layout.stages, saved, strict=True)
    ]
    found = []
    for rank, passed in enumerate(_moments(layout, microbatches)):
        states = fullest_states(config, world_size, rank)
        stages = [layout.stages[index] for index in layout.on_rank(rank)]
        whole = _whole(config, stages, states) if ranks else 0.0
        highest = peak(passed, saved, points)
        buffers = 0.0
        if len(layout.stages) > 1:
            buffers = 2 * saved[0].message  # one that arrives and one that leaves
            if rank == layout.rank_of[-1] and not _splits_backward(layout):
                # torch keeps every loss of a step, and with its graph the stage's input, which is a leaf of it
                buffers += microbatches * saved[-1].message
        working, offloaded = whole + highest.working, _offloaded(config, states)
        found.append(RankMemory(states, working, highest.activations, highest.logits, buffers, offloaded))
    return found


def _offloaded(config: EngineConfig, states: ModelStates) -> float:
    """Bytes of the states that are on the host or on NVMe. FSDP's shards go together, DeepSpeed's by kind."""
    zero = config.zero
    optimizer = states.gradients + states.optimizer if zero.offload_optimizer is not None else 0.0
    weights = zero.offload_param is not None or (optimizer > 0 and zero.zero_engine == "torch")
    return optimizer + (states.weights if weights else 0.0)


class Moment(NamedTuple):
    """A pass on a rank: its kind and stage, and how many microbatches each stage of the rank then keeps, up to their
    input half and between both halves. What a pass makes or frees is there while it runs."""

    kind: str
    stage: int
    kept: tuple[tuple[int, int], ...]
    deferred: tuple[tuple[int, int], ...]


def moments(actions: Iterable[Action]) -> frozenset[Moment]:
    """All that a rank goes through while it runs these actions."""
    kept: Counter[int] = Counter()
    deferred: Counter[int] = Counter()
    found = set()
    for kind, stage, _ in actions:
        if kind == "F":
            kept[stage] += 1
        found.add(Moment(kind, stage, tuple(kept.items()), tuple(deferred.items())))
        if kind == "W":
            deferred[stage] -= 1
        elif kind in "BI":
            kept[stage] -= 1
            deferred[stage] += kind == "I"
    return frozenset(found)


@functools.lru_cache(maxsize=256)
def _moments(layout: StageLayout, microbatches: int) -> tuple[frozenset[Moment], ...]:
    return tuple(map(moments, action_lists(layout, microbatches)))


class Point(NamedTuple):
    """Bytes at a point of a pass; see `RankMemory`."""

    activations: float
    logits: float
    working: float


def peak(passed: Iterable[Moment], saved: Sequence[Saved], points: Sequence[dict[str, list[Point]]]) -> Point:
    """The point of a rank's step with most bytes.

    saved: of one microbatch, by stage of the pipeline. points: by stage and kind of pass, what there is more (or less)
    at points of the pass than all microbatches keep that the rank works on, the one that passes included.
    """

    def reached() -> Iterator[Point]:
        for moment in passed:
            activations = sum(n * saved[i].kept for i, n in moment.kept)
            activations += sum(n * saved[i].deferred for i, n in moment.deferred)
            logits = sum(n * saved[i].logits for i, n in moment.kept)
            logits += sum(n * saved[i].deferred_logits for i, n in moment.deferred)
            for more in points[moment.stage][moment.kind]:
                yield Point(activations + more.activations, logits + more.logits, more.working)

    return max(reached(), key=sum)


def _points(
    config: EngineConfig, layout: StageLayout, stage: StageSpec, saved: Saved, ranks: int, device_type: str
) -> dict[str, list[Point]]:
    """Where a pass through a stage may need most, by kind of pass. ranks: that ZeRO shards over; 0: it does not.

    Forward: its end. Backward: the loss; the first layer of the pass (the stage's last); the reduction of that one's
    gradients; the layer after it; the embedding.
    """
    compute, stored = config.precision.compute.itemsize, config.precision.stored.itemsize
    zero, splits = config.zero, _splits_backward(layout)
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
    backward = [
        loss,
        Point(saved.temporary - saved.head, -saved.logits, at_layer + (sent * last[1] if stage.has_head else before)),
        Point(-saved.head - saved.layer, -saved.logits, at_layer + reduced * layer[1]),
        Point(saved.temporary - saved.head - saved.layer, -saved.logits, at_layer + sent * layer[1]),
        Point(-saved.kept, -saved.logits, at_layer + (reduced or stored) * first[1] * stage.has_embedding),
    ]
    if not splits:
        return {"F": [loss], "B": backward}
    gradients = compute * sum(trained for _, trained in groups) + reduced * layer[1]
    weight = [Point(0.0, 0.0, at_layer), Point(-saved.deferred, -saved.deferred_logits, at_layer + gradients)]
    if stage.has_embedding:  # the whole pass is there
        return {"F": [loss], "B": backward, "I": [Point(0.0, 0.0, at_layer)], "W": [*backward, *weight]}
    whole = Point(saved.deferred - saved.kept + saved.temporary, saved.deferred_logits, at_layer + before)
    return {"F": [loss], "B": backward, "I": [loss, whole], "W": weight}


def _whole(config: EngineConfig, stages: list[StageSpec], states: ModelStates) -> float:
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


def _splits_backward(layout: StageLayout) -> bool:
    return layout.schedule in SCHEDULES and SCHEDULES[layout.schedule].splits_backward


def _groups(config: EngineConfig, stage: StageSpec) -> list[tuple[int, int]]:
    """Elements on a tensor-parallel rank of what FSDP gathers together, in forward order: all, and the trained."""

    def part(first: int, last: int, has_embedding: bool = False, has_head: bool = False) -> tuple[int, int]:
        return local_elements(config, stage_parameters(config, StageSpec(first, last, has_embedding, has_head)))

    layers = [part(i, i + 1) for i in range(stage.first, stage.last)]
    if config.model.tied and stage.has_embedding and stage.has_head:
        return [part(0, 0, True, True), *layers]
    before = [part(0, 0, has_embedding=True)] if stage.has_embedding else []
    return [*before, *layers, *([part(0, 0, has_head=True)] if stage.has_head else [])]


def _one_layer(config: EngineConfig, stage: StageSpec) -> tuple[int, int]:
    """The same of the stage's last layer, the first one of a backward pass."""
    last = StageSpec(stage.last - 1, stage.last, has_embedding=False, has_head=False)
    return local_elements(config, stage_parameters(config, last))
