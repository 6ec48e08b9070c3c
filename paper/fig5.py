"""Figure 5: a damping factor on the accumulated attention, at 50 % of the cache, 20 % recent."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import (
    LEVELS,
    LOOKS,
    Figure,
    axis_name,
    draw_level,
    draw_line,
    left_of,
    panels,
    setting,
)
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import (
    LOSSES,
    compared_metric,
    labelled,
    print_differences,
    print_tables,
)
from keyformer_evaluation.studies.written import Written

FACTORS = (0.875, 0.9, 0.925, 0.95, 0.975, 1.0)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig5", __doc__, argv, PICTURES)
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
    study.differences += print_differences(
        results,
        "Does damping help? 0.875 - none",
        labelled(damping=0.875),
        labelled(damping=1.0),
    )
    study.write(results)


def picture(written: Written) -> Figure:
    """The metric over the factor, beside full attention."""
    metric = compared_metric(next(iter(written.results.values()))[0]) or ""
    figure, axes = panels(
        written,
        "H2O with its accumulated attention damped at every step",
        setting(written, "cache 50 % of the prompt, 20 % of it recent"),
        [*LEVELS[: 2 - (metric in LOSSES)], LOOKS["h2o"]],
    )
    for panel, ax in axes.items():
        full, *rows = written.results[panel]
        draw_level(ax, full, metric)
        draw_line(ax, rows, "damping", LOOKS["h2o"])
        ax.set_xlabel("damping factor (1: none)")
        ax.set_xticks(FACTORS[::3] + FACTORS[-1:])
    for ax in left_of(axes):
        ax.set_ylabel(axis_name(metric))
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
