"""DeepSpeed's ZeRO under our layers and our schedule trains what one process does."""

import pytest

from tests.distributed import Pool
from tests.megatron_ext.layouts import Layout, Reference, assert_parity, layout
from tests.megatron_ext.training import STEPS, tiny, train

pytest.importorskip("deepspeed")

CPU = {"offload_optimizer": "cpu"}
LAYOUTS: dict[str, Layout] = {
    **{f"TP2 PP2 DP2 SP ZeRO-{zero}": layout(2, 2, 2, zero=zero, sp=True) for zero in (1, 2, 3)},
    "DP4 ZeRO-3": layout(dp=4, zero=3),
    "TP4 SP, 2 KV heads": layout(tp=4, sp=True, num_query_groups=2, zero=2),
    "DP2 ZeRO-1, tied": layout(dp=2, zero=1, untie_embeddings_and_output_weights=False),
    "DP2 ZeRO-3, tied": layout(dp=2, zero=3, untie_embeddings_and_output_weights=False),
    "PP2 DP2 gpipe ZeRO-3, recompute full": layout(pp=2, dp=2, schedule="gpipe", zero=3, recompute_granularity="full"),
    "TP2 PP2 SP ZeRO-1, documents and masks": layout(tp=2, pp=2, sp=True, zero=1, documents=True),
    **{f"PP2 DP2 ZeRO-{zero}, offload": layout(pp=2, dp=2, zero=zero, **CPU) for zero in (1, 2, 3)},
    "one process ZeRO-2, offload": layout(zero=2, **CPU),
    "DP2 ZeRO-3, offload of parameters too": layout(dp=2, zero=3, offload_param="cpu", **CPU),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(pool: Pool, reference: Reference, name: str) -> None:
    case = LAYOUTS[name]
    config = tiny(zero_engine="deepspeed", **case.options)
    expected = reference(config, case.documents)
    runs = pool.run(train, case.ranks, config, case.documents, (0, STEPS // 2))
    assert_parity(runs, expected, name, "float32")
