"""What data parallelism shards."""

import dataclasses

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from megatron_ext.option import option


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

    def validate(self, model: ModelConfig, tp: int, dp_shard: int) -> None:
        """Raise RequestError where this model cannot be sharded so."""
        if self.zero_engine != "torch":
            raise RequestError(
                f"--zero-engine {self.zero_engine}: this engine is not built yet; use --zero-engine torch"
            )
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
