"""A comparison as text, Markdown and a picture."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizer.compare.run import LINES, RUNS
from tokenizer.errors import TokenizerError
from tokenizer.output import markdown_table, text_table

_Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]

_HEAD = (
    "input", "tokenizer", "vocabulary", "tokens", "chars/token", "bytes/token", "byte tokens", "unknown", "vs first",
)  # fmt: skip


def as_text(records: Sequence[dict[str, Any]]) -> str:
    """Format the tables for the terminal."""
    return "\n\n".join(f"{part}\n{_table(records, part, text_table)}" for part in (LINES, RUNS))


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Format the tables as a page."""
    tables = [f"## {part.capitalize()}\n\n{_table(records, part, markdown_table)}" for part in (LINES, RUNS)]
    return "\n\n".join(["# Tokenizers compared", *tables]) + "\n"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Give each path as much of its end as tells it from the others; tokenizer.model with its directory."""
    depth = 1
    while len({_tail(path, depth) for path in paths}) < len(set(paths)):
        depth += 1
    return {path: _tail(path, depth) for path in paths}


def _tail(path: str, depth: int) -> str:
    parts = Path(path).parts
    return str(Path(*parts[-depth - (Path(path).stem == "tokenizer") :]))


def _table(records: Sequence[dict[str, Any]], part: str, draw: _Table) -> str:
    inputs = short_names([record["input"] for record in records])
    tokenizers = short_names([record["tokenizer"] for record in records])
    rows = [
        (
            inputs[record["input"]],
            tokenizers[record["tokenizer"]],
            f"{record['vocabulary']:,}",
            f"{record['tokens']:,}",
            _number(record["characters_per_token"], ".3f"),
            _number(record["bytes_per_token"], ".3f"),
            _number(record["byte_share"], ".1%"),
            _number(record["unknown_share"], ".1%"),
            _number(record["relative"], ".1%"),
        )
        for record in records
        if record["part"] == part
    ]
    return draw(_HEAD, rows)


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


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
    """Draw bars for every input and tokenizer.

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
