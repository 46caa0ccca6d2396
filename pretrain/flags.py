"""From a command line and a YAML file to a `RunConfig`, and back.

Every field of the configuration dataclasses is a flag of the same name. What is asked for later wins: the
preset named by --model, then --config's file, then the command line. What nobody says of the model is that of the
checkpoint, if the run starts from one, and else the default.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_ext.checkpoint import model_of, read_manifest
from megatron_ext.checkpoint.directory import MANIFEST
from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig, preset, preset_names
from megatron_ext.option import field_of, flag_of, refuse_unused
from pretrain.checkpoints import CheckpointConfig
from pretrain.config import RunConfig
from pretrain.flag import Flag, all_flags, read_switch
from pretrain.megatron_flags import ADVICE
from tokenizer.formats.load import read_tokenizer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m pretrain",
        description="Pretrain a LLaMA-style model with tensor, pipeline and ZeRO data parallelism.",
        epilog="Start it under torchrun for several ranks. Exit codes: 0 done, 2 the request is wrong.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by flag name; the command line overrides them")
    parser.add_argument("--model", metavar="NAME", help=f"a published shape: {', '.join(preset_names())}")
    parser.add_argument(
        "--use-checkpoint-args", action=argparse.BooleanOptionalAction, help="the model's shape is that of --load"
    )
    parser.add_argument(
        "--callback",
        action="append",
        metavar="MODULE:CLASS",
        help="import a class that acts beside the steps; repeatable",
    )
    sections = {group: parser.add_argument_group(group) for group in RunConfig.kinds()}
    for flag in all_flags().values():
        options: dict[str, Any] = {"dest": flag.name, "help": _help_line(flag)}
        if flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = flag.metavar or _metavar(flag)
            if flag.repeated:
                options["nargs"] = "+"
        sections[flag.group].add_argument(flag.spelled, **options)
    return parser


def _metavar(flag: Flag) -> str:
    if flag.choices is not None:
        return "{" + ",".join(map(str, flag.choices)) + "}"
    if flag.listed:
        return "N,N,..."
    return {int: "N", float: "X"}.get(flag.kind, "TEXT")


def _help_line(flag: Flag) -> str:
    shown = flag.default not in (None, False, ())
    return (flag.help + (f" (default: {flag.default})" if shown else "")).replace("%", "%%")


def parse(arguments: Sequence[str]) -> RunConfig:
    """The run that a command line asks for. Raises RequestError: one line that says what is wrong."""
    file, given = read_settings(arguments)
    return resolve(file | given)


def read_settings(arguments: Sequence[str], also: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by field name, of --config's file and of the command line, not yet resolved. Raises RequestError.

    also: flags that the caller has taken out already, for one that is misspelled is still there.
    """
    _refuse_unknown(arguments, also)
    given = vars(build_parser().parse_args(arguments))
    file = given.pop("config", None)
    return ({} if file is None else read_yaml(file)), given


def _refuse_unknown(arguments: Sequence[str], also: Sequence[str]) -> None:
    known = set(build_parser()._option_string_actions)
    for word in arguments:
        spelled = word.split("=", 1)[0]
        if not spelled.startswith("--") or spelled in known:
            continue
        name = spelled[2:]
        if name in ADVICE:
            raise RequestError(f"{spelled}: {ADVICE[name]}")
        close = difflib.get_close_matches(spelled, {*known, *also}, n=1, cutoff=0.75)
        raise RequestError(
            f"{spelled}: unknown flag" + (f"; did you mean {close[0]}?" if close else "; see python -m pretrain --help")
        )


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Settings from a YAML mapping of flag names (dashes or underscores)."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--config {file}: cannot be read ({error.__class__.__name__}: {error})") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"--config {file}: not valid YAML ({reason})") from error
    if not isinstance(content, dict):
        raise RequestError(f"--config {file}: must be a mapping of flag names to values")
    settings = {field_of(str(key)): value for key, value in content.items()}
    if "callback" in settings:  # whoever reads a file must not run its code
        raise RequestError(f"--config {file}: callback: is not taken from a file: give --callback on the command line")
    known = {*all_flags(), "model", "use_checkpoint_args"}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise RequestError(
                f"--config {file}: unknown setting {name}" + (f"; did you mean {close[0]}?" if close else "")
            )
    return settings


