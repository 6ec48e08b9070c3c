"""How much of the cache the recent window takes: w from 10 to 90 % of k (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import Figure, method_curves
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import gain, print_tables
from keyformer_evaluation.studies.written import Written

METHODS = ("h2o", "keyformer")
SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("recent_ratio", __doc__, argv, PICTURES)
    full = Cell({"method": "full", "recent": ""}, KeyformerConfig.preset("full"))
    cells = (
        Cell(
            {"method": method, "recent": share},
            KeyformerConfig.preset(method, kv_cache=50, recent=share),
        )
        for method in METHODS
        for share in SHARES
    )
    results = yield from study.measure([full, *cells])
    print_tables(results)
    print("\nBest recent window, % of the cache:")
    for (model, task), (full_row, *rows) in results.items():
        for method in METHODS:
            of_method = [row for row in rows if row.labels["method"] == method]
            best = max(of_method, key=lambda row: gain(row, full_row))
            print(f"  {model}, {task}, {method}: {best.labels['recent']}")
    study.write(results)


def picture(written: Written) -> Figure:
    """Both methods over the share of the recent window."""
    title, xlabel = (
        "How much of the cache the recent window takes",
        "recent window (% of the cache)",
    )
    return method_curves(written, "recent", xlabel, title, "cache 50 % of the prompt")


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
