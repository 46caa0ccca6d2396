"""`python -m tools.plan`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.command import run
from tools.plan import build_parser, work

_SMALL = ["--num-layers", "8", "--hidden-size", "1024", "--ffn-hidden-size", "2816", "--num-attention-heads", "16"]
_SMALL += ["--vocab-size", "49953", "--seq-length", "1024", "--global-batch-size", "32"]
_ON = ["--gpus", "8", "--gpu", "a800-80g"]


def plan(*arguments: str) -> None:
    assert work(build_parser().parse_args([*arguments])) == 0


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    plan(*arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong request gets."""
    assert run(build_parser(), work, arguments) == 2
    shown = capsys.readouterr()
    (line,) = (line for line in shown.err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.slow
def test_opt_66b_on_three_nodes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """64 layers on 24 GPUs: a layout that uses them all, and a script that pretrain accepts."""
    script = tmp_path / "opt.sh"
    arguments = ["--model", "opt-66b", "--gpus", "24", "--gpu", "a800-80g"]
    arguments += ["--global-batch-size", "1024", "--seq-length", "2048"]
    best = planned(capsys, *arguments, "--script", str(script))["plans"][0]
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    tp, pp, dp = (best[size] for size in sizes)
    assert (tp * pp * dp, best["fits"]) == (24, True)
    assert sum(best["pipeline_layers"]) == 64
    assert max(rank["total"] for rank in best["memory_bytes"]) <= 0.8 * 80 * 2**30

    environment = {**os.environ, "MEGATRON_ZH_PYTHON": sys.executable}
    dry = subprocess.run(
        ["bash", str(script), "--dry-run"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert dry.returncode == 0, dry.stderr
    assert "dry run of 24 ranks" in dry.stdout
    assert f"PP {pp} x DP {dp} x TP {tp}" in dry.stdout
    most = f"{max(rank['total'] for rank in best['memory_bytes']) / 2**30:.2f}"
    assert most in dry.stdout  # both say what the fullest rank needs


def test_what_a_user_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    plan(*_SMALL, *_ON, "--plot", str(picture))
    shown = capsys.readouterr().out
    for words in (
        "8 a800-80g",
        "assumed: --bf16",
        "layouts can run",
        "fits: ",
        "the step: ",
        "why not TP 8: ",
        "flags: --",
    ):
        assert words in shown
    assert picture.stat().st_size > 10_000


def test_a_layout_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    layout = "tp=2,pp=2,zero=2,mb=2,schedule=interleaved,chunks=2,recompute=full,sp=true,layers=3/2/2/1"
    found = planned(capsys, *_SMALL, *_ON, "--layout", layout)
    (only,) = found["plans"]
    assert only["pipeline_layers"] == [3, 2, 2, 1]
    assert (only["data_parallel_size"], only["zero_stage"], only["sequence_parallel"]) == (2, 2, True)
    assert only["recompute_granularity"] == "full"
    again = planned(capsys, *_SMALL, *_ON, *only["flags"], "--layout", "given")
    assert again["plans"] == [only]  # the flags that it prints are the layout


def test_flags_are_decisions_already_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fixed = ["--tensor-model-parallel-size", "2", "--pipeline-schedule", "1f1b", "--micro-batch-size", "2"]
    for one in planned(capsys, *_SMALL, *_ON, *fixed, "--no-sequence-parallel")["plans"]:
        assert (one["tensor_model_parallel_size"], one["micro_batch_size"]) == (2, 2)
        assert one["pipeline_schedule"] in ("1f1b", "none")
        assert not one["sequence_parallel"]
    config = tmp_path / "run.yaml"
    config.write_text("tensor_model_parallel_size: 8\nbf16: true\n")
    free = planned(capsys, "--config", str(config), *_SMALL, *_ON)
    assert free["plans"][0]["tensor_model_parallel_size"] == 1  # a file's layout is not a decision
    assert free["notes"] == []


def test_training_embeddings_alone_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = (
        planned(capsys, *_SMALL, *_ON, "--layout", "mb=4", *more)["plans"][0]
        for more in ([], ["--train-only", "embeddings"])
    )
    assert part["step_seconds"] < 0.85 * whole["step_seconds"]
    for kind in ("gradients", "optimizer"):
        assert part["memory_bytes"][0][kind] < 0.7 * whole["memory_bytes"][0][kind]


@pytest.mark.slow
def test_the_least_memory(capsys: pytest.CaptureFixture[str]) -> None:
    fast, small = (planned(capsys, *_SMALL, *_ON, "--objective", o)["plans"] for o in ("throughput", "memory"))
    assert small[0]["memory_share"] < fast[0]["memory_share"]
    assert small[0]["step_seconds"] > fast[0]["step_seconds"]
    plan(*_SMALL, *_ON, "--objective", "memory")
    assert "why not TP 1: " in (shown := capsys.readouterr().out)
    assert " GiB more at least" in shown
    assert " slower" not in shown


def test_a_script_for_fp16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/model.sh computes in bf16, which is not everywhere."""
    script = tmp_path / "v100.sh"
    plan(*_SMALL, "--gpus", "8", "--gpu", "v100-32g", "--script", str(script))
    assert "assumed: --fp16" in capsys.readouterr().out
    assert "--no-bf16" in script.read_text()
    assert "--fp16" in script.read_text()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "5",
        '{"iteration": 1, "elapsed_ms": "x", "world_size": 8}',
        '{"iteration": 1, "elapsed_ms": NaN, "world_size": 8}',
        '{"iteration": 1, "elapsed_ms": 1}',
    ],
)
def test_calibration_with_no_metrics(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(line + "\n")
    assert "not a metrics file of pretrain" in refused(capsys, *_SMALL, *_ON, "--calibrate", str(tmp_path / "m.jsonl"))


def test_a_device_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    own = [
        "--peak-tflops",
        "312",
        "--memory-gb",
        "80",
        "--bandwidth",
        "2039",
        "--link",
        "200",
        "--interconnect",
        "8x200",
    ]
    found = planned(capsys, *_SMALL, "--gpus", "8", *own)
    assert found["plans"] == planned(capsys, *_SMALL, *_ON)["plans"]


def test_calibration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A run of half the predicted speed makes predictions of other layouts slower, by up to a half."""
    before = planned(capsys, *_SMALL, *_ON, "--layout", "mb=2")["plans"][0]
    metrics = tmp_path / "metrics.jsonl"
    measured = 2e3 * before["step_seconds"]
    record = {"iteration": 1, "elapsed_ms": measured, "world_size": 8}
    metrics.write_text("".join(json.dumps(record | {"iteration": i}) + "\n" for i in range(4)))
    run = {
        "num_layers": 8,
        "hidden_size": 1024,
        "ffn_hidden_size": 2816,
        "num_attention_heads": 16,
        "vocab_size": 49953,
    }
    run |= {"seq_length": 1024, "global_batch_size": 32, "micro_batch_size": 2, "bf16": True}
    (tmp_path / "metrics.run.yaml").write_text(json.dumps(run))
    with_it = ["--calibrate", str(metrics)]
    same = planned(capsys, *_SMALL, *_ON, "--layout", "mb=2", *with_it)
    assert same["plans"][0]["step_seconds"] == pytest.approx(measured / 1e3, rel=1e-3)
    assert "the table's speed" in same["notes"][-1]
    other = planned(capsys, *_SMALL, *_ON, "--layout", "tp=2,mb=4,sp=true")["plans"][0]["step_seconds"]
    slower = planned(capsys, *_SMALL, *_ON, "--layout", "tp=2,mb=4,sp=true", *with_it)["plans"][0]["step_seconds"]
    assert 1.3 < slower / other <= 2.5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*_SMALL, "--gpus", "8", "--gpu", "z9"], "--gpu z9: unknown"),
        ([*_SMALL, "--gpus", "8"], "--gpu is missing"),
        ([*_SMALL, "--gpu", "h200"], "--gpus"),
        ([*_SMALL, "--gpus", "0", "--gpu", "h200"], "--gpus 0: must be above 0"),
        ([*_SMALL[:-2], *_ON], "--global-batch-size is required"),
        ([*_SMALL, *_ON, "--layout", "tq=2"], "--layout tq=2: 'tq=2' is not KEY=VALUE"),
        ([*_SMALL, *_ON, "--layout", "tp=3"], "world size 8 is not a multiple of TP x PP"),
        ([*_SMALL, *_ON, "--layot", "tp=2"], "--layot: unknown flag; did you mean --layout?"),
        ([*_SMALL, *_ON, "--gpu-per-node", "8"], "--gpu-per-node: unknown flag; did you mean --gpus-per-node?"),
        ([*_SMALL, *_ON, "--hiden-size", "8"], "--hiden-size: unknown flag; did you mean --hidden-size?"),
        ([*_SMALL, *_ON, "--layout", "tp=2,tp=4"], "--layout tp=2,tp=4: names tp twice"),
        ([*_SMALL, *_ON, "--layout", "lr=1"], "'lr=1' is not KEY=VALUE"),
        ([*_SMALL, *_ON, "--interconnect", "fast"], "--interconnect fast: give the GB/s"),
        ([*_SMALL, *_ON, "--memory-fraction", "1.5"], "--memory-fraction 1.5: must be above 0 and at most 1"),
        ([*_SMALL, *_ON, "--memory-gb", "0.1"], "nothing fits in 80% of 8 x 0.1 GiB: the least is"),
        (
            [*_SMALL, "--gpus", "7", "--gpu", "h200", "--pipeline-model-parallel-size", "1"],
            "no layout of 7 GPUs can run",
        ),
        ([*_SMALL, "--gpus", "12", "--gpu", "h200"], "--gpus 12 does not fill nodes of 8"),
        ([*_SMALL, *_ON, "--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0: must be at least 1"),
        ([*_SMALL, *_ON, "--micro-batch-size", "0"], "--micro-batch-size 0: must be at least 1"),
        ([*_SMALL, *_ON, "--pipeline-layers", "4,5"], "no layout of 8 GPUs can run"),
        ([*_SMALL, *_ON, "--no-bf16"], "in half precision only: plan with --bf16 or --fp16"),
        ([*_SMALL, "--gpus", "8", "--gpu", "v100-32g", "--bf16"], "--bf16: v100-32g computes in fp16 only"),
        ([*_SMALL, *_ON, "--load", "x"], "--load says nothing about a layout"),
        ([*_SMALL, *_ON, "--dry-run"], "--dry-run says nothing about a layout"),
        (
            [*_SMALL, *_ON, "--layout", "mb=1", "--objective", "memory"],
            "--objective memory has no effect with --layout",
        ),
        ([*_SMALL, *_ON, "--plot", "plan.xyz"], "--plot plan.xyz: must end in .png, .svg or .pdf"),
        ([*_SMALL, *_ON, "--script", "."], "--script .: is a folder"),
        ([*_SMALL, *_ON, "--plot", "nowhere/p.png"], "--plot nowhere/p.png: its folder does not exist"),
        ([*_SMALL, *_ON, "--calibrate", "none.jsonl"], "--calibrate none.jsonl: not a metrics file"),
        ([*_SMALL, *_ON, "--offload-optimizer", "cpu"], "how fast hosts and disks are is not in the planner"),
        ([*_SMALL, *_ON, "--zero-engine", "deepspeed"], "--zero-engine deepspeed: the search plans for torch"),
        ([*_SMALL, *_ON, "--seq-length", "9999"], "--seq-length 9999 is longer than"),
    ],
)
def test_wrong_requests(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []
