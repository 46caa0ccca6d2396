"""`python -m tools.check_export`: is an exported Hugging Face model the model that was trained?

Asks two programs about one text: this project, which trained, with the native checkpoint, and transformers with the
exported folder. Four checks, each with what was found:
  tokenizer   the folder's is the one that the checkpoint was trained with
  token ids   transformers' AutoTokenizer gives the ids that training used, for texts in English and Chinese
  loss        of the text; the native weights are rounded to the type of the exported ones first, as the export was
  logits      at every position of the text
So an export in bfloat16 is held to the same 1e-4 as one in float32: what rounding alone changes is in both numbers.
Prints a continuation by the exported model. Exit codes: 0 equal, 1 different, 2 the request is wrong.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.models.decoder import Decoder, whole_model
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.option import flag_of
from tokenizer.errors import TokenizerError
from tokenizer.formats.interface import Tokenizer
from tokenizer.formats.load import open_tokenizer
from tokenizer.formats.record import TokenizerRecord, record_of
from tokenizer.text.documents import read_documents
from tokenizer.text.file import decode, inspect
from tools.command import Parser, run
from tools.conversion.changes.weights import CastWeights
from tools.conversion.formats.hf_folder import open_tensors
from tools.conversion.formats.native import open_native
from tools.conversion.proof.prove import TOLERANCE
from tools.conversion.proof.run_transformers import NotRunnable
from tools.conversion.proof.tokenizers import compare_tokenizers
from tools.conversion.source import Source


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check found: `found` in words, after its name."""

    name: str
    passed: bool
    found: str

    def __str__(self) -> str:
        return f"  {'ok  ' if self.passed else 'FAIL'}  {self.name}: {self.found}"


def build_parser() -> Parser:
    parser = Parser("check_export", __doc__)
    parser.add_argument("--native", required=True, metavar="DIR", help="checkpoint that was exported")
    parser.add_argument("--hf", required=True, metavar="DIR", help="the exported folder, with its tokenizer")
    parser.add_argument("--text", required=True, metavar="FILE", help="text whose loss is compared")
    parser.add_argument("--max-tokens", type=int, default=256, help="how much of the text is used")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--new-tokens", type=int, default=40, help="length of the continuation")
    return parser


def load_decoder(source: Source, dtype: torch.dtype | None = None) -> Decoder:
    """Load a model, undistributed, in float32, adapters merged. dtype: to which its weights are rounded first."""
    decoder = whole_model(source.model)
    stored = source.weights if dtype is None else CastWeights(source.weights, dtype)
    weights = {name: stored.read_rows(name, 0, shape[0]).float() for name, shape in stored.shapes.items()}
    if decoder.config.tied:
        weights[HEAD] = weights[EMBEDDING]
    decoder.load_state_dict(weights, assign=True)
    return decoder


def first_document(path: Path) -> str:
    """The file's text; of JSON lines, the first document's."""
    file = inspect("--text", path)
    if file.json_lines:
        return next(read_documents([path], "text", lambda _: None, "--text"), "")
    with file.open("--text") as (stream, _):
        return decode(stream.read(), f"--text {path}")


@torch.no_grad()
def work(options: argparse.Namespace) -> int:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise RequestError(f"transformers is needed to check an export ({error}): pip install transformers") from error
    folder = Path(options.hf)
    for name in ("max_tokens", "new_tokens"):
        if getattr(options, name) < 1:
            raise RequestError(f"{flag_of(name)} {getattr(options, name)}: must be at least 1")
    if not folder.is_dir():
        raise RequestError(f"--hf {folder}: no such folder")
    text = first_document(Path(options.text))
    tokenizer = _open_tokenizer(folder)
    source = open_native(Path(options.native))
    record = source.record or record_of(tokenizer)
    if tokenizer.vocab_size > source.model.vocab_size:
        raise RequestError(
            f"--hf {folder}: {tokenizer.path.name} has {tokenizer.vocab_size} pieces, the model of --native "
            f"{options.native} {source.model.vocab_size} rows"
        )
    ids = _encode(tokenizer, record, text, min(options.max_tokens, source.model.max_position_embeddings - 1))
    if ids.shape[1] < 2:
        raise RequestError(f"--text {options.text}: has {ids.shape[1]} tokens, at least 2 are needed")
    stored = open_tensors(folder)
    dtype = next(iter(stored.dtypes.values()))
    exported: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    print(f"{folder}: {type(exported).__name__}, weights in {_name(dtype)}; tokenizer: {record_of(tokenizer)}")
    as_trained = dtype == next(iter(source.weights.dtypes.values()))
    decoder = load_decoder(source, None if as_trained else dtype)
    checks = [*_check_tokenizer(source, record, tokenizer, folder), *_check_model(decoder, exported, tokenizer, ids)]
    print(f"{ids.shape[1] - 1} tokens of {options.text}:")
    for check in checks:
        print(check)
    del decoder  # at most two models in memory
    if not as_trained:
        full = _losses(load_decoder(source)(ids), ids).mean().item()
        print(f"  (the loss with the weights as they were trained, not rounded to {_name(dtype)}: {full:.6f})")
    if options.prompt is not None:
        prompt = _encode(tokenizer, record, options.prompt, source.model.max_position_embeddings)
        continued = exported.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new_tokens, do_sample=False
        )
        print(f"continuation: {tokenizer.decode(continued[0].tolist())}")
    failed = [check.name for check in checks if not check.passed]
    print("passed" if not failed else f"different: {', '.join(failed)}")
    return 1 if failed else 0


