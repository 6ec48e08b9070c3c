"""Figure 3: how sparse attention is (a), how its mass gathers (b), what key tokens alone do (c).

a: percent of attention weights below 1 % of their query's largest, by layer. b: percent of the
attention that falls on the most attended tokens. Both of full attention, for the tokens that write
the reference. c: ROUGE-2 of full attention, and at half the cache of key tokens alone, recent ones
alone, and both (H2O).
"""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.measures import Attention
from keyformer_evaluation.studies.pictures import PALETTE, draw_line, method_bars, panels
from keyformer_evaluation.studies.study import Results, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Row, Steps
from keyformer_evaluation.studies.tables import print_tables

METHODS = ("full", "key", "window", "h2o")


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig3", __doc__, argv)
    full = Cell({}, KeyformerConfig.preset("full"))
    attention = yield from study.measure([full], study.measures(Attention))
    scores = yield from study.measure(
        Cell({"method": method}, KeyformerConfig.preset(method, kv_cache=50)) for method in METHODS
    )
    sparsity = by_metric(attention, "layer", "sparsity")
    mass = by_metric(attention, "mass", "mass")

    print_tables(sparsity)
    figure, axes = panels(
        sparsity, "Attention sparsity", ylabel="weights below 1 % of the largest, %"
    )
    for ax, rows in zip(axes, sparsity.values(), strict=True):
        draw_line(ax, rows, "layer", "", PALETTE[0], metric="sparsity")
        ax.set_xlabel("layer")
        ax.set_ylim(0, 100)
    study.write(sparsity, figure, "a")

    print_tables(mass)
    figure, axes = panels(mass, "Where the attention goes", ylabel="share of the attention, %")
    for ax, rows in zip(axes, mass.values(), strict=True):
        draw_line(ax, rows, "mass", "", PALETTE[0], metric="mass")
        ax.axvline(40, color="black", linewidth=0.8, linestyle=":")
        ax.set_xlabel("most attended tokens, %")
        ax.set_ylim(0, 105)
    study.write(mass, figure, "b")

    print_tables(scores)
    study.write(
        scores, method_bars(scores, "Key tokens, recent tokens, both; 50 % of the cache"), "c"
    )


def by_metric(results: Results, prefix: str, metric: str) -> Results:
    """A row for each metric whose name is the prefix and a number, the number its label."""
    return {
        panel: [
            Row(
                {prefix: int(name.removeprefix(prefix))},
                row.config,
                row.seeds,
                {metric: row.per_item[name]},
                {metric: row.values[name]},
            )
            for row in rows
            for name in row.values
            if name.startswith(prefix)
        ]
        for panel, rows in results.items()
    }


if __name__ == "__main__":
    run_study(main)
