"""`python -m pretrain`: parse, refuse, then run or rehearse.

Exit codes: 0 done (also after --exit-interval or a signal, with what there was to save saved); 2 the request is
wrong, in one line; anything else is a failure with its traceback.
"""

import os
import sys
import time
import warnings

from megatron_ext.errors import RequestError
from tokenizer.errors import TokenizerError
from tokenizer.output import begin_in_utf8, keep_streams_open


def main(arguments: list[str]) -> int:
    # torch's notes about its own coming changes are not the user's business
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        from pretrain.flags import parse
        from pretrain.validate import validate

        config = parse(arguments)
        validate(config)
        if config.dry.dry_run:
            from pretrain.dry_run import dry_run

            dry_run(config)
            return 0

        from pretrain.train import run
        from pretrain.world import joined_world

        with joined_world(config.engine.parallel.distributed_timeout_minutes) as device:
            run(config, device)
    except (RequestError, TokenizerError) as error:
        return _refuse(str(error))
    return 0


def _refuse(message: str) -> int:
    """Say it once per node: usually all ranks refuse alike, and torchrun ends the others as soon as one has left.

    They wait for that, so that the first one is heard; a rank that is alone in refusing speaks after the wait.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    begin_in_utf8()
    keep_streams_open(tell_closed=True)
    sys.exit(main(sys.argv[1:]))