def _open_tokenizer(folder: Path) -> Tokenizer:
    try:
        return open_tokenizer("--hf", folder)
    except TokenizerError as error:
        raise RequestError(f"{error}; export with --tokenizer, which puts it there") from error


def _encode(tokenizer: Tokenizer, record: TokenizerRecord, text: str, longest: int) -> torch.Tensor:
    """Ids as training had them, int64 [1, at most longest + 1]."""
    first = [tokenizer.bos_id] if record.prepend_bos and tokenizer.bos_id is not None else []
    return torch.tensor([[*first, *tokenizer.encode(text)][: longest + 1]], dtype=torch.int64)


def _check_tokenizer(source: Source, record: TokenizerRecord, tokenizer: Tokenizer, folder: Path) -> list[Check]:
    own = record_of(tokenizer)
    if source.record is None:
        first = Check("tokenizer", True, f"{own}; the checkpoint does not say which it was trained with")
    else:
        difference = source.record.difference(own)
        found = f"{own}, that of the run" if difference is None else f"it {difference}; the run's was {source.record}"
        first = Check("tokenizer", difference is None, found)
    try:
        differences = compare_tokenizers(tokenizer, record, folder)
    except NotRunnable as error:
        raise RequestError(str(error)) from error
    if differences.ids is not None:
        return [first, Check("token ids", False, f"transformers' AutoTokenizer {differences.ids}")]
    return [first, Check("token ids", True, str(differences))]


def _check_model(decoder: Decoder, exported: Any, tokenizer: Tokenizer, ids: torch.Tensor) -> list[Check]:
    """Loss and logits of ids [1, s + 1] by both programs."""
    ours, theirs = decoder(ids), exported(input_ids=ids).logits
    if ours.shape != theirs.shape:
        return [Check("logits", False, f"this project gives {ours.shape[-1]} a token, transformers {theirs.shape[-1]}")]
    losses = [_losses(logits, ids) for logits in (ours, theirs)]
    mean = [loss.mean().item() for loss in losses]
    differ = abs(mean[0] - mean[1])
    loss = f"this project {mean[0]:.6f}, transformers {mean[1]:.6f}, apart by {differ:.1e} (at most {TOLERANCE:.0e})"
    relative = ((ours - theirs).abs().amax(-1) / ours.abs().amax(-1).clamp(min=1e-30))[0]
    wrong = ~(relative <= TOLERANCE)  # also what is not a number
    worst = int(relative.nan_to_num(nan=torch.inf).argmax())
    logits = (
        f"apart by at most {relative[worst]:.1e} of the largest of a position (at most {TOLERANCE:.0e}), at position "
        f"{worst}"
    )
    if wrong.any():
        first = int(wrong.nonzero()[0])
        place = _place(first, tokenizer, ids, losses)
        logits += f"; {int(wrong.sum())} of {len(wrong)} positions differ, the first is {place}"
    return [Check("loss", differ <= TOLERANCE, loss), Check("logits", not wrong.any(), logits)]


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")


def _place(position: int, tokenizer: Tokenizer, ids: torch.Tensor, losses: list[torch.Tensor]) -> str:
    piece = tokenizer.pieces.get(int(ids[0, position]))
    if position >= len(losses[0]):
        return f"{position} ({piece!r}, the last)"
    ours, theirs = (loss[position].item() for loss in losses)
    return f"{position} ({piece!r}): loss of what follows {ours:.6f} by this project, {theirs:.6f} by transformers"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
