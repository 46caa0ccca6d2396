"""Rows for a larger vocabulary: their values, and that every layout loads the same ones."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ext.checkpoint.write
import megatron_ext.models.expand
from megatron_ext.checkpoint import Manifest, find_checkpoint, load_checkpoint
from megatron_ext.checkpoint.directory import partial_path, publish
from megatron_ext.checkpoint.read import ResizedWeights, WeightReader
from megatron_ext.checkpoint.write import write_weights
from megatron_ext.engine import Engine, EngineConfig
from megatron_ext.errors import RequestError
from megatron_ext.mesh import build_grid
from megatron_ext.models.expand import METHODS, Expansion, NewRows, Parts
from tests.distributed import Pool
from tests.megatron_ext.layouts import Layout, layout
from tests.megatron_ext.training import tiny, whole_parameters
from tests.slow import sweep
from tests.weights import InMemory

OLD, ADDED, WIDTH = 5000, 1500, 48
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def some_parts(old: int, added: int) -> tuple[Parts, ...]:
    """Rows of one to six parts; every tenth has those of the row before in another order, every hundredth has none."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Parts] = []
    for row in range(added):
        ids = torch.randint(old, (1 + row % 6,), generator=generator).tolist()
        shares = [Fraction(1), Fraction(1, 3), Fraction(1, 2)]
        parts = tuple((index, shares[slot % 3]) for slot, index in enumerate(ids))
        rows.append(() if row % 100 == 99 else rows[-1][::-1] if row % 10 == 5 else parts)
    return tuple(rows)


def plan(method: str, **options: Any) -> Expansion:
    values = {"old_size": OLD, "parts": some_parts(OLD, ADDED), "seed": 7, "std": 0.02}
    return Expansion(**(values | options | {"method": method}))


