"""The numbers in the documents are those of the records."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "paper" / "results"
DOCUMENTS = ("README.md", "blog/README.md")
MARKER = re.compile(r"<!-- by (size|measure)(?:, (\d+) %)?: (.*?) -->\n((?:\|.*\n)+)")


def tables(document: str) -> list[tuple[str, str, list[list[str]], list[dict[str, str]]]]:
    """Of each marked table: its kind, the size of its cache, the columns' sources, its rows."""
    text = (ROOT / document).read_text()
    found = []
    for kind, size, sources, lines in MARKER.findall(text):
        cells = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()
        ]
        rows = [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]
        found.append((kind, size, [source.split() for source in sources.split(", ")], rows))
    return found


def recorded(source: list[str], method: str, size: str) -> float:
    """What the one row of a CSV has, in which full attention has no size."""
    name, *task, metric = source
    with (RESULTS / name).open(newline="") as file:
        (row,) = (
            row
            for row in csv.DictReader(file)
            if (row["task"], row["method"]) == (" ".join(task), method)
            and row["kv_cache"] == ("" if method == "full" else size)
        )
    return float(row[metric])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_marked_tables_are_those_of_the_records(document) -> None:
    """To the last digit printed, each of every table with a marker above it."""
    marked = tables(document)
    assert marked and all(rows for *_, rows in marked)
    for kind, size, sources, rows in marked:
        for row in rows:
            method, *texts = row.values()
            names = list(row)[1:]
            if kind == "size":
                asked = [(sources[0], name.removesuffix(" %")) for name in names]
            else:
                asked = [(source, size) for source in sources]
            for (source, at), text in zip(asked, texts, strict=True):
                digits = len(text.partition(".")[2])
                expected = recorded(source, method, at)
                assert abs(float(text) - expected) <= 0.5 * 10**-digits + 1e-9, (method, at, source)
