"""The figures as a table and as a picture. A row is what `benchmarks.zero.__main__.measure` makes of a contender."""

from typing import Any

import torch

from benchmarks.zero.contenders import Task
from megatron_ext.models.count import parameters

_SIZES = ("weights", "gradients", "optimizer", "peak")  # keys of a row, in bytes


def heading(task: Task) -> str:
    config, device = task.config, task.grid.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    batch, ranks = config.batch, task.grid.dp_size
    return (
        f"torch {torch.__version__}, DP {ranks} on {where}, {str(config.precision.compute).removeprefix('torch.')}: "
        f"{parameters(config.model) / 1e6:.1f} M parameters, "
        f"{batch.microbatches(ranks)} microbatches of {batch.micro_batch_size} x {batch.seq_length} tokens a rank"
    )


def report(rows: list[dict[str, Any]]) -> None:
    print("step: median over rounds, its ratio to DDP's of the same round, quartiles of that; memory of a rank in MiB")
    print(f"{'':30s}{'ms':>8s}{'/ DDP':>7s}{'quartiles':>13s}" + "".join(f"{key:>11s}" for key in (*_SIZES, "/ DDP")))
    for row in rows:
        low, high = row["quartiles"]
        times = f"{row['seconds'] * 1e3:8.1f}{row['ratio']:7.2f}  {low:.2f} - {high:.2f}"
        sizes = "".join(f"{row[key] / 2**20:11.1f}" for key in _SIZES)
        print(f"{row['name']:30s}{times}{sizes}{row['peak'] / rows[0]['peak']:11.2f}")


def draw(rows: list[dict[str, Any]], title: str, output: str) -> None:
    """Step times by DDP's, with quartiles, and memory: states as stacked bars, peaks as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="small")
    time, memory = figure.subplots(1, 2, sharey=True)
    names, ratios = [row["name"] for row in rows], [row["ratio"] for row in rows]
    below = [row["ratio"] - row["quartiles"][0] for row in rows]
    above = [row["quartiles"][1] - row["ratio"] for row in rows]
    time.barh(names, ratios, xerr=[below, above], color="tab:gray")
    time.set_xlabel("step time / DDP's (median, quartiles)")
    left = [0.0] * len(rows)
    *states, peak = _SIZES
    for key in states:
        sizes = [row[key] / 2**20 for row in rows]
        memory.barh(names, sizes, left=left, label=key)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    memory.plot([row[peak] / 2**20 for row in rows], names, "k|", markersize=14, label="peak in a step")
    memory.set_xlabel("MiB of a rank")
    memory.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize="small", frameon=False)
    time.invert_yaxis()
    figure.savefig(output, dpi=120)
