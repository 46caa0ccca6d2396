"""Against what we did not write: transformers' LLaMA, megatron-core's layers and schedules, torch's FLOP counter."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from megatron_ext.kernels import KernelConfig, load_kernels
from megatron_ext.models import Decoder, ModelConfig, StageSpec, parameter_shapes, preset, preset_names
from megatron_ext.models.count import flops_per_token, parameters
from megatron_ext.optim import OptimizerConfig, TrainableConfig, learning_rate
from megatron_ext.optim.config import DECAY_STYLES, WSD_STYLES
from megatron_ext.optim.trainable import select, trained_in_products
from megatron_ext.tensor_parallel import TensorParallel
from tests.distributed import Pool
from tests.megatron_ext import megatron_core
from tests.megatron_ext.hugging_face import hugging_face_name, llama_config, llama_like
from tests.megatron_ext.training import tiny
from tools.conversion.families import family_for


def decoder(config: ModelConfig) -> Decoder:
    """The whole model on one rank, with random weights (norms and biases too)."""
    stage = StageSpec(0, config.num_layers, True, True)
    model = Decoder(config, stage, TensorParallel(), load_kernels(KernelConfig()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(1.0 if param.ndim == 1 else 0.0, 0.1, generator=generator)
    return model


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_query_groups": 2},
    "one KV head": {"num_query_groups": 1},
    "tied": {"untie_embeddings_and_output_weights": False},
    "heads wider than the hidden size": {"kv_channels": 16},
    "biases": {"add_bias_linear": True},
    "epsilon": {"norm_epsilon": 1e-2},
    "theta": {"rotary_base": 500000.0},
    "linear scaling": {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "llama3 scaling": {
        "rope_scaling": "llama3",
        "rope_scaling_factor": 8.0,
        "rope_original_max_position": 32,
        "kv_channels": 32,  # enough frequencies for all three of its regions
    },
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_and_gradients_equal_transformers(options: dict[str, Any]) -> None:
    config = tiny(**options).model
    ours = decoder(config)
    theirs = llama_like(config, ours.state_dict())
    tokens, labels = torch.randint(config.vocab_size, (2, 3, 64), generator=torch.Generator().manual_seed(1))

    logits = ours(tokens)
    expected = theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    (ours(tokens, labels) / labels.numel()).backward()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: param.grad for name, param in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, gradients[hugging_face_name(name)], rtol=0, atol=1e-5, msg=name)


def test_query_biases_alone_leave_the_output_projection_without() -> None:
    names = [name for name, _ in decoder(tiny(add_qkv_bias=True).model).named_parameters() if name.endswith("bias")]
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_packed_documents_are_as_if_alone() -> None:
    config = tiny().model
    ours = decoder(config)
    theirs = llama_like(config, ours.state_dict())
    first, second = torch.randint(config.vocab_size, (1, 24)).split([9, 15], dim=1)
    packed = ours(
        torch.cat([first, second], dim=1),
        document_ids=torch.tensor([[0] * 9 + [1] * 15]),
        position_ids=torch.cat([torch.arange(9), torch.arange(15)])[None],
    )
    alone = torch.cat([theirs(first).logits, theirs(second).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_tensor_parallel_layers_equal_megatron_core(pool: Pool, bias: bool) -> None:
    for differences in pool.run(megatron_core.differences, 2, bias):
        assert len(differences) == (12 if bias else 10)
        for what, difference in differences.items():  # megatron-core's cross entropy computes in float32
            assert difference <= (1e-6 if what.startswith("cross entropy") else 1e-12), what


PUBLISHED_PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "glm4-9b": 9_399_951_360,
    "bloom-560m": 559_214_592,
    "bloom-176b": 176_247_271_424,
    "opt-125m": 125_239_296,
    "falcon-7b": 6_921_720_704,
}


@pytest.mark.parametrize("name", preset_names())
def test_parameters_of_the_presets_equal_transformers(name: str) -> None:
    description = family_for(preset(name)).write(preset(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**description))
    assert parameters(preset(name)) == sum(param.numel() for param in model.parameters())
    assert parameters(preset(name)) == PUBLISHED_PARAMETERS.get(name, parameters(preset(name)))


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b"])
def test_flops_equal_torch_counter(name: str) -> None:
    """Forward and backward of transformers' eager model, which computes all s x s scores; on no device at all."""
    config = dataclasses.replace(preset(name), num_layers=2)
    tokens = torch.zeros(3, 128, dtype=torch.int64, device="meta")
    hf = llama_config(config)
    hf._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(hf)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    counts = counter.get_flop_counts()
    rotation = sum(counts.get("LlamaForCausalLM.model.rotary_emb", {}).values())  # written as a product there
    expected = counter.get_total_flops() - rotation
    assert flops_per_token(config, 128, causal=False) * tokens.numel() == expected
    scores = 12 * config.num_layers * 128 * config.num_attention_heads * config.head_dim
    assert flops_per_token(config, 128, causal=False) - flops_per_token(config, 128, causal=True) == scores / 2


@pytest.mark.parametrize("output_too", [False, True])
def test_flops_of_embeddings_alone_equal_torch_counter(output_too: bool) -> None:
    config = dataclasses.replace(preset("llama2-7b"), num_layers=2)
    tokens = torch.zeros(3, 128, dtype=torch.int64, device="meta")
    hf = llama_config(config)
    hf._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(hf)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_()
    model.lm_head.weight.requires_grad_(output_too)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    rotation = sum(counter.get_flop_counts().get("LlamaForCausalLM.model.rotary_emb", {}).values())
    trainable = TrainableConfig(train_only="embeddings", train_output_embeddings=output_too)
    trained = trained_in_products(select(trainable, parameter_shapes(config)), tied=False)
    found = flops_per_token(config, 128, causal=False, trained=trained) * tokens.numel()
    assert found == counter.get_total_flops() - rotation


@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed")
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    "style, wsd", [(style, None) for style in DECAY_STYLES if style != "WSD"] + [("WSD", wsd) for wsd in WSD_STYLES]
)
def test_learning_rate_equals_megatron_core(style: str, wsd: str | None, warmup: int) -> None:
    options: dict[str, Any] = {"lr_wsd_decay_style": wsd, "lr_wsd_decay_iters": 30} if wsd else {}
    options |= {"min_lr": 2e-5} if style != "constant" else {}
    options |= {"lr_warmup_iters": warmup, "lr_warmup_init": 1e-6} if warmup else {}
    config = OptimizerConfig(lr=3e-4, lr_decay_style=style, **options)
    config.validate(100)
    expected = megatron_core.learning_rates(config, 100, range(130))
    ours = [learning_rate(config, iteration, 100) for iteration in range(130)]
    assert ours == pytest.approx(expected, rel=1e-12)
