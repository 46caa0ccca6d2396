"""Step results on their way from the device to the host, one step behind, so that no step waits for them."""

import dataclasses

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


class ResultQueue:
    """Holds the newest step's figures back until the next step has been launched."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, float, torch.Tensor, torch.cuda.Event | None]] = []

    def put(
        self, iteration: int, learning_rate: float, figures: torch.Tensor, loss_scale: torch.Tensor | float
    ) -> None:
        """figures: what `Engine.train_step` returned."""
        scale = torch.as_tensor(loss_scale, dtype=figures.dtype, device=figures.device)
        values = torch.cat([figures, scale[None]])
        event = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((iteration, learning_rate, values, event))

    def take(self, keep: int) -> list[StepResult]:
        """Results of all steps but the newest `keep`, in order; waits for them if need be."""
        ready, self._waiting = self._waiting[: len(self._waiting) - keep], self._waiting[len(self._waiting) - keep :]
        results = []
        for iteration, learning_rate, values, event in ready:
            if event is not None:
                event.synchronize()
            loss, norm, stops, skipped, scale = values.tolist()
            results.append(StepResult(iteration, learning_rate, loss, norm, stops, bool(skipped), scale))
        return results
