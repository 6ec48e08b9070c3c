"""Figure 5: a damping factor on the accumulated attention, at 50 % of the cache, 20 % recent."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Study, draw_level, draw_line, panels, print_tables
from keyformer.evaluation.sweep import Cell

FACTORS = (0.875, 0.9, 0.925, 0.95, 0.975, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("fig5", __doc__, argv)
    damped = (
        Cell(
            {"damping": factor},
            KeyformerConfig.preset("h2o", kv_cache=50, recent=20, damping=factor),
        )
        for factor in FACTORS
    )
    results = study.measure([Cell({"damping": "full"}, KeyformerConfig.preset("full")), *damped])
    print_tables(results)
    figure, axes = panels(results, "Damping of accumulated attention, 50 % of the cache")
    for ax, (full, *rows) in zip(axes, results.values(), strict=True):
        draw_level(ax, full)
        draw_line(ax, rows, "damping", "accumulated attention", "C0")
        ax.set_xlabel("damping factor")
        ax.legend(fontsize=8)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