@pytest.fixture(scope="module")
def matrix() -> torch.Tensor:
    """Rows with a mean, of which columns differ in scale and depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    rows = torch.randn(OLD, WIDTH, generator=generator, dtype=torch.float64) @ mixing + 3
    return (rows * torch.rand(OLD, 1, generator=generator)).float()


def rows_of(matrix: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: matrix[start:stop]


def grow(expansion: Expansion, matrix: torch.Tensor) -> NewRows:
    return expansion.new_rows(EMBEDDING, rows_of(matrix))


def plain_means(expansion: Expansion, matrix: torch.Tensor, weighted: bool) -> torch.Tensor:
    """The definition, row by row."""
    rows = []
    for parts in expansion.parts:
        ids = [index for index, _ in parts]
        weights = torch.tensor([float(share) if weighted else 1.0 for _, share in parts], dtype=torch.float64)
        chosen = matrix[ids].double() if parts else matrix.double()
        rows.append((chosen * weights[:, None]).sum(0) / weights.sum() if parts else chosen.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["mean-subtoken", "weighted-subtoken"])
def test_means_of_parts_and_ties(matrix: torch.Tensor, method: str) -> None:
    expansion = plan(method)
    new = grow(expansion, matrix)
    expected = plain_means(expansion, matrix, weighted=method == "weighted-subtoken")
    reached = (new.values - expected).norm(dim=1) / expected.norm(dim=1)
    keys = [frozenset(mixture) for mixture in expansion.mixtures]
    repeated = torch.tensor([keys.index(key) < row for row, key in enumerate(keys)])
    assert reached[~repeated].max() < 1e-6
    assert 2.0**-10 < reached[repeated].min() <= reached[repeated].max() < 2.0**-7  # noise of about 2^-8 of the norm
    assert new.ties == repeated.sum() >= 15
    assert len(new.values.bfloat16().unique(dim=0)) == ADDED
    assert new.equal == 0
    norms = new.values.norm(dim=1)
    assert new.norm == pytest.approx(norms.mean().item(), rel=1e-5)
    assert (new.smallest_norm, new.largest_norm) == pytest.approx((norms.min().item(), norms.max().item()), rel=1e-5)
    assert new.old_norm == pytest.approx(matrix.norm(dim=1).mean().item(), rel=1e-5)


def test_the_order_of_parts_does_not_matter() -> None:
    one, third = Fraction(1), Fraction(1, 3)
    parts = (
        ((4, one), (2, one)),
        ((2, one), (4, one)),
        ((2, one), (4, one), (4, one), (2, one)),
        ((2, one), (4, third)),
    )
    assert plan("mean-subtoken", parts=parts).mixtures == (((2, 1), (4, 1)),) * 4
    assert plan("weighted-subtoken", parts=parts).mixtures[1:] == (((2, 1), (4, 1)),) * 2 + (((2, 3), (4, 1)),)


def test_mean_and_covariance_are_those_of_transformers(matrix: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, vocab_size=OLD
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data.copy_(matrix)
    torch.manual_seed(0)
    model.resize_token_embeddings(OLD + ADDED, mean_resizing=True)
    theirs = model.model.embed_tokens.weight.detach()
    new = grow(plan("mean-normal"), matrix)
    assert torch.equal(theirs[:OLD], matrix)
    ours, theirs = new.values.double(), theirs[OLD:].double()
    mean = matrix.double().mean(0)
    covariance = (matrix.double() - mean).T.cov(correction=0) * 1e-9
    # Of the covariance of n normal samples, in the Frobenius norm
    expected_error = ((torch.linalg.norm(covariance) ** 2 + covariance.trace() ** 2) / ADDED).sqrt()
    assert expected_error < 0.2 * torch.linalg.norm(covariance)
    for sample in (ours, theirs):  # the same statistic of both: how far the sample's moments are from the matrix'
        assert ((sample.mean(0) - mean).abs() / covariance.diagonal().sqrt() * ADDED**0.5).max() < 4.5
        assert torch.linalg.norm(sample.T.cov() - covariance) < 1.5 * expected_error
    assert len(new.values.unique(dim=0)) == ADDED
    assert new.ties == 0


@pytest.mark.parametrize("method", ["mean", "mean-normal"])
def test_the_mean_changes_predictions_no_more_than_its_bound(method: str) -> None:
    """KL(old || new) = ln(1 + Z_new / Z_old) <= ln(1 + n / V): 0.445 nats for 17,953 new rows on 32,000."""
    old, added = 3200, 1795
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(old, WIDTH, generator=generator)
    states = torch.randn(200, WIDTH, generator=generator) * torch.logspace(-2, 0.3, 200)[:, None]
    new = grow(plan(method, old_size=old, parts=((),) * added), matrix).values
    before = torch.log_softmax((states @ matrix.T).double(), dim=1)
    after = torch.log_softmax((states @ torch.cat([matrix, new]).T).double(), dim=1)[:, :old]
    divergence = (before.exp() * (before - after)).sum(1)
    bound = math.log(1 + added / old)
    assert bound == pytest.approx(0.445, abs=5e-4)
    assert divergence.max() < bound + 1e-4
    assert divergence.max() > 0.9 * bound  # at small states it is reached: the bound is no empty one
    random = torch.randn(added, WIDTH, generator=generator) * 2
    worse = torch.log_softmax((states @ torch.cat([matrix, random]).T).double(), dim=1)[:, :old]
    assert (before.exp() * (before - worse)).sum(1).max() > bound


def test_norm_correction(matrix: torch.Tensor) -> None:
    for method in METHODS:
        new = grow(plan(method, norm_correction=True), matrix)
        assert torch.allclose(new.values.norm(dim=1), matrix.norm(dim=1).mean(), rtol=1e-5)
        assert len(new.values.unique(dim=0)) == ADDED


@pytest.mark.parametrize("method", METHODS)
def test_values_depend_on_seed_and_name_only(
    matrix: torch.Tensor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = plan(method)
    expected = grow(expansion, matrix).values
    monkeypatch.setattr(megatron_ext.models.expand, "_BLOCK_READ", 1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(grow(expansion, matrix).values, expected)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(grow(plan(method, seed=8), matrix).values, expected)
    assert not torch.equal(expansion.new_rows(HEAD, rows_of(matrix)).values, expected)
    for dtype in (torch.bfloat16, torch.float64):
        assert grow(expansion, matrix.to(dtype)).values.dtype == dtype


def test_a_vocabulary_that_matches_neither_tokenizer_is_refused() -> None:
    expansion = plan("mean")
    expansion.check_vocabulary(OLD, "x")
    with pytest.raises(RequestError, match=r"^x: its vocabulary of 5120 matches neither .* 5000 .* 6500"):
        expansion.check_vocabulary(5120, "x")
    with pytest.raises(RequestError, match=r"^x: has the new tokenizer's 6500 pieces already"):
        expansion.check_vocabulary(6500, "x")


# A checkpoint, and engines of a larger vocabulary that load it.

VOCABULARY, LARGER = 1117, 1401


def engine(config: EngineConfig) -> Engine:
    return Engine(config, build_grid(config.parallel, torch.device("cpu")))


def larger(method: str) -> Expansion:
    return plan(method, old_size=VOCABULARY, parts=some_parts(VOCABULARY, LARGER - VOCABULARY))


def save(folder: Path, config: EngineConfig) -> None:
    source = engine(config)
    weights = InMemory(whole_parameters(source))
    partial = partial_path(folder, 0)
    partial.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_ext.checkpoint.write, "_PIECE_BYTES", 5000)
        write_weights(partial, weights)
    publish(folder, Manifest(0, 0, 0, dataclasses.asdict(config.model), {}, has_optimizer=False))


def load(folder: Path, config: EngineConfig, expansion: Expansion) -> dict[str, torch.Tensor]:
    target = engine(config)
    load_checkpoint(target, find_checkpoint(folder), weights_only=True, expansion=expansion)
    return whole_parameters(target)


LAYOUTS: dict[str, tuple[bool, Layout]] = {
    "TP2": (False, layout(tp=2)),
    "PP2": (False, layout(pp=2)),
    "DP2 ZeRO-3": (False, layout(dp=2, zero=3)),
    "TP2 DP2 ZeRO-3": (False, layout(tp=2, dp=2, zero=3, sp=True)),
    "tied TP2": (True, layout(tp=2)),
    "tied PP2": (True, layout(pp=2)),
    "tied V-shaped": (True, layout(pp=2, schedule="zbv")),
}


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints of the smaller vocabulary, by whether head and embedding are one matrix."""
    folders = {tied: tmp_path_factory.mktemp("tied" if tied else "untied") for tied in (False, True)}
    for tied, folder in folders.items():
        pool.run(save, 1, folder, tiny(vocab_size=VOCABULARY, untie_embeddings_and_output_weights=not tied))
    return folders


