"""A source whose vocabulary has grown to that of another tokenizer, and a report of what its new rows are."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.read import VOCABULARY_MATRICES, ResizedWeights
from megatron_ext.models.expand import Expansion
from tokenizer.merge.decompose import Decomposition, decompose
from tools.conversion.source import Source

REPORT = "embedding_init.json"


@dataclasses.dataclass(frozen=True)
class Resized:
    """A source with more rows than it is read from."""

    source: Source
    weights: ResizedWeights
    expansion: Expansion
    decomposition: Decomposition

    def report(self) -> dict[str, Any]:
        """Figures of the new rows, for every matrix that has some."""
        plan, new = self.expansion, self.decomposition
        matrices = [name for name in VOCABULARY_MATRICES if name in self.weights.shapes]
        return {
            "method": plan.method,
            "norm_correction": plan.norm_correction,
            "seed": plan.seed,
            "old_rows": plan.old_size,
            "new_rows": len(plan.parts),
            "of_bytes_only": new.of_bytes,
            "distinct_old_pieces": new.distinct,
            "matrices": {name: self.weights.new_rows(name).figures() for name in matrices},
        }


def resize(
    source: Source, where: str, base: Path, tokenizer: Path, method: str, norm_correction: bool, seed: int
) -> Resized:
    """Let `source` grow from the tokenizer `base` to `tokenizer`.

    Raises:
        TokenizerError: `tokenizer` does not extend `base`.
        RequestError: the source has another vocabulary; the message begins with `where`.
    """
    decomposition = decompose("--base-tokenizer", base, "--tokenizer", tokenizer)
    expansion = Expansion(
        old_size=decomposition.old_size,
        parts=decomposition.parts,
        method=method,
        seed=seed,
        std=source.model.init_method_std,
        norm_correction=norm_correction,
    )
    expansion.check_vocabulary(source.model.vocab_size, where)
    weights = ResizedWeights(source.weights, expansion, progress=True)
    model = dataclasses.replace(source.model, vocab_size=expansion.new_size)
    return Resized(dataclasses.replace(source, model=model, weights=weights), weights, expansion, decomposition)


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Put the report beside the weights, and its gist on the console."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    new = report["new_rows"]
    print(
        f"{new:,} new rows by {report['method']}: {report['of_bytes_only'] / new:.1%} of the pieces were bytes only, "
        f"all together were {report['distinct_old_pieces']:,} old pieces"
    )
    for name, figures in report["matrices"].items():
        print(
            f"  {name}: norm {figures['norm']:.4g} ({figures['smallest_norm']:.4g} to {figures['largest_norm']:.4g}), "
            f"old rows {figures['old_norm']:.4g}; rows like an earlier one: {figures['ties']:,} before ties were "
            f"broken, {figures['equal']:,} after"
        )
