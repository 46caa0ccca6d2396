"""Checkpoints and their run.yaml as release 0.1.0 wrote them, after two steps of a tiny run, still load, bitwise.

digests.json in each: SHA-256 of every stored tensor, row by row, taken when it was written.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor

from megatron_ext.checkpoint import find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.directory import read_manifest
from megatron_ext.checkpoint.state import MODEL, optimizer_key
from megatron_ext.checkpoint.verify import find_problems
from megatron_ext.engine import Engine
from megatron_ext.mesh import build_grid
from pretrain.flags import parse, to_yaml
from tests.distributed import Pool
from tests.pretrain.support import stored

FIXTURES = Path(__file__).parents[1] / "fixtures"
RANKS = {"one_rank": 1, "tp2_zero1": 4, "lora": 1, "deepspeed": 2}  # TP2 x DP2; the last with DeepSpeed's ZeRO-2


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def load(root: Path) -> dict[str, str]:
    """Digests of what the run that run.yaml describes holds once it has loaded its own checkpoint."""
    config = parse(["--config", str(root / "run.yaml"), "--load", str(root)])
    engine = Engine(config.engine, build_grid(config.engine.parallel, torch.device("cpu")))
    load_checkpoint(engine, find_checkpoint(root))
    states = engine.state_dict()
    tensors = {MODEL + name: weight for name, weight in states.weights.items()}
    for name, kept in states.optimizer.items():
        tensors |= {optimizer_key(kind, name): value for kind, value in kept.items()}
    found = {"optimizer.steps": digest(engine.optimizer.step_count)}
    for key, tensor in tensors.items():
        assert isinstance(tensor, DTensor)
        found[key] = digest(tensor.full_tensor())
    return found


@pytest.mark.parametrize("kind", RANKS)
def test_loads_bitwise(pool: Pool, tmp_path: Path, kind: str) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    with tarfile.open(FIXTURES / f"{kind}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / kind
    expected = json.loads((root / "digests.json").read_text(encoding="utf-8"))
    checkpoint = find_checkpoint(root)
    assert not list(find_problems(checkpoint, read_manifest(checkpoint), True, lambda _: None))
    assert {key: digest(tensor) for key, tensor in stored(checkpoint).items()} == expected
    held = {key: value for key, value in expected.items() if not key.startswith(("random.", "loss_scaler"))}
    for found in pool.run(load, RANKS[kind], root):
        assert found == held


@pytest.mark.parametrize("kind", RANKS)
def test_run_yaml_says_what_it_said(tmp_path: Path, kind: str) -> None:
    with tarfile.open(FIXTURES / f"{kind}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    file = tmp_path / kind / "run.yaml"
    before = yaml.safe_load(file.read_text(encoding="utf-8"))
    now = yaml.safe_load(to_yaml(parse(["--config", str(file)])))
    assert {name: now[name] for name in before} == before
