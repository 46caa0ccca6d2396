"""`python -m tools.convert_checkpoint`: LLaMA checkpoints between Hugging Face and this project.

    --from native --to hf      a checkpoint of `pretrain --save` -> config.json, safetensors, tokenizer files
    --from hf --to native      the reverse; continue with `pretrain --load DIR --finetune`

The result appears under its name only when it is whole. Exit codes: 0 done, 2 the request is wrong.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_ext.checkpoint import Manifest, find_checkpoint, read_manifest
from megatron_ext.checkpoint.directory import partial_path, publish
from megatron_ext.checkpoint.read import WeightReader, write_weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.models.decoder import whole_model
from tools.command import Parser, run
from tools.conversion import hf_folder, llama

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> Parser:
    parser = Parser("convert_checkpoint", __doc__)
    parser.add_argument("--from", dest="source", choices=("native", "hf"), required=True)
    parser.add_argument("--to", dest="target", choices=("native", "hf"), required=True)
    parser.add_argument("--input", required=True, metavar="DIR", help="a checkpoint, or a folder with a `latest` one")
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist yet")
    parser.add_argument("--tokenizer", metavar="DIR|FILE", help="to hf: tokenizer files to put beside the weights")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="to hf: size of a safetensors file")
    return parser


def work(options: argparse.Namespace) -> int:
    if options.source == options.target:
        raise RequestError(f"--from {options.source} --to {options.target}: nothing to convert")
    output = Path(options.output)
    if output.exists():
        raise RequestError(f"--output {output} exists already: remove it or choose another name")
    if not output.resolve().parent.is_dir():
        raise RequestError(f"--output {output}: {output.resolve().parent} is not a directory")
    dtype = _DTYPES.get(options.dtype)
    if options.target == "hf":
        native_to_hf(options.input, output, dtype, options.tokenizer, int(options.max_shard_gb * 1e9))
    else:
        hf_to_native(Path(options.input), output, dtype)
    print(f"wrote {output}")
    return 0


def native_to_hf(source: str, output: Path, dtype: torch.dtype | None, tokenizer: str | None, shard_bytes: int) -> None:
    """Convert a native checkpoint, at most a shard's weights in memory at a time."""
    checkpoint = find_checkpoint(source)
    model = ModelConfig(**read_manifest(checkpoint).model)
    config = llama.to_hf_config(model)
    reader = WeightReader(checkpoint)
    order = _check_names(set(reader.shapes), model, str(checkpoint))
    stored = next(iter(reader.dtypes.values()))
    config["dtype"] = config["torch_dtype"] = str(dtype or stored).removeprefix("torch.")
    names = {llama.to_hf_name(name): name for name in order}
    sizes = {theirs: reader.shapes[ours].numel() * (dtype or stored).itemsize for theirs, ours in names.items()}
    progress = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="weights")

    def read(wanted: list[str]) -> dict[str, torch.Tensor]:
        tensors = reader.read(names[name] for name in wanted)
        progress.update(sum(sizes[name] for name in wanted))
        return {name: tensors[names[name]].to(dtype or stored).contiguous() for name in wanted}

    with _appearing(output) as folder:
        hf_folder.write_model(folder, config, sizes, read, shard_bytes)
        if tokenizer is not None:
            hf_folder.copy_tokenizer(Path(tokenizer), folder)
    progress.close()


def hf_to_native(source: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Convert a Hugging Face LLaMA into a folder that `pretrain --load` takes."""
    model = llama.from_hf_config(hf_folder.read_config(source))
    weights = {}
    for name, tensor in tqdm(hf_folder.read_weights(source), desc="weights", unit=" tensors"):
        ours = llama.from_hf_name(name)
        if not (model.tied and ours == "lm_head.weight"):
            weights[ours] = tensor.to(dtype or torch.float32)
    _check_names(set(weights), model, str(source))
    expected = whole_model(model).state_dict()
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise RequestError(
                f"--input {source}: {llama.to_hf_name(name)} is {tuple(tensor.shape)}, "
                f"config.json asks for {tuple(expected[name].shape)}"
            )
    manifest = Manifest(0, 0, 0, dataclasses.asdict(model), {"source": "hugging face"}, has_optimizer=False)
    with _appearing(output) as folder:
        partial_path(folder, 0).mkdir()
        write_weights(partial_path(folder, 0), weights)
        publish(folder, manifest)


def _check_names(found: set[str], model: ModelConfig, source: str) -> list[str]:
    """Every parameter of the model there, none left over. Returns the names in the model's order."""
    wanted = [name for name, _ in whole_model(model).named_parameters()]
    for problem, names in (("lacks", set(wanted) - found), ("has an unknown", found - set(wanted))):
        if names:
            raise RequestError(f"--input {source}: {problem} weight {min(names)} ({len(names)} in all)")
    return wanted


class _appearing:
    """A folder that exists under its name only once the block has ended well."""

    def __init__(self, final: Path):
        self._final, self._partial = final, final.with_name(f".{final.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        return self._partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.replace(self._partial, self._final)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
