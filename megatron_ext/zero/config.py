"""What data parallelism shards."""

import dataclasses
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.option import option, refuse_unused

DeepSpeedSettings = dict[str, Any]  # as in a JSON file of DeepSpeed's


@dataclasses.dataclass(frozen=True)
class ZeroConfig:
    zero_stage: int = option(
        1, "0: nothing, 1: optimizer states, 2: + gradients, 3: + parameters are sharded", choices=(0, 1, 2, 3)
    )
    zero_engine: str = option("torch", "who does it: FSDP2 or DeepSpeed", choices=("torch", "deepspeed"))
    accumulate_then_reduce: bool = option(
        False, "stage 3: keep whole gradients until the step's last microbatch, and reduce them once"
    )
    grad_reduce_in_bf16: bool = option(False, "with --bf16: gradients travel in bfloat16, not in float32")
    offload_optimizer: str | None = option(
        None, "keep optimizer states (and the update) on the host, or on NVMe (DeepSpeed)", choices=("cpu", "nvme")
    )
    offload_param: str | None = option(
        None, "DeepSpeed, stage 3: keep the parameter shards on the host, or on NVMe", choices=("cpu", "nvme")
    )
    nvme_path: str | None = option(None, "folder on an NVMe disk for what is offloaded to it", metavar="DIR")
    deepspeed_config: str | None = option(
        None, "DeepSpeed's own settings, which must not contradict the flags", metavar="FILE.json"
    )

    @property
    def describe(self) -> str:
        """'ZeRO-3 by DeepSpeed, optimizer on nvme'."""
        parts = [f"ZeRO-{self.zero_stage}" + (" by DeepSpeed" if self.zero_engine == "deepspeed" else "")]
        if self.offload_optimizer is not None:
            parts.append(f"optimizer on {self.offload_optimizer}")
        if self.offload_param is not None:
            parts.append(f"parameters on {self.offload_param}")
        return ", ".join(parts)

    def validate_flags(self, bf16: bool) -> None:
        """Raise RequestError for what no engine could make sense of."""
        if "nvme" not in (self.offload_optimizer, self.offload_param):
            refuse_unused(self, ("nvme_path",), "--offload-optimizer nvme or --offload-param nvme")
        if self.grad_reduce_in_bf16 and not bf16:
            raise RequestError("--grad-reduce-in-bf16 needs --bf16")
        if self.accumulate_then_reduce and self.zero_stage != 3:
            raise RequestError(
                f"--accumulate-then-reduce needs --zero-stage 3: stages 0 and 1 always do, and stage 2 with it is "
                f"stage 1 (--zero-stage {self.zero_stage})"
            )

    def validate_torch(self, model: ModelConfig, tp: int, dp_shard: int) -> None:
        """Raise RequestError where FSDP2 cannot shard this model so."""
        if self.offload_optimizer == "nvme":
            raise RequestError(
                "--offload-optimizer nvme needs --zero-engine deepspeed; --offload-optimizer cpu does not"
            )
        if self.offload_optimizer is not None and self.zero_stage == 0:
            raise RequestError("--offload-optimizer cpu needs --zero-stage 1, 2 or 3")
        if self.offload_param is not None:
            raise RequestError(
                f"--offload-param {self.offload_param} needs --zero-engine deepspeed; with --zero-engine torch "
                "--offload-optimizer cpu takes the weights along, which are the optimizer's own"
            )
        refuse_unused(self, ("deepspeed_config",), "--zero-engine deepspeed")
        if self.zero_stage == 0 or tp == 1 or dp_shard == 1:
            return
        if model.hidden_size % dp_shard:  # TP cuts one dimension, ZeRO the other: the hidden one
            raise RequestError(
                f"--hidden-size {model.hidden_size} is not divisible by the {dp_shard} ranks that --zero-stage "
                f"{self.zero_stage} shards over with tensor parallelism: set --zero-shard-size to a divisor"
            )
        if model.add_qkv_bias or model.add_bias_linear:
            for name, size in (("ffn-hidden-size", model.ffn_hidden_size), ("kv heads x head size", _kv(model))):
                if size % (tp * dp_shard):
                    raise RequestError(
                        f"biases of {name} {size} cannot be cut evenly over TP {tp} x {dp_shard} ZeRO ranks: "
                        "set a smaller --zero-shard-size"
                    )


def _kv(model: ModelConfig) -> int:
    return model.kv_heads * model.head_dim
