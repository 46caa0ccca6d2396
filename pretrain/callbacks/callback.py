"""The protocol of what happens beside the steps of a run."""

import dataclasses

from pretrain.logs import Record
from pretrain.run import Run


@dataclasses.dataclass(frozen=True)
class Stop:
    """The wish to end the run. why: completes the line "stopping at iteration N ..."."""

    why: str = ""


Decision = Stop | None
"""None: go on."""


class Callback:
    """Acts beside the steps of a run; a subclass overrides what it needs. Every rank makes one, after the run itself.

    Steps are launched without waiting for the device, so the record of a step arrives while the next one runs. A wish
    to stop travels in the all-reduce of the next step that is launched: as soon as the figures of a step are here in
    which any rank wished it, all ranks end after the same step. What a callback sends to other ranks it must send on
    all of them, in a method that all call: none may depend on what differs from rank to rank, as times do.
    """

    def __init__(self, run: Run):
        self.run = run

    def before_step(self, iteration: int) -> Decision:
        """Act before the step of this iteration is launched. Stop: wish that this step is the last."""
        return None

    def due(self, iteration: int) -> bool:
        """Say, the same on all ranks, whether the record of this step must be here before the next one is launched.

        The host then waits for the device, and what `after_step` does is left out of the times of steps.
        """
        return False

    def after_step(self, record: Record) -> Decision:
        """Act on the figures of a step, as --metrics has them; where they were due, the weights are still its own."""
        return None

    def on_error(self, error: BaseException) -> None:
        """Act on what ends the run, on a rank that raised it; `close` is not called any more."""

    def close(self) -> None:
        """Act after the last step. The callbacks are closed in the reverse order, those of --callback first."""
