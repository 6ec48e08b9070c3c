"""Figure 5: a damping factor on the accumulated attention, at 50 % of the cache, 20 % recent."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import COLORS, draw_level, draw_line, legend_of, panels
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables

FACTORS = (0.875, 0.9, 0.925, 0.95, 0.975, 1.0)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig5", __doc__, argv)
    damped = (
        Cell(
            {"damping": factor},
            KeyformerConfig.preset("h2o", kv_cache=50, recent=20, damping=factor),
        )
        for factor in FACTORS
    )
    results = yield from study.measure(
        [Cell({"damping": "full"}, KeyformerConfig.preset("full")), *damped]
    )
    print_tables(results)
    print_differences(
        results,
        "Does damping help? 0.875 - none",
        labelled(damping=0.875),
        labelled(damping=1.0),
    )
    figure, axes = panels(results, "Damping of accumulated attention, 50 % of the cache")
    for ax, (full, *rows) in zip(axes, results.values(), strict=True):
        draw_level(ax, full)
        draw_line(ax, rows, "damping", "accumulated attention", COLORS["h2o"])
        ax.set_xlabel("damping factor")
    legend_of(figure, axes[0])
    study.write(results, figure)


if __name__ == "__main__":
    run_study(main)
