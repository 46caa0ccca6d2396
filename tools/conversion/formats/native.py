"""A native checkpoint as the source of a conversion, and as its result."""

import dataclasses
from pathlib import Path

from megatron_ext.checkpoint import Manifest, find_checkpoint, model_of, read_manifest
from megatron_ext.checkpoint.directory import MANIFEST, partial_path, publish
from megatron_ext.checkpoint.read import WeightReader, Weights
from megatron_ext.checkpoint.write import write_weights
from tokenizer.formats.record import stored_record
from tools.conversion.changes.weights import MergedWeights
from tools.conversion.source import Source


def open_native(folder: Path) -> Source:
    """Open the checkpoint that `folder` is, or whose folder it is; adapters that it has are merged into the weights."""
    checkpoint = find_checkpoint(folder, "--input")
    manifest = read_manifest(checkpoint, "--input")
    model, lora = model_of(manifest, f"--input {checkpoint}: {MANIFEST}")
    weights: Weights = WeightReader(checkpoint, check_values=True)
    adapters = 0
    if lora is not None:
        weights = merged = MergedWeights(weights, lora)
        adapters = merged.adapters
    source = Source(
        model,
        weights,
        tokenizer=None,
        origin="native",
        hugging_face=manifest.hugging_face,
        record=stored_record(manifest.tokenizer, f"--input {checkpoint}: {MANIFEST}"),
        merged_adapters=adapters,
        has_optimizer=manifest.has_optimizer,
    )
    return source.check(f"--input {checkpoint}", MANIFEST)


def write_native(source: Source, folder: Path) -> None:
    """Write a checkpoint of iteration 0, without optimizer states, into a folder that `pretrain --load` takes."""
    manifest = Manifest(
        iteration=0,
        consumed_samples=0,
        consumed_tokens=0,
        model=dataclasses.asdict(source.model),
        layout={"source": source.origin},
        has_optimizer=False,
        hugging_face=source.hugging_face,
        tokenizer=None if source.record is None else source.record.plain(),
    )
    partial = partial_path(folder, manifest.iteration)
    partial.mkdir()
    digests = write_weights(partial, source.weights)
    publish(folder, dataclasses.replace(manifest, sha256=digests))
