"""What is found against what is lost: needles and likelihoods, at each size of the cache.

Draws what retrieval.py and summaries.py have measured: FOLDER/retrieval.csv, and of each dataset
FOLDER/DATASET/summaries.csv.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keyformer.config import InputError
from keyformer_evaluation.records.results import check_record, write_json, write_picture
from keyformer_evaluation.studies.pictures import COLORS, Figure, colors_of
from keyformer_evaluation.studies.sweep import Estimate
from keyformer_evaluation.tasks import flags as flag

LOSSES = {"reference": "summaries", "continued": "how it goes on"}
"""What of a dataset is drawn, by its task in summaries.csv."""

Table = dict[tuple[str, str, str], Estimate]
"""What is drawn by task, method and size of the cache."""


class Point(NamedTuple):
    """A method at a size: needles found, %, and nats a token more than the full cache's."""

    found: Estimate
    lost: Estimate


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = flag.Parser(prog="frontier.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="of results, where the picture goes, too")
    parser.add_argument("--datasets", nargs="+", help="which of them (default: all)")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    folder = flags.folder
    of_dataset = {path.parent.name: path for path in sorted(folder.glob("*/summaries.csv"))}
    if not of_dataset:
        raise InputError(f"{folder} has no summaries.csv of a dataset")
    for name in flags.datasets or ():
        if name not in of_dataset:
            raise InputError(
                f"--datasets must be of {', '.join(of_dataset)}, which {folder} has, got {name}"
            )
    found = read(folder / "retrieval.csv")
    sizes = sorted({size for _, _, size in found if size}, key=float, reverse=True)
    panels = {}
    drawn = dict.fromkeys(flags.datasets or of_dataset)
    for dataset in drawn:
        table = read(of_dataset[dataset])
        for task, name in LOSSES.items():
            shown = {size: points(found, table, task, size) for size in sizes}
            if any(shown.values()):
                panels[f"{dataset}, {name}"] = shown
    if not panels:
        raise InputError(f"the tables of {folder} have no needles and losses of the same methods")
    record, *files = (folder / f"frontier.{kind}" for kind in ("json", "png", "svg"))
    check_record(record, *files, script="frontier.py")
    figure = picture(panels, sizes)
    tables = ["retrieval.csv", *(f"{dataset}/summaries.csv" for dataset in drawn)]
    command = shlex.join(["python", "paper/frontier.py", *argv])
    write_json(record, {"command": command, "drawn_from": tables})
    for file in files:
        write_picture(file, figure)
    print(f"picture and record: {folder / 'frontier.{png,svg,json}'}")


def read(path: Path) -> Table:
    """A table that one of the two scripts wrote.

    Raises
    ------
    InputError
        If it is none, or has several models.
    """
    metric = "answered" if path.name == "retrieval.csv" else "nll_minus_full"
    table: Table = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            if line["kv_cache"]:
                float(line["kv_cache"])
            if line["task"] in ("needle", *LOSSES):
                table[line["task"], line["method"], line["kv_cache"]] = estimate(line, metric)
        models = {line["model"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"cannot read results from {path}: {error!r}") from error
    if len(models) > 1:
        raise InputError(f"{path} has several models, {', '.join(sorted(models))}: draw each alone")
    return table


def estimate(line: dict[str, str], metric: str) -> Estimate:
    """A mean and the ends of its interval."""
    mean, low, high = (float(line[f"{metric}{end}"]) for end in ("", "_low", "_high"))
    return mean, low, high


def points(found: Table, lost: Table, task: str, size: str) -> dict[str, Point]:
    """Of the full cache, and of each method that both tables have at this size."""
    return {
        method: Point(of, lost[task, method, at])
        for (asked, method, at), of in found.items()
        if asked == "needle" and at in ("", size) and (task, method, at) in lost
    }


def picture(panels: dict[str, dict[str, dict[str, Point]]], sizes: Sequence[str]) -> Figure:
    """A row for each thing lost, a column for each size; best is at the lower right."""
    colors = colors_of(
        method for of in panels.values() for shown in of.values() for method in shown
    )
    size = (3.3 * len(sizes), 0.8 + 2.5 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), len(sizes), squeeze=False, sharex=True, sharey="row")
    drawn = {}
    for line, (name, of_size) in zip(axes, panels.items(), strict=True):
        line[0].set_ylabel(f"{name}:\nnats a token above full")
        for ax, shown in zip(line, of_size.values(), strict=True):
            for method, ((x, *of_x), (y, *of_y)) in shown.items():
                color, marker = colors[method], "*" if method == "full" else "o"
                ax.plot(of_x, [y, y], [x, x], of_y, color=color, linewidth=1, alpha=0.5)
                (drawn[method],) = ax.plot(x, y, marker, color=color, markersize=6)
            ax.axhline(0, color=COLORS["full"], linewidth=1, linestyle=":")
            ax.set_xlim(0, 100)
    for ax, size_of in zip(axes[0], sizes, strict=True):
        ax.set_title(f"{size_of} % of the cache")
    for ax in axes[-1]:
        ax.set_xlabel("needles found, %")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(len(drawn), 7))
    return figure


if __name__ == "__main__":
    flag.run_main(main)
