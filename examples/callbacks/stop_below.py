"""End a run once its loss is low enough.

    PYTHONPATH=examples/callbacks python -m pretrain ... --callback stop_below:StopBelow

Copy this file, or make a subclass with another `threshold`.
"""

from pretrain.callbacks import Callback, Decision, Stop
from pretrain.logs import Record


class StopBelow(Callback):
    """Stops when the mean loss of the last `steps` steps is below `threshold`, in nats per token."""

    threshold, steps = 2.0, 10

    def __init__(self, run):
        super().__init__(run)
        self.losses: list[float] = []

    def after_step(self, record: Record) -> Decision:
        if not record["skipped"]:
            self.losses = [*self.losses, record["lm_loss"]][-self.steps :]
        mean = sum(self.losses) / self.steps
        if len(self.losses) < self.steps or not mean < self.threshold:
            return None
        return Stop(f"because the loss, {mean:.4f}, is below {self.threshold}")
