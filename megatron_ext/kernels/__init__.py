"""The operations worth a hand-tuned kernel, behind one protocol, `Backend`. `torch` is built in."""

import dataclasses

from megatron_ext.attention import BACKENDS
from megatron_ext.errors import RequestError
from megatron_ext.kernels.apex import check_apex
from megatron_ext.kernels.backend import Backend
from megatron_ext.kernels.torch_backend import TorchBackend
from megatron_ext.option import option

TRANSFORMER_IMPLS = ("torch", "transformer_engine", "apex")


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    transformer_impl: str = option("torch", "where norm, attention and activation come from", choices=TRANSFORMER_IMPLS)
    attention_backend: str = option(
        "auto", "which of torch's attention kernels, or dense: all scores, written out", choices=("auto", *BACKENDS)
    )


def load_kernels(config: KernelConfig) -> Backend:
    """The backend that was asked for, or RequestError: nothing degrades silently."""
    if config.transformer_impl == "apex":
        check_apex()
    if config.transformer_impl != "torch":
        raise RequestError(
            f"--transformer-impl {config.transformer_impl}: this backend is not built yet; use --transformer-impl torch"
        )
    return TorchBackend(config.attention_backend)


__all__ = ["TRANSFORMER_IMPLS", "Backend", "KernelConfig", "load_kernels"]
