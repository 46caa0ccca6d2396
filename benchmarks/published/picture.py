"""Predicted over published step times, a mark for every run."""

from collections.abc import Sequence

from benchmarks.published.runs import Run
from megatron_ext.errors import RequestError

_MARKS = "os^vDP*X<>phd8"


def draw(groups: dict[str, Sequence[Run]] | dict[str, list[Run]], output: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [0.05, 1000.0]
    axes.fill_between(ends, [0.85 * e for e in ends], [1.15 * e for e in ends], color="0.9", label="within 15%")
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    for (name, runs), mark in zip(groups.items(), _MARKS * 3, strict=False):
        small = len(runs) > 200
        axes.plot(
            [run.seconds for run in runs],
            [run.plan.step.seconds for run in runs],
            "." if small else mark,
            markersize=2 if small else 6,
            alpha=0.4 if small else 0.8,
            markeredgewidth=0,
            label=f"{name} ({len(runs)})",
            zorder=1 if small else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("published seconds of a step")
    axes.set_ylabel("predicted")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot {output}: {error}") from error
