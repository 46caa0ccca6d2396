"""`python -m tools.plan`: which layout to train a model in, before anything waits in a queue.

Enumerates TP x PP x DP x ZeRO stage x schedule x virtual stages x microbatch x recomputation and uneven splits,
predicts memory and step time of each, and explains the best that fit. Beside the flags below it takes those of
`python -m pretrain`: the model's (--model, --num-layers ...), --config, --global-batch-size, --seq-length,
--train-only ...; a layout flag such as --tensor-model-parallel-size 4 is a decision already made. Needs no GPU.

    python -m tools.plan --model opt-66b --gpus 24 --gpu a800-80g --global-batch-size 1024 --seq-length 2048
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from megatron_ext.errors import RequestError
from megatron_ext.planner.gpus import gpu_names
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.program import MEGATRON_ZH, program_named, program_names
from megatron_ext.planner.reasons import alternatives
from megatron_ext.planner.search import SAFE_SHARE, Search
from tools.command import Parser, run
from tools.picture import check_picture
from tools.planning.calibrate import calibrated
from tools.planning.picture import draw_plan
from tools.planning.report import as_json, explain_alternative, explanation, introduction, table, verdict
from tools.planning.request import LAYOUT_HELP, Planned, read_cluster, read_run
from tools.planning.script import launch_script, layout_flags

_SHOWN = 5


class _PlanParser(Parser):
    """Leaves what it does not know, in `rest`, to pretrain's flags; `own` are those that it does know."""

    def parse_args(self, arguments=None, namespace=None):  # type: ignore[no-untyped-def,override]
        options, options.rest = self.parse_known_args(arguments, namespace)
        options.own = list(self._option_string_actions)
        return options


