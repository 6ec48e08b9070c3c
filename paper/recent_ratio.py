"""How much of the cache the recent window takes: w from 10 to 90 % of k (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.study import Study, draw_level, draw_line, panels, print_tables
from keyformer.evaluation.sweep import Cell

METHODS = ("h2o", "keyformer")
SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    study = Study("recent_ratio", __doc__, argv)
    full = Cell({"method": "full", "recent": ""}, KeyformerConfig.preset("full"))
    cells = (
        Cell(
            {"method": method, "recent": share},
            KeyformerConfig.preset(method, kv_cache=50, recent=share),
        )
        for method in METHODS
        for share in SHARES
    )
    results = study.measure([full, *cells])
    print_tables(results)
    figure, axes = panels(results, "Recent window, 50 % of the cache")
    for ax, (whole, *rows) in zip(axes, results.values(), strict=True):
        draw_level(ax, whole)
        for number, method in enumerate(METHODS):
            of_method = [row for row in rows if row.labels["method"] == method]
            draw_line(ax, of_method, "recent", method, f"C{number}")
        ax.set_xlabel("recent window, % of the cache")
        ax.legend(fontsize=8)
    study.write(results, figure)


if __name__ == "__main__":
    run_main(main)