@pytest.mark.parametrize("name", sweep(LAYOUTS, {"PP2", "TP2 DP2 ZeRO-3", "tied TP2", "tied V-shaped"}))
def test_every_layout_loads_the_same_rows(pool: Pool, saved: dict[bool, Path], name: str) -> None:
    (tied, where), expansion = LAYOUTS[name], larger("mean-subtoken")
    reader = WeightReader(find_checkpoint(saved[tied]))
    expected = ResizedWeights(reader, expansion)
    options = where.options | {"num_layers": tiny().model.num_layers}  # as many as were saved
    config = tiny(vocab_size=LARGER, untie_embeddings_and_output_weights=not tied, **options)
    ranks = pool.run(load, where.ranks, saved[tied], config, expansion)
    found = set()
    for parameters in ranks:
        for parameter, values in parameters.items():
            source = EMBEDDING if tied and parameter == HEAD else parameter
            assert torch.equal(values, expected.read_rows(source, 0, expected.shapes[source][0])), parameter
            found.add(source)
    assert found == set(expected.shapes)
    old = reader.read([EMBEDDING])[EMBEDDING]
    assert torch.equal(expected.read_rows(EMBEDDING, 0, LARGER)[:VOCABULARY], old)
    for start, stop in ((0, 10), (1000, 1200), (1116, 1118), (1117, 1401), (1399, 1400), (5, 5)):
        assert torch.equal(
            expected.read_rows(EMBEDDING, start, stop), expected.read_rows(EMBEDDING, 0, LARGER)[start:stop]
        )


def initial(config: EngineConfig) -> dict[str, torch.Tensor]:
    return whole_parameters(engine(config))


def test_random_rows_are_those_of_a_model_that_starts_at_this_size(pool: Pool, saved: dict[bool, Path]) -> None:
    config = tiny(vocab_size=LARGER)
    (expected,) = pool.run(initial, 1, config)
    expansion = dataclasses.replace(larger("random"), seed=config.seed, std=config.model.init_method_std)
    weights = ResizedWeights(WeightReader(find_checkpoint(saved[False])), expansion)
    for name in (EMBEDDING, HEAD):
        assert torch.equal(weights.read_rows(name, VOCABULARY, LARGER), expected[name][VOCABULARY:])


def test_windows_of_a_stored_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(50, 7), "b": torch.randn(9, dtype=torch.float64), "c": torch.randn(3, 4).bfloat16()}
    monkeypatch.setattr(megatron_ext.checkpoint.write, "_PIECE_BYTES", 100)
    write_weights(tmp_path, InMemory(tensors))
    reader = WeightReader(tmp_path)
    assert (reader.shapes, reader.dtypes) == (InMemory(tensors).shapes, InMemory(tensors).dtypes)
    for name, tensor in tensors.items():
        for start in range(0, len(tensor), 4):
            for stop in {start, start + 1, start + 3, len(tensor)}:
                stop = min(stop, len(tensor))
                assert torch.equal(reader.read_rows(name, start, stop), tensor[start:stop])
        assert torch.equal(reader.read([name])[name], tensor)
