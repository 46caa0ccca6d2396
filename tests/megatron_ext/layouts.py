"""Layouts of a tiny training run, and what it means that one equals a single process."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.megatron_ext.training import LR, Run, worst

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
# Weights are compared absolutely. Where a gradient is near zero, AdamW makes its rounding a step of its own, so that
# float32 weights agree less well than the loss: to within one step of the few.
WEIGHT_TOLERANCE = {"float64": 1e-9, "float32": LR}
VALID_TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # of a loss with the weights of the end


Reference = Callable[..., Run]


@dataclasses.dataclass(frozen=True)
class Layout:
    ranks: int
    options: dict[str, Any]
    documents: bool = False


# Without a pipeline half the layers do, and another clip bites on some steps.
SHALLOW: dict[str, Any] = {"num_layers": 2, "clip_grad": 1.08}


def layout(
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    schedule: str | None = None,
    zero: int = 0,
    sp: bool = False,
    documents: bool = False,
    **options: Any,
) -> Layout:
    options |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    options |= {"pipeline_schedule": schedule, "zero_stage": zero}
    if pp == 1:
        options = SHALLOW | options
    # Two microbatches a rank where each costs many small collectives, else four (pipelines want as many).
    options.setdefault("micro_batch_size", 8 // dp if tp > 1 or dp > 2 else 4 // dp)
    return Layout(tp * pp * dp, options, documents)


def assert_parity(runs: list[Run], expected: Run, name: str, dtype: str) -> None:
    """The ranks' runs have the losses, gradient norms, evaluations and weights of the one process."""
    loss = max(worst(run.losses, expected.losses) for run in runs)
    norm = max(worst(run.norms, expected.norms) for run in runs)
    print(f"{name}, {dtype}: largest relative difference {loss:.1e} (loss), {norm:.1e} (gradient norm)")
    assert loss <= TOLERANCE[dtype]
    assert norm <= TOLERANCE[dtype]
    for run in runs:
        assert torch.equal(run.losses, runs[0].losses)  # what is reported is one number, not one for each rank
        assert torch.equal(run.norms, runs[0].norms)
        assert run.valid_loss == pytest.approx(expected.valid_loss, rel=VALID_TOLERANCE[dtype])
        for step, evaluated in run.evaluated.items():  # and the evaluation left no trace: see the reference
            assert evaluated == pytest.approx(run.losses[step].item(), rel=TOLERANCE[dtype])
    assert_same_weights(runs, expected, WEIGHT_TOLERANCE[dtype])


def assert_same_weights(runs: list[Run], expected: Run, tolerance: float) -> None:
    assert set().union(*(run.parameters for run in runs)) >= set(expected.parameters)
    for name, weight in itertools.chain.from_iterable(run.parameters.items() for run in runs):
        # The copy of a tied matrix that another stage holds must have stayed a copy.
        original = expected.parameters.get(name, expected.parameters["embed_tokens.weight"])
        assert (weight - original).abs().max() <= tolerance, name
