"""Which sample stands at which place: a pure function of (seed, corpora, position)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.data.cache import cached_arrays, digest

_FIRST_BLEND = 1 << 16


class SampleOrder:
    """The endless order of the samples of one split.

    It knows nothing of ranks, batches or the length of the run, so the same position is the same sample at any
    layout, after any number of restarts, and for any `--train-iters`. The first pass over a corpus takes its
    samples as GPTDataset shuffled them; pass e > 0 takes them in a permutation drawn from (seed, corpus, e).

    Args:
        sizes: samples in one pass over each corpus.
        weights: of each corpus, positive, any scale.
        seed: of the run, 0 <= seed < 2**32.
        cache: directory that keeps the blending index (only used for two or more corpora).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, cache: Path) -> None:
        self.sizes = tuple(sizes)
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
        self.seed = seed
        self.cache = cache
        self._blend: dict[str, np.ndarray] = {}
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(corpus, sample of that corpus's dataset) at `position` >= 0."""
        corpus, nth = self._draw(position)
        epoch, sample = divmod(nth, self.sizes[corpus])
        return corpus, sample if epoch == 0 else int(self._permutation(corpus, epoch)[sample])

    def _draw(self, position: int) -> tuple[int, int]:
        """(corpus, how many samples of it came before) at `position`."""
        if len(self.sizes) == 1:
            return 0, position
        if not self._blend or position >= len(self._blend["corpus"]):
            self._blend = self._build_blend(max(_FIRST_BLEND, 1 << position.bit_length()))
        return int(self._blend["corpus"][position]), int(self._blend["sample"][position])

    def _build_blend(self, length: int) -> dict[str, np.ndarray]:
        # Megatron's blend is greedy: each draw looks only at those before it, so a longer index repeats the
        # shorter one and then goes on. Doubling keeps the work linear in the length of the run.
        from pretrain.data.gpt_source import blending_indices

        shares = "-".join(weight.hex() for weight in self.weights.tolist())
        key = f"blend-{length}-{digest(shares)}"
        return cached_arrays(self.cache, key, ("corpus", "sample"), lambda: blending_indices(self.weights, length))

    def _permutation(self, corpus: int, epoch: int) -> np.ndarray:
        known = self._passes.get(corpus)
        if known is None or known[0] != epoch:
            size = self.sizes[corpus]
            order = np.arange(size, dtype=np.uint32 if size < 2**32 else np.uint64)
            # RandomState, as its stream is frozen: numpy may change Generator's, and with it a run's order.
            np.random.RandomState([self.seed, corpus, epoch]).shuffle(order)
            known = self._passes[corpus] = (epoch, order)
        return known[1]
