"""`python -m benchmarks.expansion`: which initial values of new rows, and which first stage, pay off?

A small LLaMA is trained on English (with a little Chinese, as LLaMA was), its vocabulary is expanded with
`python -m tokenizer merge`, its new rows are initialised in every way there is, and then embeddings, new rows, LoRA
adapters with embeddings, or everything is trained on Chinese. Bits per character of held-out Chinese and English
compare across vocabularies, which losses per token do not. Every regime runs at the best of three learning rates.

Writes trials.json, results.md and results.png. A killed run goes on where it was. About two hours on one core.

    python -m benchmarks.expansion --english EN.jsonl --chinese ZH.jsonl [ZH.jsonl ...] --output DIR [--jobs 2]
"""

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.expansion.report import write_report
from benchmarks.expansion.texts import make_tokenizers, read_text
from benchmarks.expansion.trial import REGIMES, Setting, Trial, run_trial, train_base
from megatron_ext.models.expand import METHODS

RATES = (1e-3, 3e-3, 1e-2)
INIT = "mean-subtoken"
STAGED = ("embeddings", "new rows", "LoRA + embeddings")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.expansion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--english", nargs="+", type=Path, required=True, metavar="FILE", help="text or JSON lines")
    parser.add_argument("--chinese", nargs="+", type=Path, required=True, metavar="FILE", help="text or JSON lines")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results, and what a rerun reuses")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once, one core each (default: 1)")
    parser.add_argument("--base-steps", type=int, default=1500, help="steps of the base model (default: 1500)")
    parser.add_argument("--steps", type=int, default=200, help="steps after the expansion (default: 200)")
    parser.add_argument("--base-vocab-size", type=int, default=3000, help="pieces of the base (default: 3000)")
    parser.add_argument("--extra-vocab-size", type=int, default=5000, help="pieces of the Chinese one (default: 5000)")
    parser.add_argument("--chinese-share", type=float, default=0.05, help="of the base model's text (default: 0.05)")
    return parser


def sweep(steps: int) -> list[Trial]:
    """For the learning rate of every regime."""
    half = max(1, steps // 2)
    return [Trial(f"rate/{regime}/{rate}", INIT, ((regime, rate, half),), half) for regime in REGIMES for rate in RATES]


def grid(rates: dict[str, float], steps: int) -> list[Trial]:
    """Every initialisation with every regime; stages one after the other; and the vocabulary left as it was."""
    inits = [*METHODS, f"{INIT} + norm correction"]
    regimes = [regime for regime in REGIMES if regime != "input embedding only"]
    trials = [Trial(f"{regime}/{i}", i, ((regime, rates[regime], steps),)) for i in inits for regime in regimes]
    alone = "input embedding only"
    trials.append(Trial(alone, INIT, ((alone, rates[alone], steps),)))
    half = steps // 2
    for first in STAGED:
        stages = ((first, rates[first], half), ("full", rates["full"], steps - half))
        trials.append(Trial(f"{first}, then full", INIT, stages))
    trials.append(Trial("not expanded", None, (("full", rates["full"], steps),)))
    return trials


class Results:
    """Finished trials, kept in a file as they come."""

    def __init__(self, file: Path):
        self._file = file
        self.by_name: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def run(self, setting: Setting, trials: list[Trial], jobs: int, title: str) -> None:
        missing = [trial for trial in trials if trial.name not in self.by_name]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool, tqdm(total=len(missing), desc=title) as bar:
            futures = {pool.submit(run_trial, setting, trial): trial for trial in missing}
            for future in as_completed(futures):
                self.by_name[futures[future].name] = future.result()
                temporary = self._file.with_suffix(".tmp")
                temporary.write_text(json.dumps(self.by_name, indent=1) + "\n", encoding="utf-8")
                os.replace(temporary, self._file)
                bar.update()

    def best_rates(self) -> dict[str, float]:
        """Of every regime, the rate with the fewest bits per Chinese character at the end of the sweep."""

        def best(regime: str) -> float:
            return min(RATES, key=lambda rate: self.by_name[f"rate/{regime}/{rate}"]["points"][-1]["chinese"])

        return {regime: best(regime) for regime in REGIMES}


def main() -> int:
    options = build_parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.output.mkdir(parents=True, exist_ok=True)
    setting = Setting(options.output, tuple(options.english), tuple(options.chinese), measured_characters=16_000)
    if not (options.output / "expanded").is_dir():
        english, chinese = read_text(options.english), read_text(options.chinese)
        # a fifth of the model's Chinese: as in LLaMA's vocabulary, few characters have a piece
        share = options.chinese_share / 5
        make_tokenizers(options.output, english, chinese, share, options.base_vocab_size, options.extra_vocab_size)
    if not (options.output / "base.pt").is_file():
        with tqdm(total=options.base_steps, desc="base model") as bar:

            def report(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()

            weights = train_base(setting, options.chinese_share, 2e-3, options.base_steps, report)
        torch.save(weights, options.output / "base.pt")
    results = Results(options.output / "trials.json")
    results.run(setting, sweep(options.steps), options.jobs, "learning rates")
    rates = results.best_rates()
    trials = grid(rates, options.steps)
    results.run(setting, trials, options.jobs, "trials")
    print(write_report(options.output, {trial.name: results.by_name[trial.name] for trial in trials}, rates, INIT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