def resolve(settings: dict[str, Any]) -> RunConfig:
    """Settings by field name (and `model`, `use_checkpoint_args`, `callback`), with presets and defaults filled in."""
    settings = dict(settings)
    name, asked = settings.pop("model", None), settings.pop("use_checkpoint_args", None)
    callbacks = tuple(settings.pop("callback", ()))
    from_checkpoint = asked is not None and read_switch("--use-checkpoint-args", asked)
    flags = all_flags()
    read = {key: flags[key].read(value) for key, value in settings.items()}
    read = {key: value for key, value in read.items() if value is not None or flags[key].default is None}
    kinds = RunConfig.kinds()
    given = {group: {key: value for key, value in read.items() if flags[key].group == group} for group in kinds}
    options = CheckpointConfig(**given["checkpoint"])
    keeps_rows = from_checkpoint and options.embedding_init is None
    tokenizer = None if keeps_rows else read.get("tokenizer_model")
    stored = _stored_model(name, from_checkpoint, options)
    model = _model(name, given.pop("model"), stored, options.overridden, tokenizer)
    groups = {"model": model} | {group: kinds[group](**values) for group, values in given.items()}
    return RunConfig.of(groups, callbacks)


def _stored_model(name: Any, from_checkpoint: bool, options: CheckpointConfig) -> ModelConfig | None:
    """The model of the checkpoint that the run starts from, if it does from any."""
    start = options.start()
    if from_checkpoint and name is not None:
        raise RequestError(f"--use-checkpoint-args contradicts --model {name}: either says what the model's shape is")
    if from_checkpoint and start.checkpoint is None:
        raise RequestError("--use-checkpoint-args needs --load: the checkpoint that has the shape")
    if start.checkpoint is None:
        return None
    manifest = read_manifest(start.checkpoint, start.flag)
    return model_of(manifest, f"{start.flag} {start.checkpoint}: {MANIFEST}")[0]


def _model(
    name: Any,
    values: dict[str, Any],
    stored: ModelConfig | None,
    overridden: Collection[str],
    tokenizer: str | None,
) -> ModelConfig:
    """What single flags say, then what the preset does; what neither says is the stored model's, or the default."""
    values = {key: value for key, value in values.items() if value is not None}
    if "vocab_size" not in values and tokenizer is not None:
        values["vocab_size"] = read_tokenizer("--tokenizer-model", tokenizer).vocab_size  # never padded
    given = set(values)
    if name is not None:
        values = dataclasses.asdict(preset(str(name))) | values
    elif stored is not None:
        kept = {key: value for key, value in dataclasses.asdict(stored).items() if key not in overridden}
        values = kept | values
    needed = [field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING]
    missing = [flag_of(key) for key in needed if values.get(key) is None]
    if missing:
        raise RequestError(
            f"{', '.join(missing)} missing: give them, or --model NAME (--help lists the names), or --load a "
            "checkpoint that has them"
        )
    model = ModelConfig(**values)
    # of a preset or the stored model: what has no effect beside the values that are given, as a factor without scaling
    idle: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(model) if field.name in model.idle()
    }
    model = dataclasses.replace(model, **{key: value for key, value in idle.items() if key not in given})
    # of the factor the model itself says what it needs
    unused = [key for key in idle if key in given and key != "rope_scaling_factor"]
    rotates = model.position_embedding_type == "rope"
    refuse_unused(model, unused, "--rope-scaling llama3" if rotates else "--position-embedding-type rope")
    return model


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as a file that `--config` reads back to an equal run, without its callbacks."""
    parts = [f"# with --callback {name}" for name in config.callbacks]
    for group, values in config.groups().items():
        values = dataclasses.asdict(values)
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        parts.append(f"# {group}\n" + yaml.safe_dump(plain, sort_keys=False))
    return "\n".join(parts)
