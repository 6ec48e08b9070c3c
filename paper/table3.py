"""Table 3: methods, positions and the sharing of scores, at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Published, Study, draw_bars, panels, print_tables
from keyformer.evaluation.sweep import Cell

PAPER: Published = {
    "mpt-7b-keyformer": {
        ("full", "", ""): 17.6329,
        ("window", "", ""): 4.2655,
        ("h2o", "original", "per_layer"): 16.3865,
        ("streaming_llm", "", ""): 0.0179,
        ("keyformer", "new", "per_layer"): 16.9092,
        ("keyformer", "original", "per_layer"): 17.5976,
        ("keyformer", "original", "shared"): 17.3732,
    }
}
SCORED = (
    ("h2o", "original", "per_layer"),
    ("keyformer", "new", "per_layer"),
    ("keyformer", "original", "per_layer"),
    ("keyformer", "original", "shared"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("table3", __doc__, argv)
    cells = [
        Cell(
            {"method": method, "positions": "", "score": ""},
            KeyformerConfig.preset(method, kv_cache=60),
        )
        for method in ("full", "window", "streaming_llm")
    ]
    cells += [
        Cell(
            {"method": method, "positions": positions, "score": score},
            KeyformerConfig.preset(method, kv_cache=60, positions=positions, score=score),
        )
        for method, positions, score in SCORED
    ]
    results = study.measure(cells)
    print_tables(results, PAPER)
    figure, axes = panels(results, "Methods, positions and shared scores, 60 % of the cache")
    for ax, rows in zip(axes, results.values(), strict=True):
        draw_bars(ax, rows)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
