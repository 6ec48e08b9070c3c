"""Beyond the paper: cache size x what slots hold keys and values in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keyformer.config import CACHE_DTYPES, KeyformerConfig
from keyformer_evaluation.studies.pictures import (
    FULL,
    Figure,
    axis_name,
    draw_bars,
    looks_of,
    panels,
    setting,
)
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import compared_metric, print_tables
from keyformer_evaluation.studies.written import Written

SIZES = (30, 50, 70, 90, 100)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("cache_dtype", __doc__, argv, PICTURES)
    full = Cell({"method": "full", "cache %": ""}, KeyformerConfig.preset("full"))
    cells = (
        Cell(
            {"method": "keyformer" if kind == "auto" else f"keyformer, {kind}", "cache %": size},
            KeyformerConfig(kv_cache=size, cache_dtype=kind),
        )
        for kind in CACHE_DTYPES
        for size in SIZES
    )
    results = yield from study.measure([full, *cells])
    print_tables(results)
    study.write(results)


def picture(written: Written) -> Figure:
    """A group of bars for each size: curves would hide each other."""
    results = written.results
    looks = looks_of(row.labels["method"] for _, *rows in results.values() for row in rows)
    for name, look in looks.items():
        kind = name.partition(", ")[2] or f"{written.record['dtype']} (the model's)"
        looks[name] = replace(look, label=kind, marker="s", line="")
    figure, axes = panels(
        written,
        "Keyformer with its keys and values in fewer bits",
        setting(written),
        [FULL, *looks.values()],
    )
    for panel, ax in axes.items():
        full, *rows = results[panel]
        metric = compared_metric(full) or ""
        sizes = list(dict.fromkeys(row.labels["cache %"] for row in rows))
        ax.axhline(full.values[metric][0], color=FULL.color)
        for number, (name, look) in enumerate(looks.items()):
            of_kind = [row.values[metric] for row in rows if row.labels["method"] == name]
            at = [place + 0.2 * (number - 1.5) for place in range(len(sizes))]
            draw_bars(ax, at, of_kind, look, 0.18)
        ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
        ax.grid(False, axis="x")
        ax.set_xlabel("cache size (% of the prompt)")
        ax.set_ylabel(axis_name(metric))
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
