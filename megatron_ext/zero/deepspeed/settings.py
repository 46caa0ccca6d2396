"""DeepSpeed's settings: what our flags say, in its words, joined with what a user's own file adds.

The flags are the truth. Where the file speaks of the same thing it must agree; where it speaks of what only
DeepSpeed knows, it is passed on; where it asks for what would not happen here, it is refused.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of
from megatron_ext.zero.config import DeepSpeedSettings, ZeroConfig
from megatron_ext.zero.deepspeed import schema
from megatron_ext.zero.deepspeed.schema import SETTINGS, Setting

Settings = DeepSpeedSettings

# said to DeepSpeed where the file is silent
_DEFAULTS: Settings = {
    "zero_allow_untested_optimizer": True,  # torch's fused AdamW, which needs no compiler; also on the host
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization.memory_efficient_linear": False,  # would replace torch.nn.functional.linear in this process
    "zero_optimization.reduce_bucket_size": 50_000_000,  # of DeepSpeed's 5e8 a rank allocates 2 GB
    "data_types.grad_accum_dtype": "fp32",
    "bf16.check_grad_overflow": True,  # skip a step whose gradient is not finite, as the other engine does
}
_UNSAID = ("auto", None)  # Hugging Face's word for "as the flags say"


def deepspeed_settings(
    zero: ZeroConfig, *, micro_batch_size: int, global_batch_size: int, microbatches: int, clip_grad: float, bf16: bool
) -> Settings:
    """What `deepspeed.initialize` gets. Raises RequestError where --deepspeed-config cannot be joined with the flags.

    microbatches: of a rank, in one optimizer step.
    """
    micro, whole = f"--micro-batch-size {micro_batch_size}", f"--global-batch-size {global_batch_size}"
    dp = global_batch_size // (micro_batch_size * microbatches)
    by_flags = {
        "train_micro_batch_size_per_gpu": (micro_batch_size, micro),
        "train_batch_size": (global_batch_size, whole),
        "gradient_accumulation_steps": (microbatches, f"{whole} / ({micro} x data-parallel size {dp})"),
        "gradient_clipping": (clip_grad, f"--clip-grad {clip_grad}"),
        **_by_zero_flags(zero, bf16),
    }
    said = read_settings(zero.deepspeed_config) if zero.deepspeed_config is not None else {}
    passed_on = _passed_on(said, by_flags, zero, bf16)
    ours = {key: value for key, (value, _) in by_flags.items() if value not in (None, "none")}
    return _nested(_DEFAULTS | _pinned(zero) | passed_on | ours)


def _by_zero_flags(zero: ZeroConfig, bf16: bool) -> dict[str, tuple[Any, str]]:
    """Setting -> what our flags make it, and the words that name them. None and "none" are not said to DeepSpeed."""
    half = "--bf16" if bf16 else "the absence of --bf16"
    reduced = "bf16" if zero.grad_reduce_in_bf16 else "fp32"
    found: dict[str, tuple[Any, str]] = {
        "bf16.enabled": (bf16, half),
        "data_types.param_dtype": ("bf16" if bf16 else "fp32", half),
        "communication_data_type": (reduced, _given(zero, "grad_reduce_in_bf16")),
        "zero_optimization.stage": (zero.zero_stage, f"--zero-stage {zero.zero_stage}"),
    }
    for what in ("offload_optimizer", "offload_param"):
        device = getattr(zero, what)
        path, flag = (zero.nvme_path, "nvme_path") if device == "nvme" else (None, what)
        found[f"zero_optimization.{what}.device"] = (device or "none", _given(zero, what))
        found[f"zero_optimization.{what}.nvme_path"] = (path, _given(zero, flag))
    return found


def _given(zero: ZeroConfig, field: str) -> str:
    value, flag = getattr(zero, field), flag_of(field)
    if value in (None, False):
        return f"the absence of {flag}"
    return flag if value is True else f"{flag} {value}"


def _conditions(zero: ZeroConfig, bf16: bool) -> dict[str, bool]:
    """Which of what a setting may need there is."""
    return {
        schema.BF16: bf16,
        schema.OFFLOAD_OPTIMIZER: zero.offload_optimizer is not None,
        schema.OPTIMIZER_ON_NVME: zero.offload_optimizer == "nvme",
        schema.OFFLOAD_PARAM: zero.offload_param is not None,
        schema.PARAM_ON_NVME: zero.offload_param == "nvme",
        schema.NVME: "nvme" in (zero.offload_optimizer, zero.offload_param),
        schema.GPU: torch.cuda.is_available(),
    }


def _pinned(zero: ZeroConfig) -> Settings:
    """Page-locked memory is for copies to a GPU."""
    offloaded = [what for what in ("offload_optimizer", "offload_param") if getattr(zero, what) is not None]
    return {f"zero_optimization.{what}.pin_memory": torch.cuda.is_available() for what in offloaded}


def _passed_on(said: Settings, by_flags: dict[str, tuple[Any, str]], zero: ZeroConfig, bf16: bool) -> Settings:
    """What only the file says, and has its effect here. Raises RequestError, naming all that is wrong in the file."""
    there = _conditions(zero, bf16)
    stage = str(zero.zero_stage)
    if stage == "1" and bf16 and zero.offload_optimizer is None:
        stage = schema.BF16_STAGE_1
    passed_on: Settings = {}
    wrong: list[str | None] = []
    for key, value in said.items():
        if key in by_flags:
            wrong.append(_contradiction(key, value, *by_flags[key]))
            continue
        setting = SETTINGS.get(key)
        if setting is None:
            wrong.append(_unknown(key, [*SETTINGS, *schema.SECTIONS, *by_flags]))
            continue
        reason = _no_effect(setting, stage, there)
        if reason is None:
            wrong.append(_wrong_value(key, value, setting))
            passed_on[key] = value
        elif not _asks_nothing(value, setting):
            wrong.append(f"remove {key}: {reason}")
    found = [line for line in wrong if line is not None]
    if found:
        raise RequestError(f"--deepspeed-config {zero.deepspeed_config}: {'; '.join(found)}")
    return passed_on


def _contradiction(key: str, value: Any, said: Any, flag: str) -> str | None:
    if key == "communication_data_type" and isinstance(value, str):
        value = value.lower()
    if _same(value, said):
        return None
    return f"{key} is {_shown(value)}, but {flag} makes it {_shown(said)}: change one of them"


def _unknown(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    return f"remove {key}: no setting that has an effect here" + (f"; did you mean {close[0]}?" if close else "")


def _no_effect(setting: Setting, stage: str, there: dict[str, bool]) -> str | None:
    """Why it would be accepted and ignored; None where it has its effect."""
    if setting.instead is not None:
        return setting.instead
    if stage not in setting.stages:
        return f"it has no effect at --zero-stage {stage}"
    return next((f"it has no effect without {needed}" for needed in setting.needs if not there[needed]), None)


def _asks_nothing(value: Any, setting: Setting) -> bool:
    if isinstance(value, dict):  # a section, which may say that it is switched off
        return value.get("enabled", True) in (False, *_UNSAID)
    return any(_same(value, idle) for idle in setting.idle)


def _wrong_value(key: str, value: Any, setting: Setting) -> str | None:
    """What is wrong with it, where DeepSpeed itself would not look."""
    if setting.values is None:
        return None
    if isinstance(setting.values, tuple):
        right, must = value in setting.values, f"one of {', '.join(setting.values)}"
    elif setting.values is bool:
        right, must = isinstance(value, bool), "true or false"
    else:
        right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        must = "a whole number of at least 1"
    return None if right else f"{key} is {_shown(value)}: must be {must}"


def _same(value: Any, said: Any) -> bool:
    """Equal, 1 and 1.0 too, but not 1 and true."""
    return isinstance(value, bool) == isinstance(said, bool) and bool(said == value)


def _shown(value: Any) -> str:
    """A value as JSON, if it is short."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def read_settings(file: str) -> Settings:
    """A user's DeepSpeed settings by dotted name; what is left to the flags ("auto") is left out. RequestError."""
    try:
        content = json.loads(
            Path(file).read_text(encoding="utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
        if not isinstance(content, dict):
            raise ValueError("it must be a JSON object")
        return dict(_flat(content))
    except RecursionError:
        raise RequestError(f"--deepspeed-config {file}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"--deepspeed-config {file}: cannot be read ({error})") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Settings:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _flat(tree: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + (f'"{name}"' if "." in name else name)
        if key in schema.SECTIONS and value not in _UNSAID:
            if not isinstance(value, dict):
                raise ValueError(f"{key} must be an object, not {_shown(value)}")
            yield from _flat(value, f"{key}.")
        elif value not in _UNSAID:
            yield key, value


def _nested(flat: Settings) -> Settings:
    tree: Settings = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
