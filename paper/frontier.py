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
from keyformer_evaluation.studies.pictures import COLORS, Figure, colors_of, legend_of
from keyformer_evaluation.studies.sweep import Estimate
from keyformer_evaluation.tasks import flags as flag

LOSSES = {"reference": "summaries", "continued": "how it goes on"}
"""What of a dataset is drawn, by its task in summaries.csv."""

Table = dict[tuple[str, str, str], dict[str, str]]
"""Lines by task, method and size of the cache."""


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
    for name in flags.datasets or ():
        if name not in of_dataset:
            raise InputError(
                f"--datasets must be of {', '.join(of_dataset)}, which {folder} has, got {name}"
            )
    if not of_dataset:
        raise InputError(f"{folder} has no summaries.csv of a dataset")
    drawn = [of_dataset[name] for name in flags.datasets or of_dataset]
    tables = [folder / "retrieval.csv", *drawn]
    found, *of_datasets = map(read, tables)
    panels = {
        (f"{path.parent.name}, {name}", size): points(found, table, task, size)
        for path, table in zip(drawn, of_datasets, strict=True)
        for task, name in LOSSES.items()
        for size in sorted({size for _, _, size in found if size}, key=float, reverse=True)
        if any(key[0] == task for key in table)
    }
    record, *files = (folder / f"frontier.{kind}" for kind in ("json", "png", "svg"))
    check_record(record, *files, script="frontier.py")
    figure = picture(panels)
    for file in files:
        write_picture(file, figure)
    read_from = [str(table.relative_to(folder)) for table in tables]
    command = shlex.join(["python", "paper/frontier.py", *argv])
    write_json(record, {"command": command, "drawn_from": read_from})
    print(f"picture and record: {folder / 'frontier.{png,svg,json}'}")


def read(path: Path) -> Table:
    """A table that one of the two scripts wrote.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        return {(line["task"], line["method"], line["kv_cache"]): line for line in lines}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"cannot read results from {path}: {error}") from error


def points(found: Table, lost: Table, task: str, size: str) -> dict[str, Point]:
    """Of the full cache, and of each method that both tables have at this size."""
    return {
        method: Point(
            estimate(line, "answered"),
            estimate(lost[task, method, at], "nll_minus_full"),
        )
        for (asked, method, at), line in found.items()
        if asked == "needle" and at in ("", size) and (task, method, at) in lost
    }


def estimate(line: dict[str, str], metric: str) -> Estimate:
    """A mean and the ends of its interval."""
    low, mean, high = (float(line[f"{metric}{end}"]) for end in ("_low", "", "_high"))
    return mean, low, high


def picture(panels: dict[tuple[str, str], dict[str, Point]]) -> Figure:
    """A row for each thing lost, a column for each size; best is at the lower right."""
    rows = list(dict.fromkeys(name for name, _ in panels))
    columns = list(dict.fromkeys(size for _, size in panels))
    colors = colors_of(method for panel in panels.values() for method in panel)
    figure = Figure(figsize=(3.3 * len(columns), 0.8 + 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for (name, size), panel in panels.items():
        ax = axes[rows.index(name)][columns.index(size)]
        for method, ((x, *of_x), (y, *of_y)) in panel.items():
            ax.plot(of_x, [y, y], [x, x], of_y, color=colors[method], linewidth=1, alpha=0.5)
            marker = "*" if method == "full" else "o"
            ax.plot(x, y, marker, color=colors[method], label=method, markersize=6)
        ax.axhline(0, color=COLORS["full"], linewidth=1, linestyle=":")
        ax.set_xlim(0, 100)
    for ax, size in zip(axes[0], columns, strict=True):
        ax.set_title(f"{size} % of the cache")
    for line, name in zip(axes, rows, strict=True):
        line[0].set_ylabel(f"{name}:\nnats a token above full")
    for ax in axes[-1]:
        ax.set_xlabel("needles found, %")
    legend_of(figure, axes[0][0])
    return figure


if __name__ == "__main__":
    flag.run_main(main)
