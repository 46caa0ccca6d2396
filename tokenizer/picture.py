"""A comparison as a picture."""

import io
from collections.abc import Sequence
from typing import Any

from tokenizer.compare import LINES, RUNS
from tokenizer.compare_report import short_names
from tokenizer.errors import TokenizerError

_PANELS = (
    (RUNS, ("characters_per_token",), 1, ".2f", "Characters per token in runs of Chinese (more is better)"),
    (LINES, ("characters_per_token",), 1, ".2f", "Characters per token in whole lines (more is better)"),
    (LINES, ("byte_share", "unknown_share"), 100, ".1f", "Byte and unknown tokens in whole lines, % (less is better)"),
)
# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")


def require_matplotlib() -> None:
    """Raise TokenizerError where there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TokenizerError("--picture needs `pip install matplotlib`") from None


def draw(records: Sequence[dict[str, Any]], suffix: str) -> bytes:
    """Bars for every input and tokenizer.

    Args:
        records: of `compare`.
        suffix: the format: png or svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    inputs = short_names([record["input"] for record in records])
    tokenizers = short_names([record["tokenizer"] for record in records])
    group = max(0.5 * (len(tokenizers) + 1), *(0.1 * len(name) for name in inputs.values()))
    figure = Figure(figsize=(max(8.0, 1 + group * len(inputs)), 9), layout=ConstrainedLayoutEngine(hspace=0.06))
    FigureCanvasAgg(figure)
    width = min(0.3, 0.86 / len(tokenizers))
    for axes, (part, keys, scale, how, title) in zip(figure.subplots(len(_PANELS)), _PANELS, strict=True):
        for number, path in enumerate(tokenizers):
            shown = [r for r in records if (r["part"], r["tokenizer"]) == (part, path)]
            heights = [scale * sum(r[key] or 0 for key in keys) for r in shown]
            places = [place + (number - (len(tokenizers) - 1) / 2) * width for place in range(len(shown))]
            drawn = axes.bar(places, heights, 0.92 * width, color=_COLOURS[number % len(_COLOURS)])
            labels = [format(height, how) if r["tokens"] else "none" for r, height in zip(shown, heights, strict=True)]
            axes.bar_label(drawn, labels, padding=2, fontsize=8, color="0.25")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(range(len(inputs)), list(inputs.values()))
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.5, len(inputs) - 0.5)
        axes.margins(y=0.15)
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))  # so that a share of almost nothing looks like it
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    sizes = {record["tokenizer"]: record["vocabulary"] for record in records}
    names = [f"{name} ({sizes[path]:,} pieces)" for path, name in tokenizers.items()]
    patches = [Patch(color=_COLOURS[number % len(_COLOURS)]) for number in range(len(names))]
    figure.legend(patches, names, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format=suffix, dpi=150)
    return content.getvalue()
