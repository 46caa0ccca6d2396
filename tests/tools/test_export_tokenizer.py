"""What lies beside exported weights gives transformers the ids of training, and the text back; other tokenizers are
refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import find_checkpoint, read_manifest
from megatron_ext.checkpoint.directory import MANIFEST
from tests.families import save_model
from tests.tokenizer.extended import OLD, base_model, extended_model, write_models
from tests.tokenizer.samples import CHINESE, ENGLISH, write_byte_level, write_json, write_sentencepiece
from tests.tools.test_convert_checkpoint import convert
from tokenizer.formats.load import open_tokenizer
from tokenizer.formats.record import record_of
from tools import check_export
from tools.command import run
from tools.conversion.proof.tokenizers import compare_tokenizers

transformers = pytest.importorskip("transformers", minversion="5")

OURS = [" A dog,  two dogs\n\tand 27 foxes 😀", "人工智能 needs 时间；1984年。", "é一丁, To be"]
CONFIGS = ("config.json", "generation_config.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bpe.model`, which has an exact tokenizer.json; `ext.model` and `uni.model`, which have none; `bytes/`, which is
    one, with an end of text that is not id 2; for each a native checkpoint of every type of model that is tested."""
    folder = tmp_path_factory.mktemp("made")
    write_sentencepiece(folder / "bpe.model", ENGLISH * 3 + CHINESE * 3, 500)
    write_sentencepiece(folder / "uni.model", ENGLISH * 3 + CHINESE * 3, 500, model_type="unigram")
    (folder / "ext.model").write_bytes(extended_model().SerializeToString())
    (folder / "bytes").mkdir()
    path = write_byte_level(folder / "bytes" / "tokenizer.json", ENGLISH + CHINESE, 400)
    content = json.loads(path.read_text())
    added = content["added_tokens"][0]
    content["added_tokens"] += [added | {"id": 400 + i, "content": name} for i, name in enumerate(("<bos>", "<eos>"))]
    write_json(path, content)
    write_json(path.with_name("tokenizer_config.json"), {"bos_token": "<bos>", "eos_token": "<eos>"})
    write_json(path.with_name("special_tokens_map.json"), {"eos_token": "<|endoftext|>"})  # it disagrees
    path.with_name("chat_template.jinja").write_text("{{ messages }}")
    return folder


def native(made: Path, family: str, tokenizer: str, **noted: Any) -> Path:
    """A checkpoint as a run with this tokenizer leaves it; `noted` is what its corpora said beside."""
    folder = made / f"{family}-{tokenizer}"
    size = open_tokenizer("", made / tokenizer).vocab_size
    if not folder.exists():
        save_model(family, made / f"{folder.name}-hf", vocab_size=size)
        names = ("--input", made / f"{folder.name}-hf", "--output", folder, "--tokenizer", made / tokenizer)
        assert convert("--from", "hf", "--to", "native", *names, "--no-verify") == 0
    path = find_checkpoint(folder) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= {"prepend_bos": None} | noted
    manifest["hugging_face"] = None  # as if it had been made here
    path.write_text(json.dumps(manifest))
    return folder


def export(made: Path, source: Path, output: Path, *flags: object) -> int:
    """Without the check of the weights, which others test."""
    return convert("--from", "native", "--to", "hf", "--input", source, "--output", output, "--no-verify", *flags)


