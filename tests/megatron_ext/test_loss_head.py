"""The loss head: its gradient, and how often the logits are there."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.tensor_parallel import TensorParallel, tp_shard_range
from tests.distributed import Pool
from tests.megatron_ext.live import Highest

TOKENS, VOCABULARY, HIDDEN = (2, 48), 2003, 2  # shards of 1002 and 1001 over two ranks; weights are small
CASES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]


def logits_at_most(dtype: torch.dtype, tolerance: float) -> tuple[float, float]:
    """Most bytes of tensors in a forward and a backward pass, by those of this rank's logits. Checks the gradient."""
    tp = TensorParallel(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, TOKENS, generator=generator)
    upstream = torch.rand(TOKENS, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    start, stop = tp_shard_range(VOCABULARY, tp.size, tp.rank)
    mine = weight[start:stop].clone().requires_grad_()
    with Highest() as live:
        loss = vocab_parallel_cross_entropy(F.linear(hidden, mine), labels, VOCABULARY, tp)
        forward, live.highest = live.highest, 0
        (gradient,) = torch.autograd.grad(loss, mine, upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(loss, mine, upstream)

    whole = weight.double().requires_grad_()
    expected = F.cross_entropy((hidden.double() @ whole.T).flatten(0, 1), labels.flatten(), reduction="none")
    expected.backward(upstream.double().flatten())
    assert whole.grad is not None
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double().flatten(), expected.detach(), rtol=tolerance, atol=tolerance)
    scale = whole.grad.abs().max().item()
    torch.testing.assert_close(gradient.double(), whole.grad[start:stop], rtol=0, atol=tolerance * scale)
    size = labels.numel() * (stop - start)
    return forward / size, live.highest / size


@pytest.mark.parametrize("dtype, tolerance", CASES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("tp", [1, 2])
def test_there_is_one_wide_copy_of_the_logits(pool: Pool, tp: int, dtype: torch.dtype, tolerance: float) -> None:
    """Forward the logits and a copy in float32, backward that and the gradient; wide logits have no copy. Some figures
    for every token come to it."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    expected = wide if wide == dtype.itemsize else wide + dtype.itemsize
    for found in pool.run(logits_at_most, tp, dtype, tolerance):
        assert found == pytest.approx((expected, expected), rel=0.05)
