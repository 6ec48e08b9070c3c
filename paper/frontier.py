"""What is found against what is lost: needles and likelihoods, at each size of the cache.

Draws what retrieval.py and summaries.py have measured: FOLDER/retrieval.csv, and of each dataset
FOLDER/DATASET/summaries.csv.
"""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from keyformer.config import InputError
from keyformer_evaluation.records.results import check_record, write_json
from keyformer_evaluation.studies.pictures import (
    BLACK,
    INTERVALS,
    Figure,
    looks_of,
    model_name,
    page,
)
from keyformer_evaluation.studies.sweep import Estimate
from keyformer_evaluation.studies.written import Written, read_written
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
    record, *files = (folder / f"frontier.{kind}" for kind in ("json", "png", "svg"))
    check_record(record, *files, script="frontier.py")
    tables = [f"{dataset}/summaries.csv" for dataset in dict.fromkeys(flags.datasets or of_dataset)]
    command = shlex.join(["python", "paper/frontier.py", *argv])
    written = Written(record, {"command": command, "drawn_from": ["retrieval.csv", *tables]})
    figure = picture(written)
    write_json(record, written.record)
    written.write(figure)
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


def picture(written: Written) -> Figure:
    """A line for each thing lost, a column for each size; best is at the lower right."""
    needles, *of_datasets = (written.path.parent / name for name in written.record["drawn_from"])
    found = read(needles)
    sizes = sorted({size for _, _, size in found if size}, key=float, reverse=True)
    shown = {}
    for path in of_datasets:
        table = read(path)
        for task, name in LOSSES.items():
            of_size = {size: points(found, table, task, size) for size in sizes}
            if any(of_size.values()):
                shown[f"{path.parent.name}, {name}"] = of_size
    if not shown:
        raise InputError(
            f"the tables of {needles.parent} have no needles and losses of the same methods"
        )
    looks = looks_of(method for of in shown.values() for points in of.values() for method in points)
    beside = Written(needles.with_suffix(".json"), {})
    record = read_written(beside.path).record if beside.path.exists() else {}
    came = f"{record['dtype']}, {record['device']} · " if record else ""
    figure, grid = page(
        "What is found against what is lost, by the size of the cache",
        f"{model_name(beside.table[0]['model'])} · across: needles found, of those hidden in long"
        " texts · up: how much less likely a text is than with the full cache · best is at the"
        f" lower right, where the full cache is · {came}{INTERVALS}",
        len(shown),
        len(sizes),
        [replace(look, line="") for look in looks.values()],
        height=2.3,
        sharex=True,
        sharey="row",
    )
    for line, (name, of_size) in zip(grid, shown.items(), strict=True):
        line[0].set_ylabel(f"{name}\n(nats per token above full)", size=9)
        for ax, of_method in zip(line, of_size.values(), strict=True):
            for place, (method, look) in enumerate(looks.items()):
                if method in of_method:
                    (x, *of_x), (y, *of_y) = of_method[method]
                    # Both of two that coincide are seen, and the full cache above all.
                    above = 3 if method == "full" else 2
                    large = 9 if method == "full" else 11 - 0.7 * place
                    style: dict[str, Any] = {"color": look.color, "zorder": above, "clip_on": False}
                    ax.plot(of_x, [y, y], [x, x], of_y, linewidth=1, **style)
                    ax.plot(x, y, look.marker, markersize=large, **style)
            ax.axhline(0, color=BLACK, linewidth=1, linestyle=":")
            ax.set_xlim(0, 100)
    for ax, size in zip(grid[0], sizes, strict=True):
        ax.set_title(f"cache {size} % of the prompt", loc="left")
    for ax in grid[-1]:
        ax.set_xlabel("needles found (%)")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    flag.run_main(main)
