"""What runs on this rank, and when: passes of a pipeline, messages and matrix products."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.pipeline.actions import Action
from megatron_ext.pipeline.stage import Stage
from megatron_ext.planner.timeline import Span


@contextlib.contextmanager
def recorded_actions() -> Iterator[list[Span]]:
    """Gathers every pass that a stage of this rank runs, in order; on the clock that a machine's processes share."""
    spans: list[Span] = []

    def noted(name: str) -> Any:
        method = getattr(Stage, name)

        def run(stage: Stage, microbatch: int, *args: Any, **kwargs: Any) -> Any:
            kind = {"forward_one_chunk": "F", "backward_weight_one_chunk": "W"}.get(name)
            kind = kind or ("B" if kwargs.get("full_backward", True) else "I")
            start = time.monotonic()
            result = method(stage, microbatch, *args, **kwargs)
            spans.append(Span(Action(kind, stage.stage_index, microbatch), start, time.monotonic()))
            return result

        return run

    names = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    with mock.patch.multiple(Stage, **{name: noted(name) for name in names}):
        yield spans


class Issued(TorchDispatchMode):
    """names: the messages and matrix products that are issued inside the context, in order; of messages that are waited
    for at once with an exclamation mark."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            names = [argument.name.lower().replace("_", "") for argument in func._schema.arguments]
            at_once = "asyncop" in names and len(args) > names.index("asyncop") and not args[names.index("asyncop")]
            self.names.append(func._opname.strip("_") + "!" * at_once)
        elif func._opname.strip("_") in ("mm", "addmm"):
            self.names.append("product")
        return func(*args, **(kwargs or {}))
