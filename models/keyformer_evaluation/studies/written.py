"""What a script of paper/ has written, from which its picture is drawn: at once, or again later."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyformer.config import InputError
from keyformer_evaluation.records.results import write_picture
from keyformer_evaluation.studies.sweep import Shown

if TYPE_CHECKING:  # what draws nothing goes without matplotlib
    from matplotlib.figure import Figure

Panel = tuple[str, str]
"""A model's name and a task: what gets a table and a panel of its own."""

PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class Written:
    """A record, beside which its table is and its picture goes.

    Attributes
    ----------
    path
        Of the record.
    record
        What it holds.
    """

    path: Path
    record: dict[str, Any]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The record's."""
        return self.record["rows"]

    @cached_property
    def results(self) -> dict[Panel, list[Shown]]:
        """The rows of a study: metrics have ends, labels stand before the seeds."""
        found: dict[Panel, list[Shown]] = {}
        for row in self.rows:
            values = {
                name: (row[name], row[f"{name}_low"], row[f"{name}_high"])
                for name in row
                if f"{name}_low" in row
            }
            before = list(row)[: list(row).index("seeds")]
            labels = {name: row[name] for name in before if name not in {"model", "task", *values}}
            found.setdefault((row["model"], row["task"]), []).append(Shown(labels, values))
        return found

    @cached_property
    def table(self) -> list[dict[str, str]]:
        """The lines of the CSV."""
        path = self.path.with_suffix(".csv")
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"cannot read a table from {path}: {error}") from error

    def write(self, figure: Figure) -> None:
        """The picture as PNG and SVG."""
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for ax in figure.axes:  # a layout's last digits differ from run to run
            left, bottom, width, height = (round(side, 6) for side in ax.get_position().bounds)
            ax.set_position((left, bottom, width, height))
        for kind in PICTURES:
            write_picture(self.path.with_suffix(kind), figure)


Picture = Callable[[Written], "Figure"]
Pictures = Mapping[str, Picture]
"""By part of a script's files, as in fig3a, or "": what draws them."""


def read_written(path: Path) -> Written:
    """A record from its file.

    Raises
    ------
    InputError
        If it is none.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read a record from {path}: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"cannot read a record from {path}: it holds no object")
    return Written(path, record)
