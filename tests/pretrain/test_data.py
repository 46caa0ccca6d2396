"""pretrain.data: the order of samples, the batches, the caches."""

import errno
import itertools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.errors import RequestError
from pretrain.data import Data, DataConfig, build_data
from pretrain.data.cache import cached_arrays
from pretrain.data.masks import document_ids, document_lengths, loss_mask, position_ids
from pretrain.data.order import SampleOrder
from pretrain.data.source import Source
from tools.preprocessing.writer import DatasetWriter

EOD = 2
VOCAB = 1000


def write_corpus(prefix: Path, documents: int = 300, seed: int = 0, first: int = 3, end: int = VOCAB) -> str:
    """A corpus of `documents` random documents of ids from `first` to before `end`, each ending with EOD."""
    import array

    random = np.random.RandomState(seed)
    with DatasetWriter(str(prefix), np.dtype(np.uint16), False) as writer:
        for _ in range(documents):
            tokens = np.append(random.randint(first, end, random.randint(1, 60)), EOD).astype(np.uint16)
            writer.add(tokens.tobytes(), array.array("i", [len(tokens)]))
        writer.finish({})
    Path(f"{prefix}.json").unlink()
    return str(prefix)


def build(config: DataConfig, **changes: Any) -> Data:
    options: dict[str, Any] = {"seq_length": 16, "vocab_size": VOCAB, "seed": 7, "dp_rank": 0, "dp_size": 1}
    return build_data(config, **(options | {"micro_batch_size": 2, "global_batch_size": 8} | changes))


def take(data: Data, steps: int, consumed: int = 0) -> torch.Tensor:
    """Tokens [steps * B, s]."""
    return torch.cat([batch["tokens"] for batch in itertools.islice(data.train_batches(consumed), steps)])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("corpora")
    return [write_corpus(directory / name, count, seed) for seed, (name, count) in enumerate([("a", 300), ("b", 120)])]


def test_first_pass_is_megatrons_gpt_dataset(corpora: list[str], tmp_path: Path) -> None:
    from types import SimpleNamespace

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=7, sequence_length=16, blend=([corpora[0]], None), split="80,15,5", path_to_cache=str(tmp_path),
        tokenizer=SimpleNamespace(vocab_size=None, eod=EOD, unique_identifiers={}), reset_position_ids=False,  # type: ignore[arg-type]
        reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    theirs = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    ours = build(DataConfig(data_path=(corpora[0],), split="80,15,5", data_cache_path=str(tmp_path / "ours")))
    for split, dataset in zip(("train", "valid", "test"), theirs):
        part = ours._part(split)
        assert len(part.sources[0]) == len(dataset) > 0
        assert part.corpora[0].samples(split, 16) == len(dataset)
        for place in range(len(dataset)):
            sample = part[part.order[place]]
            assert np.array_equal(sample.tokens, dataset[place]["tokens"])
            assert np.array_equal(sample.labels, dataset[place]["labels"])


