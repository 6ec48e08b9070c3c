"""The temperature's two ends (Eq. 10), at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import (
    Figure,
    axis_name,
    draw_grid,
    left_of,
    panels,
    setting,
)
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import (
    compared_metric,
    labelled,
    print_differences,
    print_tables,
)
from keyformer_evaluation.studies.written import Written

ENDS = (0.5, 1.0, 2.0, 4.0)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("temperature", __doc__, argv, PICTURES)
    results = yield from study.measure(
        Cell(
            {"tau_init": first, "tau_end": last},
            KeyformerConfig(kv_cache=60, recent=30, tau_init=first, tau_end=last),
        )
        for first in ENDS
        for last in ENDS
    )
    print_tables(results)
    study.differences += print_differences(
        results,
        "Does a rising temperature help? 1 to 2 - 1 throughout",
        labelled(tau_init=1.0, tau_end=2.0),
        labelled(tau_init=1.0, tau_end=1.0),
    )
    study.write(results)


def picture(written: Written) -> Figure:
    """A grid of both ends, each model's colours over its own values."""
    rows = next(iter(written.results.values()))
    metric = axis_name(compared_metric(rows[0]) or "").replace("\n", " ")
    about = setting(written, "cache 60 % of the prompt", last="colours: each panel's own range")
    figure, axes = panels(written, f"Keyformer's temperature: {metric}", about)
    for panel, ax in axes.items():
        draw_grid(ax, written.results[panel], "tau_end", "tau_init")
        ax.set_xlabel("tau_end, at the last token")
    for ax in left_of(axes):
        ax.set_ylabel("tau_init, at the prompt")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