def build_parser() -> Parser:
    parser = _PlanParser("plan", __doc__)
    names = ", ".join(gpu_names())
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many there are")
    parser.add_argument("--gpu", metavar="NAME", help=f"their kind: {names}")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="dense bf16 peak, if not the kind's")
    parser.add_argument("--memory-gb", type=float, metavar="X", help="memory of a GPU in GiB")
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of a GPU's memory")
    parser.add_argument(
        "--link", type=float, metavar="GB/s", help="from a GPU to the others of its node, one direction"
    )
    parser.add_argument(
        "--interconnect", metavar="GB/s", help="from a GPU to other nodes, or a node's adapters as 8x200 (Gb/s)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(8)")
    parser.add_argument(
        "--objective",
        choices=("throughput", "memory"),
        default="throughput",
        help="what the best has most, or least, of",
    )
    parser.add_argument("--layout", metavar="KEY=VALUE,...", help=LAYOUT_HELP)
    parser.add_argument(
        "--memory-fraction",
        type=float,
        default=SAFE_SHARE,
        metavar="X",
        help=f"of a GPU's memory to plan with ({SAFE_SHARE})",
    )
    parser.add_argument(
        "--calibrate", metavar="FILE.jsonl", help="metrics of a run on these devices: predict at the speed that it had"
    )
    parser.add_argument(
        "--program",
        choices=program_names(),
        default=MEGATRON_ZH.name,
        help="whose kernels: ours, or a peer's to compare",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw memory by pipeline rank, and the timeline of a step")
    parser.add_argument("--script", metavar="FILE.sh", help="write a launch script of the best")
    return parser


def work(options: argparse.Namespace) -> int:
    if not 0 < options.memory_fraction <= 1:
        raise RequestError(f"--memory-fraction {options.memory_fraction}: must be above 0 and at most 1")
    _check_outputs(options)
    if options.layout is not None and options.objective != "throughput":
        raise RequestError(f"--objective {options.objective} has no effect with --layout: there is nothing to choose")
    cluster, program, notes = read_cluster(options), program_named(options.program), []
    planned = read_run(options, cluster.gpu)
    if planned.assumed:
        notes.append(f"assumed: {', '.join(planned.assumed)}")
    if options.calibrate is not None:
        cluster, line = calibrated(cluster, program, options.calibrate)
        notes.append(line)
    name = str(planned.settings.get("model") or "model")
    say = _quiet if options.json else print
    say(introduction(planned.base, cluster, name))
    for note in notes:
        say(note)
    reasons: list[str] = []
    if options.layout is not None:
        plans = [Plan(planned.base.validate(cluster.gpus), cluster, program)]
    else:
        started = time.monotonic()
        with tqdm(unit=" layouts", desc="predicting", leave=False, delay=1, disable=None) as bar:
            search = Search(planned.base, cluster, program, options.memory_fraction, planned.allowed, bar.update)
            plans = _best(planned, options.objective, search)
            reasons = [
                explain_alternative(plans[0], other, options.objective)
                for other in alternatives(search, plans[0], options.objective)
            ]
        say(
            f"{len(search.choices):,} layouts can run, {search.predicted:,} of them predicted in "
            f"{time.monotonic() - started:.1f} s; the best that fit in {options.memory_fraction:.0%} of the memory:"
        )
    best = plans[0]
    best.config.validate(cluster.gpus)  # what is recommended must be what pretrain accepts
    say("\n" + table(plans))
    for line in ["", *explanation(best, options.memory_fraction), *([""] if reasons else []), *reasons]:
        say(line)
    say("\nflags: " + " ".join(word for flag in layout_flags(best.config) for word in flag))
    title = f"{name} on {cluster.gpus} {cluster.gpu.name}: {verdict(best, options.memory_fraction)}"
    if options.plot is not None:
        draw_plan(best, options.memory_fraction, title, options.plot)
        say(f"wrote {options.plot}")
    if options.script is not None:
        _write(options.script, launch_script(best, planned.settings, title))
        say(f"wrote {options.script}: try it with bash {options.script} --dry-run")
    if options.json:
        found = [as_json(plan, options.memory_fraction) for plan in plans]
        print(json.dumps({"plans": found, "why_not": reasons, "notes": notes}, indent=2))
    return 0


def _best(planned: Planned, objective: str, search: Search) -> list[Plan]:
    """The best layouts, at least one; RequestError where none can run, or fit."""
    cluster = search.cluster
    if planned.base.zero.zero_engine == "deepspeed":
        raise RequestError("--zero-engine deepspeed: the search plans for torch; --layout predicts DeepSpeed's memory")
    if not search.choices:
        raise RequestError(
            f"no layout of {cluster.gpus} GPUs can run this: the GPUs that TP x PP leaves must divide "
            f"--global-batch-size {planned.base.batch.global_batch_size}, and TP the model's heads"
        )
    plans = search.fastest(_SHOWN) if objective == "throughput" else list(filter(search.fits, search.smallest(_SHOWN)))
    if not plans:
        least = search.smallest()[0]
        flags = " ".join(word for flag in layout_flags(least.config) for word in flag)
        raise RequestError(
            f"nothing fits in {search.memory_share:.0%} of {cluster.gpus} x {cluster.gpu.memory_gib:g} GiB: the least "
            f"is {least.fullest / 2**30:.1f} GiB on the fullest rank ({flags}); take more GPUs, or a larger "
            "--memory-fraction"
        )
    return plans


def _check_outputs(options: argparse.Namespace) -> None:
    """Before anything takes time."""
    for flag in ("plot", "script"):
        path = getattr(options, flag)
        if path is None:
            continue
        folder = Path(path).resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise RequestError(f"--{flag} {path}: its folder does not exist, or is not writable")
        if Path(path).is_dir():
            raise RequestError(f"--{flag} {path}: is a folder; name a file in it")
    if options.plot is not None:
        check_picture(options.plot)


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
        Path(path).chmod(0o755)
    except OSError as error:
        raise RequestError(f"--script {path}: cannot be written ({error})") from error


def _quiet(*_: object) -> None:
    """Of --json: nothing but the JSON."""


if __name__ == "__main__":
    gc.disable()  # millions of small tuples that live as long as the process: looking for cycles takes a third
    sys.exit(run(build_parser(), work, None))
