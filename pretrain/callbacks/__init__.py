"""What happens beside the steps of a run: one protocol, the run's own callbacks, and those of --callback.

callback.py   the protocol
built_in.py   evaluating, logging, reporting memory, saving, stopping
given.py      classes of the user's, by name
"""

from pretrain.callbacks.built_in import built_in
from pretrain.callbacks.callback import Callback, Decision, Stop
from pretrain.callbacks.given import load_callbacks

__all__ = ["Callback", "Decision", "Stop", "built_in", "load_callbacks"]
