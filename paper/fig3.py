"""Figure 3: how sparse attention is (a), how its mass gathers (b), what key tokens alone do (c).

a: percent of attention weights below 1 % of their query's largest, by layer. b: percent of the
attention that falls on the most attended tokens. Both of full attention, for the tokens that write
the reference. c: ROUGE-2 of full attention, and at half the cache of key tokens alone, recent ones
alone, and both (H2O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.measures import SHARES, Attention
from keyformer_evaluation.studies.pictures import (
    LOOKS,
    Figure,
    draw_line,
    left_of,
    method_bars,
    panels,
    setting,
)
from keyformer_evaluation.studies.study import Results, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Row, Steps
from keyformer_evaluation.studies.tables import print_tables
from keyformer_evaluation.studies.written import Written

METHODS = ("full", "key", "window", "h2o")
DOTS = replace(LOOKS["full"], marker="o")
MARKED = 40
"""Percent of the tokens, of which the paper says that 90 % of the attention falls on them."""


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig3", __doc__, argv, PICTURES)
    full = Cell({}, KeyformerConfig.preset("full"))
    attention = yield from study.measure([full], study.measures(Attention))
    scores = yield from study.measure(
        Cell({"method": method}, KeyformerConfig.preset(method, kv_cache=50)) for method in METHODS
    )
    sparsity = by_metric(attention, "layer", "layer", "sparsity")
    mass = by_metric(attention, "mass", "tokens", "mass")

    print_tables(sparsity)
    study.write(sparsity, "a")

    print_tables(mass)
    study.write(mass, "b")

    print_tables(scores)
    study.write(scores, "c")


def by_metric(results: Results, prefix: str, label: str, metric: str) -> Results:
    """A row for each metric whose name is the prefix and a number, the number its label."""
    return {
        panel: [
            Row(
                {label: int(name.removeprefix(prefix))},
                {metric: row.values[name]},
                row.config,
                row.seeds,
                {metric: row.per_item[name]},
            )
            for row in rows
            for name in row.values
            if name.startswith(prefix)
        ]
        for panel, rows in results.items()
    }


def sparsity_picture(written: Written) -> Figure:
    """Weights near zero, by layer."""
    about = setting(written, "full attention")
    figure, axes = panels(written, "How sparse attention is in each layer", about)
    for panel, ax in axes.items():
        rows = written.results[panel]
        draw_line(ax, rows, "layer", DOTS, metric="sparsity")
        ax.locator_params(axis="x", integer=True)
        ax.set_xlabel("layer")
        ax.set_ylim(0, 100)
    for ax in left_of(axes):
        ax.set_ylabel("weights below 1 %\nof the largest (%)")
    return figure


def mass_picture(written: Written) -> Figure:
    """What the most attended tokens get; at 40 % of them the number is told."""
    about = setting(written, "full attention")
    figure, axes = panels(written, "How much attention falls on the most attended tokens", about)
    for panel, ax in axes.items():
        rows = [  # which stand in the order of SHARES
            replace(row, labels={"tokens": share})
            for share, row in zip(SHARES, written.results[panel], strict=True)
        ]
        draw_line(ax, rows, "tokens", DOTS, metric="mass")
        mean = rows[SHARES.index(MARKED)].values["mass"][0]
        ax.vlines(MARKED, 0, mean, color="#D55E00", linewidth=1.3)
        told = f"{mean:.0f} % on\n{MARKED} % of the tokens"
        ax.text(MARKED + 3, mean / 2, told, color="#D55E00", va="center")
        ax.set_xlabel("most attended tokens (%)")
        ax.set_ylim(0, 105)
    for ax in left_of(axes):
        ax.set_ylabel("share of the attention (%)")
    return figure


def picture(written: Written) -> Figure:
    """A bar for each method."""
    title = "Key tokens alone, recent tokens alone, and both (H2O)"
    return method_bars(written, title, "cache 50 % of the prompt")


PICTURES = {"a": sparsity_picture, "b": mass_picture, "c": picture}


if __name__ == "__main__":
    run_study(main)
