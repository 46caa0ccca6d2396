"""The optimizer algorithms by the names that --optimizer has for them."""

from megatron_ext.errors import RequestError
from megatron_ext.optim.adamw import AdamW
from megatron_ext.optim.algorithm import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {"adam": AdamW}


def algorithm_named(name: str) -> type[Algorithm]:
    """The algorithm of this name. Raises RequestError where there is none."""
    if name not in ALGORITHMS:
        raise RequestError(f"--optimizer {name}: must be one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
