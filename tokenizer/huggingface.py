"""The files with which transformers' AutoTokenizer loads a SentencePiece model.

Where an exact `tokenizer.json` exists (`fast_tokenizer.py`), it is written, and transformers runs that. Its class is
the general one, which does what the file says: transformers' LlamaTokenizer has a way of its own with leading spaces.
Else, as after a merge with equal scores (on Chinese prose about one line in eleven would be cut differently), there
is none, and `SentencePieceBackend` (transformers 5) runs the model itself.
"""

import json

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from tokenizer.fast_tokenizer import fast_tokenizer, why_no_fast_tokenizer

HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def huggingface_files(proto: ModelProto, pad_token: str | None = None, add_bos: bool = True) -> dict[str, bytes]:
    """The files to lie beside `tokenizer.model`, among them `tokenizer.json` where there is an exact one.

    As sentencepiece, a `</s>` within a text is text (`split_special_tokens=False` makes it the token). One limit is
    transformers' own: SentencePieceBackend's decoding shows byte pieces as `<0x0A>`; sentencepiece decodes them.

    Args:
        proto: the model.
        pad_token: the piece for padding, where the model does not say.
        add_bos: encoding puts the begin-of-sentence token first, as LLaMA's tokenizer does, unless it is called with
            `add_special_tokens=False`.
    """
    names = _special_tokens(proto)
    if pad_token:
        names["pad_token"] = pad_token
    exact = why_no_fast_tokenizer(proto) is None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "SentencePieceBackend",
        **names,
        "legacy": True,  # SentencePieceBackend: encode with the model as it is, its dummy prefix included
        "special_tokens_pattern": "bos" if add_bos and "bos_token" in names else "none",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    fast = {"tokenizer.json": _json(fast_tokenizer(proto, names, add_bos))} if exact else {}
    return {**fast, "tokenizer_config.json": _json(config), "special_tokens_map.json": _json(names)}


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
