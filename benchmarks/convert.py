"""`python -m benchmarks.convert`: how fast checkpoints are converted, and in how much memory, beside transformers.

Makes a LLaMA of random bfloat16 weights as a Hugging Face folder of several shards and takes it to a native checkpoint
and back, in turn with transformers' from_pretrained and save_pretrained of the same folder and with a plain copy, each
a process of its own. What came back is compared byte for byte. Peaks are of resident memory. A conversion's must not
be above twice the largest tensor and what the same conversion of a model of 10 MB takes.

    python -m benchmarks.convert
    python -m benchmarks.convert --gigabytes 10 --runs 3 --json convert.json

Exit codes: 0 done, 1 a conversion took more memory than that, 2 the request is wrong.
"""

import argparse
import dataclasses
import filecmp
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.peak import Usage, measure
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from tools.conversion.formats.hf_folder import write_hf
from tools.conversion.source import Source, WatchedWeights

# hidden, feed-forward, heads, key/value heads, vocabulary: of Llama 3 8B, of Llama 3.2 1B, and small ones
_SHAPES = (
    (4096, 14336, 32, 8, 128256),
    (2048, 8192, 32, 8, 128256),
    (1024, 2816, 16, 8, 32000),
    (512, 1536, 8, 4, 8000),
    (256, 768, 4, 2, 4000),
)
_FEWEST_LAYERS = 4
_SHARDS = 4
_SMALL = 0.01  # GB of the model whose conversion shows what a process takes by itself
_CONVERT = [sys.executable, "-m", "tools.convert_checkpoint"]
_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
"""
_PEER, _COPY = "transformers, load and save", "plain copy"


class RandomWeights:
    """Weights drawn as they are read: uniform, bfloat16."""

    def __init__(self, model: ModelConfig):
        self.shapes = parameter_shapes(model)
        self.dtypes = dict.fromkeys(self.shapes, torch.bfloat16)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty([stop - start, *self.shapes[name][1:]], dtype=torch.bfloat16).uniform_(-0.05, 0.05)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model to convert.

    Attributes:
        size, largest: bytes of all weights, and of the largest.
        shard: GB of a file.
    """

    path: Path
    size: int
    largest: int
    shard: float


@dataclasses.dataclass(frozen=True)
class Way:
    """A conversion as a command. to: the folder that it writes."""

    name: str
    to: str
    command: list[str]


def shape_of(gigabytes: float) -> ModelConfig:
    """The largest of the shapes that comes out near this size with some layers."""
    for hidden, ffn, heads, kv_heads, vocabulary in _SHAPES:
        model = ModelConfig(1, hidden, ffn, heads, vocabulary, num_query_groups=kv_heads)
        sizes = sizes_of(model)
        layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
        layers = round((gigabytes * 1e9 - sum(sizes.values())) / layer) + 1
        if layers >= _FEWEST_LAYERS:
            return dataclasses.replace(model, num_layers=layers)
    raise RequestError(f"--gigabytes {gigabytes}: too small, {_SMALL} will do")


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """Bytes of every weight in bfloat16."""
    return {name: 2 * shape.numel() for name, shape in parameter_shapes(model).items()}


def make(gigabytes: float, root: Path) -> Folder:
    """Write a random model into `root`/hf."""
    model = shape_of(gigabytes)
    weights = WatchedWeights(RandomWeights(model))
    sizes = sizes_of(model)
    size, largest = sum(sizes.values()), max(sizes.values())
    folder = Folder(root / "hf", size, largest, size / _SHARDS / 1e9)
    folder.path.mkdir(parents=True)
    with weights.bar:
        write_hf(Source(model, weights, tokenizer=None, origin="random"), folder.path, int(folder.shard * 1e9))
    return folder


def ways(folder: Folder, peer: bool) -> list[Way]:
    root, shard = folder.path.parent, str(folder.shard)
    hf, native, back, copy = (str(root / name) for name in ("hf", "native", "back", "copy"))
    there = [*_CONVERT, "--from", "hf", "--to", "native", "--input", hf, "--output", native]
    home = [*_CONVERT, "--from", "native", "--to", "hf", "--max-shard-gb", shard, "--input", native, "--output", back]
    found = []
    for name, to, command in (("hf -> native", native, there), ("native -> hf", back, home)):
        found += [Way(f"{name}, proved", to, command), Way(name, to, [*command, "--no-verify"])]
    if peer:
        found.append(Way(_PEER, copy, [sys.executable, "-c", _TRANSFORMERS, hf, copy, f"{folder.shard}GB"]))
        found.append(Way(_COPY, copy, ["cp", "-r", hf, copy]))
    return found


