"""Conversion to a larger vocabulary: the same rows on every way, read by transformers; what does not fit is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from megatron_ext.models.expand import METHODS
from tests.tokenizer.extended import NEW, OLD, base_model, extended_model, write_models
from tests.tools.test_convert_checkpoint import convert, hf_model, tensors
from tokenizer.merge.decompose import decompose

transformers = pytest.importorskip("transformers")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Made:
    """A Hugging Face model with the vocabulary `base`, also as a native checkpoint; `extended` extends it."""

    hf: Path
    native: Path
    base: Path
    extended: Path

    def grow(self, source: str, target: str, output: Path, method: str = "mean-subtoken", *more: object) -> int:
        names = ("--from", source, "--to", target, "--input", getattr(self, source), "--output", output)
        models = ("--base-tokenizer", self.base, "--tokenizer", self.extended)
        return convert(*names, *models, "--embedding-init", method, *more)


def make(folder: Path, **options: Any) -> Made:
    hf_model(folder / "hf", vocab_size=OLD, **options)
    names = ("--input", folder / "hf", "--output", folder / "native")
    assert convert("--from", "hf", "--to", "native", *names) == 0
    return Made(folder / "hf", folder / "native", *write_models(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("which", ["made", "tied"])
def test_every_way_gives_the_same_rows(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Made = request.getfixturevalue(which)
    before = tensors(made.hf)
    assert made.grow("hf", "hf", tmp_path / "hf-hf") == 0
    grown = tensors(tmp_path / "hf-hf")
    assert made.grow("native", "hf", tmp_path / "native-hf") == 0
    for source in ("hf", "native"):
        assert made.grow(source, "native", tmp_path / f"{source}-native") == 0
        assert read_manifest(find_checkpoint(tmp_path / f"{source}-native")).model["vocab_size"] == NEW
        names = ("--input", tmp_path / f"{source}-native", "--output", tmp_path / f"{source}-native-hf")
        assert convert("--from", "native", "--to", "hf", *names, "--tokenizer", made.extended) == 0
    for way in ("native-hf", "hf-native-hf", "native-native-hf"):
        for name, tensor in tensors(tmp_path / way).items():
            assert torch.equal(tensor, grown[name]), (way, name)
    for name, tensor in before.items():
        assert torch.equal(grown[name][:OLD] if name in (EMBEDDING, HEAD) else grown[name], tensor), name
    assert grown[EMBEDDING].shape == grown[HEAD].shape == (NEW, 32)
    assert torch.equal(grown[EMBEDDING], grown[HEAD]) == (which == "tied")


def test_transformers_reads_the_result(made: Made, tmp_path: Path) -> None:
    assert made.grow("native", "hf", tmp_path / "out") == 0
    old, new = (transformers.LlamaForCausalLM.from_pretrained(folder) for folder in (made.hf, tmp_path / "out"))
    ids = torch.arange(50)[None] * 13 % OLD
    assert torch.allclose(new(input_ids=ids).logits[..., :OLD], old(input_ids=ids).logits, rtol=0, atol=1e-6)
    old.resize_token_embeddings(NEW)
    for name, tensor in old.state_dict().items():  # the same names and shapes as transformers' own resizing gives
        assert new.state_dict()[name].shape == tensor.shape
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (NEW, 1, 2)
    assert config["pad_token_id"] is None
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == made.extended.read_bytes()


def test_ids_come_from_the_tokenizer(made: Made, tmp_path: Path) -> None:
    model = extended_model()
    model.trainer_spec.bos_id, model.trainer_spec.eos_id = 2, 1
    model.trainer_spec.bos_piece, model.trainer_spec.eos_piece = "</s>", "<s>"
    model.trainer_spec.pad_id = next(i for i, piece in enumerate(model.pieces) if piece.piece == "<mask>")
    model.trainer_spec.pad_piece = "<mask>"
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    assert dataclasses.replace(made, extended=tmp_path / "other.model").grow("hf", "hf", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 1, model.trainer_spec.pad_id]


def test_the_report(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--embedding-norm-correction", "--seed", "5")
    assert made.grow("hf", "native", tmp_path / "out", "weighted-subtoken", *options) == 0
    report = json.loads((tmp_path / "out" / "embedding_init.json").read_text())
    new = decompose("", made.base, "", made.extended)
    assert (report["method"], report["norm_correction"], report["seed"]) == ("weighted-subtoken", True, 5)
    assert (report["old_rows"], report["new_rows"]) == (OLD, NEW - OLD)
    assert (report["of_bytes_only"], report["distinct_old_pieces"]) == (new.of_bytes, new.distinct)
    assert set(report["matrices"]) == {"embed_tokens.weight", "lm_head.weight"}
    for figures in report["matrices"].values():
        assert (figures["ties"], figures["equal"]) == (3, 0)  # 丁一, 一一丁丁, and the second of two without parts
        assert figures["norm"] == pytest.approx(figures["old_norm"], rel=1e-6)
    assert f"{NEW - OLD:,} new rows by weighted-subtoken" in capsys.readouterr().out


def test_methods_and_seeds_differ(made: Made, tmp_path: Path) -> None:
    results = []
    for method in METHODS:
        for seed in (1, 2):
            output = tmp_path / f"{method}{seed}"
            assert made.grow("hf", "hf", output, method, "--seed", seed) == 0
            results.append(tensors(output)[EMBEDDING][OLD:])
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_the_dtype_is_the_written_one(made: Made, tmp_path: Path) -> None:
    """Growing while changing the dtype is changing it first: what is written can be had in two steps as well."""
    assert made.grow("hf", "native", tmp_path / "at-once", "mean-subtoken", "--dtype", "bfloat16") == 0
    half = ("--input", made.hf, "--output", tmp_path / "half", "--dtype", "bfloat16")
    assert convert("--from", "hf", "--to", "hf", *half) == 0
    assert dataclasses.replace(made, hf=tmp_path / "half").grow("hf", "hf", tmp_path / "second") == 0
    names = ("--input", tmp_path / "at-once", "--output", tmp_path / "back")
    assert convert("--from", "native", "--to", "hf", *names) == 0
    expected = tensors(tmp_path / "second")
    for name, tensor in tensors(tmp_path / "back").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])


def _write(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def _longer(model: Any, by: int) -> Any:
    for number in range(by):
        model.pieces.add(piece=f"more{number}", score=0.0)
    return model


def _other(model: Any) -> Any:
    model.pieces[500].piece = "other"
    return model


WRONG: dict[str, Callable[[Made, Path], Made]] = {
    f"its vocabulary of {OLD} matches neither tokenizer, the base has {OLD + 5} pieces and the new one {OLD + 9}": (
        lambda made, at: dataclasses.replace(
            made,
            base=_write(at / "a.model", _longer(base_model(), 5)),
            extended=_write(at / "b.model", _longer(base_model(), 9)),
        )
    ),
    f"has the new tokenizer's {OLD} pieces already, leave out --embedding-init": lambda made, at: dataclasses.replace(
        made, base=_write(at / "a.model", _shorter(base_model())), extended=made.base
    ),
    "does not extend --base-tokenizer": lambda made, at: dataclasses.replace(
        made, extended=_write(at / "a.model", _other(extended_model()))
    ),
    f"adds nothing to --base-tokenizer {{base}}: it has {OLD} pieces": lambda made, at: dataclasses.replace(
        made, extended=made.base
    ),
    "cut.model": lambda made, at: dataclasses.replace(made, extended=_cut(made.extended, at / "cut.model")),
    "none.model: cannot read it": lambda made, at: dataclasses.replace(made, base=at / "none.model"),
}


def _shorter(model: Any) -> Any:
    del model.pieces[600:]
    return model


def _cut(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes()[:-2])
    return target


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("source, target", [("hf", "native"), ("native", "hf")])
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str, source: str, target: str
) -> None:
    wrong = WRONG[message](made, tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert wrong.grow(source, target, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --")
    assert "matches neither" not in line or f"--input {getattr(made, source)}: " in line
    assert message.format(base=made.base) in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_of_another_size_needs_the_flag(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("--input", made.native, "--output", tmp_path / "out")
    assert convert("--from", "native", "--to", "hf", *names, "--tokenizer", made.extended) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"has {NEW} pieces, the model a vocabulary of {OLD}" in line
    assert "--embedding-init METHOD --base-tokenizer OLD" in line
    assert list(tmp_path.iterdir()) == []
    assert convert("--from", "native", "--to", "hf", *names, "--tokenizer", made.base) == 0
