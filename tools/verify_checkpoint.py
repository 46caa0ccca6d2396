"""`python -m tools.verify_checkpoint`: what is this checkpoint, and is it whole?

    DIR of `pretrain --save`     its latest checkpoint (--all: every one), or DIR itself if it is a checkpoint
    DIR of Hugging Face          config.json and weights: every file is whole, names and shapes are the configuration's

A native checkpoint is whole if every file is there with its full size and the digest that its writer computed, and
every weight that the model asks for is stored in full, with all that its optimizer keeps where it is trained. No value
of either, nor of a Hugging Face model's weights, may be NaN or infinite.
Exit codes: 0 whole, 1 damaged or incomplete, 2 the request is wrong.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ext.checkpoint import has_checkpoints, locate_checkpoint, model_of
from megatron_ext.checkpoint.digest import sha256_of
from megatron_ext.checkpoint.directory import LATEST, MANIFEST, Manifest, checkpoints_in, leftovers, parse_manifest
from megatron_ext.checkpoint.read import WeightReader, Weights
from megatron_ext.checkpoint.verify import count_not_finite, find_problems, not_finite
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes, preset, preset_names
from megatron_ext.models.names import is_adapter
from megatron_ext.optim.algorithm import stored_states
from megatron_ext.optim.algorithms import ALGORITHMS
from megatron_ext.tensor_parallel import LoraConfig
from tokenizer.errors import TokenizerError
from tokenizer.formats.record import stored_record
from tools.command import Parser, run
from tools.conversion.families import family_of
from tools.conversion.formats.hf_folder import CONFIG, open_hf, open_tensors
from tools.conversion.formats.safetensors_file import INDEX, SafetensorsFiles
from tools.conversion.source import read_table

# a model continued from a preset may have others of these
_FREE_FIELDS = frozenset({"init_method_std", "max_position_embeddings"})


@dataclasses.dataclass
class Report:
    """What is known of one checkpoint.

    facts: for --json, by name. lines: the same for people, by label. checked: what was compared, if nothing is wrong.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: dict[str, str] = dataclasses.field(default_factory=dict)
    checked: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, label: str, text: str, **facts: Any) -> None:
        self.lines[label] = text
        self.facts |= facts

    def add_files(self, folder: Path, names: Iterable[str]) -> None:
        sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
        size = sum(sizes.values())
        text = f"{tqdm.format_sizeof(size, 'B', 1000)} in {len(sizes)} files"
        self.add("on disk", text, bytes=size, files={name: {"bytes": size} for name, size in sizes.items()})

    def print(self, as_json: bool) -> None:
        if as_json:
            values = {"path": str(self.path), "kind": self.kind, "whole": not self.problems, **self.facts}
            print(json.dumps(values | {"notes": self.notes, "problems": self.problems}, ensure_ascii=False))
            return
        print(f"{self.path}: {self.kind}")
        for label, text in [*self.lines.items(), *(("note", note) for note in self.notes)]:
            print(f"  {label:<10} {text}")
        if not self.problems:
            print(f"  whole: {self.checked}")
            return
        print(f"  NOT WHOLE: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}")
        for problem in self.problems:
            print(f"    {problem}")


def build_parser() -> Parser:
    parser = Parser("verify_checkpoint", __doc__)
    parser.add_argument(
        "folder", metavar="DIR", help="a checkpoint, a folder with a `latest` one, or a Hugging Face model"
    )
    parser.add_argument("--all", action="store_true", help="every checkpoint of a folder, not only the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object for a checkpoint, on one line")
    parser.add_argument(
        "--no-checksums", action="store_true", help="do not read the files, for their digests or their values"
    )
    return parser


def work(options: argparse.Namespace) -> int:
    folder, checksums = Path(options.folder), not options.no_checksums
    if not folder.is_dir():
        raise RequestError(f"DIR {folder}: no such directory")
    is_native = has_checkpoints(folder)
    reports: Iterable[Report]
    if options.all:
        reports = (_verify_native(checkpoint, checksums) for checkpoint in _all_checkpoints(folder))
    elif is_native:
        reports = [_verify_latest(folder, checksums)]
    elif (folder / CONFIG).is_file():
        reports = [_verify_hugging_face(folder, values=checksums, digests=options.json and checksums)]
    else:
        expected = f"a checkpoint ({MANIFEST}), a folder of checkpoints ({LATEST}) or a Hugging Face model ({CONFIG})"
        raise RequestError(f"DIR {folder}: not {expected}")
    code = 0
    for report in reports:
        report.print(options.json)
        code = max(code, 1 if report.problems else 0)
    return code


