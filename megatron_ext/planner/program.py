"""How a program computes a layer, as far as its time depends on it.

Ours, and the peers whose published runs the planner is held against: without them a prediction of a run of theirs
would be one of ours. What our kernels move is theirs to say (`megatron_ext.kernels`).
"""

import dataclasses

from megatron_ext.errors import RequestError
from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.models import rotary


@dataclasses.dataclass(frozen=True)
class Program:
    """Passes over memory are counted in elements read or written per element of the tensor concerned."""

    name: str
    flash_attention: bool  # else the scores of all heads go to memory and back
    dropout: bool  # after attention's scores and both halves of a layer
    fused_projections: bool  # q, k, v are one product, and gate and up
    rotation_passes: int  # over queries and keys, forward
    gated_passes: tuple[int, int]  # over the inner features of SwiGLU, forward and backward
    plain_passes: tuple[int, int]  # the same of an activation without a gate
    norm_passes: tuple[int, int]
    loss_bytes: tuple[int, int]  # of a logit in the loss, forward and backward
    gradient_bytes: int  # of a parameter's gradient in a message
    accumulate_bytes: int  # moved for a parameter and microbatch: cast weights, accumulated gradients
    update_bytes: int  # moved for a parameter at the update
    hidden_share: float  # of data-parallel messages, if there is work enough; 0: they travel alone, at the end
    sends_slices: bool  # a pipeline message is one rank's slice, gathered over tensor parallelism on arrival
    kernels: int  # started for a layer's forward pass


_KERNELS = load_kernels(KernelConfig())
MEGATRON_ZH = Program(
    name="megatron-zh",
    flash_attention=True,
    dropout=False,
    fused_projections=False,
    rotation_passes=rotary.MOVED,
    gated_passes=_KERNELS.activation("swiglu").moved,
    plain_passes=_KERNELS.activation("gelu").moved,
    norm_passes=_KERNELS.norm("RMSNorm").moved,
    loss_bytes=_KERNELS.linear_cross_entropy.moved_bytes,
    gradient_bytes=4,
    accumulate_bytes=22,  # float32 gradients: cast, added to; weights cast
    update_bytes=40,  # fused AdamW in float32, and the norm
    hidden_share=0.5,
    sends_slices=False,
    kernels=36,
)
MEGATRON_LM_2021 = Program(
    name="megatron-lm-2021",
    flash_attention=False,
    dropout=True,
    fused_projections=True,
    rotation_passes=3,
    gated_passes=(3, 5),
    plain_passes=(2, 3),
    norm_passes=(2, 3),
    loss_bytes=(36, 14),
    gradient_bytes=4,
    accumulate_bytes=10,
    update_bytes=40,
    hidden_share=0.0,
    sends_slices=True,
    kernels=36,
)
MEGATRON_DEEPSPEED = dataclasses.replace(  # of 2022: gradients accumulated in float32, whole messages in the pipeline
    MEGATRON_LM_2021, name="megatron-deepspeed-2022", accumulate_bytes=22, sends_slices=False
)
MEGATRON_CORE = dataclasses.replace(
    MEGATRON_LM_2021,
    name="megatron-core",
    flash_attention=True,
    dropout=False,
    hidden_share=0.5,
    kernels=28,
)
_PROGRAMS = (MEGATRON_ZH, MEGATRON_LM_2021, MEGATRON_DEEPSPEED, MEGATRON_CORE)


def program_names() -> tuple[str, ...]:
    return tuple(program.name for program in _PROGRAMS)


def program_named(name: str) -> Program:
    """Raises RequestError, naming the known ones."""
    for program in _PROGRAMS:
        if program.name == name:
            return program
    raise RequestError(f"--program {name}: unknown; known are {', '.join(program_names())}")
