"""A plan as a picture: memory by pipeline rank against what a GPU has, above the timeline of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ext.errors import RequestError
from megatron_ext.pipeline import StageLayout
from megatron_ext.pipeline.actions import Action
from megatron_ext.planner.plan import Plan
from megatron_ext.planner.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision.
_KINDS = {
    "F": ("#0072B2", "forward"),
    "B": ("#E69F00", "backward"),
    "I": ("#D55E00", "backward: input"),
    "W": ("#009E73", "backward: weights"),
}
_MOST_BARS = 400  # on one rank; of a longer step only the two ends are drawn
_CUT = 0.02  # of the width, between the two
_DIGIT = 0.7  # of the font size is a digit's width, with some air


def draw_timeline(timeline: Timeline, layout: StageLayout, axes: Axes) -> None:
    """Draw ranks from top to bottom, seconds from left to right, blank where a rank waits.

    The stages of a rank differ in lightness, the first is the darkest. Microbatch numbers stand where there is room
    for them. Of a step with too many passes to be seen, the beginning and the end are drawn, the same length of both.
    """
    from matplotlib.patches import Patch

    total = timeline.seconds
    shown = min(1.0, _MOST_BARS / max(len(spans) for spans in timeline.spans))
    edge = total * shown / 2 if shown < 1 else total
    width = 2 * edge + _CUT * total * shown if shown < 1 else total
    seam = min(0.4, 20 / max(len(spans) for spans in timeline.spans))  # white, which must not drown thin bars
    for rank, spans in enumerate(timeline.spans):
        bars = defaultdict(list)
        for span, left, right in _visible(spans, total, edge, width):
            bars[_looks(span.action), span.action.stage].append((left, right - left))
        stages = layout.on_rank(rank)
        for (kind, stage), places in bars.items():
            face = _lighter(_KINDS[kind][0], 0.55 * stages.index(stage) / max(1, len(stages) - 1))
            axes.broken_barh(places, (rank - 0.45, 0.9), facecolors=face, edgecolors="white", linewidth=seam)
    axes.set_xlim(0, width)
    axes.set_ylim(len(timeline.spans) - 0.5, -0.5)
    _number(timeline, layout, axes, edge, width)
    title = f"{layout.schedule}: {timeline.bubble:.1%} bubble in a step of {total:.3g} s"
    if shown < 1:
        axes.axvspan(edge, width - edge, color="0.85", zorder=0)
        title += f" (its first and last {edge:.3g} s)"
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yticks(range(len(timeline.spans)), [f"rank {rank}" for rank in range(len(timeline.spans))])
    axes.xaxis.set_major_formatter(lambda x, _: f"{x if x <= edge else x + total - width:.3g}")
    axes.set_xlabel("seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    used = {_looks(span.action) for spans in timeline.spans for span in spans}
    patches = [Patch(color=colour, label=name) for kind, (colour, name) in _KINDS.items() if kind in used]
    axes.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=3.5, ncols=4, frameon=False, fontsize=8
    )


def _looks(action: Action) -> str:
    """The kind as which it is drawn: on stage 0 torch leaves the whole of a split backward pass to its "W"."""
    return "B" if action.stage == 0 and action.kind in "IW" else action.kind


def _visible(spans: tuple[Span, ...], total: float, edge: float, width: float) -> Iterator[tuple[Span, float, float]]:
    """The spans that are drawn, and from where to where."""
    for span in spans:
        if span.end == span.start:  # the input half on stage 0
            continue
        if span.start < edge:
            yield span, span.start, min(span.end, edge)
        elif span.end > total - edge:
            yield span, max(span.start, total - edge) + width - total, span.end + width - total


def _number(timeline: Timeline, layout: StageLayout, axes: Axes, edge: float, width: float) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, dpi = axes.get_window_extent(), figure.dpi
    size = min(8.0, 0.6 * box.height / len(timeline.spans) * 72 / dpi)
    if size < 4:
        return
    digits = len(str(max(span.action.microbatch for span in timeline.spans[0])))
    room = digits * _DIGIT * size * dpi / 72 * width / box.width  # in seconds
    for rank, spans in enumerate(timeline.spans):
        for span, left, right in _visible(spans, timeline.seconds, edge, width):
            if right - left > room:
                colour = "white" if span.action.stage == layout.on_rank(rank)[0] else "black"
                middle, text = (left + right) / 2, str(span.action.microbatch)
                axes.text(middle, rank, text, ha="center", va="center", fontsize=size, color=colour)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """`share` of the way to white."""
    from matplotlib.colors import to_rgb

    return tuple(value + (1 - value) * share for value in to_rgb(colour))


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
