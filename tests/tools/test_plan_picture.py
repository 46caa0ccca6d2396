import pytest

from megatron_ext.models import StageSpec
from megatron_ext.pipeline import StageLayout
from megatron_ext.planner.timeline import StageTimes, Timeline, simulate

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tools.planning.picture import draw_timeline

FORWARD, BACKWARD, INPUT, WEIGHTS = "#0072b2", "#e69f00", "#d55e00", "#009e73"


def drawn(schedule: str, pp: int, n_microbatches: int) -> tuple[Timeline, Axes]:
    stages = tuple(StageSpec(i, i + 1, i == 0, i == pp - 1) for i in range(pp))
    layout = StageLayout(schedule, stages, tuple(range(pp)))
    timeline = simulate(layout, n_microbatches, [StageTimes(1, 1, 1)] * pp, send=0)
    figure = Figure(figsize=(14, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_timeline(timeline, layout, axes)
    canvas.draw()
    return timeline, axes


def bars(axes: Axes) -> list[tuple[str, float, float, float]]:
    """Of every bar its colour, its height on the axis, and from where to where it goes."""
    found = []
    for collection in axes.collections:
        for path, colour in zip(collection.get_paths(), list(collection.get_facecolor()) * 9999, strict=False):
            box = path.get_extents()
            found.append((to_hex(colour), round((box.y0 + box.y1) / 2), box.x0, box.x1))
    return found


def test_every_pass_is_a_bar() -> None:
    timeline, axes = drawn("zero-bubble", 4, 8)
    colours = {"F": FORWARD, "I": INPUT, "W": WEIGHTS}
    expected = [
        (BACKWARD if rank == 0 and span.action.kind == "W" else colours[span.action.kind], rank, span.start, span.end)
        for rank, spans in enumerate(timeline.spans)
        for span in spans
        if span.end > span.start
    ]
    assert sorted(bars(axes)) == sorted(expected)
    numbers = [text.get_text() for text in axes.texts]
    assert sorted(numbers) == sorted(
        str(span.action.microbatch) for spans in timeline.spans for span in spans if span.end > span.start
    )
    assert axes.get_title(loc="left") == "zero-bubble: 11.1% bubble in a step of 27 s"


def test_a_long_step_shows_its_two_ends() -> None:
    timeline, axes = drawn("1f1b", 2, 400)
    shown = [bar for bar in bars(axes) if bar[1] == 0]
    first, last = min(shown, key=lambda bar: bar[2]), max(shown, key=lambda bar: bar[3])
    width = axes.get_xlim()[1]
    assert (first[2], last[3]) == (0, pytest.approx(width))
    assert 390 < len(shown) < 410
    assert "first and last" in axes.get_title(loc="left")
    assert axes.xaxis.get_major_formatter()(width) == f"{timeline.seconds:.3g}"  # the axis tells the true time
    assert not axes.texts
