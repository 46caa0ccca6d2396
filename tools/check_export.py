"""`python -m tools.check_export`: is an exported Hugging Face model the model that was trained?

Computes the loss of a text with this project's decoder from the native checkpoint and with transformers from the
exported folder, compares loss and logits, and prints a continuation by the exported model.
Exit codes: 0 equal, 1 different, 2 the request is wrong.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.models.decoder import Decoder, whole_model
from megatron_ext.models.names import EMBEDDING, HEAD
from tools.command import Parser, run
from tools.conversion.formats.native import open_native

_TOLERANCE = 1e-4


def build_parser() -> Parser:
    parser = Parser("check_export", __doc__)
    parser.add_argument("--native", required=True, metavar="DIR", help="checkpoint that was exported")
    parser.add_argument("--hf", required=True, metavar="DIR", help="the exported folder, with its tokenizer")
    parser.add_argument("--text", required=True, metavar="FILE", help="text whose loss is compared")
    parser.add_argument("--max-tokens", type=int, default=256, help="how much of the text is used")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--new-tokens", type=int, default=40, help="length of the continuation")
    return parser


def load_native(folder: Path) -> Decoder:
    """The trained model, undistributed, in float32, adapters merged."""
    source = open_native(folder)
    decoder = whole_model(source.model)
    weights = {name: source.weights.read_rows(name, 0, shape[0]) for name, shape in source.weights.shapes.items()}
    if decoder.config.tied:
        weights[HEAD] = weights[EMBEDDING]
    decoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return decoder


def first_document(path: Path) -> str:
    """The file's text; of JSON lines, the first document's."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split("\n", 1)[0])["text"] if path.suffix == ".jsonl" else text


@torch.no_grad()
def work(options: argparse.Namespace) -> int:
    try:
        import sentencepiece
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise RequestError(f"{error.name} is needed to check an export: pip install {error.name}") from error
    for flag in ("text", "hf"):
        if not Path(getattr(options, flag)).exists():
            raise RequestError(f"--{flag} {getattr(options, flag)}: no such file or folder")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(Path(options.hf) / "tokenizer.model"))
    except OSError as error:
        raise RequestError(f"--hf {options.hf}: no SentencePiece tokenizer.model there") from error
    decoder = load_native(Path(options.native))
    exported: Any = AutoModelForCausalLM.from_pretrained(options.hf, dtype=torch.float32)
    text = first_document(Path(options.text))
    ids = torch.tensor([tokenizer.encode(text, add_bos=True)[: options.max_tokens + 1]])
    ours = decoder(ids[:, :-1], labels=ids[:, 1:]).item() / (ids.shape[1] - 1)
    theirs = exported(input_ids=ids, labels=ids).loss.item()
    difference = (decoder(ids) - exported(input_ids=ids).logits).abs().max().item()
    print(f"loss of {ids.shape[1] - 1} tokens of {options.text}:")
    print(f"  this project, native checkpoint   {ours:.6f}")
    print(f"  transformers, exported folder     {theirs:.6f}")
    print(f"  largest difference of a logit     {difference:.2e}")
    if options.prompt is not None:
        prompt = torch.tensor([tokenizer.encode(options.prompt, add_bos=True)])
        continued = exported.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new_tokens, do_sample=False
        )
        print(f"continuation: {tokenizer.decode(continued[0].tolist())}")
    return 0 if max(abs(ours - theirs), difference) <= _TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
