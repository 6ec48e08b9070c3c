"""The temperature's two ends (Eq. 10), at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Study, draw_grid, panels, print_tables
from keyformer.evaluation.sweep import Cell

ENDS = (0.5, 1.0, 2.0, 4.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("temperature", __doc__, argv)
    results = study.measure(
        Cell(
            {"tau_init": first, "tau_end": last},
            KeyformerConfig(kv_cache=60, recent=30, tau_init=first, tau_end=last),
        )
        for first in ENDS
        for last in ENDS
    )
    print_tables(results)
    figure, axes = panels(results, "ROUGE-2 by temperature, 60 % of the cache", ylabel="tau_init")
    for ax, rows in zip(axes, results.values(), strict=True):
        draw_grid(ax, rows, "tau_end", "tau_init")
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
