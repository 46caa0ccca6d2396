"""The files with which transformers' AutoTokenizer loads a SentencePiece model.

There is no `tokenizer.json` here. That format ranks merges by pair, so one of two pairs always goes first; a
SentencePiece model may give many pieces one score, and then the leftmost goes first. Where `AB` and `BC` are both
new pieces of one score no ranking gives the ids of the model: on Chinese prose about one line in eleven would be
cut differently. `SentencePieceBackend` (transformers 5) runs the model itself, so its ids are the model's.
"""

import json

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]


def huggingface_files(proto: ModelProto) -> dict[str, bytes]:
    """`tokenizer_config.json` and `special_tokens_map.json`, to lie beside `tokenizer.model`.

    As LLaMA's tokenizer does, encoding puts the begin-of-sentence token first unless `add_special_tokens=False`.
    One limit is transformers' own: its decoding shows byte pieces as `<0x0A>`; sentencepiece decodes them.
    """
    names = _special_tokens(proto)
    config = {
        "tokenizer_class": "SentencePieceBackend",
        **names,
        "legacy": True,  # encode with the model as it is, its dummy prefix included
        "special_tokens_pattern": "bos" if "bos_token" in names else "none",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    return {"tokenizer_config.json": _json(config), "special_tokens_map.json": _json(names)}


def _special_tokens(proto: ModelProto) -> dict[str, str]:
    trainer = proto.trainer_spec
    ids = {
        "unk_token": trainer.unk_id,
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "pad_token": trainer.pad_id,
    }
    return {name: proto.pieces[index].piece for name, index in ids.items() if index >= 0}


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
