"""Hyperparameters of the optimizer, under Megatron-LM's flag names."""

import dataclasses
from typing import Any

import torch

from megatron_ext.errors import RequestError
from megatron_ext.option import flag_of, option, refuse_unused

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")
_MOST_COUNTED = 2**24  # float32 has every whole number up to here
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    optimizer: str = option("adam", "the algorithm: adam is AdamW", choices=("adam",))
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    lr_decay_style: str = option("cosine", "how the rate falls after warm-up", choices=DECAY_STYLES)
    lr_decay_iters: int | None = option(None, "iteration at which the rate reaches --min-lr (default: --train-iters)")
    lr_warmup_iters: int = option(0, "iterations of linear warm-up")
    lr_warmup_init: float = option(0.0, "rate at which warm-up starts")
    lr_wsd_decay_style: str = option("exponential", "shape of WSD's final decay", choices=WSD_STYLES)
    lr_wsd_decay_iters: int | None = option(None, "iterations of WSD's final decay (required with WSD)")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices; norms and biases have none")
    adam_beta1: float = option(0.9, "decay of AdamW's first moment")
    adam_beta2: float = option(0.95, "decay of AdamW's second moment")
    adam_eps: float = option(1e-8, "added to the root of AdamW's second moment")
    clip_grad: float = option(1.0, "largest global gradient norm; 0 switches clipping off")

    def validate(self, train_iters: int) -> None:
        """Raise RequestError where the values contradict each other."""
        if self.min_lr > self.lr:
            raise RequestError(f"--min-lr {self.min_lr} is larger than --lr {self.lr}")
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "lr_warmup_init"):
            if getattr(self, name) < 0:
                raise RequestError(f"{flag_of(name)} {getattr(self, name)}: must not be negative")
            _require_float32(self, name)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"{flag_of(name)} {getattr(self, name)}: must be in [0, 1)")
        _require_positive(self, "adam_eps")  # else what never had a gradient is divided by 0
        if self.lr * self.weight_decay >= 1:
            raise RequestError(
                f"--weight-decay {self.weight_decay} x --lr {self.lr} is what a step takes of every weight: "
                "must be below 1"
            )
        self._validate_schedule(train_iters)

    def _validate_schedule(self, train_iters: int) -> None:
        for name in ("lr_decay_iters", "lr_wsd_decay_iters"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RequestError(f"{flag_of(name)} {getattr(self, name)}: must be at least 1")
        end = self.lr_decay_iters or train_iters
        if self.lr_warmup_iters > end:
            raise RequestError(f"--lr-warmup-iters {self.lr_warmup_iters} is beyond the end of the decay ({end})")
        if self.lr_warmup_iters == 0:
            refuse_unused(self, ("lr_warmup_init",), "--lr-warmup-iters")
        if self.lr_warmup_init > self.lr:
            raise RequestError(f"--lr-warmup-init {self.lr_warmup_init} is larger than --lr {self.lr}")
        if self.lr_decay_style == "constant":
            refuse_unused(self, ("min_lr", "lr_decay_iters"), "a decay: choose another --lr-decay-style than constant")
        if self.lr_decay_style != "WSD":
            refuse_unused(self, ("lr_wsd_decay_style", "lr_wsd_decay_iters"), "--lr-decay-style WSD")
        else:
            if self.lr_wsd_decay_iters is None:
                raise RequestError("--lr-decay-style WSD needs --lr-wsd-decay-iters")
            if self.lr_wsd_decay_iters > end - self.lr_warmup_iters:
                raise RequestError(
                    f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters} does not fit between warm-up and iteration {end}"
                )


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Weights, gradients and optimizer states are kept in params_dtype; products run in bf16 or fp16 if asked."""

    bf16: bool = option(False, "compute in bfloat16 over float32 master weights")
    fp16: bool = option(False, "compute in float16 over float32 master weights, with loss scaling")
    params_dtype: str = option("float32", "dtype of the stored weights", choices=tuple(_DTYPES))
    loss_scale: float | None = option(None, "fp16: a constant loss scale (default: dynamic)")
    initial_loss_scale: float = option(
        2.0**32, "fp16: first dynamic loss scale; a continued run keeps its own, unless this has been changed"
    )
    min_loss_scale: float = option(1.0, "fp16: smallest dynamic loss scale")
    loss_scale_window: int = option(1000, "fp16: good steps before the scale doubles")
    hysteresis: int = option(2, "fp16: overflows before the scale begins to halve")

    def validate(self) -> None:
        dynamic = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
        if not self.fp16:
            refuse_unused(self, ("loss_scale", *dynamic), "--fp16")
        elif self.loss_scale is None:
            self._validate_dynamic_scale()
        else:
            refuse_unused(self, dynamic, "a dynamic loss scale: leave out --loss-scale")
            _require_positive(self, "loss_scale", "; for a dynamic scale leave it out")
        if self.bf16 and self.fp16:
            raise RequestError("--bf16 and --fp16 exclude each other")
        if (self.bf16 or self.fp16) and self.params_dtype != "float32":
            flag = "--bf16" if self.bf16 else "--fp16"
            raise RequestError(f"{flag} keeps float32 master weights: drop --params-dtype {self.params_dtype}")

    @property
    def scales_dynamically(self) -> bool:
        return self.fp16 and self.loss_scale is None

    def _validate_dynamic_scale(self) -> None:
        for name in ("initial_loss_scale", "min_loss_scale"):
            _require_positive(self, name)
        if self.min_loss_scale > self.initial_loss_scale:
            raise RequestError(
                f"--min-loss-scale {self.min_loss_scale} is larger than --initial-loss-scale {self.initial_loss_scale}"
            )
        for name in ("loss_scale_window", "hysteresis"):  # counted on the device, as float32
            value = getattr(self, name)
            if not 1 <= value < _MOST_COUNTED or value != int(value):
                raise RequestError(f"{flag_of(name)} {value}: must be a whole number from 1 to {_MOST_COUNTED - 1}")

    @property
    def stored(self) -> torch.dtype:
        return _DTYPES[self.params_dtype]

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else self.stored


def _require_float32(config: Any, name: str) -> None:
    """Raise RequestError where a number is none or beyond float32: there it would become one that is not finite."""
    value = getattr(config, name)
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise RequestError(f"{flag_of(name)} {value}: must be a number that float32 has")


def _require_positive(config: Any, name: str, remedy: str = "") -> None:
    """Raise RequestError where a number is not above 0, or would not be as float32."""
    value, least = getattr(config, name), torch.finfo(torch.float32).tiny
    _require_float32(config, name)
    if not value >= least:
        bound = "above 0" if value <= 0 else f"at least {least:.2g}, or float32 makes it 0"
        raise RequestError(f"{flag_of(name)} {value}: must be {bound}{remedy}")
