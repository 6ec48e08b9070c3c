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
from keyformer_evaluation.studies.pictures import COLORS, Figure
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import PerItem, Steps
from keyformer_evaluation.studies.tables import print_columns
from keyformer_evaluation.tasks.flags import Parser, whole

METHODS = ("full", "window", "h2o", "keyformer")


def more_flags(parser: Parser) -> None:
    """Whose weights."""
    parser.add_argument("--layer", type=whole(0), default=3, help="counted from 0 (default: 3)")
    parser.add_argument("--head", type=whole(0), default=7, help="counted from 0 (default: 7)")


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig4", __doc__, argv, measures=(), more_flags=more_flags)
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
        records.append({**of, "tokens": len(kept), "of_full_percent": round(share, 3)})
        lines.append(
            [model, task, method, f"{len(kept)}", f"{share:.1f}", f"{max(kept.values()):.3f}"]
        )
    print_columns(lines)
    study.write_table(table, records)

    figure = Figure(figsize=(0.6 + 4 * len(measures), 1 + 1.5 * len(METHODS)), layout="constrained")
    grid = figure.subplots(len(METHODS), len(measures), sharex="col", sharey="col", squeeze=False)
    line = {"linewidth": 1, "rasterized": True}  # a thousand of them, which an SVG need not name
    for column, (model, task) in enumerate(measures):
        full = _by_position(found[runs[(model, task), "full"]])
        for ax, method in zip(grid[:, column], METHODS, strict=True):
            kept = _by_position(found[runs[(model, task), method]])
            ax.vlines(list(full), 0, list(full.values()), color="#cccccc", **line)
            ax.vlines(list(kept), 0, list(kept.values()), color=COLORS[method], **line)
            ax.text(0.02, 0.92, method, transform=ax.transAxes, va="top", color=COLORS[method])
            ax.set_yscale("asinh", linear_width=0.002)
            top = max(*full.values(), *kept.values())
            ax.set_yticks([0, *(tick for tick in (0.001, 0.01, 0.1, 1) if tick < top)])
            ax.set_ylim(0, 1.3 * top)
        grid[0, column].set_title(f"{model.removesuffix('-keyformer')}, {task}")
        grid[-1, column].set_xlabel("position in the text")
    for ax in grid[:, 0]:
        ax.set_ylabel("weight")
    figure.suptitle(
        f"The softmax of layer {layer}, head {head}; grey: with the full cache", fontsize=12
    )
    study.draw(figure)


def _by_position(found: PerItem) -> dict[int, float]:
    return dict(zip(map(int, found["position"]), found["weight"], strict=True))


if __name__ == "__main__":
    run_study(main)
