"""Every name that is installed, or that a message tells to install, is the project that is meant."""

import configparser
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.errors import RequestError
from megatron_ext.kernels import KernelConfig, load_kernels

ROOT = Path(__file__).parents[1]
# name on PyPI -> the module that it brings; each was looked up there
KNOWN = {
    "torch": "torch",
    "megatron-core": "megatron",
    "sentencepiece": "sentencepiece",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "protobuf": "google",
    "pyyaml": "yaml",
    "tqdm": "tqdm",
    "zstandard": "zstandard",
    "filelock": "filelock",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "deepspeed": "deepspeed",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "peft": "peft",
    "pytest": "pytest",
    "pytest-xdist": "xdist",
    "hypothesis": "hypothesis",
    "ruff": "ruff",
    "mypy": "mypy",
    "transformer-engine": "transformer_engine",
}
STUBS = {"types-pyyaml", "types-tqdm"}


def name_of(requirement: str) -> str:
    """`deepspeed>=0.19,<0.20` -> deepspeed"""
    match = re.match(r"[\w.-]*\w", requirement)
    assert match is not None, requirement
    return match[0].lower()


def required() -> set[str]:
    pinned = (line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"].values()
    listed = "\n".join([settings["options"]["install_requires"], *extras]).split()
    return {name_of(requirement) for requirement in (*pinned, *listed)}


def told() -> set[str]:
    """Names after `pip install` in all files of the repository but this one."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = (path.read_text(errors="replace") for file in files if (path := ROOT / file) != Path(__file__))
    found = {match[1] for text in texts for match in re.finditer(r"pip install ['\"]?([A-Za-z{][\w.{}-]*)", text)}
    return {name.lower() for name in found}


def test_names_are_known() -> None:
    assert required() - STUBS <= KNOWN.keys()
    if (ROOT / ".git").exists():
        assert told() <= KNOWN.keys()  # also not one that is made at run time, of a module's name


def test_what_is_installed_is_what_is_imported() -> None:
    owners = importlib.metadata.packages_distributions()
    installed = {owner.lower().replace("_", "-") for names in owners.values() for owner in names}
    assert "torch" in installed
    for name in KNOWN.keys() & installed:
        assert name in {owner.lower().replace("_", "-") for owner in owners[KNOWN[name]]}


@pytest.mark.parametrize("nvidia", [False, True], ids=["another project", "NVIDIA's"])
def test_another_project_named_apex_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nvidia: bool
) -> None:
    (tmp_path / "apex" / "normalization").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    if nvidia:
        (tmp_path / "apex" / "normalization" / "fused_layer_norm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    reason = "this backend is not built yet" if nvidia else f"the `apex` in {tmp_path}/apex is not NVIDIA's but another"
    with pytest.raises(RequestError, match=rf"^--transformer-impl apex: {reason}"):
        load_kernels(KernelConfig(transformer_impl="apex"))
    assert "apex" not in sys.modules
