"""Figure 7: ROUGE against the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Study, draw_level, draw_line, panels, print_tables
from keyformer.evaluation.sweep import Cell

METHODS = ("window", "h2o", "keyformer")
SIZES = (20, 30, 40, 50, 60, 70, 80, 90)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("fig7", __doc__, argv)
    full = Cell({"method": "full", "kv_cache": ""}, KeyformerConfig.preset("full"))
    smaller = (
        Cell({"method": method, "kv_cache": size}, KeyformerConfig.preset(method, kv_cache=size))
        for method in METHODS
        for size in SIZES
    )
    results = study.measure([full, *smaller])
    print_tables(results)
    figure, axes = panels(results, "ROUGE-2 by cache size")
    for ax, (whole, *rows) in zip(axes, results.values(), strict=True):
        draw_level(ax, whole)
        for number, method in enumerate(METHODS):
            of_method = [row for row in rows if row.labels["method"] == method]
            draw_line(ax, of_method, "kv_cache", method, f"C{number}")
        ax.set_xlabel("cache, % of the prompt")
        ax.legend(fontsize=8)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