def test_batches_follow_each_other_and_labels_are_the_next_tokens(corpora: list[str]) -> None:
    data = build(DataConfig(data_path=(corpora[0],)))
    batch = next(data.train_batches(0))
    assert set(batch) == {"tokens", "labels"}
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (8, 16)
        assert tensor.is_contiguous()
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_order_depends_on_the_seed_only(corpora: list[str], weighted: bool) -> None:
    path = ("0.3", corpora[0], "0.7", corpora[1]) if weighted else tuple(corpora)
    config = DataConfig(data_path=path)
    steps = 150  # several passes over both corpora
    whole = take(build(config), steps)
    assert torch.equal(take(build(config), 5, consumed=8 * 140), whole[8 * 140 : 8 * 145])  # a restart
    assert torch.equal(take(build(config, global_batch_size=16), steps // 2), whole)  # another batch size
    for dp_size, micro in ((2, 2), (4, 1), (2, 1)):
        ranks = [
            build(config, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro).train_batches(0)
            for rank in range(dp_size)
        ]
        for step in range(3):
            batches = [next(rank)["tokens"].view(-1, micro, 16) for rank in ranks]
            # microbatch k of all ranks side by side is the global order
            assert torch.equal(torch.stack(batches, dim=1).view(8, 16), whole[8 * step : 8 * step + 8])
    assert not torch.equal(take(build(config, seed=8), 3), whole[:24])


def test_workers_give_the_same_batches(corpora: list[str]) -> None:
    config = DataConfig(data_path=tuple(corpora))
    workers = DataConfig(data_path=tuple(corpora), num_workers=2)
    assert torch.equal(take(build(workers), 12), take(build(config), 12))


def test_each_pass_sees_every_sample_once_in_a_new_order(corpora: list[str]) -> None:
    part = build(DataConfig(data_path=(corpora[0],)))._part("train")
    size = len(part.sources[0])
    passes = [[part.order[number * size + place] for place in range(size)] for number in range(3)]
    for one in passes:
        assert sorted(one) == [(0, place) for place in range(size)]
    assert passes[0] != passes[1] != passes[2]


def test_blend_keeps_its_prefix_when_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [0.61, 0.29, 0.1]
    long = SampleOrder([10**6] * 3, weights, 0, tmp_path / "long")
    monkeypatch.setattr("pretrain.data.order._FIRST_BLEND", 4)
    grown = SampleOrder([10**6] * 3, weights, 0, tmp_path / "grown")
    places = [grown[place] for place in range(5000)]
    assert places == [long[place] for place in range(5000)]
    assert len(list((tmp_path / "grown").glob("blend-*/"))) > 5
    counts = np.bincount([corpus for corpus, _ in places])
    assert np.abs(counts / 5000 - weights).max() < 1e-3
    for corpus in range(3):  # no sample skipped, none repeated
        assert [sample for one, sample in places if one == corpus] == list(range(counts[corpus]))


def test_unweighted_blend_visits_each_sample_once(corpora: list[str]) -> None:
    part = build(DataConfig(data_path=tuple(corpora)))._part("train")
    sizes = [len(samples) for samples in part.sources]
    seen = {part.order[place] for place in range(sum(sizes))}
    assert len(seen) > 0.99 * sum(sizes)


def test_validation_is_fixed_and_apart_from_training(corpora: list[str]) -> None:
    data = build(DataConfig(data_path=(corpora[0],), split="80,20"))
    first, second = ([batch["tokens"] for batch in data.valid_batches(4)] for _ in range(2))
    assert len(first) == 4
    assert torch.equal(torch.cat(first), torch.cat(second))
    train = {tuple(row.tolist()) for row in take(data, 60)}
    assert not train & {tuple(row.tolist()) for row in torch.cat(first)}
    with pytest.raises(RequestError, match="no sample of 16 tokens for the test split"):
        data.test_batches(1)


def test_masks_are_megatrons(corpora: list[str]) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    batch = next(build(DataConfig(data_path=(corpora[0],), eod_token_id=EOD, **flags)).train_batches(0))
    assert (batch["tokens"] == EOD).any()
    assert batch["loss_mask"].dtype == torch.float32
    causal = torch.ones(16, 16).tril().bool()
    for row in range(8):
        blocked, mask, positions = _get_ltor_masks_and_position_ids(
            batch["tokens"][row], EOD, True, True, True, True
        )  # fmt: skip
        ids = batch["document_ids"][row]
        assert torch.equal(~blocked[0], causal & (ids[:, None] == ids[None, :]))
        assert torch.equal(mask, batch["loss_mask"][row])
        assert torch.equal(positions, batch["position_ids"][row])


def test_masks_by_hand() -> None:
    tokens = np.array([[5, EOD, 6, 7, EOD, EOD, 8], [EOD, 5, 6, 7, 8, 9, EOD]])
    lengths = [document_lengths(row, EOD) for row in tokens]
    assert document_ids(lengths).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert position_ids(lengths).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert loss_mask(tokens, EOD).tolist() == [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("flags", [{}, {"reset_position_ids": True}, {"eod_mask_loss": True}])
def test_a_source_says_what_its_samples_are_made_of(corpora: list[str], flags: dict[str, bool]) -> None:
    source: Source = build(DataConfig(data_path=(corpora[0],), eod_token_id=EOD, **flags))._part("train").sources[0]
    for sample in (source[place] for place in range(40)):
        assert np.array_equal(sample.tokens[1:], sample.labels[:-1])
        assert sample.lengths.sum() == len(sample.tokens) == len(sample.labels) == 16
        assert (sample.loss_mask is not None) == ("eod_mask_loss" in flags)
        ends = np.flatnonzero(sample.tokens[:-1] == EOD) if flags else []
        assert np.array_equal(sample.lengths.cumsum()[:-1] - 1, ends)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_wrong_id_in_a_batch_names_the_file(tmp_path: Path, num_workers: int) -> None:
    good, bad = write_corpus(tmp_path / "good"), write_corpus(tmp_path / "bad", first=VOCAB - 1, seed=3)
    data = build(DataConfig(data_path=(good, bad), num_workers=num_workers), vocab_size=VOCAB - 1)
    with pytest.raises(RequestError, match=r"^token id 999 in \S+(bad|good)\.bin is outside the vocabulary of 999"):
        for _ in itertools.islice(data.train_batches(0), 50):
            pass


def _start(prefix: str, cache: str, barrier: Any, answers: Any) -> None:
    import pretrain.data.gpt_source  # noqa: F401 (the slow import comes first, so that the builds start together)

    barrier.wait()
    data = build(DataConfig(data_path=(prefix, prefix), data_cache_path=cache))
    answers.put((os.getpid(), take(data, 3).numpy()))


def test_many_processes_start_at_once(corpora: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(5), context.Queue()
    cache = tmp_path / "cache"
    arguments = (corpora[0], str(cache), barrier, answers)
    processes = [context.Process(target=_start, args=arguments) for _ in range(5)]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60)[1] for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(np.array_equal(result, results[0]) for result in results)
    directories = sorted(path.name.split("-")[0] for path in cache.iterdir() if path.is_dir())
    assert directories == ["blend", "samples"]  # built once each, no leftovers

    for name in ("samples-*/shuffle.npy", "blend-*/corpus.npy"):  # and once each when they are damaged
        os.truncate(next(cache.glob(name)), 140)
    capfd.readouterr()
    arguments = (corpora[0], str(cache), context.Barrier(3), answers)
    again = [context.Process(target=_start, args=arguments) for _ in range(3)]
    for process in again:
        process.start()
    assert all(np.array_equal(answers.get(timeout=60)[1], results[0]) for _ in again)
    for process in again:
        process.join()
    said = sorted(line.split(": ")[1] for line in capfd.readouterr().err.splitlines() if str(cache) in line)
    assert said == [f"{name}.npy is damaged; building this index again" for name in ("corpus", "shuffle")]


def _rank(rank: int, prefix: str, directory: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    cache = f"{directory}/disk-of-node-{rank}"
    answers.put((rank, take(build(DataConfig(data_path=(prefix,), data_cache_path=cache)), 3).numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_node_may_have_its_own_disk(corpora: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, corpora[0], str(tmp_path), answers)) for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        process.start()
    results = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert np.array_equal(results[0], results[1])


def _build_slowly(directory: Path, started: Any) -> None:
    def arrays() -> dict[str, np.ndarray]:
        started.set()
        time.sleep(60)
        return {}

    cached_arrays(directory, "key", ["x"], arrays)


def test_a_killed_builder_is_replaced(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_build_slowly, args=(tmp_path, started))
    process.start()
    assert started.wait(20)
    process.kill()
    process.join()
    assert cached_arrays(tmp_path, "key", ["x"], lambda: {"x": np.arange(5)})["x"].tolist() == list(range(5))


def test_reading_data_leaves_the_random_stream_alone(corpora: list[str]) -> None:
    data = build(DataConfig(data_path=(corpora[0],), split="80,20", num_workers=1))
    before = torch.get_rng_state()
    next(data.train_batches(0))
    next(data.valid_batches(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_is_built_once_even_after_a_failed_build(tmp_path: Path) -> None:
    builds = []

    def arrays() -> dict[str, np.ndarray]:
        builds.append(1)
        return {"x": np.arange(5)}

    def fail() -> dict[str, np.ndarray]:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cached_arrays(tmp_path, "key", ["x"], fail)
    for _ in range(2):
        assert cached_arrays(tmp_path, "key", ["x"], arrays)["x"].tolist() == list(range(5))
    assert len(builds) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def _as_file(key: Path) -> None:
    shutil.rmtree(key)
    key.write_bytes(b"")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)


CACHE_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda key: os.truncate(key / "x.npy", 140), "x.npy is damaged"),
    "no bytes": (lambda key: os.truncate(key / "x.npy", 0), "x.npy is damaged"),
    "a bit": (lambda key: _flip(key / "y.npy"), "y.npy is damaged"),
    "missing": (lambda key: (key / "y.npy").unlink(), "y.npy is missing"),
    "another dtype": (lambda key: np.save(key / "x.npy", np.arange(5.0)), "x.npy is damaged"),
    "another shape": (lambda key: np.save(key / "x.npy", np.arange(5)[None]), "x.npy is damaged"),
    "a pickle": (lambda key: np.save(key / "x.npy", np.array([{}]), allow_pickle=True), "x.npy is damaged"),
    "beyond": (lambda key: np.save(key / "x.npy", np.arange(5) + 10**9), "x.npy is damaged"),
    "a folder": (lambda key: ((key / "x.npy").unlink(), (key / "x.npy").mkdir()), "it cannot be read ("),
    "no record": (lambda key: (key / "crc32.json").unlink(), "crc32.json is missing"),
    "empty record": (lambda key: (key / "crc32.json").write_text(""), "it cannot be read ("),
    "another record": (lambda key: (key / "crc32.json").write_text("[1]"), "it cannot be read ("),
    "empty folder": (lambda key: [file.unlink() for file in key.iterdir()], "crc32.json is missing"),
    "no folder": (_as_file, "it cannot be read ("),
}


@pytest.mark.parametrize("kind", CACHE_DAMAGE)
def test_a_damaged_cache_is_built_again(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    def arrays() -> dict[str, np.ndarray]:
        return {"x": np.arange(5), "y": np.arange(3)}

    def read() -> list[list[int]]:
        return [array.tolist() for array in cached_arrays(tmp_path, "key", ["x", "y"], arrays).values()]

    expected = read()
    assert capsys.readouterr().err == ""
    (tmp_path / "key" / "z.npy").write_text("of somebody else")
    assert read() == expected
    spoil, what = CACHE_DAMAGE[kind]
    spoil(tmp_path / "key")
    assert read() == expected
    errors = capsys.readouterr().err
    assert errors.startswith(f"{tmp_path}/key: {what}")
    assert errors.endswith("; building this index again\n")
    assert read() == expected
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_a_damaged_cache_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> dict[str, np.ndarray]:
        return {"x": np.arange(5)}

    cached_arrays(tmp_path, "key", ["x"], build)
    os.truncate(tmp_path / "key" / "x.npy", 9)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _read_only)
        with pytest.raises(RequestError, match=f"index to {tmp_path}: Read-only file system; "):
            cached_arrays(tmp_path, "key", ["x"], build)
    with pytest.raises(RequestError, match=f"{tmp_path}/key is damaged as soon as it is written .x.npy is missing"):
        cached_arrays(tmp_path, "key", ["x"], dict)


def _read_only(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_new_data_at_an_old_path_gets_a_new_index(tmp_path: Path) -> None:
    config = DataConfig(data_path=(str(tmp_path / "a"),))
    write_corpus(tmp_path / "a", seed=1)
    old = take(build(config), 2)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").unlink()
    write_corpus(tmp_path / "a", documents=200, seed=2)
    assert not torch.equal(take(build(config), 2), old)
    assert len(list((tmp_path / "cache").glob("samples-*/"))) == 2


def test_a_cache_that_cannot_be_written(corpora: list[str], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # (permissions would not stop a root user)
    with pytest.raises(RequestError, match="--data-cache-path"):
        build(DataConfig(data_path=(corpora[0],), data_cache_path=str(blocked / "cache")), seed=99)


def test_megatrons_own_dataset_is_read(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    stream = np.arange(1, 200)
    for part in np.split(stream, [50, 51, 120]):
        builder.add_item(torch.from_numpy(part))
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    part = build(DataConfig(data_path=(str(tmp_path / "m"),), split="1"))._part("train")
    assert len(part.sources[0]) == 198 // 16
    seen = np.concatenate([part[part.order[place]].tokens for place in range(198 // 16)])
    assert set(seen) <= set(stream)
    assert len(set(seen)) == len(seen) == 192
