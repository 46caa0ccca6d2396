"""Small tokenizers in every format, and a text."""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from tokenizer.formats.sentencepiece_model import read_model

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Training a language model needs text, time and patience; 12345 tokens are not enough.",
    "    indented code = [1, 2, 3]",
]
CHINESE = [
    "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。",
    "语言模型的训练需要大量的文本，人工智能的训练也需要大量的时间。",
    "科学家说：“计算机科学是一门学科……”",
]


def write_sentencepiece(path: Path, texts: list[str], size: int, **options: Any) -> Path:
    """Train a model with LLaMA's conventions, except for `options`."""
    settings = {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "hard_vocab_limit": False,
        "minloglevel": 2, "vocab_size": size,
    } | options  # fmt: skip
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=file, **settings)
    return path


def as_tokenizer_json(model: Path) -> dict[str, Any]:
    """A tokenizer.json that gives the ids of a BPE model whose scores differ."""
    proto = read_model("--model", model)
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    merges = [
        [piece.piece[:cut], piece.piece[cut:]]
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ids and piece.piece[cut:] in ids
    ]
    special = [
        {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for index, name in enumerate(("<unk>", "<s>", "</s>"))
    ]  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": ids,
            "merges": merges,
        },
    }  # fmt: skip


def write_byte_level(path: Path, texts: list[str], size: int) -> Path:
    """Train a tokenizer.json as GPT-2's; needs the package tokenizers."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(texts, trainer)
    model.save(str(path))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    return path
