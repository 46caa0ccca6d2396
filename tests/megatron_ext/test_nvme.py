"""ZeRO-Infinity: optimizer states on a disk. DeepSpeed compiles its asynchronous I/O for it, which takes minutes:

bash tests/run.sh --compiles
"""

from pathlib import Path

import pytest
import torch

from megatron_ext.models.count import parameters
from tests.distributed import Pool
from tests.megatron_ext.layouts import Reference, assert_parity, layout
from tests.megatron_ext.test_deepspeed import read, write
from tests.megatron_ext.training import STEPS, tiny, train

op_builder = pytest.importorskip("deepspeed.ops.op_builder")
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(
        not op_builder.AsyncIOBuilder().is_compatible(verbose=False), reason="needs libaio (apt-get install libaio-dev)"
    ),
]

# DeepSpeed leaves what is below a mebibyte in memory: the shards of every stage's matrices must be larger
LARGE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "vocab_size": 1024}
# with so many weights some gradients are rounding alone, which Adam with the usual 1e-8 makes whole steps of: under
# that any two orders of summation drift apart, those of torch's engine and one process too
LARGE |= {"adam_eps": 1e-3}
NVME = {"zero": 3, "zero_engine": "deepspeed", "offload_optimizer": "nvme"}
LAYOUTS = {
    "DP2": {"dp": 2, "num_layers": 2},
    "TP2 PP2 DP2 SP": {"tp": 2, "pp": 2, "dp": 2, "sp": True, "num_layers": 8},
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Once, here, where no rank waits for another."""
    op_builder.AsyncIOBuilder().load()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(pool: Pool, reference: Reference, tmp_path: Path, name: str) -> None:
    case = layout(**LAYOUTS[name], **NVME, **LARGE, nvme_path=str(tmp_path))
    config = tiny(**case.options)
    runs = pool.run(train, case.ranks, config, False, (0, STEPS // 2))
    assert_parity(runs, reference(config), name, "float32")

    files = list(tmp_path.rglob("*.swp"))
    of_rank = {file.parent.name for file in files}
    assert of_rank == {f"rank{rank}" for rank in range(case.ranks)}
    assert len(files) == 3 * case.ranks  # masters and two moments of all matrices of a rank; vectors stay in memory
    vectors = (2 * config.model.num_layers + 1) * config.model.hidden_size
    matrices = parameters(config.model) - vectors
    assert sum(file.stat().st_size for file in files) == pytest.approx(3 * 4 * matrices, rel=0.02)
    for moment in ("exp_avg", "exp_avg_sq"):
        states = [torch.from_file(str(file), size=1000) for file in files if file.name.startswith(f"{moment}-")]
        assert len(states) == case.ranks
        assert all(state.isfinite().all() and state.any() for state in states)


def test_checkpoints_go_to_the_disk_and_come_back(pool: Pool, tmp_path: Path) -> None:
    saves = tmp_path / "saves"
    disks = [tmp_path / "written", tmp_path / "read"]
    for disk in disks:
        disk.mkdir()
    configs = [tiny(**layout(dp=2, **NVME, **LARGE, num_layers=2, nvme_path=str(disk)).options) for disk in disks]
    torch_config = tiny(**layout(tp=2, dp=2, zero=1, **LARGE, num_layers=2).options)
    (saved, went_on), _ = pool.run(write, 2, configs[0], saves)
    for config, ranks in ((configs[1], 2), (torch_config, 4)):
        for loaded, goes_on in pool.run(read, ranks, config, saves):
            assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
            assert torch.tensor(goes_on) == pytest.approx(torch.tensor(went_on), rel=2e-5)
