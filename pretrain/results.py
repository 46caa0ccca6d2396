"""Step results on their way from the device to the host, one step behind, so that no step waits for them."""

import dataclasses
import time
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class StepResult:
    iteration: int
    learning_rate: float
    loss: float
    grad_norm: float
    stop_wishes: float
    skipped: bool
    loss_scale: float
    seconds: float


class _Clock:
    """Marks in time: on the device's own stream for CUDA, the host's clock otherwise."""

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_cuda else end - start

    def wait(self, mark: Any) -> None:
        if self._on_cuda:
            mark.synchronize()


class ResultQueue:
    """Holds the newest step's figures back until the next step has been launched."""

    def __init__(self, device: torch.device) -> None:
        self._clock = _Clock(device)
        self._waiting: list[tuple[int, float, torch.Tensor, Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Leave what happened since the last step (an evaluation, a checkpoint) out of the next one's time."""
        self._since = self._clock.mark()

    def put(
        self, iteration: int, learning_rate: float, figures: torch.Tensor, loss_scale: torch.Tensor | float
    ) -> None:
        """figures: what `Engine.train_step` returned."""
        values = torch.cat([figures, torch.ones_like(figures[:1]) * loss_scale])
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        start, self._since = self._since, self._clock.mark()
        self._waiting.append((iteration, learning_rate, values, start, self._since))

    def pop(self, keep: int) -> list[StepResult]:
        """Results of all steps but the newest `keep`, in order; waits for them if need be."""
        ready, self._waiting = self._waiting[: len(self._waiting) - keep], self._waiting[len(self._waiting) - keep :]
        results = []
        for iteration, learning_rate, values, start, end in ready:
            self._clock.wait(end)
            loss, norm, stops, skipped, scale = values.tolist()
            seconds = self._clock.seconds(start, end)
            results.append(StepResult(iteration, learning_rate, loss, norm, stops, bool(skipped), scale, seconds))
        return results
