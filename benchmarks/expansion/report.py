"""The experiment's tables and its picture."""

from pathlib import Path
from typing import Any

Points = list[dict[str, float]]


def write_report(folder: Path, trials: dict[str, Any], rates: dict[str, float], init: str) -> str:
    """Write results.md and results.png into `folder`; returns the text. init: the one that stages are compared with."""
    text = "\n".join([*_start(trials), *_grid(trials, rates), *_stages(trials, init)])
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    _draw(folder / "results.png", trials, init)
    return text


def steps_to_regain(points: Points, value: float) -> float | None:
    """The first measured step at which a Chinese character takes at most `value` bits."""
    return next((point["step"] for point in points if point["chinese"] <= value), None)


def _before(trials: dict[str, Any]) -> dict[str, float]:
    return trials["not expanded"]["points"][0]


def _grid_trials(trials: dict[str, Any]) -> dict[tuple[str, str], Points]:
    """(regime, init) -> points, of the trials in which every init meets every regime."""
    return {
        (trial["trial"]["stages"][0][0], trial["trial"]["init"]): trial["points"]
        for name, trial in trials.items()
        if "/" in name
    }


def _names(trials: dict[str, Any]) -> tuple[list[str], list[str]]:
    pairs = _grid_trials(trials)
    return list(dict.fromkeys(regime for regime, _ in pairs)), list(dict.fromkeys(init for _, init in pairs))


def _start(trials: dict[str, Any]) -> list[str]:
    before, pairs = _before(trials), _grid_trials(trials)
    regimes, inits = _names(trials)
    lines = ["Bits per character at step 0", "", "| rows begin as | Chinese | English |", "|---|---|---|"]
    lines.append(f"| before the expansion | {before['chinese']:.3f} | {before['english']:.3f} |")
    for init in inits:
        first = pairs[regimes[0], init][0]
        lines.append(f"| {init} | {first['chinese']:.3f} | {first['english']:.3f} |")
    return [*lines, ""]


def _grid(trials: dict[str, Any], rates: dict[str, float]) -> list[str]:
    before, pairs = _before(trials)["chinese"], _grid_trials(trials)
    regimes, inits = _names(trials)
    last = pairs[regimes[0], inits[0]][-1]["step"]
    heads = " | ".join(f"{regime} (rate {rates[regime]:g})" for regime in regimes)
    lines = [f"After {last} steps: Chinese / English bits per character (steps to regain Chinese before the expansion)"]
    lines += ["", f"| rows begin as | {heads} |", "|---" * (1 + len(regimes)) + "|"]
    for init in inits:
        cells = []
        for regime in regimes:
            points = pairs[regime, init]
            regained = steps_to_regain(points, before)
            end = points[-1]
            shown = "-" if regained is None else f"{regained:g}"
            cells.append(f"{end['chinese']:.3f} / {end['english']:.3f} ({shown})")
        lines.append(f"| {init} | {' | '.join(cells)} |")
    return [*lines, ""]


def _compared(trials: dict[str, Any], init: str) -> dict[str, Points]:
    """What is held against full training of the expanded model from the start, that itself first."""
    regimes, _ = _names(trials)
    named = {regime: f"{regime}/{init}" for regime in regimes}
    others = [name for name in trials if "/" not in name]
    return {name: trials[key]["points"] for name, key in (named | dict(zip(others, others, strict=True))).items()}


def _stages(trials: dict[str, Any], init: str) -> list[str]:
    before = _before(trials)["chinese"]
    lines = [f"One stage and two, the same number of steps; rows begin as {init}", ""]
    lines += ["| trained | Chinese | English | steps to regain Chinese |", "|---|---|---|---|"]
    for name, points in _compared(trials, init).items():
        end, regained = points[-1], steps_to_regain(points, before)
        shown = "-" if regained is None or name == "not expanded" else f"{regained:g}"
        lines.append(f"| {name} | {end['chinese']:.3f} | {end['english']:.3f} | {shown} |")
    return lines


def _draw(file: Path, trials: dict[str, Any], init: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs, before, compared = _grid_trials(trials), _before(trials), _compared(trials, init)
    figure, ((left, right), (low_left, low_right)) = pyplot.subplots(2, 2, figsize=(13, 9.5), constrained_layout=True)

    def curves(axes: Any, lines: dict[str, Points], language: str, title: str, limits: tuple[float, float]) -> None:
        for name, points in lines.items():
            style = {"color": "0.5", "linestyle": ":"} if name == "not expanded" else {}
            axes.plot([p["step"] for p in points], [p[language] for p in points], label=name, **style)
        axes.axhline(before[language], color="black", linewidth=0.8, linestyle="--", label="before the expansion")
        axes.set(title=title, xlabel="step", ylabel=f"bits per {language.capitalize()} character", ylim=limits)
        axes.grid(alpha=0.3)

    by_init, by_init_alone = (
        {i: points for (regime, i), points in pairs.items() if regime == wanted} for wanted in ("full", "embeddings")
    )

    def limits(lines: dict[str, Points], language: str) -> tuple[float, float]:
        values = sorted(p[language] for points in lines.values() for p in points)
        high = values[int(len(values) * 0.97)]
        return values[0] - 0.05 * (high - values[0]), max(high, before[language]) * 1.02

    curves(left, compared, "chinese", f"What is trained (rows begin as {init})", limits(compared, "chinese"))
    curves(right, compared, "english", "What it costs in English (colours as on the left)", limits(compared, "english"))
    curves(low_left, by_init, "chinese", "How rows begin: full training", limits(by_init, "chinese"))
    curves(low_right, by_init_alone, "chinese", "How rows begin: embeddings only", limits(by_init_alone, "chinese"))
    for axes in (left, low_left, low_right):
        axes.legend(fontsize=8, loc="upper right")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
