"""Running a benchmark on this process's device."""

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_ext.errors import RequestError
from megatron_ext.mesh import init_distributed


def on_device(work: Callable[[torch.device], None]) -> int:
    """Say what the device is and work in a world of one; gives the exit code."""
    device = init_distributed()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__} on {name}")
    try:
        work(device)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0
