"""megatron-core's GPTModel on the CPU, its loader and its writer, as an oracle of converted checkpoints.

megatron-core is imported where it is used: that takes seconds.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import queue
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from megatron_ext.models import ModelConfig


def expected(model: ModelConfig, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPTModel's parameters on one rank, put together from ours without the tables of the conversion."""
    model = model.resolved()
    heads, groups, d, h = model.num_attention_heads, model.kv_heads, model.head_dim, model.hidden_size
    fused: dict[str, torch.Tensor] = {"embedding.word_embeddings.weight": ours["embed_tokens.weight"]}
    if model.position_embedding_type == "learned_absolute":
        fused["embedding.position_embeddings.weight"] = ours["embed_positions.weight"]
    if not model.tied:
        fused["output_layer.weight"] = ours["lm_head.weight"]
    for name, tensor in ours.items():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("norm."):
            fused[f"decoder.final_layernorm.{kind}"] = tensor
        if not name.startswith("layers."):
            continue
        layer, part = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:-1])
        prefix, width = f"decoder.{layer}.", (h,) if kind == "weight" else ()
        match part:
            case "input_layernorm":
                fused[f"{prefix}input_layernorm.{kind}"] = tensor
            case "post_attention_layernorm":
                fused[f"{prefix}pre_mlp_layernorm.{kind}"] = tensor
            case "self_attn.q_norm" | "self_attn.k_norm":
                fused[f"{prefix}self_attention.{part[10]}_layernorm.{kind}"] = tensor
            case "self_attn.o_proj":
                fused[f"{prefix}self_attention.linear_proj.{kind}"] = tensor
            case "mlp.down_proj":
                fused[f"{prefix}mlp.linear_fc2.{kind}"] = tensor
            case "mlp.up_proj":
                gate = ours.get(f"{layer}.mlp.gate_proj.{kind}")
                fused[f"{prefix}mlp.linear_fc1.{kind}"] = tensor if gate is None else torch.cat([gate, tensor])
            case "self_attn.q_proj":
                rows = torch.empty(groups, heads // groups + 2, d, *width, dtype=tensor.dtype)
                rows[:, :-2] = tensor.view(groups, heads // groups, d, *width)
                rows[:, -2] = ours[f"{layer}.self_attn.k_proj.{kind}"].view(groups, d, *width)
                rows[:, -1] = ours[f"{layer}.self_attn.v_proj.{kind}"].view(groups, d, *width)
                fused[f"{prefix}self_attention.linear_qkv.{kind}"] = rows.flatten(0, 2)
    return fused


class OnCpu(TorchFunctionMode):
    """What megatron-core makes on "cuda" is made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def without_gpu() -> None:
    """In this rank, let megatron-core do without CUDA where it only asks where to put something, or has to wait."""
    from megatron.core import tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_: None
    no_dropout = types.SimpleNamespace(fork=contextlib.nullcontext)
    tensor_parallel.get_cuda_rng_tracker = lambda: no_dropout
    filesystem_async._results_queue = queue.Queue()  # instead of one in another process
    rank: Any = multiprocessing.current_process()
    rank._config["daemon"] = False  # its writer starts processes


def gpt(args: argparse.Namespace, vocab_size: int) -> Any:
    """megatron-core's model of these arguments, made from them as Megatron-LM does."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    named = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TransformerConfig)
        if hasattr(args, field.name)
    }
    config = TransformerConfig(
        **named
        | {
            "tensor_model_parallel_size": dist.get_world_size(),
            "num_query_groups": args.num_query_groups if args.group_query_attention else None,
            "layernorm_epsilon": args.norm_epsilon,
            "activation_func": F.silu if args.swiglu else F.gelu,
            "gated_linear_unit": args.swiglu,
            "bias_activation_fusion": not args.swiglu and args.bias_gelu_fusion,
            "use_cpu_initialization": True,
            "masked_softmax_fusion": False,
        }
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    )


def load(folder: Path, divisible_by: int = 1) -> tuple[Any, argparse.Namespace]:
    """A GPTModel filled from the checkpoint by megatron-core's loader, its vocabulary padded."""
    from megatron.core import dist_checkpointing

    args = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    model = gpt(args, -(-args.vocab_size // divisible_by) * divisible_by)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    asked = {"model": {key: value for key, value in model.sharded_state_dict().items() if "_extra_state" not in key}}
    loaded, missing, unexpected = dist_checkpointing.load(asked, str(folder), strict="return_all")
    assert not missing
    assert not unexpected
    model.load_state_dict(loaded["model"], strict=False)
    return model, args


def save(model: Any, args: argparse.Namespace, folder: Path, metadata: dict[str, Any]) -> None:
    """Have megatron-core write a checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {
        "model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(metadata)),
        "optimizer.state": dist_checkpointing.ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg", torch.ones(4), replica_id=dist.get_rank()
        ),
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
