"""The numbers in the documents' tables are those of the records, to the last digit printed.

Above such a table stands a comment, `numbers:` and a source for each column of numbers, between
semicolons; or one for them all. A source is a record or a CSV, labels that pick one row of it as
`name=value`, and what the row has there; `|1e6` after it divides. `{name}` is what the line has
in the column of that name, `{column}` the column's own heading without " %", and `-` a column of
no record. In the place of the first source, `all` is followed by a folder and labels of the others.
A row whose label is empty in the record is the one of every value, as full attention's is of every
size of the cache.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *("README.md", "blog/README.md", "blog/results.md"),
    *("benchmarks/README.md", "models/README.md"),
)
TABLE = re.compile(r"(?:<!-- numbers: ([^>]*) -->\n)?((?:^\|.*\n)+)", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+")


@functools.cache
def rows_of(path: str) -> list[dict[str, Any]]:
    """Of a CSV, or of a JSON record what ``#`` names, by default its rows."""
    path, _, part = path.partition("#")
    with (ROOT / path).open(newline="") as file:
        if path.endswith(".csv"):
            return list(csv.DictReader(file))
        return json.load(file)[part or "rows"]


def same(recorded: Any, asked: str) -> bool:
    """Whether a label has a value, as text or as a number."""
    if str(recorded) == asked:
        return True
    try:
        return float(recorded) == float(asked)
    except (TypeError, ValueError):
        return False


def recorded(source: list[str]) -> float:
    """What the one row of a record has."""
    path, *labels, metric = source
    wanted = [label.split("=", 1) for label in labels]
    found = [row for row in rows_of(path) if all(same(row[name], of) for name, of in wanted)]
    if not found:
        for row in rows_of(path):
            if all(row[name] in ("", None) or same(row[name], of) for name, of in wanted):
                found.append(row)
    assert len(found) == 1, f"{len(found)} rows: {source}"
    name, _, divisor = metric.partition("|")
    return float(found[0][name]) / float(divisor or 1)


def cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_those_of_the_records(document) -> None:
    """Every number of every table with a source; and every table of numbers has one."""
    checked = 0
    for given, table in TABLE.findall((ROOT / document).read_text()):
        heads, _, *lines = map(cells, table.splitlines())
        if not given:
            bare = [cell for line in lines for cell in line if NUMBER.fullmatch(cell)]
            assert len(bare) < 2, f"no source of {bare[:3]} in {table.splitlines()[0]}"
            continue
        sources = [shlex.split(one) for one in given.split(";")]
        folder, common = "", []
        if sources[0][0] == "all":
            _, folder, *common = sources.pop(0)
        labels = set(re.findall(r"\{(.+?)\}", given)) - {"column"}
        columns = [number for number, head in enumerate(heads) if head not in labels]
        if len(sources) == 1:
            sources *= len(columns)
        for line in lines:
            names = dict(zip(heads, line, strict=True))
            for number, (path, *asked) in zip(columns, sources, strict=True):
                text = line[number].replace(",", "")
                if path == "-" or not text:
                    continue
                names["column"] = heads[number].removesuffix(" %")
                source = [f"{folder}{path}", *common, *asked]
                parts = [re.sub(r"\{(.+?)\}", lambda m, n=names: n[m[1]], part) for part in source]
                expected = recorded(parts)
                digits = len(text.partition(".")[2])
                at = (document, heads[number], line, expected)
                assert abs(float(text) - expected) <= 0.5 * 10**-digits + 1e-9, at
                checked += 1
    assert checked


def test_one_score_beats_others_as_often_as_the_results_say() -> None:
    """The verdict of beyond.py, from its record."""
    best, *_ = rows_of("paper/results/beyond.json#differences")
    setting, better, alike, worse = best.values()
    text = " ".join((ROOT / "blog" / "results.md").read_text().split())
    assert setting == "forgetting 1, mean, recent 30, none 0.5 to 0.5" and worse == 1
    said = f"{better + alike + worse} comparisons document by document, it is better in {better},"
    assert f"{said} cannot be told apart in {alike} and worse in one:" in text
