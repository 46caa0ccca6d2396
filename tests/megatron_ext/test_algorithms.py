"""Optimizer algorithms: what they declare is what they keep, and whose states a checkpoint holds is no guess."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.compatible import check_trained
from megatron_ext.checkpoint.directory import MANIFEST, Manifest, parse_manifest
from megatron_ext.checkpoint.verify import asked_tensors
from megatron_ext.errors import RequestError
from megatron_ext.optim import OptimizerConfig
from megatron_ext.optim.algorithm import STEP, new_state, stored_states
from megatron_ext.optim.algorithms import ALGORITHMS
from tests.megatron_ext.training import tiny


def test_every_algorithm_is_a_choice_of_the_flag() -> None:
    (flag,) = (field for field in dataclasses.fields(OptimizerConfig) if field.name == "optimizer")
    assert tuple(ALGORITHMS) == flag.metadata["choices"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_states_are_as_declared_and_lie_as_the_parameter_does(name: str) -> None:
    parameter = torch.ones(3, 5, dtype=torch.float64).T
    declared = ALGORITHMS[name].declare(parameter.shape, parameter.dtype)
    kept = new_state(ALGORITHMS[name], parameter)
    assert {kind: (value.shape, value.dtype) for kind, value in kept.items()} == declared
    assert not any(value.any() for value in kept.values())
    stored = stored_states(ALGORITHMS[name], parameter.shape, parameter.dtype)
    assert STEP not in stored
    assert all(spec.shape == parameter.shape and kept[kind].stride() == (1, 5) for kind, spec in stored.items())


def test_a_checkpoint_of_another_algorithm() -> None:
    config = tiny()
    manifest = Manifest(1, 1, 1, dataclasses.asdict(config.model), {}, has_optimizer=True, optimizer="lion")
    with pytest.raises(RequestError, match=r"its optimizer is lion, the run asks for --optimizer adam: .*--finetune"):
        check_trained(manifest, config, Path("run"), weights_only=False)
    check_trained(manifest, config, Path("run"), weights_only=True)
    with pytest.raises(RequestError, match="--optimizer lion: must be one of adam"):
        asked_tensors(manifest)


def test_a_manifest_that_names_none_is_of_adam(tmp_path: Path) -> None:
    plain = dataclasses.asdict(Manifest(1, 1, 1, {}, {}, has_optimizer=True))
    del plain["optimizer"]
    (tmp_path / MANIFEST).write_text(json.dumps(plain))
    assert parse_manifest(tmp_path).optimizer == "adam"
    (tmp_path / MANIFEST).write_text(json.dumps(plain | {"optimizer": 7}))
    with pytest.raises(RequestError, match="its optimizer is no name"):
        parse_manifest(tmp_path)
