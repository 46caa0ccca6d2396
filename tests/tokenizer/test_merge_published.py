"""A clean merge of the published models, against the published merge."""

import json
from pathlib import Path

import pytest

from tests.tokenizer.test_merge_clean import check_promises, load, tokens
from tokenizer.__main__ import main
from tokenizer.text.characters import chinese_runs, has_cjk

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the published models are not at hand")
def test_fewer_tokens_than_the_published_merge(tmp_path: Path) -> None:
    tokenizers = SHARED / "tokenizers"
    flags = ("--base", tokenizers / "llama.model", "--extra", tokenizers / "chinese_sp.model", "--quiet", "--output")
    assert main([*map(str, ("merge", *flags, tmp_path / "clean"))]) == 0
    assert main([*map(str, ("merge", *flags, tmp_path / "published", "--mode", "chinese-llama"))]) == 0
    check_promises(tmp_path / "clean", tokenizers / "llama.model")
    base = load(tokenizers / "llama.model")
    clean, published = (load(tmp_path / name / "tokenizer.model") for name in ("clean", "published"))
    assert clean.vocab_size() == published.vocab_size() == 49953
    import tokenizers as library

    fast = library.Tokenizer.from_file(str(tmp_path / "clean" / "tokenizer.json"))
    fast.encode_special_tokens = True
    for corpus in ("zh_d2l", "zh_tang_poems", "en_shakespeare"):
        with (SHARED / "corpus" / f"{corpus}.jsonl").open(encoding="utf-8") as file:
            lines = [line for row in file for line in json.loads(row)["text"].splitlines()][:1500]
        ids = clean.encode(lines, num_threads=1)
        assert [encoding.ids for encoding in fast.encode_batch(lines, add_special_tokens=False)] == ids
        untouched = [(line, cut) for line, cut in zip(lines, ids, strict=True) if not has_cjk(line)]
        assert all(cut == base.encode(line) for line, cut in untouched)
        if corpus == "en_shakespeare":
            assert len(untouched) == len(lines) > 1000
        else:
            runs = [run for line in lines for run in chinese_runs(line)]
            assert tokens(clean, runs) <= 0.99 * tokens(published, runs)
            assert sum(map(len, ids)) <= 1.04 * tokens(published, lines)
