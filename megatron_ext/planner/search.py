"""The best layouts of a model on a cluster.

There are thousands, and a prediction takes milliseconds: so every layout first gets a bound that its step cannot be
faster than with its layers spread evenly, and is predicted in the order of the bounds until none is below what was
found.
"""

import dataclasses
import heapq
from collections.abc import Callable
from typing import Any

from megatron_ext.engine import EngineConfig
from megatron_ext.planner.choices import Choice, choices, configured
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.program import Program
from megatron_ext.planner.step import least_time

SAFE_SHARE = 0.8
"""Of a GPU's memory: of 454 runs none that was estimated below it ran out (Fujii et al., arXiv 2411.06465)."""
_NEAR = 1.1  # what takes longer than this, of the slowest found, is not made faster than it by moving layers
_MOVES = 40  # of a layer, from one stage to another


class Search:
    """base: the model, the batch, and all that is not to be decided (its layout is written over).

    allowed: by name of a field of Choice, the only values to be looked at. tick: called for every layout looked at.
    """

    def __init__(
        self,
        base: EngineConfig,
        cluster: Cluster,
        program: Program,
        memory_share: float = SAFE_SHARE,
        allowed: dict[str, tuple[Any, ...]] | None = None,
        tick: Callable[[], Any] = lambda: None,
    ):
        self.base, self.cluster, self.program, self.memory_share = base, cluster, program, memory_share
        self._tick = tick
        self.choices = list(choices(base, cluster, allowed or {}))
        self._plans: dict[EngineConfig, Plan] = {}
        self._bounds: dict[Choice, float] = {}

    @property
    def predicted(self) -> int:
        """How many layouts were predicted so far."""
        return len(self._plans)

    def fits(self, plan: Plan) -> bool:
        return plan.memory_share <= self.memory_share

    def fastest(self, count: int = 1, only: Callable[[Choice], bool] = lambda _: True) -> list[Plan]:
        """The `count` fastest layouts that fit, the fastest first, their layers spread as suits them."""
        waiting = [(self._bound(choice), i, choice) for i, choice in enumerate(self.choices) if only(choice)]
        heapq.heapify(waiting)
        found: list[Plan] = []
        while waiting:
            bound, _, choice = heapq.heappop(waiting)
            self._tick()
            if len(found) == count and bound >= found[-1].step.seconds:
                break
            plan = self._plan(configured(self.base, choice))
            near = len(found) < count or not self.fits(plan) or plan.step.seconds < _NEAR * found[-1].step.seconds
            plan = self._spread(plan) if near else plan
            if self.fits(plan):
                found = sorted([*found, plan], key=lambda p: p.step.seconds)[:count]
        return found

    def smallest(self, count: int = 1, only: Callable[[Choice], bool] = lambda _: True) -> list[Plan]:
        """The `count` layouts whose fullest rank needs least, fitting or not; the faster of equals first.

        Only microbatches of the least size and with most recomputation: of equal degrees no other needs less.
        """
        considered = list(filter(only, self.choices))
        least = min((c.micro_batch for c in considered), default=0)
        strongest = max((_STRENGTH[c.recompute] for c in considered), default=0)
        plans = [
            self._plan(configured(self.base, c))
            for c in considered
            if c.micro_batch == least and _STRENGTH[c.recompute] == strongest
        ]
        return sorted(plans, key=lambda p: (round(p.fullest / 2**20), p.step.seconds))[:count]

    def _plan(self, config: EngineConfig) -> Plan:
        if config not in self._plans:
            self._plans[config] = Plan(config, self.cluster, self.program)
        return self._plans[config]

    def _bound(self, choice: Choice) -> float:
        if choice not in self._bounds:
            self._bounds[choice] = least_time(configured(self.base, choice), self.cluster, self.program)
        return self._bounds[choice]

    def _spread(self, plan: Plan) -> Plan:
        """The same layout with layers moved from one stage to another, as long as that makes it fit, or faster."""
        pp = plan.config.parallel.pipeline_model_parallel_size
        if pp == 1 or self.base.pipeline.pipeline_layers is not None:
            return plan
        if sum(rank.total for rank in plan.memory) / pp > self.memory_share * self.cluster.gpu.memory:
            return plan  # there is no room on any rank
        for _ in range(_MOVES):
            moved = self._moved(plan)
            if moved is None or not self._better(moved, plan):
                return plan
            plan = moved
        return plan

    def _better(self, one: Plan, other: Plan) -> bool:
        """Fits better, or if both fit is faster: times are not predicted where they do not matter."""
        if self.fits(one) and self.fits(other):
            return one.step.seconds < other.step.seconds
        return one.fullest < other.fullest

    def _moved(self, plan: Plan) -> Plan | None:
        """A layer moved from the rank that is too full, or else takes longest, to the one that is farthest from it."""
        config = plan.config
        layout = plan.layout
        loads = list(plan.step.timeline.busy) if self.fits(plan) else [rank.total for rank in plan.memory]
        order = sorted(range(len(loads)), key=loads.__getitem__)
        counts = [stage.last - stage.first for stage in layout.stages]
        giver = max(layout.on_rank(order[-1]), key=counts.__getitem__)
        taker = min(layout.on_rank(order[0]), key=counts.__getitem__)
        if counts[giver] == 1:
            return None
        counts[giver], counts[taker] = counts[giver] - 1, counts[taker] + 1
        pipeline = dataclasses.replace(config.pipeline, pipeline_layers=tuple(counts))
        return self._plan(dataclasses.replace(config, pipeline=pipeline))


_STRENGTH: dict[str | None, int] = {None: 0, "selective": 1, "full": 2}
