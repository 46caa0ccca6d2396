"""`python -m benchmarks.zero`: step time and memory of ZeRO, native and DeepSpeed's, beside DistributedDataParallel.

All train the same decoder on the same tokens in the same microbatches, data-parallel over all ranks: bf16 products on
GPUs, float32 on CPUs. Loss and gradient norm of the first step have to agree. Then they take turns, a step each, in
rounds; a busy machine slows all of a round alike, so times are given as the ratio to DDP's step of the same round.

Memory is that of the rank with most of it: weights, gradients (as the update finds them) and optimizer states, and the
most that lives at once in a step, on the device. What is offloaded (GPUs only) is among the former, not the latter.
All stay on the device together, a dozen models on a GPU.

    torchrun --nproc-per-node 2 -m benchmarks.zero
    torchrun --nproc-per-node 8 -m benchmarks.zero --model llama2-7b --num-layers 4 --plot zero.png

Exit codes: 0 done, 1 they did not train alike, 2 the request is wrong.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.zero.contenders import DDP, Contender, Task, contenders
from benchmarks.zero.live import live_memory
from benchmarks.zero.report import draw, heading, report
from megatron_ext.errors import RequestError
from megatron_ext.mesh import init_distributed
from megatron_ext.models import preset_names
from tools.picture import check_picture

_SETTLE = 2  # steps before anything is measured: DDP forms its buckets anew in the second
_LOSS, _NORM = 1e-4, 1e-2  # relative differences that precision explains


def check_alike(outcomes: dict[str, torch.Tensor]) -> None:
    """Raise RuntimeError unless all have DDP's loss and gradient norm."""
    loss, norm = outcomes[DDP].tolist()
    for name, outcome in outcomes.items():
        its_loss, its_norm = outcome.tolist()
        if not (abs(its_loss / loss - 1) < _LOSS and abs(its_norm / norm - 1) < _NORM):
            raise RuntimeError(
                f"{name} does not train as DDP does: in the first step its loss is {its_loss} and its gradient norm "
                f"{its_norm}, DDP's are {loss} and {norm}"
            )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(task: Task, rounds: int) -> list[dict[str, Any]]:
    """A row of figures for every contender, the same on all ranks. Collective."""
    device, quiet = task.grid.device, dist.get_rank() != 0
    built: dict[str, Contender] = {}
    first: dict[str, torch.Tensor] = {}
    peaks = []
    with tqdm(contenders(task).items(), "memory", unit="contender", disable=quiet) as bar:
        for name, build in bar:
            memory = live_memory(device)
            with memory:
                built[name] = build()
                first[name], *_ = [built[name].step() for _ in range(_SETTLE)]
                memory.restart()
                built[name].step()
            peaks.append(memory.largest)
    check_alike(first)
    gc.collect()
    gc.freeze()  # or its collector would go through all contenders in one's step
    seconds = torch.zeros(len(built), rounds, dtype=torch.float64)
    turns = list(enumerate(built.values()))
    for i in tqdm(range(rounds), "time", unit="round", disable=quiet):
        for row, contender in turns[i % len(turns) :] + turns[: i % len(turns)]:
            dist.barrier()
            start = _now(device)
            contender.step()
            seconds[row, i] = _now(device) - start
    states = [contender.states() for contender in built.values()]
    sizes = torch.tensor([[*dataclasses.astuple(s), peak] for s, peak in zip(states, peaks, strict=True)]).double()
    for tensor in (seconds, sizes):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [_row(*figures, seconds[0]) for figures in zip(built, seconds, sizes.tolist(), strict=True)]


def _row(name: str, seconds: torch.Tensor, sizes: list[float], ddp_seconds: torch.Tensor) -> dict[str, Any]:
    """Seconds, and their ratio to DDP's: the median over rounds and the quartiles. Bytes."""
    low, ratio, high = (seconds / ddp_seconds).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    names = ("weights", "gradients", "optimizer", "peak")
    times = {"seconds": seconds.median().item(), "ratio": ratio, "quartiles": [low, high]}
    return {"name": name, **times, **dict(zip(names, sizes, strict=True))}


def build_parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=preset_names(), default="tinyllama-1.1b" if cuda else None, help="a preset")
    parser.add_argument("--num-layers", type=int, default=8 if cuda else None, help="instead of the preset's own")
    parser.add_argument("--seq-length", type=int, default=2048 if cuda else 128)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=4, help="of a rank, in a step")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them; or .svg, .pdf")
    return parser


def work(options: argparse.Namespace, device: torch.device) -> None:
    """Collective."""
    for flag, file in (("json", options.json), ("plot", options.plot)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise RequestError(f"--{flag} {file}: no such folder")
    if options.plot is not None:
        check_picture(options.plot)
    for name in ("rounds", "microbatches"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name} {getattr(options, name)}: must be at least 1")
    task = Task.of(options, device)
    rows = measure(task, options.rounds)
    if dist.get_rank() != 0:
        return
    title = heading(task)
    print(title)
    report(rows)
    if options.json is not None:
        Path(options.json).write_text(json.dumps({"run": title, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        draw(rows, title, options.plot)


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    # torch's notes about its own coming changes are not the user's business
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    device = init_distributed()
    try:
        work(options, device)
    except RequestError as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
