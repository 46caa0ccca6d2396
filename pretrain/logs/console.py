"""The lines that a run prints."""

import datetime
import math
import sys

from tqdm import tqdm

from pretrain.logs.log import Record

_LONGEST = 1e10  # seconds that are worth telling


class Console:
    """Lines that a Megatron user recognises; on a terminal a live progress bar below them."""

    def __init__(self, interval: int, first: int, total: int):
        self._interval, self._total = interval, total
        self._since_last_line: list[Record] = []
        live = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=first, unit="it", dynamic_ncols=True) if live else None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def write(self, record: Record) -> None:
        iteration = record["iteration"]
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['lm_loss']:.4f}", refresh=False)
            self._bar.update(1)
        self._since_last_line.append(record)
        if iteration % self._interval == 0 or iteration == self._total or record["skipped"]:
            self.say(self._line(record | self._means()))
            self._since_last_line.clear()
        if "valid_loss" in record:
            loss = record["valid_loss"]
            said = f"lm loss value: {loss:.6E} | lm loss PPL: {math.exp(min(loss, 80.0)):.6E}"
            said = "no token counted" if math.isnan(loss) else said
            self.say(f" validation loss at iteration {iteration} | {said}")

    def _means(self) -> Record:
        """Speed over the iterations since the last line, which is steadier than the last iteration's."""
        names = ("elapsed_ms", "tokens_per_second", "tflops_per_device", "mfu_full", "mfu_causal")
        steps = self._since_last_line
        seconds = sum(step["elapsed_ms"] for step in steps)
        weighted = {
            name: None if steps[0][name] is None else sum(step[name] * step["elapsed_ms"] for step in steps) / seconds
            for name in names
        }
        return weighted | {"elapsed_ms": seconds / len(steps)}

    def _line(self, record: Record) -> str:
        mfu = "n/a"
        if record["mfu_full"] is not None:
            mfu = f"{record['mfu_full']:.1%} (causal {record['mfu_causal']:.1%})"
        remaining = min((self._total - record["iteration"]) * record["elapsed_ms"] / 1e3, _LONGEST)
        parts = [
            f" [{datetime.datetime.now():%Y-%m-%d %H:%M:%S}] iteration {record['iteration']:8d}/{self._total:8d}",
            f"consumed samples: {record['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {record['elapsed_ms']:.1f}",
            f"tokens/s: {record['tokens_per_second']:.0f}",
            f"TFLOP/s/device: {record['tflops_per_device']:.3g}",
            f"MFU: {mfu}",
            f"learning rate: {record['learning_rate']:.6E}",
            f"global batch size: {record['global_batch_size']:5d}",
            f"lm loss: {record['lm_loss']:.6E}",
            f"loss scale: {record['loss_scale']:.1f}",
            f"grad norm: {record['grad_norm']:.3f}",
            f"memory (GiB): {record['memory_gib']:.2f}",
            f"ETA: {datetime.timedelta(seconds=int(remaining))}",
        ]
        if record["skipped"]:
            parts.append("SKIPPED: gradient not finite")
        return " | ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
