"""The temperature's two ends (Eq. 10), at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import draw_grid, panels
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables

ENDS = (0.5, 1.0, 2.0, 4.0)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("temperature", __doc__, argv)
    results = yield from study.measure(
        Cell(
            {"tau_init": first, "tau_end": last},
            KeyformerConfig(kv_cache=60, recent=30, tau_init=first, tau_end=last),
        )
        for first in ENDS
        for last in ENDS
    )
    print_tables(results)
    print_differences(
        results,
        "Does a rising temperature help? 1 to 2 - 1 throughout",
        labelled(tau_init=1.0, tau_end=2.0),
        labelled(tau_init=1.0, tau_end=1.0),
    )
    figure, axes = panels(
        results, "By temperature, 60 % of the cache", ylabel="tau_init, at the prompt"
    )
    for ax, rows in zip(axes, results.values(), strict=True):
        draw_grid(ax, rows, "tau_end", "tau_init")
        ax.set_xlabel("tau_end, at the last token")
    study.write(results, figure)


if __name__ == "__main__":
    run_study(main)
