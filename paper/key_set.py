"""Key tokens chosen at every step, as in the paper, or once, as the authors' code does."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KEY_SETS, NOISE_SCHEDULES, KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Study, draw_bars, panels, print_tables
from keyformer.evaluation.sweep import Cell


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("key_set", __doc__, argv)
    results = study.measure(
        Cell(
            {"key_set": key_set, "noise_schedule": schedule},
            KeyformerConfig(kv_cache=60, recent=30, key_set=key_set, noise_schedule=schedule),
        )
        for key_set in KEY_SETS
        for schedule in NOISE_SCHEDULES
    )
    print_tables(results)
    figure, axes = panels(results, "Key set and noise schedule, 60 % of the cache")
    for ax, rows in zip(axes, results.values(), strict=True):
        draw_bars(ax, rows)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
