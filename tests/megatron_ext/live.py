"""What a rank on a CPU really keeps while it takes a step: storages that live, after every pass and at most."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.engine import Engine
from megatron_ext.pipeline.actions import Action
from megatron_ext.pipeline.stage import Stage


def storages(tensors: Any) -> Iterable[torch.UntypedStorage]:
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


class Highest(TorchDispatchMode):
    """highest: most bytes that there were, after any operator, of what operators inside the context have made."""

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(s) for s in storages((args, kwargs))}
        self._seen.update(s for s in storages(result) if id(s) not in given)
        self.highest = max(self.highest, sum(s.nbytes() for s in self._seen))
        return result


class Watch(TorchDispatchMode):
    """Inside the context: what operators take and give, but for what there was before (the engine's, the batch's).

    passes (if asked for): every pass and the bytes that are kept after it, without gradients of weights, and without
    what microbatches handed over that are done: gloo holds what it sent until the step ends, and torch the inputs of
    the last stage. highest (else): most bytes there were after any operator, all included.
    """

    def __init__(self, engine: Engine, batch: dict[str, torch.Tensor], of_passes: bool):
        super().__init__()
        self.passes: list[tuple[Action, int]] = []
        self.highest = 0
        self._engine, self._of_passes = engine, of_passes
        before = [[p.detach() for p in engine.parameters.values()], batch, engine.optimizer.step_count]
        states = [list(state.values()) for state in engine.optimizer.local_states.values()]
        self._known = weakref.WeakSet(storages([before, states]))
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._messages: dict[tuple[int, int], list[Any]] = defaultdict(list)
        self._patched = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        if self._of_passes:
            self._patched.enter_context(mock.patch.multiple(Stage, **self._passes_of_stages()))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._seen.update(s for s in storages((args, kwargs, result)) if s not in self._known)
        if not self._of_passes:
            self.highest = max(self.highest, sum(s.nbytes() for s in self._seen))
        return result

    def _after(self, action: Action, handed_over: Any) -> None:
        messages = self._messages[action.stage, action.microbatch]
        messages += map(weakref.ref, storages(handed_over))
        if action.kind in "BW":
            for storage in filter(None, (message() for message in messages)):
                self._known.add(storage)
                self._seen.discard(storage)
        gradients = {id(s) for s in storages([p.grad for p in self._engine.parameters.values() if p.grad is not None])}
        self.passes.append((action, sum(s.nbytes() for s in self._seen if id(s) not in gradients)))

    def _passes_of_stages(self) -> dict[str, Any]:
        """The methods of a pipeline stage that run its passes, and note what is kept after each."""
        forward, backward, weight = Stage.forward_one_chunk, Stage.backward_one_chunk, Stage.backward_weight_one_chunk

        def run_forward(stage: Stage, i: int, *args: Any, **kwargs: Any) -> Any:
            result = forward(stage, i, *args, **kwargs)
            self._after(Action("F", stage.stage_index, i), stage.fwd_cache[i])
            return result

        def run_backward(stage: Stage, i: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> None:
            backward(stage, i, *args, full_backward=full_backward, **kwargs)
            self._after(Action("B" if full_backward else "I", stage.stage_index, i), stage.bwd_cache.get(i))

        def run_weight(stage: Stage, i: int, *args: Any, **kwargs: Any) -> None:
            weight(stage, i, *args, **kwargs)
            self._after(Action("W", stage.stage_index, i), None)

        return {
            "forward_one_chunk": run_forward,
            "backward_one_chunk": run_backward,
            "backward_weight_one_chunk": run_weight,
        }
