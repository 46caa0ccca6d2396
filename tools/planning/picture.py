"""A plan as a picture: memory by pipeline rank against what a GPU has, above the timeline of a step."""

from megatron_ext.errors import RequestError
from megatron_ext.planner.plan import Plan
from tools.planning.timeline_picture import draw_timeline

_GIB = 2**30
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#999999")


def draw_plan(plan: Plan, memory_share: float, title: str, output: str) -> None:
    """Write it to `output`, in the format that its name says. Raises RequestError where that is not possible."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = len(plan.memory)
    piped = ranks > 1
    heights = [3.2, 1.2 + min(0.35 * ranks, 7.0)]
    figure = Figure(figsize=(11, sum(heights) if piped else 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, *timeline = figure.subplots(2 if piped else 1, height_ratios=heights if piped else None, squeeze=False)[
        :, 0
    ]
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _draw_memory(plan, memory_share, memory)
    if piped:
        draw_timeline(plan.step.timeline, plan.layout, timeline[0])
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot {output}: {error}") from error


def _draw_memory(plan: Plan, memory_share: float, axes) -> None:  # type: ignore[no-untyped-def]
    parts = {
        "weights": [r.states.weights for r in plan.memory],
        "gradients": [r.states.gradients for r in plan.memory],
        "optimizer": [r.states.optimizer for r in plan.memory],
        "within a step": [r.working for r in plan.memory],
        "activations": [r.activations for r in plan.memory],
        "logits": [r.head for r in plan.memory],
        "buffers": [r.buffers for r in plan.memory],
    }
    left = [0.0] * len(plan.memory)
    places = range(len(plan.memory))
    for (name, values), colour in zip(parts.items(), _COLOURS, strict=True):
        sizes = [value / _GIB for value in values]
        axes.barh(places, sizes, left=left, color=colour, label=name, edgecolor="white", linewidth=0.4)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    gib = plan.cluster.gpu.memory_gib
    axes.axvline(gib, color="black", label=f"{plan.cluster.gpu.name}: {gib:g} GiB")
    axes.axvline(gib * memory_share, color="black", linestyle=":", label=f"{memory_share:.0%} of it")
    axes.set_yticks(places, [f"pipeline rank {rank}" for rank in places])
    axes.invert_yaxis()
    axes.set_xlabel("GiB on the fullest rank")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
