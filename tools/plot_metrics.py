"""`python -m tools.plot_metrics`: the curves of one or several runs, from their metrics files, as a picture."""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from tools.command import Parser, run
from tools.metrics_file import read_metrics

_PANELS = (("lm_loss", "lm loss"), ("grad_norm", "gradient norm"), ("learning_rate", "learning rate"))


def draw(runs: dict[str, list[dict[str, Any]]], output: str, marks: list[int]) -> None:
    """Draw loss (with validation loss), gradient norm and learning rate over iterations, one colour a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(figure.subplots(len(_PANELS), sharex=True), _PANELS, strict=True):
        for name, records in runs.items():
            line = axes.plot([r["iteration"] for r in records], [_number(r[key]) for r in records], label=name)[0]
            valid = [(r["iteration"], _number(r["valid_loss"])) for r in records if "valid_loss" in r]
            if key == "lm_loss" and valid:
                axes.plot(*zip(*valid, strict=True), "o", color=line.get_color(), label=f"{name}, validation")
        for mark in marks:
            axes.axvline(mark, color="grey", linestyle=":")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if key == "lm_loss":
            axes.legend()
    axes.set_xlabel("iteration")
    figure.savefig(output, dpi=120)


def _number(value: float | None) -> float:
    """Of a record, whose null is a gap in a curve."""
    return float("nan") if value is None else value


def build_parser() -> Parser:
    parser = Parser("plot_metrics", __doc__)
    parser.add_argument("--metrics", nargs="+", required=True, metavar="FILE.jsonl", help="of pretrain --metrics")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="or .svg, .pdf")
    parser.add_argument(
        "--mark", nargs="*", type=int, default=[], metavar="N", help="iterations to mark, such as restarts"
    )
    return parser


def work(options: argparse.Namespace) -> int:
    runs = {Path(path).stem: read_metrics(path, "--metrics") for path in options.metrics}
    try:
        draw(runs, options.output, options.mark)
    except (OSError, ValueError) as error:
        raise RequestError(f"--output {options.output}: {error}") from error
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
