"""`python -m pretrain` in which one rank fails: python -m tests.pretrain.failing_rank RANK PLACE FLAGS..."""

import os
import sys
from typing import Any

from megatron_ext.checkpoint import save
from megatron_ext.checkpoint.digest import HashingWriter
from megatron_ext.errors import RequestError
from megatron_ext.models import Decoder
from megatron_ext.zero import DataParallel
from pretrain.__main__ import main
from pretrain.data.gpt_source import GPTSource
from pretrain.train import Trainer

PLACES: dict[str, tuple[Any, str]] = {
    "forward": (Decoder, "forward"),
    "backward": (DataParallel, "before_backward"),
    "data": (GPTSource, "__getitem__"),
    "save": (save, "model_state"),
    "async save": (HashingWriter, "write_data"),
    "late refusal": (Trainer, "_record"),
}


def fail_in(place: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise (RequestError if place == "late refusal" else ValueError)("no bread")

    owner, name = PLACES[place]
    setattr(owner, name, fail)


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        fail_in(sys.argv[2])
    sys.exit(main(sys.argv[3:]))