def run_all(folder: Folder, runs: int, peer: bool) -> dict[str, list[Usage]]:
    """Every way, in turn with the others, `runs` times. Of the folders that they write only the last one is kept."""
    usages: dict[str, list[Usage]] = {}
    with tqdm(total=runs * len(ways(folder, peer)), unit="run") as bar:
        for _ in range(runs):
            for way in ways(folder, peer):
                bar.set_description(way.name)
                shutil.rmtree(way.to, ignore_errors=True)
                usages.setdefault(way.name, []).append(measure(way.command))
                bar.update()
            shutil.rmtree(folder.path.parent / "copy", ignore_errors=True)
    return usages


def check_equal(folder: Folder) -> None:
    """Raise RequestError unless the weights that came back are those that left."""
    for file in sorted(folder.path.glob("*.safetensors")):
        if not filecmp.cmp(file, folder.path.parent / "back" / file.name, shallow=False):
            raise RequestError(f"{file.name} came back from native with other bytes than it left with")


def figures(folder: Folder, large: dict[str, list[Usage]], small: dict[str, list[Usage]]) -> list[dict[str, Any]]:
    """A row for every way; bytes. Those of ours have a bound on the peak, and whether it holds."""
    rows = []
    for way in ways(folder, peer=_PEER in large):
        usages = large[way.name]
        seconds, peak = statistics.median(usage.seconds for usage in usages), max(usage.peak for usage in usages)
        row: dict[str, Any] = {"name": way.name, "seconds": seconds, "bytes_per_second": folder.size / seconds}
        row["peak"] = peak
        if _PEER in large:
            row["speed"] = statistics.median(usage.seconds for usage in large[_PEER]) / seconds
        if way.name in small:
            constant = max(usage.peak for usage in small[way.name])
            bound = constant + 2 * folder.largest
            row |= {"constant": constant, "bound": bound, "holds": peak <= bound}
        rows.append(row)
    return rows


def report(folder: Folder, rows: list[dict[str, Any]]) -> None:
    print(f"{folder.size / 1e9:.2f} GB of bfloat16, largest tensor {folder.largest / 1e6:.1f} MB; peaks in MB")
    print(f"{'':30s}{'seconds':>9s}{'GB/s':>7s}{'speed':>7s}{'peak':>9s}{'constant':>10s}{'bound':>9s}")
    for row in rows:
        speed = f"{row['speed']:7.2f}" if "speed" in row else f"{'':7s}"
        line = (
            f"{row['name']:30s}{row['seconds']:9.1f}{row['bytes_per_second'] / 1e9:7.2f}{speed}{row['peak'] / 1e6:9.0f}"
        )
        if "bound" in row:
            holds = "holds" if row["holds"] else "BROKEN"
            line += f"{row['constant'] / 1e6:10.0f}{row['bound'] / 1e6:9.0f}  {holds}"
        print(line)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the model; the disk needs four times it")
    parser.add_argument("--runs", type=int, default=1, help="of each; seconds are the median, peaks the largest")
    parser.add_argument("--work-dir", metavar="DIR", help="where to write (default: where temporary files go)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure transformers too")
    return parser


def work(options: argparse.Namespace) -> int:
    shape_of(options.gigabytes)
    if options.runs < 1:
        raise RequestError(f"--runs {options.runs}: must be at least 1")
    if options.work_dir is not None and not Path(options.work_dir).is_dir():
        raise RequestError(f"--work-dir {options.work_dir}: no such directory")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as root:
        small = run_all(make(_SMALL, Path(root) / "small"), options.runs, peer=False)
        folder = make(options.gigabytes, Path(root) / "large")
        large = run_all(folder, options.runs, options.peer)
        check_equal(folder)
    rows = figures(folder, large, small)
    report(folder, rows)
    if options.json is not None:
        content = {"bytes": folder.size, "largest_tensor": folder.largest, "ways": rows}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.get("holds", True) for row in rows) else 1


def main(arguments: list[str]) -> int:
    try:
        return work(build_parser().parse_args(arguments))
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
