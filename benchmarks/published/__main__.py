"""`python -m benchmarks.published`: the planner's step times beside those that others measured and published.

The rows are in benchmarks/published/runs.csv with their sources. Constants of the A100 were fitted to Megatron-LM's
table 1, the sequence-parallelism paper and vTrain's runs, those of the H100 to NVIDIA's; all other groups are
predictions of runs that nobody fitted.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

from benchmarks.published.picture import draw
from benchmarks.published.runs import Run, published_runs, vtrain_runs
from megatron_ext.errors import RequestError
from tokenizer.output import markdown_table, text_table
from tools.picture import check_picture

_HEAD = (
    "model",
    "GPUs",
    "TP",
    "PP",
    "chunks",
    "ZeRO",
    "microbatch",
    "recompute",
    "published s",
    "predicted s",
    "error",
)
_MANY = 100  # runs of a group that are too many to be shown one by one
_GROUPS = ("group", "runs", "mean error", "mean |error|", "largest", "source")


def row(run: Run) -> list[str]:
    config = run.plan.config
    return [
        run.model,
        str(run.plan.cluster.gpus),
        str(config.parallel.tensor_model_parallel_size) + ("+SP" if config.parallel.sequence_parallel else ""),
        str(config.parallel.pipeline_model_parallel_size),
        str(config.pipeline.num_virtual_stages_per_pipeline_rank or 1),
        str(config.zero.zero_stage),
        str(config.batch.micro_batch_size),
        config.recompute.recompute_granularity or "none",
        f"{run.seconds:.4g}",
        f"{run.plan.step.seconds:.4g}",
        f"{run.error:+.1%}",
    ]


def summary(group: str, runs: Sequence[Run]) -> list[str]:
    errors = [run.error for run in runs]
    return [
        group,
        str(len(runs)),
        f"{statistics.mean(errors):+.1%}",
        f"{statistics.mean(map(abs, errors)):.1%}",
        f"{max(errors, key=abs):+.1%}",
        runs[0].source,
    ]


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def work(options: argparse.Namespace) -> None:
    if options.plot is not None:
        check_picture(options.plot)
    runs = published_runs()
    for file in options.vtrain:
        runs += vtrain_runs(file)
    groups = grouped(runs)
    table = markdown_table if options.markdown else text_table
    print(table(_GROUPS, [summary(name, members) for name, members in groups.items()]))
    for name, members in groups.items():
        if len(members) < _MANY:
            print(f"\n{name}\n\n" + table(_HEAD, [row(run) for run in members]))
    if options.plot is not None:
        draw(groups, options.plot)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vtrain",
        nargs="+",
        default=[],
        metavar="FILE.csv",
        help="vTrain's data/ground_truth_single.csv or _multi.csv",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--plot", metavar="FILE.png", help="draw predicted over published step times")
    try:
        work(parser.parse_args())
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