def _all_checkpoints(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        raise RequestError(f"--all: DIR {folder} is a checkpoint itself; give the folder that it is in")
    checkpoints = checkpoints_in(folder)[::-1]
    if not checkpoints:
        raise RequestError(f"--all: no checkpoints (iter_*) in DIR {folder}")
    return checkpoints


def _verify_latest(folder: Path, checksums: bool) -> Report:
    try:
        checkpoint, remark = locate_checkpoint(folder, "DIR")
    except RequestError as error:
        return Report(folder, "folder of checkpoints", problems=[_reason(error, "DIR", folder)])
    report = _verify_native(checkpoint, checksums)
    if remark:
        report.problems.insert(0, remark.removeprefix(f"DIR {folder}: "))
    return report


def _verify_native(checkpoint: Path, checksums: bool) -> Report:
    report = Report(checkpoint, "native checkpoint")
    unfinished = leftovers(checkpoint.resolve().parent)
    report.notes = [f"{path.name} lies beside it: a save that goes on, or was cut off" for path in unfinished]
    try:
        manifest = parse_manifest(checkpoint, "DIR")
    except RequestError as error:
        report.problems = [_reason(error, "DIR", checkpoint)]
        return report
    _describe_native(report, checkpoint, manifest)
    compared = checksums and bool(manifest.sha256)
    with _bar(checkpoint, report.facts["bytes"] * (checksums + compared)) as bar:
        found = find_problems(checkpoint, manifest, checksums, bar.update)
        report.problems = [f"{file} {what}" for file, what in found]
    how = "digests equal" if compared else "digests not compared" if manifest.sha256 else "no digests to compare"
    report.checked = f"all {len(manifest.files)} files have their full size, {how}, every tensor is there"
    report.checked += ", every value is finite" if checksums else ", values not looked at"
    report.facts["digests_compared"] = compared
    if not manifest.sha256:
        report.notes.append("its manifest has no digests (an older version wrote it): only sizes can be compared")
    return report


def _describe_native(report: Report, checkpoint: Path, manifest: Manifest) -> None:
    progress = f"iteration {manifest.iteration}, {manifest.consumed_samples:,} samples, "
    progress += f"{manifest.consumed_tokens:,} tokens consumed"
    names = ("iteration", "consumed_samples", "consumed_tokens")
    report.add("progress", progress, **{name: getattr(manifest, name) for name in names})
    with contextlib.suppress(RequestError):  # what is wrong with it is one of the problems
        _describe_model(report, *model_of(manifest))
    with contextlib.suppress(RequestError):  # the same
        _describe_dtypes(report, WeightReader(checkpoint))
    report.add("optimizer", _optimizer_of(manifest), has_optimizer=manifest.has_optimizer)
    report.facts |= {"trainable": manifest.trainable, "lora": manifest.lora}
    if manifest.trainable is not None:
        chosen = {name: value for name, value in manifest.trainable.items() if value not in (None, False)}
        report.add("trained", _listed(chosen | (manifest.lora or {})) or "all parameters")
    report.add("written by", _listed(manifest.layout), layout=manifest.layout)
    if manifest.hugging_face is not None:
        model_type = manifest.hugging_face.get(CONFIG, {}).get("model_type")
        report.add("origin", f"Hugging Face model of type {model_type}", model_type=model_type)
    with contextlib.suppress(TokenizerError):  # the same
        record = stored_record(manifest.tokenizer, MANIFEST)
        report.add("tokenizer", "not known" if record is None else str(record), tokenizer=manifest.tokenizer)
    report.add_files(checkpoint, manifest.files)
    for name, digest in manifest.sha256.items():
        report.facts["files"].setdefault(name, {})["sha256"] = digest


def _optimizer_of(manifest: Manifest) -> str:
    if not manifest.has_optimizer:
        return "none: weights alone"
    if manifest.optimizer not in ALGORITHMS:  # one of the problems
        return manifest.optimizer
    algorithm = ALGORITHMS[manifest.optimizer]
    return f"{algorithm.title} ({', '.join(stored_states(algorithm, torch.Size(), torch.float32))})"


def _verify_hugging_face(folder: Path, values: bool, digests: bool) -> Report:
    report = Report(folder, "Hugging Face model")
    try:
        config = read_table(folder, CONFIG, "DIR")
    except RequestError as error:
        report.problems = [_reason(error, "DIR", folder)]
        return report
    try:
        model_type, model = config["model_type"], family_of(config).read(config)
    except RequestError as error:
        raise RequestError(f"DIR {folder}: {error}") from error
    except LookupError as error:
        report.problems = [f"{CONFIG} lacks {error}"]
        return report
    report.add("origin", f"model_type {model_type}", model_type=model_type)
    _describe_model(report, model, None)
    try:
        _describe_dtypes(report, open_hf(folder).weights)
        stored = open_tensors(folder)
    except RequestError as error:
        report.problems = _broken_shards(folder) or [_reason(error, "--input", folder)]
        return report
    files = sorted(set(stored.files.values()))
    report.add_files(folder, files)
    with _bar(folder, report.facts["bytes"] * (values + digests)) as bar:
        for name in files if digests else ():
            report.facts["files"][name]["sha256"] = sha256_of(folder / name, bar.update)
        for name in stored.shapes if values else ():
            if count := count_not_finite(stored, name, bar.update):
                report.problems.append(f"{name} {not_finite(count, stored, name)}")
    report.checked = f"all {len(files)} files of weights, names and shapes as {CONFIG} asks"
    report.checked += ", every value is finite" if values else ", values not looked at"
    return report


def _broken_shards(folder: Path) -> list[str]:
    """What is wrong with each of the files that the index names, if there is an index."""
    try:
        files = sorted(set(map(str, read_table(folder, INDEX)["weight_map"].values())))
    except (RequestError, LookupError, AttributeError):
        return []
    problems = []
    for file in files:
        try:
            SafetensorsFiles(folder, [file])
        except RequestError as error:
            problems.append(_reason(error, "--input", folder))
    return problems


def _describe_model(report: Report, model: ModelConfig, lora: LoraConfig | None) -> None:
    shapes = parameter_shapes(model, lora)
    total = sum(shape.numel() for shape in shapes.values())
    adapters = sum(shape.numel() for name, shape in shapes.items() if is_adapter(name))
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads "
    shape += f"({model.kv_heads} of keys and values), ffn {model.ffn_hidden_size}, vocabulary {model.vocab_size}"
    name = preset_of(model)
    report.add("model", shape + (f" = {name}" if name else ""), model=dataclasses.asdict(model), preset=name)
    parameters = f"{total:,}" + (f", {adapters:,} of them in adapters" if adapters else "")
    report.add("parameters", parameters, parameters=total, adapter_parameters=adapters)


def preset_of(model: ModelConfig) -> str | None:
    """Find the name of the published shape that a model has."""
    free = {name: getattr(model, name) for name in _FREE_FIELDS}
    shapes = {name: dataclasses.replace(preset(name), **free).resolved() for name in preset_names()}
    return next((name for name, shape in shapes.items() if shape == model.resolved()), None)


def _describe_dtypes(report: Report, weights: Weights) -> None:
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in weights.dtypes.values()})
    report.add("stored as", ", ".join(dtypes), dtypes=dtypes)


def _listed(values: dict[str, Any]) -> str:
    plain = {name: " ".join(value) if isinstance(value, list) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


@contextlib.contextmanager
def _bar(folder: Path, size: int) -> Iterator[tqdm]:
    with tqdm(total=size, unit="B", unit_scale=True, desc=folder.name, disable=size == 0) as bar:
        yield bar
        bar.total = bar.n  # values take a little less than the files that they are in
        bar.refresh()


def _reason(error: RequestError, flag: str, folder: Path) -> str:
    return str(error).removeprefix(f"{flag} {folder}: ")


if __name__ == "__main__":
    sys.exit(run(build_parser(), work, None))
