"""LoRA adapters of a native checkpoint as a folder for peft, to be put on the base model that they were trained on.

In it is what `--train-only lora` trains: the adapters, and the embedding and output matrix as they became. These two
are whole (peft's `modules_to_save`), so a base model must have as many rows as they: resize_token_embeddings gives
them to one from before the vocabulary was expanded. A tied matrix is there under both names: peft's word for keeping
them one, `ensure_weight_tying`, makes its older versions refuse the whole file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from megatron_ext.checkpoint import find_checkpoint, model_of, read_manifest
from megatron_ext.checkpoint.directory import MANIFEST
from megatron_ext.checkpoint.read import WeightReader, Weights
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, parameter_shapes
from megatron_ext.models.names import EMBEDDING, HEAD
from megatron_ext.optim import TrainableConfig
from megatron_ext.tensor_parallel import LoraConfig
from tools.conversion.families import Family, family_of
from tools.conversion.formats.hf_folder import config_files
from tools.conversion.formats.safetensors_file import write_safetensors
from tools.conversion.rows import RowView, Transposed, bind
from tools.conversion.source import CONFIG, Source, check_shapes, read_table

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before transformers' name of a module in a peft model
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What was trained beside a frozen model.

    Attributes:
        model: the shape of that model.
        weights: by peft's names and in its layout.
        base_model: folder of that model, or its name on the Hugging Face Hub, if one was named.
    """

    model: ModelConfig
    lora: LoraConfig
    weights: Weights
    base_model: str | None


def open_adapters(folder: Path, base_model: str | None) -> Adapters:
    """Open those of the checkpoint that `folder` is, or whose folder it is.

    Raises RequestError where it has none, or where `base_model` is a folder of a model of another shape.
    """
    checkpoint = find_checkpoint(folder, "--input")
    manifest = read_manifest(checkpoint, "--input")
    if manifest.lora is None:
        raise RequestError(f"--input {checkpoint}: there are no LoRA adapters in it; --to hf exports the whole model")
    model, lora = model_of(manifest, f"--input {checkpoint}: {MANIFEST}")
    assert lora is not None
    stored = WeightReader(checkpoint, check_values=True)
    check_shapes(stored.shapes, parameter_shapes(model, lora), f"--input {checkpoint}", MANIFEST)
    model_type = None if base_model is None else _check_base(base_model, model)
    source = Source(model, stored, tokenizer=None, origin="native", hugging_face=manifest.hugging_face)
    family, _ = config_files(source, model_type)
    return Adapters(model, lora, _by_peft(stored, _peft_names(family, model, lora)), base_model)


def _check_base(base_model: str, model: ModelConfig) -> str | None:
    """The model type of a base that is a folder here; other names are taken as they are.

    Raises RequestError unless all shapes are those of `model`, rows of the vocabulary aside.
    """
    folder = Path(base_model)
    if not folder.exists() and not base_model.startswith((".", "/")):
        return None  # a name on the Hub
    config = read_table(folder, CONFIG, "--base-model")
    try:
        family = family_of(config)
        base = family.read(config)
    except RequestError as error:
        raise RequestError(f"--base-model {base_model}: {error}") from error
    theirs = parameter_shapes(dataclasses.replace(base, vocab_size=model.vocab_size))
    ours = parameter_shapes(model)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            raise RequestError(
                f"--base-model {base_model}: the adapters were trained on another model, "
                f"{name} is {_shape(theirs, name)} there and {_shape(ours, name)} beside them"
            )
    return family.model_type


def _shape(shapes: dict[str, torch.Size], name: str) -> tuple[int, ...] | str:
    return tuple(shapes[name]) if name in shapes else "missing"


def write_peft(adapters: Adapters, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder."""
    weights, lora = adapters.weights, adapters.lora
    modules = [name.removesuffix(_A) for name in weights.shapes if name.endswith(_A)]
    whole = [name.removesuffix(".weight") for name in weights.shapes if not name.endswith((_A, _B))]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base_model,
        "r": lora.lora_rank,
        "lora_alpha": int(lora.lora_alpha) if lora.lora_alpha == int(lora.lora_alpha) else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": _last_names(modules),
        "modules_to_save": _last_names(whole),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / ADAPTER_WEIGHTS, weights, list(weights.shapes))
    rows = adapters.model.vocab_size
    print(
        f"{len(modules)} adapters of rank {lora.lora_rank}, {' and '.join(_last_names(whole))} whole: "
        f"a base model with other than {rows} rows needs resize_token_embeddings({rows}) first"
    )


def _by_peft(weights: Weights, names: dict[str, str]) -> Weights:
    """Give adapters and whole matrices by peft's names; lora_A is [rank, in], lora_B [out, rank].

    names: ours, by peft's.
    """
    renamed = RowView(weights, {theirs: [(ours, 0, weights.shapes[ours][0])] for theirs, ours in names.items()})
    return Transposed(renamed, (name for name in names if name.endswith(_B)))


def _peft_names(family: Family, model: ModelConfig, lora: LoraConfig) -> dict[str, str]:
    """peft's name of every tensor that is trained -> ours of what is in it."""
    trainable = TrainableConfig(train_only="lora")
    bindings = {ours: binding for binding in bind(family.rules, model) for ours in binding.ours}
    names: dict[str, str] = {}
    for name in parameter_shapes(model, lora):
        linear, _, part = name.partition(".lora.")
        if part:
            binding = bindings[f"{linear}.weight"]
            if len(binding.ours) > 1:
                raise RequestError(
                    f"--to peft: {linear} is a part of {binding.theirs} in a {family.model_type} model, and its "
                    "adapter cannot stand alone there: merge instead, with --to hf"
                )
            if binding.transposed:
                raise RequestError(
                    f"--to peft: {linear} lies as [in, out] in a {family.model_type} model, and adapters for that are "
                    "not built: merge instead, with --to hf"
                )
            names[_PREFIX + binding.theirs.removesuffix(".weight") + (_A if part == "a" else _B)] = name
        elif trainable.trains(name):
            names[_PREFIX + bindings[name].theirs] = name
    if model.tied:
        names[_PREFIX + next(rule.theirs for rule in family.rules if rule.ours == (HEAD,))] = EMBEDDING
    return names


def _last_names(modules: list[str]) -> list[str]:
    """Each module's own name, once: peft finds modules by the ends of their names."""
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
