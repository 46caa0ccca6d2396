"""Why the best layout is the best: what each single other decision would cost."""

import dataclasses
from typing import Any

from megatron_ext.planner.choices import Choice, choice_of
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.search import Search

_ASPECTS = ("tp", "pp", "zero", "schedule", "micro_batch", "recompute")
_TELLING = 0.005  # share of the best step's time from which on a difference is named


@dataclasses.dataclass(frozen=True)
class Alternative:
    """The best layout with another value of one aspect (a field of Choice); the one that needs least, if none fits, or
    if memory is what matters."""

    aspect: str
    value: Any
    plan: Plan
    fits: bool


def alternatives(search: Search, best: Plan, objective: str) -> list[Alternative]:
    """For every aspect, every other value that can run at all. objective: "throughput" or "memory"."""
    chosen, found = choice_of(best.config), []
    for aspect in _ASPECTS:
        values = {getattr(choice, aspect) for choice in search.choices} - {getattr(chosen, aspect)}
        for value in sorted(values, key=lambda v: (v is not None, v)):

            def same(choice: Choice, aspect: str = aspect, value: Any = value) -> bool:
                return bool(getattr(choice, aspect) == value)

            plans = search.fastest(only=same) if objective == "throughput" else []
            plan = (plans or search.smallest(only=same))[0]
            found.append(Alternative(aspect, value, plan, search.fits(plan)))
    return found


def costs(best: Plan, other: Plan) -> list[tuple[str, float]]:
    """Where the other's step is longer: parts and shares of the best's step time, the largest first."""
    longer = {name: (seconds - best.step.parts[name]) / best.step.seconds for name, seconds in other.step.parts.items()}
    return sorted(((n, share) for n, share in longer.items() if share > _TELLING), key=lambda item: -item[1])
