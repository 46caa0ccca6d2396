"""Constants of a device from a run that was measured on it: how much slower or faster it is than the table says.

One factor, for a run has one step time: on what matrix products, attention and memory-bound kernels reach.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.planner.cluster import Cluster
from megatron_ext.planner.program import Program
from megatron_ext.planner.step import step_time
from pretrain.flags import read_yaml, resolve
from tools.metrics_file import read_metrics

_SLOWEST, _FASTEST = 1e-3, 1e3


def calibrated(cluster: Cluster, program: Program, metrics: str) -> tuple[Cluster, str]:
    """Give the cluster with the factor in, and a line that says what it is. metrics: pretrain --metrics FILE, with the
    run's run.yaml where pretrain puts it. Raises RequestError."""
    records = read_metrics(metrics, "--calibrate")
    if not all(map(_is_measured, records)):
        raise RequestError(
            f"--calibrate {metrics}: not a metrics file of pretrain (not every line has elapsed_ms, a time, and "
            "world_size, a number of ranks)"
        )
    measured = statistics.median(record["elapsed_ms"] for record in records[len(records) // 2 :]) / 1e3
    ranks = records[-1]["world_size"]
    place = _resolved_beside(metrics)
    try:
        config = resolve(read_yaml(place)).engine.validate(ranks)
    except RequestError as error:
        raise RequestError(f"--calibrate {metrics}: the run of {place} cannot be planned ({error})") from error
    then = dataclasses.replace(cluster, gpus=ranks)

    def predicted(factor: float) -> float:
        return step_time(config, _faster(then, factor), program).seconds

    slow, fast = _SLOWEST, _FASTEST
    if not predicted(fast) <= measured <= predicted(slow):
        raise RequestError(
            f"--calibrate {metrics}: a step of {measured:.4g} s cannot be explained by the speed of the device: "
            f"without computation it would take {predicted(fast):.4g} s; check --gpu and --interconnect"
        )
    for _ in range(60):
        middle = (slow * fast) ** 0.5
        slow, fast = (slow, middle) if predicted(middle) <= measured else (middle, fast)
    line = (
        f"calibrated on {metrics}: {ranks} ranks, {measured:.4g} s a step where the table says {predicted(1.0):.4g}: "
        f"devices of {fast:.3g} x the table's speed"
    )
    return _faster(cluster, fast), line


def _faster(cluster: Cluster, factor: float) -> Cluster:
    measured = cluster.gpu.measured
    changed = {name: getattr(measured, name) * factor for name in ("matmul", "attention", "memory")}
    changed["launch_us"] = measured.launch_us / factor
    gpu = dataclasses.replace(cluster.gpu, measured=dataclasses.replace(measured, **changed))
    return dataclasses.replace(cluster, gpu=gpu)


def _is_measured(record: dict[str, Any]) -> bool:
    time, ranks = record.get("elapsed_ms"), record.get("world_size")
    return isinstance(time, (int, float)) and 0 < time < float("inf") and isinstance(ranks, int) and ranks > 0


def _resolved_beside(metrics: str) -> Path:
    """Where pretrain wrote the run's resolved configuration: beside the metrics, or with the checkpoints."""
    path = Path(metrics)
    places = [path.with_suffix(".run.yaml"), path.with_suffix("") / "run.yaml", path.parent / "run.yaml"]
    for place in places:
        if place.is_file():
            return place
    raise RequestError(
        f"--calibrate {metrics}: the run's configuration is not beside it; put its run.yaml at {places[0]}"
    )