@pytest.mark.parametrize(
    "family, tokenizer, prepend_bos",
    [
        ("llama", "bpe.model", True),
        ("qwen2", "bpe.model", False),
        ("mistral", "ext.model", True),
        ("qwen2", "uni.model", False),
        ("llama", "bytes", True),
        ("qwen2", "bytes", False),
    ],
)
def test_transformers_gives_the_ids_of_training(
    made: Path, tmp_path: Path, family: str, tokenizer: str, prepend_bos: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = native(made, family, tokenizer, prepend_bos=prepend_bos)
    assert export(made, source, tmp_path / "hf", "--tokenizer", made / tokenizer) == 0
    assert "AutoTokenizer gives training's ids" in capsys.readouterr().out
    trained, theirs = open_tokenizer("", made / tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    first = [trained.bos_id] if prepend_bos else []
    for text in (*OURS, *ENGLISH, *CHINESE):
        ids = trained.encode(text)
        assert theirs(text).input_ids == first + ids
        if tokenizer in ("bpe.model", "bytes"):  # SentencePieceBackend shows bytes in its own way
            assert theirs.decode(ids) == trained.decode(ids)
    assert theirs.decode(trained.encode("fox dog")) == "fox dog"
    for name in CONFIGS:
        config = json.loads((tmp_path / "hf" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (trained.bos_id, trained.eos_id)
    if tokenizer == "bytes":
        assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_spare_rows_and_added_tokens(made: Path, tmp_path: Path) -> None:
    """Rows beyond the pieces stay; of tokens that were added beyond the pieces, those with a row."""
    size = open_tokenizer("", made / "bpe.model").vocab_size
    save_model("llama", tmp_path / "hf", vocab_size=size + 2)
    (tmp_path / "hf" / "tokenizer.model").write_bytes((made / "bpe.model").read_bytes())
    added = {str(size + i): {"content": f"<|{i}|>", "special": True} for i in range(4)}
    settings = {"added_tokens_decoder": added, "chat_template": "{{ messages }}", "tokenizer_class": "LlamaTokenizer"}
    write_json(tmp_path / "hf" / "tokenizer_config.json", settings)
    names = ("--input", tmp_path / "hf", "--output", tmp_path / "n", "--no-verify")
    assert convert("--from", "hf", "--to", "native", *names) == 0
    assert export(made, tmp_path / "n", tmp_path / "out", "--tokenizer", tmp_path / "hf") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (len(theirs), theirs.chat_template) == (size + 2, "{{ messages }}")
    assert theirs.convert_tokens_to_ids(["<|0|>", "<|1|>"]) == [size, size + 1]


def test_without_its_files_the_ids_are_the_runs_or_absent(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = native(made, "llama", "bytes", eod_token_id=7)
    assert export(made, source, tmp_path / "hf") == 0
    assert "no tokenizer files are written: the model's tokenizer is tokenizer.json" in capsys.readouterr().out
    for name in CONFIGS:
        config = json.loads((tmp_path / "hf" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (400, [401, 7])
    nameless = shutil.copytree(source, tmp_path / "nameless")
    path = find_checkpoint(nameless) / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": None}))
    assert export(made, nameless, tmp_path / "unknown") == 0
    assert "tokenizer is not known, so config.json names no ids" in capsys.readouterr().out
    for name in CONFIGS:
        config = json.loads((tmp_path / "unknown" / name).read_text())
        assert [config.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")] == [None] * 3
    assert transformers.AutoConfig.from_pretrained(tmp_path / "unknown").eos_token_id is None


def test_another_tokenizer_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = extended_model()
    other.pieces[400].piece, other.pieces[401].piece = other.pieces[401].piece, other.pieces[400].piece
    (made / "swapped.model").write_bytes(other.SerializeToString())
    source = native(made, "mistral", "ext.model")
    for target in ("hf", "native"):
        names = ("--from", "native", "--to", target, "--input", source, "--output", tmp_path / target)
        assert convert(*names, "--tokenizer", made / "swapped.model") == 2
        error = capsys.readouterr().err
        assert f"swapped.model is not the tokenizer that --input {source} was trained with (ext.model" in error
        assert "it has other pieces under the same ids" in error
        assert not (tmp_path / target).exists()
    assert convert(*names, "--tokenizer", made / "swapped.model", "--change-tokenizer", "--no-verify") == 0
    noted = read_manifest(find_checkpoint(tmp_path / "native")).tokenizer
    assert noted is not None
    assert noted["vocabulary_sha256"] == open_tokenizer("", made / "swapped.model").vocabulary_sha256
    again = ("--input", source, "--output", tmp_path / "again", "--tokenizer", made / "ext.model", "--change-tokenizer")
    assert convert("--from", "native", "--to", "native", *again) == 2
    assert "already; leave it out" in capsys.readouterr().err


def test_growth_begins_at_the_models_own(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, extended = write_models(tmp_path)
    swapped = []
    for name, model in (("base", base_model()), ("extended", extended_model())):
        model.pieces[400].piece, model.pieces[401].piece = model.pieces[401].piece, model.pieces[400].piece
        swapped.append(tmp_path / f"swapped-{name}.model")
        swapped[-1].write_bytes(model.SerializeToString())
    save_model("llama", tmp_path / "hf", vocab_size=OLD)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(base.read_bytes())
    names = ("--from", "hf", "--to", "native", "--input", tmp_path / "hf", "--output", tmp_path / "out", "--no-verify")
    grow = ("--embedding-init", "mean", "--base-tokenizer")
    assert convert(*names, *grow, swapped[0], "--tokenizer", swapped[1]) == 2
    assert f"--base-tokenizer {swapped[0]} is not the tokenizer that --input" in capsys.readouterr().err
    assert convert(*names, *grow, base, "--tokenizer", extended) == 0
    noted = read_manifest(find_checkpoint(tmp_path / "out")).tokenizer
    assert noted is not None
    assert noted["sha256"] == record_of(open_tokenizer("", extended)).sha256
    core = ("--from", "native", "--to", "megatron-core", "--input", tmp_path / "out", "--output", tmp_path / "core")
    back = ("--from", "megatron-core", "--to", "native", "--input", tmp_path / "core", "--output", tmp_path / "back")
    assert convert(*core, "--no-verify") == convert(*back, "--no-verify") == 0
    assert read_manifest(find_checkpoint(tmp_path / "back")).tokenizer == noted


def test_contradictions_of_a_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = write_models(tmp_path)
    save_model("llama", tmp_path / "hf", vocab_size=OLD - 1)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    write_json(tmp_path / "hf" / "config.json", config | {"eos_token_id": 7, "bos_token_id": 1})
    write_json(tmp_path / "hf" / "generation_config.json", {"eos_token_id": [7, 2], "bos_token_id": 3})
    (tmp_path / "hf" / "tokenizer.model").write_bytes(base.read_bytes())
    names = ("--input", tmp_path / "hf", "--output", tmp_path / "n", "--no-verify")
    assert convert("--from", "hf", "--to", "native", *names) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    assert f"tokenizer.model has {OLD} pieces, the model {OLD - 1} rows" in notes[0]
    assert "config.json has eos_token_id 7, its tokenizer 2" in notes[1]
    assert "generation_config.json has bos_token_id 3, its tokenizer 1" in notes[2]


def check(native: Path, hf: Path, text: Path) -> int:
    words = ["--native", native, "--hf", hf, "--text", text, "--prompt", "dog", "--new-tokens", 2]
    return run(check_export.build_parser(), check_export.work, [str(word) for word in words])


@pytest.mark.parametrize("tokenizer", ["bpe.model", "bytes"])
def test_check_export(made: Path, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an export in bfloat16, as the recipe's; of its weights or its tokenizer spoiled."""
    source, hf, text = native(made, "llama", tokenizer, prepend_bos=True), tmp_path / "hf", tmp_path / "t.txt"
    text.write_text("\n".join((*ENGLISH, *CHINESE)), "utf-8")
    assert export(made, source, hf, "--tokenizer", made / tokenizer, "--dtype", "bfloat16") == 0
    capsys.readouterr()
    assert check(source, hf, text) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, weights in bfloat16" in printed
    assert printed.count("  ok    ") == 4
    assert printed.endswith("passed\n")

    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    model.model.norm.weight.data[3] *= 1.1
    model.save_pretrained(hf)
    assert check(source, hf, text) == 1
    printed = capsys.readouterr().out
    assert "positions differ, the first is 0 (" in printed
    assert printed.endswith("logits\n")
    name = "tokenizer.json"
    content = json.loads((hf / name).read_text())
    content["model"]["merges"] = content["model"]["merges"][5:]
    write_json(hf / name, content)
    assert check(source, hf, text) == 1
    found = "token ids: transformers' AutoTokenizer gives" if tokenizer == "bpe.model" else "tokenizer: it has the same"
    assert f"FAIL  {found}" in capsys.readouterr().out


def test_compare_sees_another_tokenizer(made: Path, tmp_path: Path) -> None:
    source = native(made, "llama", "bytes", prepend_bos=False)
    assert export(made, source, tmp_path / "hf", "--tokenizer", made / "bytes") == 0
    trained = open_tokenizer("", made / "bytes")
    record = record_of(trained)
    assert compare_tokenizers(trained, record, tmp_path / "hf").severity == 0
    write_json(tmp_path / "hf" / "special_tokens_map.json", {"eos_token": "<bos>"})
    assert compare_tokenizers(trained, record, tmp_path / "hf").ids == "has eos id 400 instead of 401"
