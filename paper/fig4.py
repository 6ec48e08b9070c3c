"""Figure 4: how eviction reshapes the softmax of one head.

The weights that the first token of the reference gives to the tokens before it, with the full
cache and with half of it: what the evicted tokens had goes to those that stay. Of one document,
the first of those drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.measures import Softmax
from keyformer_evaluation.studies.pictures import LOOKS, Figure, model_name, page
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import PerItem, Steps
from keyformer_evaluation.studies.tables import print_columns
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.flags import Parser, whole

METHODS = ("full", "window", "h2o", "keyformer")
LAYER, HEAD = 3, 7
"""Whose weights, counted from 0, where nothing else is said."""


def more_flags(parser: Parser) -> None:
    """Whose weights."""
    parser.add_argument(
        "--layer", type=whole(0), default=LAYER, help="counted from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--head", type=whole(0), default=HEAD, help="counted from 0 (default: %(default)s)"
    )


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig4", __doc__, argv, PICTURES, measures=(), more_flags=more_flags)
    layer, head = study.flags.layer, study.flags.head
    measures = study.measures(Softmax, layer=layer, head=head)
    runs = {
        (panel, method): study.runs(KeyformerConfig.preset(method, kv_cache=50), measure)[0]
        for panel, measure in measures.items()
        for method in METHODS
    }
    found = yield from study.find(runs.values())

    table: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    print(f"\nlayer {layer}, head {head}: what the tokens that stay have of the full softmax")
    lines = [["model", "task", "method", "tokens", "of the full softmax, %", "largest weight"]]
    for ((model, task), method), run in runs.items():
        full = _by_position(found[runs[(model, task), "full"]])
        kept = _by_position(found[run])
        share = 100 * sum(full[position] for position in kept)
        of = {"model": model, "task": task, "method": method}
        table += [{**of, "position": at, "weight": weight} for at, weight in kept.items()]
        shown = {"layer": layer, "head": head, "tokens": len(kept)}
        records.append({**of, **shown, "of_full_percent": round(share, 3)})
        lines.append(
            [model, task, method, f"{len(kept)}", f"{share:.1f}", f"{max(kept.values()):.3f}"]
        )
    print_columns(lines)
    study.write_table(table, records)


def _by_position(found: PerItem) -> dict[int, float]:
    return dict(zip(map(int, found["position"]), found["weight"], strict=True))


def picture(written: Written) -> Figure:
    """A column for each model and task, a line for each method over the full cache's weights."""
    weights: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for line in written.table:
        of = weights.setdefault((line["model"], line["task"]), {}).setdefault(line["method"], {})
        of[int(line["position"])] = float(line["weight"])
    share = {(of["model"], of["task"], of["method"]): of["of_full_percent"] for of in written.rows}
    row, record = written.rows[0], written.record
    figure, grid = page(
        "What one attention head looks at, before and after eviction",
        f"softmax of layer {row.get('layer', LAYER)}, head {row.get('head', HEAD)}, for the first"
        " token after the prompt of one document · cache 50 % of the prompt · grey: with the full"
        " cache · percent: what the kept tokens have of the full cache's softmax"
        f" · {record['dtype']}, {record['device']}",
        len(METHODS),
        len(weights),
        height=1.25,
        sharex="col",
        sharey="col",
    )
    style: dict[str, Any] = {
        "linewidth": 1,
        "rasterized": True,
    }  # a thousand of them, which an SVG need not name
    for column, ((model, task), of_method) in zip(grid.T, weights.items(), strict=True):
        full = of_method["full"]
        top = max(weight for kept in of_method.values() for weight in kept.values())
        for ax, method in zip(column, METHODS, strict=True):
            kept, look = of_method[method], LOOKS[method]
            ax.vlines(list(full), 0, list(full.values()), color="#dddddd", **style)
            ax.vlines(list(kept), 0, list(kept.values()), color=look.color, **style)
            told = f"{look.label}, {share[model, task, method]:.0f} %"
            ax.text(0.02, 0.98, told, transform=ax.transAxes, va="top", color=look.color)
            ax.set_yscale("asinh", linear_width=1e-4)
            ax.set_yticks([0, *(tick for tick in (1e-3, 1e-2, 1e-1, 1) if tick < top)])
            ax.set_ylim(0, 8 * top)
        several = len({task for _, task in weights}) > 1
        column[0].set_title(model_name(model) + (f", {task}" if several else ""), loc="left")
        column[-1].set_xlabel("position in the text (tokens)")
    for ax in grid[:, 0]:
        ax.set_ylabel("weight")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
